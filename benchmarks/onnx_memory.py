"""Does an ONNX export of more than 2 GB stay small in memory? Exports a random model and watches the process.

`python benchmarks/onnx_memory.py` writes results/<date>-onnx_memory.json. The model (0.6 billion weights, bfloat16 on
disk) is exported as float32, so that the data file passes protobuf's limit of 2 GB. The peak is the resident memory of
the exporting process alone, from loading the model on, Python and torch included. Memory of its own (anonymous) and
pages of mapped files, which are the libraries' and could be dropped, are sampled apart every 5 ms. Linux only.
"""

import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
EXPORT = """
import json, sys, threading
from pathlib import Path
from compressor.exporters.onnx import OnnxSettings, export_onnx
from compressor.metrics import PeakMemory
from compressor.models import load_model

def resident():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"anonymous": "RssAnon", "mapped": "RssFile"}
    return {kind: 1024 * int(lines[name].split()[0]) for kind, name in names.items()}

def watch():
    while not over.wait(0.005):
        for kind, bytes in resident().items():
            peaks[kind] = max(peaks[kind], bytes)

before, peaks, over = resident(), resident(), threading.Event()
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
with PeakMemory() as peak:
    model = load_model(sys.argv[1])
    exported = export_onnx(model, Path(sys.argv[2]), OnnxSettings())
over.set()
watcher.join()
print(json.dumps({
    "bytes": exported.bytes, "parameters": model.num_parameters(), "peak_bytes": peak.peak_bytes,
    "peak_bytes_by_kind": peaks, "before_bytes": peak.rss_before_bytes, "before_bytes_by_kind": before,
}))
"""


def make_model(folder: Path) -> None:
    """A Llama of 0.6 billion random weights with a byte tokenizer."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=8192, hidden_size=2048, intermediate_size=5632, num_hidden_layers=12, num_attention_heads=16,
        num_key_value_heads=4, max_position_embeddings=512, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="200MB")
    vocabulary = {"<unk>": 0, "a": 1}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")))
    tokenizer.save_pretrained(folder)


def main() -> int:
    if sys.argv[1:2] == ["--make"]:
        make_model(Path(sys.argv[2]))
        return 0
    from compressor.metrics import describe_environment

    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch) / "model", Path(scratch) / "onnx"
        # in a process of its own: this one stays small enough to be forgotten beside the other two
        subprocess.run([sys.executable, __file__, "--make", str(source)], check=True)
        run = subprocess.run(
            [sys.executable, "-c", EXPORT, str(source), str(out)], check=True, stdout=subprocess.PIPE, text=True
        )
        found = json.loads(run.stdout.splitlines()[-1])
        import onnxruntime

        session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
        found["loads_in_onnxruntime"] = len(session.get_outputs()) > 0
    result = found | {"environment": describe_environment()}
    path = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-onnx_memory.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(found))
    return 0 if found["bytes"] > 2e9 and found["peak_bytes"] < 1e9 else 1


if __name__ == "__main__":
    sys.exit(main())
