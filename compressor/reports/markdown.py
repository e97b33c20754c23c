"""The report as a person reads it: verdict first, then what each step changed, then everything out of the ordinary."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compressor.reports.estimate import Estimate
from compressor.reports.ledger import ExpertRow, Ledger, LedgerRow
from compressor.reports.measurement import NOT_MEASURED, ByPart, Measurement, worst_domain, worst_domain_by_kl
from compressor.reports.report import Export, Report, Step

REPRODUCE = "compress run recipe.yaml"
VERDICTS = {"pass": "PASS", "regression": "REGRESSION", "inconclusive": "INCONCLUSIVE"}
SHOWN_NAMES = 4
NOTHING = "–"


def to_markdown(report: Report, *, reproduce: str = REPRODUCE) -> str:
    """Return the report as Markdown. `reproduce` is the command that gives it again, run beside its `recipe.yaml`."""
    report = Report.from_json(report.to_json())  # so that a run and `compress report` on its file print the same
    sections = [
        f"# {report.baseline.name}: compression report",
        _verdict(report),
        _summary(report),
        "## Accuracy, step by step\n\n" + accuracy_table(report),
        "## Cost, step by step\n\n" + cost_table(report),
        _routing(report),
        *(_step_ledger(step) for step in report.steps),
        _exports(report),
        _environment(report),
        f"## Reproduce\n\n```sh\n{reproduce}\n```",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def accuracy_table(report: Report) -> str:
    """Return perplexity by text, KL and top-1 agreement as a Markdown table, one row a step, with 95 % intervals."""
    texts = _parts(measurement.accuracy.perplexity for _, measurement, _ in _rows(report))
    tasks = _parts(measurement.accuracy.tasks for _, measurement, _ in _rows(report))
    header = ["step", *(f"perplexity {text}" for text in texts), *tasks, "KL mean", "KL p99", "top-1"]
    rows = []
    for label, measurement, step in _rows(report):
        accuracy = measurement.accuracy
        ratios = (step.from_baseline.perplexity_ratio if step else None) or {}
        perplexities = [_with_ratio((accuracy.perplexity or {}).get(text), ratios.get(text)) for text in texts]
        scores = [estimate_text((accuracy.tasks or {}).get(task)) for task in tasks]
        figures = [estimate_text(accuracy.kl_mean), number(accuracy.kl_p99), estimate_text(accuracy.top1_agreement)]
        rows.append([label, *perplexities, *scores, *figures])
    return (
        _table(header, rows) + "\n\nIn brackets the 95 % interval; × is the ratio to the baseline. KL in nats a token."
    )


def cost_table(report: Report) -> str:
    """Return bytes and latencies as a Markdown table, one row a step, with ratios to the baseline."""
    decode = _parts(measurement.latency.decode_ms_per_token for _, measurement, _ in _rows(report))
    prefill = _parts(measurement.latency.prefill_ms for _, measurement, _ in _rows(report))
    header = ["step", "weights", "files", "bits a weight", "peak memory"]
    header += [f"decode ms a token, batch {batch}" for batch in decode]
    header += [f"prefill ms, batch {batch}" for batch in prefill]
    rows = []
    for label, measurement, step in _rows(report):
        memory, latency = measurement.memory, measurement.latency
        change = step.from_baseline if step else None
        row = [
            label,
            megabytes(memory.weight_bytes) + _times(change.weight_bytes_ratio if change else None),
            megabytes(memory.file_bytes) + _times(change.file_bytes_ratio if change else None),
            number(memory.bits_per_weight),
            megabytes(memory.peak_bytes),
        ]
        ratios = (change.decode_latency_ratio if change else None) or {}
        row += [_with_ratio((latency.decode_ms_per_token or {}).get(batch), ratios.get(batch)) for batch in decode]
        ratios = (change.prefill_latency_ratio if change else None) or {}
        row += [_with_ratio((latency.prefill_ms or {}).get(batch), ratios.get(batch)) for batch in prefill]
        rows.append(row)
    return _table(header, rows) + _deployment_table(report) + _unmeasured(report)


def _deployment_table(report: Report) -> str:
    """What loading and energy cost, where somebody asked (evaluate.latency.loading, .energy); else nothing."""
    rows = []
    for label, measurement, _ in _rows(report):
        memory: Mapping[str, Any] = measurement.memory.extra
        latency: Mapping[str, Any] = measurement.latency.extra
        energy = latency.get("energy") or {}
        if latency.get("load_s") is None and not energy:
            continue
        rows.append([
            label,
            _with_ratio(latency.get("load_s"), latency.get("load_ratio_to_baseline")),
            megabytes(memory.get("loading_peak_bytes")),
            megabytes(memory.get("generating_peak_bytes")),
            _with_ratio(energy.get("joules_per_token"), energy.get("ratio_to_baseline")),
        ])  # fmt: skip
    if not rows:
        return ""
    header = ["step", "load, s", "peak of loading", "peak of generating", "joules a token"]
    return "\n\n" + _table(header, rows)


def estimate_text(estimate: Estimate | None) -> str:
    """Return a value with its interval, `24.02 [23.1, 25.0]`; a dash if it was not measured."""
    if estimate is None:
        return NOTHING
    if estimate.ci95 is None or estimate.ci95[0] == estimate.ci95[1]:
        return number(estimate.value)
    return f"{number(estimate.value)} [{number(estimate.ci95[0])}, {number(estimate.ci95[1])}]"


def number(value: float | None) -> str:
    """Return four significant digits; a dash for None."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def megabytes(count: int | None) -> str:
    """Return bytes in MB (10^6), a dash for None."""
    return NOTHING if count is None else f"{count / 1e6:,.2f} MB"


