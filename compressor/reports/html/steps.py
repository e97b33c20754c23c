"""What each step changed, as rows of a table: one row a figure, one column for the baseline and each step.

Reads the document of report.json, so that a section which this version does not know by name is shown all the same.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from compressor.reports.estimate import Estimate
from compressor.reports.markdown import NOTHING, estimate_text, megabytes
from compressor.reports.measurement import NOT_MEASURED

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """A figure after a step, and how it compares with the baseline and with the step before."""

    value: str
    from_baseline: str = ""
    from_previous: str = ""


@dataclass(frozen=True)
class Row:
    """One figure over all steps."""

    label: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Figure:
    """A key of a measurement's section, its words (`{}`: the text, task or batch), and the key of its delta, if any."""

    key: str
    label: str
    delta: str | None = None
    show: Callable[[Any], str] | None = None


FIGURES: dict[str, tuple[Figure, ...]] = {
    "accuracy": (
        Figure("perplexity", "Perplexity, {}", "perplexity_ratio"),
        Figure("tasks", "Score, {}"),
        Figure("kl_mean", "KL to the baseline, nats a token", "kl_mean"),
        Figure("kl_p99", "KL, 99th percentile of tokens"),
        Figure("top1_agreement", "Top-1 agreement"),
    ),
    "memory": (
        Figure("weight_bytes", "Weights", "weight_bytes_ratio", megabytes),
        Figure("file_bytes", "Files", "file_bytes_ratio", megabytes),
        Figure("bits_per_weight", "Bits a weight"),
        Figure("kv_bytes_per_token", "Cache, bytes a token"),
        Figure("peak_bytes", "Peak memory", None, megabytes),
        Figure("loading_peak_bytes", "Peak of loading the files, in a fresh process", None, megabytes),
        Figure("generating_peak_bytes", "Peak of generating, in a fresh process", None, megabytes),
    ),
    "latency": (
        Figure("decode_ms_per_token", "Decode, ms a token, batch {}", "decode_latency_ratio"),
        Figure("prefill_ms", "Prefill, ms, batch {}", "prefill_latency_ratio"),
        Figure("tokens_per_s", "Tokens a second, batch {}"),
        Figure("ttft_ms", "To the first token, ms, batch {}"),
        Figure("load_s", "From the files to the first token, s"),
        Figure("load_ratio_to_baseline", "The same, × the baseline's in turns"),
        Figure("energy", "Energy: {}"),
    ),
}
BEHAVIOUR = {
    "calibration": "Calibration",
    "robustness": "Robustness",
    "ood": "Out of distribution",
    "bias": "Bias",
    "generation": "Generation health",
    "refusals": "Refusals",
    "similarity": "Sentence similarity",
}


def columns(document: Document) -> list[str]:
    """Return the names of the columns: the baseline and the steps."""
    return ["baseline", *(step["id"] for step in document["steps"])]


def measurements(document: Document) -> list[Mapping[str, Any]]:
    """Return the measurements in the order of the columns."""
    return [document["baseline"]["measurement"], *(step["measurement"] for step in document["steps"])]


def section_rows(document: Document, section: str) -> list[Row]:
    """Return the rows of a section (accuracy, memory, latency); a figure that no step has is left out."""
    rows = []
    for figure in FIGURES[section]:
        values = [dict(parts(measurement[section].get(figure.key))) for measurement in measurements(document)]
        changes = [_changes(figure.delta, step["delta"]) for step in document["steps"]]
        for part in dict.fromkeys(part for by_part in values for part in by_part):
            cells = [Cell(_text(figure, values[0].get(part)))]
            for place, by_part in enumerate(values[1:]):
                text = _text(figure, by_part.get(part))
                from_baseline, from_previous = (change.get(part, "") for change in changes[place])
                cells.append(Cell(text, from_baseline, from_previous if place else ""))
            rows.append(Row(figure.label.format(part), tuple(cells)))
    return rows


def behaviour_rows(document: Document) -> dict[str, list[Row]]:
    """Return the rows of what was measured of the model's behaviour, by kind: {"calibration": [...]}."""
    found = [measurement.get("behaviour") or {} for measurement in measurements(document)]
    kinds = dict.fromkeys(kind for behaviour in found for kind, part in behaviour.items() if isinstance(part, Mapping))
    tables = {}
    for kind in kinds:
        leaves = [dict(_leaves(behaviour.get(kind))) for behaviour in found]
        paths = dict.fromkeys(path for by_path in leaves for path in by_path)
        tables[kind] = [Row(path, tuple(Cell(shown(by_path.get(path))) for by_path in leaves)) for path in paths]
    return {kind: rows for kind, rows in tables.items() if rows}


def unmeasured(document: Document) -> list[str]:
    """Return why figures are missing, with the steps that lack them; what was simply not asked for is left out."""
    reasons: dict[str, list[str]] = {}
    for column, measurement in zip(columns(document), measurements(document), strict=True):
        for reason in _reasons(measurement):
            reasons.setdefault(reason, []).append(column)
    return [f"{reason} ({', '.join(steps)})" for reason, steps in reasons.items()]


def parts(value: Any) -> list[tuple[str | None, Any]]:
    """Return a figure by text, task or batch; one that has no parts comes alone, under None; no figure: nothing."""
    if value is None:
        return []
    if not isinstance(value, Mapping) or "value" in value:
        return [(None, value)]
    return [(part, one) for part, one in value.items() if not part.endswith("_reason")]


def estimate(value: Any) -> Estimate | None:
    """Return the estimate that a JSON value stands for; a bare number has no interval."""
    if isinstance(value, Mapping) and "value" in value:
        return Estimate.from_json(dict(value))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return Estimate(value, None, 1) if is_number else None


def shown(value: Any) -> str:
    """Return any JSON value as a person reads it."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(shown, value)) or NOTHING
    if isinstance(value, int):
        return f"{value:,}"
    known = estimate(value)
    if known is not None:
        return estimate_text(known)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {shown(part)}" for key, part in value.items()) or NOTHING
    return str(value)


def _text(figure: Figure, value: Any) -> str:
    return (figure.show or shown)(value)


def _changes(key: str | None, delta: Mapping[str, Any]) -> tuple[dict[str | None, str], dict[str | None, str]]:
    """By text or batch, how a figure compares with the baseline, and with the step before."""
    if key is None:
        return {}, {}
    by_side = []
    for side in ("from_baseline", "from_previous"):
        known = {part: estimate(value) for part, value in parts(delta[side].get(key))}
        by_side.append({part: _change(key, one) for part, one in known.items() if one is not None})
    # the KL's change against the baseline is the KL itself
    return ({} if key == "kl_mean" else by_side[0]), by_side[1]


def _change(key: str, one: Estimate) -> str:
    if key == "kl_mean":
        return f"{'+' if one.value >= 0 else ''}{estimate_text(one)}"
    return f"×{estimate_text(one)}"


def _reasons(value: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[str]:
    for key, part in value.items():
        name = key.removesuffix("_reason")
        if isinstance(part, Mapping):
            yield from _reasons(part, (*path, key))
        elif name != key and value.get(name) is None and part != NOT_MEASURED:
            yield f"{'.'.join((*path, name)[-2:])}: {part}"


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and "value" not in value:
        for key, part in value.items():
            if not key.endswith("_reason"):
                yield from _leaves(part, (*path, key))
    elif path:
        yield " · ".join(path), value
