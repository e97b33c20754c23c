"""Every structural rule held against an exported model folder, cheap ones first, one tensor in memory at a time.

The rules read what the files hold: no hash, no report. Ledgers only say how strictly a weight is compared.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from compressor.calibration import Progress
from compressor.errors import EnvironmentProblem
from compressor.gates.structure import companions, comparing, content, experts, files, headers, settings
from compressor.gates.structure.comparing import Comparison
from compressor.gates.structure.content import Seen
from compressor.gates.structure.experts import find_origins
from compressor.gates.structure.finding import Finding, failed, settled, skipped
from compressor.gates.structure.history import History, read_history
from compressor.gates.structure.layout import Layout, Linear, read_layout
from compressor.gates.structure.stored import Stored
from compressor.models.transformers_io import read_config

NO_BASELINE = "no baseline was given"
NO_LEDGER = "no ledger was given, so nobody knows what was asked"
MOST_WORKERS = 8  # each holds a tensor and its counterpart
COMPARING_RULES = experts.RULES | comparing.RULES
LEDGER_RULES = headers.LEDGER_RULES | content.LEDGER_RULES


def check_structure(
    candidate: Path,
    baseline: Path | None = None,
    *,
    ledgers: Sequence[Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> list[Finding]:
    """Hold every rule against a model folder; failures name the tensor or file and what was expected.

    `baseline` is the model folder that it was made from, `ledgers` those of the run's steps in order
    (`report["steps"][i]["ledger"]`). Rules that need what is not given are reported as skipped, never as passed.
    Raises EnvironmentProblem and IntegrityError for a baseline that cannot be read.
    """
    if not candidate.is_dir():
        raise EnvironmentProblem(f"{candidate}: there is no model folder here")
    original = None if baseline is None else Stored(baseline)
    history = read_history(ledgers)
    findings = settled(files.RULES, files.file_failures(candidate))
    findings += settled(settings.RULES, settings.config_failures(candidate))
    if _fails(findings, "config.readable"):
        reason = "config.json cannot be read"
        findings += skipped(settings.BASELINE_RULES, reason)
        findings += _companions(candidate, baseline, None)
        return findings + skipped(_tensor_rules(), reason)
    findings += _settings(candidate, baseline, history)
    try:
        config = read_config(candidate)
        # before the layout, whose skeleton writes its own dtype into the config
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        layout = read_layout(config, str(candidate))
    except Exception as error:  # from anywhere in transformers
        findings.append(failed("config.readable", settings.CONFIG, f"no model can be built from it: {error}"))
        findings += _companions(candidate, baseline, None)
        return findings + skipped(_tensor_rules(), "no model can be built from config.json")
    rows = layout.shapes[f"{layout.family.embedding}.weight"][0]
    findings += _companions(candidate, baseline, rows)
    for rule in ("files.weights", "config.quantization", "config.experts"):
        if _fails(findings, rule):
            return findings + skipped(_tensor_rules(), f"{rule} failed")
    return findings + _tensors(Stored(candidate), layout, dtype, original, history, progress)


def _settings(candidate: Path, baseline: Path | None, history: History) -> list[Finding]:
    if baseline is None:
        return skipped(settings.BASELINE_RULES, NO_BASELINE)
    return settled(settings.BASELINE_RULES, settings.config_differences(candidate, baseline, history))


def _companions(candidate: Path, baseline: Path | None, rows: int | None) -> list[Finding]:
    findings = settled(companions.RULES, companions.companion_failures(candidate, rows))
    if baseline is None:
        return findings + skipped(companions.BASELINE_RULES, NO_BASELINE)
    return findings + settled(companions.BASELINE_RULES, companions.companion_differences(candidate, baseline))


def _tensors(
    stored: Stored,
    layout: Layout,
    dtype: torch.dtype,
    baseline: Stored | None,
    history: History,
    progress: Progress | None,
) -> list[Finding]:
    """Headers first, then the content of whatever tensors the headers are right about."""
    found = list(headers.header_failures(stored, layout, dtype, baseline))
    findings = settled(headers.RULES, found)
    if _fails(findings, "quantized.config"):
        rest = {rule: text for rule, text in _tensor_rules().items() if rule not in headers.RULES}
        return findings + skipped(rest, "quantized.config failed")
    if history.known:
        findings += settled(headers.LEDGER_RULES, headers.asked_failures(stored, layout, history, baseline))
    broken = {failure.where for failure in found if failure.where}
    comparison = None
    failures: list[Finding] = []
    if baseline is not None:
        origins = find_origins(stored, baseline, layout, history)
        failures += origins.failures
        comparison = Comparison(baseline, layout, history, origins)
    seen: dict[str, Seen] = {}
    with _workers() as pool:
        each = pool.map(lambda name: _one(name, stored, layout, history, comparison, broken), layout.shapes)
        for i, (name, (found, one)) in enumerate(zip(layout.shapes, each, strict=True)):
            failures += found
            if progress is not None:
                progress("checking tensors", i + 1, len(layout.shapes))
            if one is not None:
                seen[name.removesuffix(".weight")] = one
    roles = {linear.name: linear.role for linear in layout.linears}
    failures += content.size_failures(seen, roles)
    wrong = {finding.where for finding in failures}
    failures += _repeated(seen, wrong, baseline, comparison)
    rules = content.RULES | (content.LEDGER_RULES if history.known else {}) | (COMPARING_RULES if baseline else {})
    findings += settled(rules, failures)
    findings += [] if history.known else skipped(LEDGER_RULES, NO_LEDGER)
    return findings + ([] if baseline else skipped(COMPARING_RULES, NO_BASELINE))


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that each look at a tensor by themselves.

    The products of one tensor are short. Where other processes take the cores as well, the threads of torch wait for
    each other at the end of each: the check of SmolLM2 took 2.4 s alone and 37 to 79 s beside them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(threads, MOST_WORKERS)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _one(
    name: str, stored: Stored, layout: Layout, history: History, comparison: Comparison | None, broken: set[str]
) -> tuple[list[Finding], Seen | None]:
    """Content of one tensor (or of the three that a packed weight is), read once."""
    failures: list[Finding] = []
    linear = layout.by_name.get(name.removesuffix(".weight"))
    if linear is None or not name.endswith(".weight"):
        if name not in broken:
            tensor = stored.reader.tensor(name)
            failures += content.dense_failures(name, tensor)
            failures += comparison.tensor(name, tensor) if comparison is not None else ()
        return failures, None
    if _is_broken(linear, broken) or not stored.holds(linear.name):
        return failures, None
    weight = stored.weight(linear.name, linear.shape)
    if isinstance(weight, torch.Tensor):
        failures += content.dense_failures(name, weight)
    else:
        shape = None if stored.is_int8(linear.name) else stored.reader.tensor(f"{linear.name}.weight_shape")
        failures += content.packed_failures(linear.name, weight, shape)
    promised = history.sparsity(linear.ledger)
    if promised is not None:
        failures += content.sparsity_failures(linear.name, weight, promised)
    failures += comparison.linear(linear, weight) if comparison is not None else ()
    return failures, content.remember(weight)


def _is_broken(linear: Linear, broken: set[str]) -> bool:
    return linear.name in broken or any(where.startswith(f"{linear.name}.weight") for where in broken)


def _repeated(
    seen: Mapping[str, Seen], wrong: set[str | None], baseline: Stored | None, comparison: Comparison | None
) -> Iterator[Finding]:
    """Weights that are the same though the baseline's are not; of such a pair the one that is not the baseline's."""
    for later, first in content.repeats(seen):
        if baseline is not None and comparison is not None and _same_in(baseline, later, first, comparison):
            continue
        name, other = (first, later) if _names(wrong, first) and not _names(wrong, later) else (later, first)
        yield failed("values.repeated", name, f"{name} holds the same as {other}, to the byte")


def _same_in(baseline: Stored, one: str, other: str, comparison: Comparison) -> bool:
    by_name = comparison.layout.by_name
    names = [comparison.origins.name(by_name[name]) for name in (one, other)]
    if any(name is None or not baseline.holds(name) for name in names):
        return False
    return content.remember(baseline.weight(str(names[0]))) == content.remember(baseline.weight(str(names[1])))


def _names(wrong: set[str | None], name: str) -> bool:
    return any(where is not None and where.startswith(f"{name}.") for where in wrong)


def _fails(findings: Sequence[Finding], rule: str) -> bool:
    return any(finding.rule == rule and finding.status == "fail" for finding in findings)


def _tensor_rules() -> dict[str, str]:
    return headers.RULES | content.RULES | LEDGER_RULES | COMPARING_RULES
