"""`compress gate`: a candidate against one or more baselines, by a policy; cheap checks first."""

import datetime
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from compressor.calibration import DEMO_TEXT, Progress, load_texts, windows
from compressor.errors import EnvironmentProblem, IntegrityError, RecipeError
from compressor.gates import Check, Policy, Verdict, limit_checks, verdict_of
from compressor.gates.faults import self_test
from compressor.gates.paired import bias_checks, brier_checks, slice_checks, task_checks
from compressor.gates.structure import Finding, check_structure, smoke
from compressor.gates.waivers import unused, waive
from compressor.models import is_packed, load_tokenizer, read_config, resolve
from compressor.pipeline.comparing import measure_side, time_sides
from compressor.pipeline.costs import LATENCY, latency_budgets
from compressor.pipeline.fair_speed import fair_latency, timed_together
from compressor.pipeline.measuring import Measured
from compressor.pipeline.onnx_subject import is_onnx
from compressor.pipeline.sides import Side, check_same_windows, find_side, original_of, same_original
from compressor.recipe import Evaluate, load_recipe
from compressor.reports import Ledger, Report, pair_items
from compressor.reports.delta import delta
from compressor.reports.measurement import section_to_json

OnInconclusive = Literal["fail", "warn", "pass"]
PAIRED = {"tasks": task_checks, "slices": slice_checks, "brier": brier_checks, "bias": bias_checks}
# What a further baseline (the last accepted artefact) is compared in: quality. Bytes and speed are about the first.
AGAINST_ALL = ("perplexity_ratio",)
SMOKE_WINDOWS, SMOKE_LENGTH = 2, 64
DAMAGED = 4  # exit code: the files do not hold a sound model, which is worse than a regression


@dataclass(frozen=True)
class GateResult:
    """What a gate says, of which models, by which policy, and each check behind it."""

    candidate: str
    baselines: tuple[str, ...]
    policy: Policy
    verdict: Verdict
    on_inconclusive: OnInconclusive
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        return self.verdict.status

    @property
    def exit_code(self) -> int:
        """0 pass, 1 regression, 2 inconclusive (0 if that is let through), 4 where the files themselves are damaged."""
        if any(check.group == "structure" and check.status == "fail" for check in self.verdict.checks):
            return DAMAGED
        if self.verdict.status == "inconclusive" and self.on_inconclusive != "fail":
            return 0
        return self.verdict.exit_code

    def to_json(self) -> dict[str, Any]:
        policy = self.policy.model_dump(mode="json", exclude_none=True)
        digest = hashlib.sha256(json.dumps(policy, sort_keys=True).encode()).hexdigest()
        return {
            "schema": "compressor.gate/1",
            "candidate": self.candidate,
            "baselines": list(self.baselines),
            "policy": policy,
            "policy_sha256": digest,
            **self.verdict.to_json(),
            "on_inconclusive": self.on_inconclusive,
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
            "exit_code": self.exit_code,
        }


def gate(
    candidate: str | Path,
    baseline: str | Path | Sequence[str | Path] | None,
    policy: Policy,
    *,
    evaluate: Evaluate | None = None,
    on_inconclusive: OnInconclusive = "fail",
    progress: Progress | None = None,
) -> GateResult:
    """Decide whether a candidate may take the place of its baseline.

    Both are run folders (their records are paired, no model is needed) or models (measured here, with `evaluate` or the
    run's own). Without a baseline a run is held against the model that it started from. Further baselines are compared
    in quality only. Raises IntegrityError where files were changed after a run, or two sides were asked different
    things.
    """
    begun = time.monotonic()
    side = find_side(candidate)
    names = [] if baseline is None else [baseline] if isinstance(baseline, str | Path) else list(baseline)
    baselines = [_baseline(name, side) for name in names] or [original_of(side)]
    checks = structure_checks(side, baselines)
    if not any(check.status == "fail" for check in checks):  # nothing that such a model scores would mean anything
        for position, before in enumerate(baselines):
            checks += _compared(side, before, policy.resolved(), evaluate, progress, first=position == 0)
    return _result(side, baselines, policy, checks, on_inconclusive, begun)


def gate_run(policy: Policy, report: Report, out: Path, source: Path, before: Measured, after: Measured) -> GateResult:
    """The gate of a run that is about to finish: its export against the model that it started from."""
    begun = time.monotonic()
    origin = {"name": report.baseline.name}
    ledgers = tuple(step.ledger for step in report.steps if step.ledger is not None)
    baseline = Side(
        report.baseline.name, str(source), before.measurement, before.windows, before.evidence.items, source=origin
    )
    model = str(out / "model") if (out / "model").is_dir() else None
    candidate = Side(
        str(out),
        model,
        after.measurement,
        after.windows,
        after.evidence.items,
        source=origin,
        ledgers=ledgers,
        timed_beside=report.baseline.name,
    )
    checks = structure_checks(candidate, [baseline]) if model else []
    checks += record_checks(candidate, baseline, policy.resolved())
    return _result(candidate, [baseline], policy, checks, "fail", begun)


def record_checks(candidate: Side, baseline: Side, policy: Policy, *, first: bool = True) -> list[Check]:
    """All checks of a policy on two sides that were measured: fidelity and cost by limits, tasks by pairs."""
    assert candidate.measurement is not None
    assert baseline.measurement is not None
    before = baseline.measurement
    changed = delta(candidate.measurement, before, against_baseline=timed_together(candidate, baseline))
    changed = fair_latency(changed, candidate, baseline)
    document = {
        "steps": [
            {
                "measurement": candidate.measurement.to_json(),
                "delta": {"from_baseline": section_to_json(changed)},
            }
        ]
    }
    limits = limit_checks(document, policy)
    checks = limits if first else [check for check in limits if check.metric in AGAINST_ALL]
    if rules := policy.paired():
        pairs = pair_items(baseline.items, candidate.items)
        for name, rule in rules.items():
            found = PAIRED[name](pairs, rule)
            checks += found or [_nothing_to_pair(name, candidate)]
    return [replace(check, baseline=baseline.name) for check in checks]


