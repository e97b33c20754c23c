"""The model card: README.md of an exported checkpoint, in the form that the Hugging Face hub reads."""

import io
import os
import re
from collections.abc import Mapping, Sequence

from ruamel.yaml import YAML

from compressor.reports import Export, Report, worst_domain, worst_domain_by_kl
from compressor.reports.markdown import accuracy_table, cost_table, number

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
OWN_DATA = "demo/"  # texts that ship with the package; the hub does not know them
LOADING = """## How to load

With transformers (`pip install transformers compressed-tensors`):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/model")
tokenizer = AutoTokenizer.from_pretrained("path/to/model")
```

With compressor, which keeps the weights packed in memory:

```python
import compressor as cx

model = cx.load("path/to/model")
```"""


def model_card(
    report: Report,
    *,
    base_model: str,
    licence: str | None,
    name: str,
    quantization: str,
    calibration: Sequence[Mapping[str, object]],
    reproduce: str = "compress run recipe.yaml",
) -> str:
    """Return the text of the model card, from what the report has measured.

    `base_model` is the hub id (a revision is cut off) or the folder, `licence` the licence's hub identifier or None if
    it is not known, `name` the title, `quantization` a phrase such as "int4, symmetric, groups of 64 (GPTQ)". Each item
    of `calibration` is a data set: "name" and whatever else is known of it (samples, length, digest).
    """
    report = Report.from_json(report.to_json())  # as a reader of report.json would see it
    # The path of a folder means nothing to a reader, and says where the author keeps things.
    base = os.path.basename(base_model.rstrip("/")) if _is_path(base_model) else base_model.partition("@")[0]
    origin = f"[{base}](https://huggingface.co/{base})" if _is_hub_id(base) else f"`{base}`"
    sections = [
        _front_matter(base, licence, calibration),
        f"# {name}",
        f"{origin}, compressed with `compressor`. Weights: {quantization}, in the compressed-tensors layout.",
        "## Figures\n\n" + accuracy_table(report) + "\n\n" + cost_table(report),
        _parity(report.exports),
        LOADING,
        _calibration(calibration),
        _limits(report),
        _licence(base, licence),
        f"## Reproduce\n\n```sh\n{reproduce}\n```\n\nThe resolved `recipe.yaml` (SHA-256 `{report.recipe_sha256}`), "
        "`report.json` and `manifest.json`, with the digest of every file, are in the output folder of the run.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(base: str, licence: str | None, calibration: Sequence[Mapping[str, object]]) -> str:
    fields: dict[str, object] = {
        "base_model": base,
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": licence or "other",
    }
    if licence is None:
        fields["license_name"] = "unknown"
    fields["tags"] = ["compressor", "compressed-tensors", "quantized"]
    if datasets := [str(data["name"]) for data in calibration if _is_hub_id(str(data["name"]))]:
        fields["datasets"] = list(dict.fromkeys(datasets))
    text = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(fields, text)
    return f"---\n{text.getvalue()}---"


def _parity(exports: Sequence[Export]) -> str:
    export = next((export for export in exports if export.format == "safetensors"), None)
    if export is None:
        return ""
    if export.parity is None:
        return f"The files were not compared with the live model: {export.parity_reason or 'no reason given'}."
    relative = export.parity.get("relative")
    found = f"its logits differ by {number(relative)} relative" if relative is not None else "its logits were compared"
    return f"The checkpoint was loaded back in a fresh process and compared with the model that was measured: {found}."


def _calibration(calibration: Sequence[Mapping[str, object]]) -> str:
    lines = []
    for data in calibration:
        rest = ", ".join(f"{key} {value}" for key, value in data.items() if key != "name" and value is not None)
        lines.append(f"- {data['name']}" + (f" ({rest})" if rest else ""))
    return "## Calibration data\n\n" + ("\n".join(lines) if lines else "None was used.")


def _limits(report: Report) -> str:
    measurement, baseline = report.latest, report.baseline.measurement
    lines = []
    texts = list(measurement.accuracy.perplexity or ())
    if texts:
        lines.append(
            f"- Measured on {', '.join(texts)} only; other languages, domains and long contexts may lose more."
        )
    else:
        lines.append("- Accuracy was not measured.")
    if report.steps and (worst := worst_domain(measurement, baseline)):
        lines.append(f"- The worst of these by perplexity is {worst[0]}: {number(worst[1])} × the original's.")
    if report.steps and (worst := worst_domain_by_kl(measurement)):
        lines.append(f"- The farthest from the original is {worst[0]}: KL {number(worst[1])} nats a token.")
    lines.append("- Latencies hold for the machine they were measured on.")
    lines.append("- Safety, bias and refusals were not evaluated again; compression can change them.")
    return "## Limits\n\n" + "\n".join(lines)


def _licence(base: str, licence: str | None) -> str:
    if licence is None:
        return f"## Licence\n\nThe licence of `{base}` is not known; its terms hold for these weights too."
    return f"## Licence\n\n`{licence}`, that of the base model `{base}`."


def _is_path(name: str) -> bool:
    return os.path.isabs(name) or name.startswith((".", "~")) or os.path.isdir(name)


def _is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not name.startswith(OWN_DATA)
