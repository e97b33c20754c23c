import importlib.util
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def protocol():
    return load("benchmark_protocol", BENCHMARKS / "peers" / "protocol.py")


@pytest.fixture(scope="module")
def peers():
    return load("benchmark_peers", BENCHMARKS / "peers.py")


def letters(text: str, add_special_tokens: bool) -> dict:
    """A tokenizer with one token a character."""
    return {"input_ids": [ord(character) - ord("a") for character in text]}


def test_windows_are_consecutive_and_drop_the_rest(protocol, tmp_path):
    """Ten letters hold three windows of three; the tenth is dropped."""
    text = tmp_path / "text.txt"
    text.write_text("abcdefghij")
    assert protocol.token_windows(str(text), letters, 3, 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_a_text_that_is_too_short_is_refused(protocol, tmp_path):
    """Fewer windows than asked would silently be another protocol."""
    text = tmp_path / "text.txt"
    text.write_text("abcdefghij")
    with pytest.raises(ValueError, match="10 tokens"):
        protocol.token_windows(str(text), letters, 3, 4)


class Guess(torch.nn.Module):
    """Gives the next letter the logit log(9) and eight others 0: it is right with probability 9/17."""

    def forward(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, 9, dtype=torch.bfloat16)
        return SimpleNamespace(logits=logits.scatter(2, ((input_ids + 1) % 9)[..., None], math.log(9)))


def test_perplexity_is_the_definition(protocol, tmp_path):
    """A model that is right with probability 9/17 at every token has perplexity 17/9 (logits in bf16, loss in fp32)."""
    text = tmp_path / "text.txt"
    text.write_text("abcdefghi" * 2)
    config = {"evaluation": {"text": str(text), "length": 6, "windows": 3}}
    result = protocol.evaluate(Guess(), letters, config)
    assert result["perplexity"] == pytest.approx(17 / 9, rel=5e-3)  # log(9) has 8 bits in bf16
    assert len(result["window_nll"]) == 3


def test_the_peak_is_that_of_the_block_only(protocol):
    """Memory that was given back before the block began does not count, memory given back inside it does."""
    before = torch.ones(100_000_000, dtype=torch.uint8)
    del before
    with protocol.measured() as figures:
        inside = torch.ones(50_000_000, dtype=torch.uint8)
        del inside
    grown = figures["peak_bytes"] - figures["resident_before_bytes"]
    assert 40e6 < grown < 80e6


def test_paired_ratio_of_equal_shifts_has_no_width(peers):
    """Every window is worse by log 1.1: the ratio is 1.1 whatever is drawn."""
    reference = [1.0, 2.0, 3.0]
    ratio = peers.paired_ratio([value + math.log(1.1) for value in reference], reference)
    assert ratio["value"] == pytest.approx(1.1)
    assert ratio["ci95"] == pytest.approx([1.1, 1.1])


def test_cache_key_follows_settings_and_not_paths(peers):
    """Another group size is another figure; another place of the same data is not."""
    hashes = {"project": "p", "protocol": "q", "data": "d", "model": "m"}

    def key(group: int, folder: str) -> dict:
        text = {"text": f"{folder}/t.txt", "windows": 32}
        settings = {"model": folder, "group_size": group, "calibration": text, "evaluation": text}
        return peers.cache_key("hqq", settings, hashes)

    assert key(64, "/a") == key(64, "/b")
    assert key(64, "/a") != key(128, "/a")


def test_a_failed_tool_is_a_row_with_its_reason(peers):
    """The exception's own line is shown, not the last of the many lines of its message."""
    log = "Traceback ...\n  File x\nValueError: 576 columns do not divide by 128\n- layer 28\n- layer 29\n"
    row = peers.summarize("hqq", [{"failed": peers.failure_reason(log)}], [{"window_nll": [1.0]}])
    assert "| hqq | failed: ValueError: 576 columns do not divide by 128 |" in peers.table([row], "title")


def test_other_tokens_are_refused(peers):
    """Two tools that evaluated other tokens must not stand in one table."""
    rows = [{"name": name, "runs": [{"evaluation_tokens": digest}]} for name, digest in (("a", "1"), ("b", "2"))]
    with pytest.raises(peers.PeersError, match="evaluation_tokens differ"):
        peers.check_same_tokens(rows)


def test_every_worker_is_pinned(peers):
    """All lines of a peer's requirements name one exact version, and torch is the one that is installed first."""
    for tool in peers.TOOLS.values():
        if tool.requirements is None:
            continue
        lines = (BENCHMARKS / "peers" / tool.requirements).read_text().splitlines()
        pins = [line for line in lines if not line.startswith("#")]
        assert all("==" in pin for pin in pins)
        assert "torch==2.13.0" in pins


def test_runs_beside_other_work_do_not_pass_for_clean_ones(peers, tmp_path, monkeypatch):
    """A cached run made with --force is measured again when --force is absent."""
    monkeypatch.setattr(peers, "PEERS", tmp_path)
    counted = []
    monkeypatch.setattr(peers, "run_once", lambda name, settings: counted.append(name) or {"seconds": len(counted)})
    options = SimpleNamespace(fresh=False, force=True, repeats=1)
    for force in (True, True, False, False):
        options.force = force
        runs = peers.measure(options, {}, {"hqq": {"tool": "hqq"}})
    assert len(counted) == 2
    assert runs["hqq"] == [{"seconds": 2, "forced": False}]
    assert json.loads(next((tmp_path / "cache").iterdir()).read_text())["key"] == {"tool": "hqq"}