def structure_checks(candidate: Side, baselines: Sequence[Side]) -> list[Check]:
    """What the candidate's files hold, read anew, beside the weights that they came from where those are here.

    Where the rules hold, one short forward of both models follows: finite numbers, predictions that are still alike.
    """
    folder = candidate.folder
    if folder is None:
        text = f"{candidate.name}: no weights here, so the files were not looked into"
        return [Check("structure", None, None, None, "skipped", text, group="structure", rule="structure.files")]
    if is_onnx(folder):
        text = (
            f"{folder}: an ONNX graph; it was compared with its model when it was written, the rules read safetensors"
        )
        return [Check("structure", None, None, None, "skipped", text, group="structure", rule="structure.files")]
    original = _original_folder([*baselines, *_sources(candidate)])
    findings = check_structure(folder, original, ledgers=_as_json(candidate.ledgers))
    if original is not None and not any(finding.status == "fail" for finding in findings):
        findings += smoke(folder, original, _smoke_windows(folder))
    return [_finding_check(finding) for finding in findings]


def gate_self_test(
    candidate: str | Path, baseline: str | Path | None = None, *, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Plant known faults in copies of a candidate, one at a time: is each caught, by which rule, and what is named?"""
    side = find_side(candidate)
    if side.folder is None:
        raise EnvironmentProblem(f"{side.name}: its weights are not here, so there is nothing to plant faults in")
    baselines = [find_side(baseline)] if baseline is not None else _sources(side)
    original = _original_folder(baselines)
    if original is None:
        raise RecipeError(f"{side.name}: the self-test compares with the original weights; give them as --baseline")
    trials = self_test(side.folder, original, ledgers=_as_json(side.ledgers), progress=progress)
    return [trial.to_json() for trial in trials]


def _result(
    side: Side,
    baselines: Sequence[Side],
    policy: Policy,
    checks: Sequence[Check],
    on_inconclusive: OnInconclusive,
    begun: float,
) -> GateResult:
    today = datetime.datetime.now(datetime.UTC).date()
    return GateResult(
        candidate=side.name,
        baselines=tuple(before.name for before in baselines),
        policy=policy,
        verdict=verdict_of(waive(checks, policy.waivers, today)),
        on_inconclusive=on_inconclusive,
        seconds=time.monotonic() - begun,
        notes=tuple(f"the waiver of {w.owner} for {w.rule!r} covers nothing" for w in unused(checks, policy.waivers)),
    )


def _baseline(name: str | Path, candidate: Side) -> Side:
    """A baseline; the model that the candidate's run started from comes with what that run measured of it."""
    side = find_side(name)
    return original_of(candidate) if same_original(candidate, side) else side


def _compared(
    candidate: Side,
    baseline: Side,
    policy: Policy,
    evaluate: Evaluate | None,
    progress: Progress | None,
    *,
    first: bool,
) -> list[Check]:
    suite = evaluate or _evaluate_of(candidate) or _evaluate_of(baseline) or Evaluate()
    if baseline.measurement is None or candidate.measurement is None:
        candidate, baseline = measure_side(candidate, baseline, suite, progress)
    check_same_windows(candidate, baseline)
    wants_speed = first and any(getattr(policy, name) is not None for name in LATENCY)
    if wants_speed and not timed_together(candidate, baseline):
        candidate = time_sides(candidate, baseline, suite, latency_budgets(policy), progress)
    return record_checks(candidate, baseline, policy, first=first)


def _nothing_to_pair(name: str, candidate: Side) -> Check:
    what = "no tasks were measured" if not candidate.items else f"no measured task has what {name!r} compares"
    text = f"{name}: {what}; add some under evaluate.tasks"
    return Check(name, None, None, None, "unmeasured", text, group="tasks", rule=f"{name}.*")


def _smoke_windows(folder: Path) -> Tensor:
    """A few token windows of bundled text."""
    text = next(iter(load_texts(DEMO_TEXT, "held_out").values()))
    return windows(text, load_tokenizer(folder), SMOKE_LENGTH, SMOKE_WINDOWS)


def _finding_check(finding: Finding) -> Check:
    """Sound files may hold a model that is much worse: that is a regression, not damage."""
    worse = finding.rule == "smoke.kl" and finding.status == "fail"
    group: Any = "fidelity" if worse else "structure"
    return Check(
        metric="structure",
        value=None,
        ci95=None,
        limit=None,
        status=finding.status,
        text=f"{finding.rule}: {finding.text}",
        group=group,
        rule=f"structure.{finding.rule}",
        where=finding.where,
    )


def _sources(candidate: Side) -> list[Side]:
    return [original_of(candidate)] if candidate.report is not None else []


def _original_folder(sides: Sequence[Side]) -> Path | None:
    """The folder of the first of some models whose weights are here and not packed."""
    for side in sides:
        if side.model is not None and side.run is None:
            folder = resolve(side.model).path
            if not is_packed(read_config(folder)):
                return folder
    return None


def _as_json(ledgers: Sequence[Ledger]) -> list[dict[str, Any]] | None:
    return [ledger.to_json() for ledger in ledgers] if ledgers else None


def _evaluate_of(side: Side) -> Evaluate | None:
    if side.run is None:
        return None
    path = side.run / "recipe.yaml"
    if not path.is_file():
        raise IntegrityError(f"{path}: missing, so it is not known how {side.name} was measured")
    return load_recipe(path).evaluate
