"""The machine, in JSON."""

import json
import subprocess
from pathlib import Path

import torch

from compressor.metrics import environment as module
from compressor.metrics.environment import describe_environment


def test_environment_is_json_with_the_versions_that_run():
    """Enough to tell two machines apart."""
    document = json.loads(json.dumps(describe_environment(), allow_nan=False))
    assert document["versions"]["torch"] == torch.__version__
    assert document["cpu"]["threads"] == torch.get_num_threads()
    assert document["cpu"]["model"]
    assert document["memory_bytes"] > 0
    assert len(document["cpu"]["load_average"]) == 3


def test_instruction_sets_come_from_the_flags_of_the_processor(monkeypatch):
    """Only those that decide about kernels, in a fixed order."""
    monkeypatch.setattr(module, "_read", lambda path: "model name\t: X\nflags\t\t: fpu amx_int8 avx2\n\nprocessor : 1")
    cpu = module._cpu()
    assert cpu["model"] == "X"
    assert cpu["instruction_sets"] == ["avx2", "amx_int8"]


def test_commit_of_another_project_is_not_taken_for_ours(monkeypatch, tmp_path):
    """An environment inside someone else's checkout: the package lies deeper than the checkout's top."""
    package = tmp_path / "site-packages" / "compressor"
    package.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(module, "__file__", str(package / "metrics" / "environment.py"))
    assert module._git() is None


def test_a_command_that_is_not_there_gives_none():
    """No nvidia-smi, no git: the figure is null."""
    assert module._run("compressor-no-such-command") is None
    assert module._read(str(Path("/no/such/file"))) is None
