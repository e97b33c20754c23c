"""A gate's result as GitHub workflow commands, which become annotations of the run."""

from compressor.gates.output.checks import (
    UNDECIDED,
    Check,
    Result,
    counts,
    is_let_through,
    label,
    notes,
    plain,
    remarks,
    worst_first,
)

MOST = 10  # GitHub keeps ten annotations of a type in a step and drops the others without a word
LONGEST_TITLE = 200


def to_github(result: Result) -> str:
    """Return `::error`, `::warning` and `::notice` commands, at most ten of each, worst first.

    Where there are more than ten of a type, the tenth says how many are left out. What could not be decided is an
    error, a warning if `on_inconclusive` lets it through; waived checks are notices, passed ones say nothing.
    """
    lines, said = [], notes(result)
    for command in ("error", "warning", "notice"):
        most = MOST - 1 if command == "notice" and said else MOST
        checks = [check for check in worst_first(result) if _command(check, result) == command]
        shown = checks if len(checks) <= most else checks[: most - 1]
        for check in shown:
            title = f"compress gate: {check['status']}: {label(check, result)}"
            lines.append(_line(command, title, "\n".join([plain(check["text"]), *remarks(check)])))
        if left_out := checks[len(shown) :]:
            message = f"{counts(left_out)}; the job summary and the JSON output list them"
            lines.append(_line(command, f"compress gate: {len(left_out):,} more checks", message))
    if said:
        lines.append(_line("notice", "compress gate: notes", "\n".join(said)))
    return "".join(lines)


def _command(check: Check, result: Result) -> str | None:
    if check["status"] in UNDECIDED:
        return "warning" if is_let_through(check, result) else "error"
    return {"fail": "error", "waived": "notice"}.get(check["status"])


def _line(command: str, title: str, message: str) -> str:
    return f"::{command} title={_property(plain(title, LONGEST_TITLE))}::{_data(message)}\n"


def _data(text: str) -> str:
    """Escaped as the runner undoes it; the percent sign goes first."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
