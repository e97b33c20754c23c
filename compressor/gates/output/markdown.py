"""A gate's result in Markdown: a CI job's summary, or a comment on a pull request."""

import re

from compressor.gates.output.checks import (
    NOTHING,
    Check,
    Result,
    against,
    counts,
    label,
    limit_text,
    notes,
    number,
    plain,
    remarks,
    value_text,
    worst_first,
)

SUMMARY_BYTES = 1024 * 1024  # GitHub drops a larger job summary whole
COMMENT_BYTES = 64_000  # a comment holds 65,536 characters
LEAST_BYTES = 30_000  # what the lines around the tables can take
LONGEST_SENTENCE = 600

HEADER = "| status | check | value [95 %] | limit | n | |\n| --- | --- | --- | --- | --- | --- |\n"
PASSED = "\n<details><summary>Checks that passed</summary>\n\n"
END_OF_PASSED = "\n</details>\n"


def to_markdown(result: Result, limit: int = SUMMARY_BYTES) -> str:
    """Return the verdict and a table of the checks, worst first, in at most `limit` bytes of UTF-8 (1 MiB at most).

    Where the checks do not fit, the mildest are left out and counted by status.
    """
    if not LEAST_BYTES <= limit <= SUMMARY_BYTES:
        raise ValueError(f"limit is {limit} bytes; possible are {LEAST_BYTES} to {SUMMARY_BYTES}")
    checks = worst_first(result)
    head = [
        f"## Gate: {result['verdict'].upper()}",
        f"{_code(result['candidate'])} against {_code(against(result))}: {counts(checks)}.",
    ]
    foot = f"Policy sha256 {_code(result.get('policy_sha256') or NOTHING)}; {result.get('seconds') or 0.0:.1f} s."
    foot = "\n\n".join([*(f"Note: {_escaped(note)}" for note in notes(result)), foot])
    text = "\n\n".join(head) + "\n\n"
    # All that may still be added besides rows, so that it always fits.
    room = limit - len(f"{text}{HEADER}{PASSED}{HEADER}{END_OF_PASSED}{_left_out(checks)}\n{foot}\n".encode())
    shown, rows = 0, []
    for check in checks:
        row = _row(check, result)
        room -= len(row.encode())
        if room < 0:
            break
        rows.append(row)
        shown += 1
    first_passed = sum(check["status"] != "pass" for check in checks[:shown])
    if first_passed:
        text += HEADER + "".join(rows[:first_passed])
    if first_passed < shown:
        text += PASSED + HEADER + "".join(rows[first_passed:]) + END_OF_PASSED
    if shown < len(checks):
        text += _left_out(checks[shown:])
    return f"{text}\n{foot}\n"


def _left_out(checks: list[Check]) -> str:
    return f"\n{len(checks):,} more checks are left out here: {counts(checks)}. The JSON output holds all of them.\n"


def _row(check: Check, result: Result) -> str:
    says = [] if check["status"] == "pass" else [plain(check["text"]), *remarks(check)]
    cells = (
        f"**{check['status']}**" if check["status"] == "fail" else check["status"],
        _code(label(check, result)),
        value_text(check),
        _escaped(limit_text(check)),
        number(check.get("n")),
        "<br>".join(_escaped(plain(sentence, LONGEST_SENTENCE)) for sentence in says),
    )
    return "| " + " | ".join(cells) + " |\n"


def _code(value: object) -> str:
    """A code span, also inside a table; a backtick would end it."""
    return "`" + plain(value, 400).replace("`", "'").replace("|", "\\|") + "`"


def _escaped(text: str) -> str:
    """Text without markup or HTML. Underscores inside a word are no markup and stay."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w))", r"\\\1", text)
