"""Energy per token, from a stand-in for codecarbon that counts a joule for each forward."""

import os
import sys

import pytest
import torch

from compressor.errors import EnvironmentProblem, RecipeError
from compressor.metrics import energy as module
from compressor.metrics.energy import measure_energy
from compressor.metrics.latency import crowd
from tests.tiny_models import tiny_model

STAND_IN = """
import os
from types import SimpleNamespace

WORK = {"joules": 0.0}
MADE = []

class OfflineEmissionsTracker:
    def __init__(self, **settings):
        self.settings, self.telemetry, self.stopped = settings, os.environ["CODECARBON_TELEMETRY_LEVEL"], False
        self._hardware = [SimpleNamespace(description=lambda: "CPU(Stand-in)")]
        MADE.append(self)
    def start_task(self):
        WORK["joules"] = 0.0
    def stop_task(self):
        kwh = WORK["joules"] / 3.6e6
        return SimpleNamespace(energy_consumed=kwh, emissions=kwh * 0.4)
    def stop(self):
        self.stopped = True
"""
INPUT = """
class DataSource:
    def get_global_energy_mix_data(self):
        return {"DEU": {}, "USA": {}, "FRA": {}}
"""


@pytest.fixture
def codecarbon(tmp_path, monkeypatch):
    """The stand-in, importable; forwards of `counting` models add joules."""
    package = tmp_path / "codecarbon"
    package.mkdir()
    (package / "__init__.py").write_text(STAND_IN)
    (package / "input.py").write_text(INPUT)
    for name in [name for name in sys.modules if name.split(".")[0] == "codecarbon"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    # The probe on a crowded machine would add forwards
    monkeypatch.setattr(crowd, "others_share", lambda: 0.0)
    import codecarbon

    yield codecarbon
    for name in ("codecarbon", "codecarbon.input"):
        sys.modules.pop(name, None)


def counting(codecarbon, joules: float):
    """A tiny model whose forward takes so many joules."""
    model = tiny_model("llama")

    def count(*_):
        codecarbon.WORK["joules"] += joules

    model.register_forward_pre_hook(count)
    return model


def test_joules_of_all_forwards_are_shared_by_all_tokens(codecarbon):
    """Two sequences of 4 tokens take 4 forwards of 6 J: 3 J a token; 0.4 kg a kWh make 0.333 mg, or 0.333 g a 1000."""
    measured = measure_energy(
        counting(codecarbon, 6.0), country="DEU", batch=2, prompt=8, generate=4, turns=2, turn_seconds=0.0
    )
    assert measured.joules_per_token.value == pytest.approx(3.0)
    assert measured.joules_per_token.n == 2
    assert measured.co2_g_per_1000_tokens.value == pytest.approx(3.0 / 3.6e6 * 0.4 * 1000 * 1000)
    assert measured.sources == ("CPU(Stand-in)",)
    assert measured.reasons == {"ratio_to_baseline": "no baseline was measured beside it"}


def test_the_ratio_is_of_turns_that_pair(codecarbon):
    """3 J against 2 J a forward, in an even number of turns."""
    measured = measure_energy(
        counting(codecarbon, 3.0), baseline=counting(codecarbon, 2.0), country="DEU", prompt=8, generate=2, turns=3,
        turn_seconds=0.0,
    )  # fmt: skip
    assert measured.ratio_to_baseline.ci95 == pytest.approx((1.5, 1.5))
    assert measured.ratio_to_baseline.n == 4


def test_nothing_is_written_or_sent(codecarbon, monkeypatch):
    """The offline tracker, with files, interfaces and statistics of use off; the variable is given back."""
    monkeypatch.delenv("CODECARBON_TELEMETRY_LEVEL", raising=False)
    measure_energy(counting(codecarbon, 1.0), country="FRA", prompt=8, generate=1, turns=1, turn_seconds=0.0)
    (tracker,) = codecarbon.MADE
    assert tracker.settings["country_iso_code"] == "FRA"
    assert not any(value for name, value in tracker.settings.items() if name.startswith("save_to"))
    assert tracker.settings["emissions_endpoint"] is False
    assert tracker.telemetry == "disabled"
    assert tracker.stopped
    assert "CODECARBON_TELEMETRY_LEVEL" not in os.environ


def test_an_unknown_country_is_refused(codecarbon):
    """codecarbon would take the world's average and go on."""
    with pytest.raises(RecipeError, match="'deu' is no ISO code of three letters; near are DEU"):
        measure_energy(tiny_model("llama"), country="deu", prompt=8, generate=2)


def test_no_energy_counted_is_no_figure(codecarbon):
    """Zero joules are a fault of the machine, not a very good model."""
    with pytest.raises(EnvironmentProblem, match="counted no energy"):
        measure_energy(tiny_model("llama"), country="DEU", prompt=8, generate=2, turn_seconds=0.0)


def test_a_missing_codecarbon_gives_the_command(monkeypatch):
    """Not a figure that is silently left out."""
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'compressor\[energy\]'"):
        measure_energy(torch.nn.Linear(1, 1), country="DEU", prompt=8, generate=2)


def test_sizes_must_be_positive(codecarbon):
    """No tokens, no energy per token."""
    with pytest.raises(RecipeError, match="generate must be at least 1"):
        measure_energy(tiny_model("llama"), country="DEU", prompt=8, generate=0)
