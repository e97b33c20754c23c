"""The model card is one that the hub understands and a reader can act on."""

import pytest
from ruamel.yaml import YAML

from compressor.exporters.card import model_card
from compressor.reports import Accuracy, Estimate, Export, Measurement, Memory, Report


def measured(perplexity: float, weight_bytes: int) -> Measurement:
    return Measurement(
        accuracy=Accuracy(perplexity={"wiki": Estimate(perplexity, None, 16)}), memory=Memory(weight_bytes=weight_bytes)
    )


REPORT = (
    Report.start("ab" * 32, {}, None, "org/base", measured(20.0, 4_000_000))
    .after("quantize", "quantize", {}, 1.0, None, measured(22.0, 1_000_000), None)
    .with_exports([Export(format="safetensors", path="model", bytes=1, parity={"relative": 0.0002})])
)


def card(**changes) -> str:
    options = {
        "base_model": "org/base@main",
        "licence": "apache-2.0",
        "name": "base-int4",
        "quantization": "int4, symmetric, groups of 64 (GPTQ)",
        "calibration": [{"name": "demo/text", "samples": 128}, {"name": "org/data", "samples": 8}],
    }
    return model_card(REPORT, **(options | changes))


def front_matter(text: str) -> dict:
    _, yaml, _ = text.split("---\n", 2)
    return YAML(typ="safe").load(yaml)


def test_front_matter():
    """The hub files it as a quantization of its base; texts of the package are no hub data sets."""
    assert front_matter(card()) == {
        "base_model": "org/base",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["compressor", "compressed-tensors", "quantized"],
        "datasets": ["org/data"],
    }


def test_unknown_licence_is_said():
    """Without a licence the hub gets `other`, and the reader a sentence."""
    text = card(licence=None)
    assert front_matter(text)["license"] == "other"
    assert "The licence of `org/base` is not known" in text


def test_a_local_path_does_not_get_out():
    """A folder of the author's machine becomes its last name."""
    text = card(base_model="/home/me/models/base/")
    assert front_matter(text)["base_model"] == "base"
    assert "/home/me" not in text


@pytest.mark.parametrize(
    "text",
    [
        "# base-int4",
        "Weights: int4, symmetric, groups of 64 (GPTQ)",
        "| quantize | 22 (×1.1) |",
        "| quantize | 1.00 MB (×0.25) |",
        "AutoModelForCausalLM.from_pretrained(",
        "pip install transformers compressed-tensors",
        "cx.load(",
        "its logits differ by 0.0002 relative",
        "- demo/text (samples 128)",
        "The worst of these by perplexity is wiki: 1.1 × the original's.",
        "compress run recipe.yaml",
        "`" + "ab" * 32 + "`",
    ],
)
def test_the_card_says(text):
    """Figures, loading, data, limits and the way to reproduce it are there."""
    assert text in card()
