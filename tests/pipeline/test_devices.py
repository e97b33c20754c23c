"""Where a model computes: asked for by name, refused with the reason."""

import pytest

from compressor.cli import main
from compressor.errors import EnvironmentProblem, RecipeError
from compressor.kernels import cuda
from compressor.pipeline import doctor, generate, load
from tests.tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine whose GPU is too old."""
    monkeypatch.setattr(cuda, "available", lambda: "a P100 has compute capability 6.0")


def test_a_gpu_that_cannot_be_used_is_refused_with_the_reason(no_gpu):
    with pytest.raises(EnvironmentProblem, match="kernels cannot run here: a P100 has"):
        load("demo/tiny-moe", device="cuda")
    with pytest.raises(EnvironmentProblem, match="kernels cannot run here: a P100 has"):
        generate("demo/tiny-moe", "The", 2, device="cuda")


def test_another_device_is_refused():
    with pytest.raises(RecipeError, match="possible are cpu and cuda"):
        load("demo/tiny-moe", device="mps")


def test_a_live_model_is_not_moved():
    with pytest.raises(RecipeError, match="for a model given by name"):
        generate(tiny_model("llama"), "ab", tokenizer=tiny_tokenizer(), device="cpu")


def test_doctor_says_why_there_are_no_kernels(no_gpu):
    assert doctor()["ops"]["cuda"] == "not here: a P100 has compute capability 6.0"


def test_the_command_takes_a_device(no_gpu, capsys):
    """Both refusals are errors that the user can act on."""
    assert main(["generate", "demo/tiny-moe", "The", "--device", "tpu"]) == 3
    assert main(["generate", "demo/tiny-moe", "The", "--device", "cuda"]) == 3
    assert "a P100 has compute capability 6.0" in capsys.readouterr().err
