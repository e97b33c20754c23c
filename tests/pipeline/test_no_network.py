"""With sockets blocked, the whole job on a local model works and nobody even tries one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from tests.tiny_models import save_tiny

# Every process of the job imports this first; an attempt is written down, and fails.
BLOCKED = """
import os, socket, traceback
def attempt(what):
    with open(os.environ["ATTEMPTS"], "a") as file:
        file.write(what + "\\n" + "".join(traceback.format_stack(limit=8)) + "\\n")
    raise OSError("no network in this test: " + what)
connect, bind = socket.socket.connect, socket.socket.bind
def guarded(self, address, *rest):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        attempt(f"connect {address!r}")
    return connect(self, address, *rest)
socket.socket.connect = socket.socket.connect_ex = guarded
socket.getaddrinfo = lambda *address, **_: attempt(f"getaddrinfo {address!r}")
"""


def test_run_gate_report_and_export_never_touch_the_network(tmp_path):
    """Without HF_HUB_OFFLINE or any other hint in the environment: zero attempts."""
    model = save_tiny(tmp_path / "dense", "qwen3_moe")
    text = tmp_path / "text.txt"
    text.write_text("A small text that is long enough for a few windows of bytes. " * 40)
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"query": "one and", "choices": ["two", "six"], "gold": 0}\n' * 8)
    (tmp_path / "gate.yaml").write_text("{perplexity_ratio: {max: 9}, tasks: {margin: 1.0}}\n")
    recipe = {
        "model": str(model),
        "calibration": {"data": str(text), "samples": 4, "length": 64},
        "passes": [{"quantize": {"bits": 8, "group_size": 32, "method": "rtn"}}],
        "evaluate": {
            "text": {"small": str(text)}, "windows": 2, "length": 64, "latency": {"batch": [1], "generate": 2},
            "tasks": [{"name": "count", "kind": "multiple_choice", "data": str(questions)}],
        },
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    attempts = tmp_path / "attempts"
    hints = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")
    environment = {key: value for key, value in os.environ.items() if key not in hints}
    environment |= {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path.cwd())]), "ATTEMPTS": str(attempts)}
    for command in (
        ["run", "recipe.yaml", "--out", "out"],
        ["gate", "out", "--baseline", str(model), "--policy", "gate.yaml"],
        ["report", "out", "--format", "html"],
        ["export", "out", "--to", "safetensors", "--out", "again"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "compressor", *command, "--quiet"],
            env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    assert not attempts.exists(), attempts.read_text()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["exports"]