def _verdict(report: Report) -> str:
    if report.gate is None:
        return "**Verdict: none** (the recipe has no gate)."
    verdict = str(report.gate.get("verdict"))
    checks = report.gate.get("checks")
    lines = [f"**Verdict: {VERDICTS.get(verdict, verdict.upper())}**", ""]
    checks = checks if isinstance(checks, list) else []
    sound = [check for check in checks if check.get("group") == "structure" and check.get("status") == "pass"]
    if sound:
        lines.append(f"- pass: {len(sound)} rules on the content of the files hold")
    for check in checks:
        if check not in sound:
            lines.append(f"- {check.get('status', '')}: {check.get('text') or check.get('metric')}")
    return "\n".join(lines).rstrip()


def _summary(report: Report) -> str:
    if not report.steps:
        return "No step has been applied; the figures are the baseline's."
    last = report.steps[-1]
    lines = []
    if worst := worst_domain(last.measurement, report.baseline.measurement):
        lines.append(f"- Worst domain by perplexity: **{worst[0]}**, {number(worst[1])} × the baseline's.")
    if worst := worst_domain_by_kl(last.measurement):
        lines.append(f"- Worst domain by KL: **{worst[0]}**, {number(worst[1])} nats a token.")
    if last.from_baseline.weight_bytes_ratio is not None:
        before, after = report.baseline.measurement.memory.weight_bytes, last.measurement.memory.weight_bytes
        ratio = number(last.from_baseline.weight_bytes_ratio)
        lines.append(f"- Weights: {megabytes(before)} before, {megabytes(after)} after ({ratio} ×).")
    if slower := _slower(last):
        lines.append(f"- Slower than the baseline: {slower}.")
    return "\n".join(lines)


def _slower(step: Step) -> str:
    """Packed weights that are slower than dense ones are said so, not left to be found in the table."""
    found = []
    ratios = {"decode": step.from_baseline.decode_latency_ratio, "prefill": step.from_baseline.prefill_latency_ratio}
    for name, by_batch in ratios.items():
        for batch, estimate in (by_batch or {}).items():
            if estimate is not None and (estimate.ci95[0] if estimate.ci95 else estimate.value) > 1:
                found.append(f"{name} at batch {batch} ({number(estimate.value)} ×)")
    return ", ".join(found)


def _unmeasured(report: Report) -> str:
    reasons: dict[str, list[str]] = {}
    for label, measurement, _ in _rows(report):
        for section in (measurement.accuracy, measurement.memory, measurement.latency):
            for key, reason in section.reasons.items():
                steps = reasons.setdefault(f"{key}: {reason}", [])
                if label not in steps and reason != NOT_MEASURED:
                    steps.append(label)
    lines = [f"- {reason} ({', '.join(labels)})" for reason, labels in reasons.items() if labels]
    return "\n\nNot measured:\n\n" + "\n".join(lines) if lines else ""


def _routing(report: Report) -> str:
    rows = []
    for label, measurement, _ in _rows(report):
        if layers := measurement.routing:
            rarest = min(layers, key=lambda layer: min(layer.tokens))
            expert = rarest.tokens.index(min(rarest.tokens))
            moved = max(layers, key=lambda layer: layer.shift or 0.0)
            shift = NOTHING if moved.shift is None else f"{number(moved.shift)} (layer {moved.layer})"
            fewest = f"{min(rarest.tokens):,} (layer {rarest.layer}, expert {expert})"
            rows.append([label, str(len(layers)), fewest, shift])
    if not rows:
        return ""
    table = _table(["step", "MoE layers", "fewest tokens for an expert", "largest shift"], rows)
    return f"## Routing\n\n{table}\n\nShift: share of the tokens that went to other experts than in the baseline."


