"""What a generated token costs in energy, as codecarbon counts it; nothing is sent anywhere.

P prompt tokens, B sequences in a batch. Where the machine has no energy counters (most virtual machines), codecarbon
estimates: rated power of the CPU x its load, and a constant for the memory. `sources` says which it was.
"""

import contextlib
import difflib
import functools
import importlib.util
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import EnvironmentProblem, RecipeError
from compressor.metrics.bootstrap import bootstrap_median, mapped
from compressor.metrics.latency.crowd import quiet_conditions
from compressor.metrics.latency.measuring import evaluating, random_ids
from compressor.metrics.latency.ratio import paired_ratio
from compressor.metrics.latency.rounds import decoding_step_ms, generate_once, turns_of
from compressor.reports.estimate import Estimate

JOULES_IN_KWH = 3.6e6
# Power is sampled once a second where there is no counter, so a shorter turn would hold a sample or none.
SHORTEST_TURN_S = 2.0
MISSING = "energy needs the extra `energy`: pip install 'compressor[energy]'"


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Joules and grams of CO2 for the machine's share in a generated token, the prompt's cost included.

    `sources` is what codecarbon read or assumed ("CPU(Cpu Load)" is an estimate, RAPL a counter); `country` decides how
    much CO2 a joule is. Figures are medians over turns; None has a reason.
    """

    joules_per_token: Estimate | None = None
    co2_g_per_1000_tokens: Estimate | None = None
    ratio_to_baseline: Estimate | None = None
    country: str | None = None
    sources: tuple[str, ...] = ()
    threads: int | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """As the latency section of a report holds them; the reasons of what is None are in `reasons`."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "reasons"}


def codecarbon_missing() -> str | None:
    """How to get codecarbon where it is not installed, else None."""
    return None if importlib.util.find_spec("codecarbon") else MISSING


@torch.inference_mode()
def measure_energy(
    model: nn.Module,
    *,
    country: str,
    batch: int = 1,
    prompt: int,
    generate: int,
    baseline: nn.Module | None = None,
    turns: int = 6,
    turn_seconds: float = SHORTEST_TURN_S,
    seed: int = 0,
) -> Energy:
    """The energy of generating with a transformers causal LM, in turns with a baseline if there is one.

    A turn generates `generate` tokens after `prompt` random ones, again and again, for at least `turn_seconds`.
    `country` is an ISO code of three letters (DEU, USA) for the CO2 of its grid; no location is looked up. Raises
    EnvironmentProblem where codecarbon is missing, RecipeError for an unknown country and sizes that are not positive.
    """
    if missing := codecarbon_missing():
        raise EnvironmentProblem(missing)
    for name, size in {"batch": batch, "prompt": prompt, "generate": generate, "turns": turns}.items():
        if size < 1:
            raise RecipeError(f"energy: {name} must be at least 1, not {size}")
    sides = (model,) if baseline is None else (model, baseline)
    joules: tuple[list[float], ...] = tuple([] for _ in sides)
    grams: list[float] = []
    with contextlib.ExitStack() as stack:
        tracker = stack.enter_context(_tracker(country))
        for side in sides:
            stack.enter_context(evaluating(side))
        ids_BP = random_ids(sides, batch, prompt, seed)
        step = functools.partial(decoding_step_ms, model, ids_BP[:1, :1])
        conditions = stack.enter_context(quiet_conditions(step, ids_BP.device))
        for side in sides:
            generate_once(side, ids_BP, generate)
        order = turns_of(len(sides), seed)
        for _ in range(turns + turns % len(sides)):
            for index in next(order):
                kwh, kg, tokens = _turn(tracker, sides[index], ids_BP, generate, turn_seconds)
                joules[index].append(kwh * JOULES_IN_KWH / tokens)
                if index == 0:
                    grams.append(kg * 1000 / tokens)
        # Which counters were found is in no public attribute.
        sources = tuple(part.description() for part in getattr(tracker, "_hardware", ()))
    return Energy(
        joules_per_token=bootstrap_median(joules[0]),
        co2_g_per_1000_tokens=mapped(bootstrap_median(grams), lambda g: 1000 * g),
        ratio_to_baseline=None if baseline is None else paired_ratio(*joules),
        country=country,
        sources=sources,
        threads=conditions.threads,
        reasons={"ratio_to_baseline": "no baseline was measured beside it"} if baseline is None else {},
    )


def _turn(tracker: Any, model: nn.Module, ids_BP: Tensor, generate: int, seconds: float) -> tuple[float, float, int]:
    """kWh, kg of CO2 and the number of tokens generated."""
    tokens, start = 0, time.perf_counter()
    tracker.start_task()
    while not tokens or time.perf_counter() - start < seconds:
        generate_once(model, ids_BP, generate)
        tokens += len(ids_BP) * generate
    used = tracker.stop_task()
    if not used.energy_consumed > 0:
        raise EnvironmentProblem(f"codecarbon counted no energy over {tokens} tokens: it found nothing to read here")
    return used.energy_consumed, used.emissions, tokens


@contextlib.contextmanager
def _tracker(country: str) -> Iterator[Any]:
    """codecarbon's offline tracker with everything that writes or sends switched off."""
    # Some versions send statistics of use unless told not to; arguments for it came and went, the variable stayed.
    before = os.environ.get("CODECARBON_TELEMETRY_LEVEL")
    os.environ["CODECARBON_TELEMETRY_LEVEL"] = "disabled"
    try:
        from codecarbon import OfflineEmissionsTracker

        logging.getLogger("codecarbon").setLevel(logging.ERROR)
        _check_country(country)
        tracker = OfflineEmissionsTracker(
            country_iso_code=country,
            save_to_file=False,
            save_to_api=False,
            save_to_logger=False,
            save_to_prometheus=False,
            emissions_endpoint=False,
            allow_multiple_runs=True,
            measure_power_secs=1,
            tracking_mode="process",
            log_level="error",
        )
        try:
            yield tracker
        finally:
            tracker.stop()
    finally:
        if before is None:
            del os.environ["CODECARBON_TELEMETRY_LEVEL"]
        else:
            os.environ["CODECARBON_TELEMETRY_LEVEL"] = before


def _check_country(country: str) -> None:
    """For a country that it does not know codecarbon takes the world's average, and says so only in its log."""
    from codecarbon.input import DataSource

    known = list(DataSource().get_global_energy_mix_data())
    if country not in known:
        near = ", ".join(difflib.get_close_matches(country.upper(), known, n=3, cutoff=0.5))
        raise RecipeError(f"energy: country {country!r} is no ISO code of three letters{near and f'; near are {near}'}")
