"""What was measured on one model: accuracy, memory, latency, routing; and how that looks in JSON.

Figures are an `Estimate`, a number, or a mapping of either by text, task or batch. A figure is None where it could not
be measured; `reasons` says why, by key (`"kl_mean"`, or `"perplexity.wiki"` for one text). In JSON that is null beside
`<key>_reason`; a value that is not finite becomes the same, since JSON has no such number.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol, Self, TypeVar, cast

from compressor.errors import IntegrityError
from compressor.reports.estimate import Estimate

ByPart = Mapping[str, Estimate | None]
NOT_MEASURED = "it was not measured"
NOT_FINITE = "the value is not a finite number"
# Fields of a section that are not figures of the report.
_ASIDE = ("extra", "reasons", "window_nll")


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How well a model predicts text, and how near it is to the baseline (KL in nats a token).

    `window_nll` holds the mean NLL (nats a token) of each evaluation window of a text, all of equal length. It is not
    part of the report: it lets two measurements of the same windows be compared pair by pair.
    """

    perplexity: ByPart | None = None
    bits_per_byte: ByPart | None = None
    kl: ByPart | None = None
    kl_mean: Estimate | None = None
    kl_p99: float | None = None
    top1_agreement: Estimate | None = None
    tasks: ByPart | None = None
    extra: Mapping[str, object] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    window_nll: Mapping[str, tuple[float, ...]] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a model takes: bytes over the weights held, in its files, for a token of cache, and at the peak."""

    weight_bytes: int | None = None
    bits_per_weight: float | None = None
    file_bytes: int | None = None
    kv_bytes_per_token: int | None = None
    peak_bytes: int | None = None
    extra: Mapping[str, object] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """How long a model takes, by batch size ("1", "8").

    `ratio_to_baseline` holds {"prefill_ms": {batch: E}, "decode_ms_per_token": {batch: E}} where both models were timed
    in turns, which cancels what the machine does meanwhile; ratios are after / before.
    """

    prefill_ms: ByPart | None = None
    decode_ms_per_token: ByPart | None = None
    tokens_per_s: ByPart | None = None
    ratio_to_baseline: Mapping[str, ByPart] | None = None
    extra: Mapping[str, object] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LayerRouting:
    """Tokens that each expert of a layer received, and how far their shares moved from the baseline's.

    `shift` is the total variation distance between the two distributions, 0 to 1; None for the baseline itself.
    """

    layer: int
    tokens: tuple[int, ...]
    shift: float | None = None

    def to_json(self) -> dict:
        """Return {"layer", "tokens", "shift"}."""
        return {"layer": self.layer, "tokens": list(self.tokens), "shift": finite(self.shift)}

    @classmethod
    def from_json(cls, data: dict) -> Self:
        """Read what `to_json` gives."""
        return cls(layer=data["layer"], tokens=tuple(data["tokens"]), shift=data["shift"])


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """What a model does beyond predicting text well; each figure is a mapping whose leaves are estimates or numbers.

    `calibration` {task: {nll, brier, ece, overconfidence}}, `flips` {task: {right_to_wrong, wrong_to_right,
    wrong_to_other, n}}, `slices` {task: {slice: score}}, `robustness` {task: {variant: gap to the baseline's loss}},
    `similarity` {task: rank correlation}; what was not asked for is left out of the report.
    """

    calibration: Mapping[str, Any] | None = None
    flips: Mapping[str, Any] | None = None
    slices: Mapping[str, Any] | None = None
    robustness: Mapping[str, Any] | None = None
    ood: Mapping[str, Any] | None = None
    bias: Mapping[str, Any] | None = None
    generation: Mapping[str, Any] | None = None
    refusals: Mapping[str, Any] | None = None
    similarity: Mapping[str, Any] | None = None
    extra: Mapping[str, object] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict:
        """The figures that were asked for; one that could not be measured is null beside its reason."""
        asked = {
            item.name
            for item in fields(self)
            if item.name not in _ASIDE and (getattr(self, item.name) is not None or item.name in self.reasons)
        }
        names = asked | set(self.extra)
        return {key: value for key, value in section_to_json(self).items() if key.removesuffix("_reason") in names}


class FigureSection(Protocol):
    """A frozen dataclass of figures, with a reason for each that is None."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def reasons(self) -> Mapping[str, str]: ...


Section = TypeVar("Section", bound=FigureSection)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """All figures of one model at one point of a run. `routing` is None for a model without experts."""

    accuracy: Accuracy = field(default_factory=Accuracy)
    memory: Memory = field(default_factory=Memory)
    latency: Latency = field(default_factory=Latency)
    behaviour: Behaviour = field(default_factory=Behaviour)
    routing: tuple[LayerRouting, ...] | None = None
    routing_reason: str | None = None

    def to_json(self) -> dict:
        """Return {"accuracy", "memory", "latency", "behaviour", "routing"}."""
        data = {name: section_to_json(getattr(self, name)) for name in ("accuracy", "memory", "latency")}
        data["behaviour"] = self.behaviour.to_json()
        if self.routing is None:
            return data | {"routing": None, "routing_reason": self.routing_reason or NOT_MEASURED}
        return data | {"routing": [layer.to_json() for layer in self.routing]}

    @classmethod
    def from_json(cls, data: dict) -> Self:
        """Read what `to_json` gives; raises IntegrityError for anything else."""
        try:
            routing = data.get("routing")
            return cls(
                accuracy=section_from_json(Accuracy, data["accuracy"]),
                memory=section_from_json(Memory, data["memory"]),
                latency=section_from_json(Latency, data["latency"]),
                behaviour=section_from_json(Behaviour, data.get("behaviour") or {}),
                routing=None if routing is None else tuple(map(LayerRouting.from_json, routing)),
                routing_reason=data.get("routing_reason"),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f"not a measurement ({error!r}): it has {', '.join(data)}") from error


def worst_domain(measurement: Measurement, baseline: Measurement) -> tuple[str, float] | None:
    """Return the text whose perplexity grew most, and the ratio after / before; None if no text was measured in both.

    A text whose perplexity is no longer a finite number is the worst of all.
    """
    before, after = baseline.accuracy.perplexity or {}, measurement.accuracy.perplexity or {}
    ratios = {}
    for text, estimate in after.items():
        reference = before.get(text)
        if estimate is not None and reference is not None:
            ratios[text] = estimate.value / reference.value
        elif measurement.accuracy.reasons.get(f"perplexity.{text}") == NOT_FINITE:
            ratios[text] = math.inf
    return _largest(ratios)


def worst_domain_by_kl(measurement: Measurement) -> tuple[str, float] | None:
    """Return the text that moved farthest from the baseline, and its mean KL in nats; None if KL by text is missing."""
    by_text = measurement.accuracy.kl or {}
    return _largest({text: estimate.value for text, estimate in by_text.items() if estimate is not None})


def section_to_json(section: FigureSection) -> dict:
    """Return the figures of a section as they stand in a report, those in `extra` beside the others."""
    figures = {item.name: getattr(section, item.name) for item in fields(section) if item.name not in _ASIDE}
    data = _encode(figures | dict(getattr(section, "extra", {})), section.reasons, "")
    assert isinstance(data, dict)
    return data


def section_from_json(kind: type[Section], data: Mapping) -> Section:
    """Read a section; figures that this version does not know are kept in `extra`, if the section has one."""
    reasons: dict[str, str] = {}
    figures = _decode(data, reasons, "")
    assert isinstance(figures, dict)
    names = {item.name for item in fields(kind)}
    values: dict[str, Any] = {name: value for name, value in figures.items() if name in names - set(_ASIDE)}
    if "extra" in names:
        values["extra"] = {name: value for name, value in figures.items() if name not in names}
    return cast(Any, kind)(**values, reasons=reasons)


def finite(value: float | None) -> float | None:
    """Return a number as JSON can hold it: None instead of NaN and infinities."""
    return value if value is not None and math.isfinite(value) else None


def _largest(values: dict[str, float]) -> tuple[str, float] | None:
    if not values:
        return None
    name = max(values, key=lambda text: math.inf if math.isnan(values[text]) else values[text])
    return name, values[name]


def _encode(value: object, reasons: Mapping[str, str], path: str) -> object:
    if isinstance(value, Estimate):
        return value.to_json() if value.is_finite else None
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, Mapping):
        data: dict[str, object] = {}
        for key, part in value.items():
            where = f"{path}.{key}" if path else str(key)
            data[str(key)] = _encode(part, reasons, where)
            if data[str(key)] is None:
                data[f"{key}_reason"] = NOT_FINITE if part is not None else reasons.get(where, NOT_MEASURED)
        return data
    if isinstance(value, list | tuple):
        return [_encode(part, reasons, path) for part in value]
    return value


def _decode(data: object, reasons: dict[str, str], path: str) -> object:
    if not isinstance(data, Mapping):
        return data
    if data.keys() == {"value", "ci95", "n"}:
        return Estimate.from_json(dict(data))
    values: dict[str, object] = {}
    for key, part in data.items():
        where = f"{path}.{key}" if path else key
        if part is None:
            reasons[where] = data.get(f"{key}_reason", NOT_MEASURED)
            values[key] = None
        elif not (key.endswith("_reason") and key.removesuffix("_reason") in data):
            values[key] = _decode(part, reasons, where)
    return values