def _step_ledger(step: Step) -> str:
    if step.ledger is None:
        return ""
    total, by_action = step.ledger.accounted()
    lines = [f"## {step.id}: what happened to the weights", ""]
    for action, count in by_action.items():
        if count:
            lines.append(f"- {action}: {count:,} parameters ({count / total:.1%})")
    for title, items in (
        ("Kept as they were", _kept(step.ledger)),
        ("Not treated as asked", _exceptions(step)),
        ("Starved experts (too few calibration tokens)", _starved(step.ledger.experts)),
    ):
        if items:
            lines += ["", f"{title}:", "", *(f"- {item}" for item in items)]
    return "\n".join(lines)


def _kept(ledger: Ledger) -> list[str]:
    return _grouped((row, row.reason) for row in ledger.weights if row.action == "kept")


def _exceptions(step: Step) -> list[str]:
    asked = step.options.get("group_size")

    def reason(row: LedgerRow) -> str:
        is_other = row.action == "quantized" and isinstance(asked, int) and row.group_size != asked
        if not is_other:
            return row.reason
        group = "one scale a row" if row.group_size is None else f"group size {row.group_size}"
        return f"{group} instead of {asked}" + (f": {row.reason}" if row.reason else "")

    assert step.ledger is not None
    return _grouped((row, reason(row)) for row in step.ledger.weights if row.action != "kept" and reason(row))


def _grouped(rows: Iterable[tuple[LedgerRow, str]]) -> list[str]:
    groups: dict[str, list[LedgerRow]] = {}
    for row, reason in rows:
        groups.setdefault(reason, []).append(row)
    items = []
    for reason, members in groups.items():
        names = ", ".join(f"`{row.name}`" for row in members[:SHOWN_NAMES])
        more = f" and {len(members) - SHOWN_NAMES} more" if len(members) > SHOWN_NAMES else ""
        parameters = sum(row.parameters for row in members)
        count = f"{len(members)} weight{'s' if len(members) > 1 else ''}"
        items.append(f"{reason}: {count}, {parameters:,} parameters ({names}{more})")
    return items


def _starved(experts: Sequence[ExpertRow]) -> list[str]:
    items = []
    for row in experts:
        if row.starved:
            described = [
                f"{expert} ({row.tokens[expert]:,} tokens" + (f", {row.policy[expert]})" if row.policy else ")")
                for expert in row.starved
            ]
            items.append(f"layer {row.layer}: expert {', '.join(described)}")
    return items


def _exports(report: Report) -> str:
    if not report.exports:
        return ""
    header = ["format", "path", "size", "max abs", "relative", "greedy equal"]
    rows = []
    for export in report.exports:
        row = [export.format, f"`{export.path}`", megabytes(export.bytes)]
        if export.parity is None:
            row += [f"not compared: {export.parity_reason or 'no reason given'}", NOTHING, NOTHING]
        else:
            row += [_cell(export.parity.get(key)) for key in ("max_abs", "relative", "greedy_equal")]
        rows.append(row)
    notes = ["Loaded back and compared with the live model's exact logits.", *map(export_note, report.exports)]
    return f"## Exports\n\n{_table(header, rows)}\n\n" + " ".join(note for note in notes if note)


def export_note(export: Export) -> str:
    """What a runtime's fast arithmetic changes beside the export itself; empty where nothing is known of it."""
    drift = (export.parity or {}).get("drift")
    if not isinstance(drift, Mapping):
        return ""
    level = (export.parity or {}).get("accuracy_level")
    return (
        f"{export.format} at accuracy_level {level} drifts from exact arithmetic by KL {number(drift['kl_mean'])} nats "
        f"a token, {number(100 * drift['top1_agreement'])} % of the first choices stay."
    )


def _environment(report: Report) -> str:
    lines = [f"- {key}: {_cell(value)}" for key, value in report.environment.items()]
    return "\n".join(["## Environment", "", *lines, f"- recipe: sha256 `{report.recipe_sha256}`"])


def _rows(report: Report) -> list[tuple[str, Measurement, Step | None]]:
    return [
        ("baseline", report.baseline.measurement, None),
        *((step.id, step.measurement, step) for step in report.steps),
    ]


def _parts(mappings: Iterable[ByPart | None]) -> list[str]:
    return list(dict.fromkeys(part for mapping in mappings for part in mapping or ()))


def _with_ratio(estimate: Estimate | None, ratio: Estimate | None) -> str:
    return estimate_text(estimate) + (f" (×{estimate_text(ratio)})" if ratio is not None else "")


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f" (×{number(ratio)})"


def _cell(value: object) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_cell(part)}" for key, part in value.items() if part is not None)
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    return number(value) if isinstance(value, float) else str(value)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
