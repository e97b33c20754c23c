"""Plant every fault into a copy of a healthy artefact and see which rule finds it."""

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from compressor.errors import IntegrityError
from compressor.gates.faults.artefact import Artefact, DoesNotApply, Injected
from compressor.gates.faults.experts import EXPERT_FAULTS
from compressor.gates.faults.files import FILE_FAULTS, link_copy
from compressor.gates.faults.weights import WEIGHT_FAULTS
from compressor.gates.structure import Finding, check_structure


@dataclass(frozen=True)
class Fault:
    """A silent corruption that can be planted; `needs` is what the rules need to see it, beside the artefact."""

    name: str
    text: str
    plant: Callable[[Artefact, Random], Injected]
    needs: frozenset[str] = frozenset()

    def inject(self, folder: Path, seed: int = 0) -> Injected:
        """Edit the folder (a copy!) in place, as before hashes are taken; DoesNotApply if there is nothing to break."""
        return self.plant(Artefact(folder), Random(f"{self.name}:{seed}"))


# Rules see these without a baseline; all other faults leave a file that is sound in itself
ALONE = {
    "missing_expert_scale", "zero_expert_scale", "nan_expert_scale", "inf_expert_scale", "absurd_expert_scale",
    "dropped_expert", "duplicated_expert", "lost_experts", "other_bits_expert", "mixed_expert_schemes",
    "unquantized_layer", "ignored_but_packed", "duplicated_layer", "nan_scale", "coarse_shard", "nan_norm",
    "missing_tensor", "unexpected_tensor", "stale_expert_count", "remote_code", "lost_quantization_config",
    "wrong_bits", "truncated_shard", "missing_shard", "stale_index", "leftover_shard", "pickle_beside",
    "lost_tokenizer",
}  # fmt: skip
ONLY_THE_RUN_KNOWS = {"quietly_unquantized_layer"}


def _needs(name: str) -> frozenset[str]:
    return frozenset({"ledgers"} if name in ONLY_THE_RUN_KNOWS else () if name in ALONE else {"baseline"})


FAULTS: dict[str, Fault] = {
    name: Fault(name, text, plant, _needs(name))
    for name, (plant, text) in (EXPERT_FAULTS | WEIGHT_FAULTS | FILE_FAULTS).items()
}


@dataclass(frozen=True)
class Trial:
    """What became of one fault. `caught` is None where it could not be tried (`text` says why).

    `rule`, `named` and `text` are those of the first finding that names what was broken; `elsewhere` lists what
    findings named beside it.
    """

    fault: str
    injected: str
    caught: bool | None
    rule: str | None
    named: str | None
    text: str
    seconds: float
    elsewhere: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {
            "fault": self.fault,
            "injected": self.injected,
            "caught": self.caught,
            "rule": self.rule,
            "named": self.named,
            "text": self.text,
            "seconds": round(self.seconds, 3),
            "elsewhere": list(self.elsewhere),
        }


def self_test(
    folder: Path,
    baseline: Path | None = None,
    *,
    ledgers: Sequence[Mapping[str, Any]] | None = None,
    faults: Iterable[str] = FAULTS,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Trial]:
    """Plant faults one by one into copies of a healthy model folder; `seconds` is the time of the check alone.

    A fault counts as caught only if a failing rule names the tensor or file that was broken. Raises IntegrityError
    where the folder is not healthy to begin with: then a failure would prove nothing.
    """
    sick = [finding for finding in check_structure(folder, baseline, ledgers=ledgers) if finding.status == "fail"]
    if sick:
        raise IntegrityError(f"{folder} is not healthy itself: {sick[0].rule}: {sick[0].text}")
    names = list(faults)
    trials = []
    for i, name in enumerate(names):
        trials.append(_try(FAULTS[name], folder, baseline, ledgers, seed))
        if progress is not None:
            progress("planting faults", i + 1, len(names))
    return trials


def _try(
    fault: Fault, folder: Path, baseline: Path | None, ledgers: Sequence[Mapping[str, Any]] | None, seed: int
) -> Trial:
    absent = fault.needs - ({"baseline"} if baseline else set()) - ({"ledgers"} if ledgers is not None else set())
    if absent:
        return Trial(fault.name, "", None, None, None, f"not tried: needs {', '.join(sorted(absent))}", 0.0)
    # Beside the artefact: hard links do not cross file systems
    with tempfile.TemporaryDirectory(prefix=".self-test-", dir=_writable(folder.parent)) as scratch:
        copy = Path(scratch) / folder.name
        link_copy(folder, copy)
        try:
            injected = fault.inject(copy, seed)
        except DoesNotApply as reason:
            return Trial(fault.name, "", None, None, None, f"not tried: {reason}", 0.0)
        begun = time.perf_counter()
        findings = [f for f in check_structure(copy, baseline, ledgers=ledgers) if f.status == "fail"]
        seconds = time.perf_counter() - begun
    return _judged(fault.name, injected, findings, seconds)


def _judged(name: str, injected: Injected, findings: list[Finding], seconds: float) -> Trial:
    right = [finding for finding in findings if _means(finding.where, injected.named)]
    elsewhere = tuple(dict.fromkeys(str(f.where) for f in findings if not _means(f.where, injected.named)))
    if right:
        first = right[0]
        return Trial(name, str(injected), True, first.rule, first.where, first.text, seconds, elsewhere)
    text = f"findings name only {', '.join(elsewhere[:4])}" if elsewhere else "no rule noticed it"
    return Trial(name, str(injected), False, None, None, text, seconds, elsewhere)


def _means(where: str | None, named: tuple[str, ...]) -> bool:
    """Whether a finding is about one of the broken things: the same tensor, a part of it, or what it is a part of."""
    return where is not None and any(
        where == name or where.startswith(f"{name}.") or name.startswith(f"{where}.") for name in named
    )


def _writable(folder: Path) -> Path | None:
    return folder if os.access(folder, os.W_OK) else None
