"""A gate's result for a terminal: a table in plain text, in which the status is a word."""

import textwrap

from compressor.gates.output.checks import (
    NOTHING,
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

HEADER = ("STATUS", "CHECK", "VALUE [95 %]", "LIMIT", "N")
NARROWEST = 60
# Lines of a sentence start with this and never with the words themselves: CI runners obey a line that begins with `::`.
MARGIN = "  | "


def to_text(result: Result, width: int = 100) -> str:
    """Return the verdict and a table of all checks, worst first, in lines of at most `width` characters (60 or more).

    Below each check that has not passed stands what is wrong, where, and what would settle it. Structural rules that
    hold make one line.
    """
    width = max(width, NARROWEST)
    whole = worst_first(result)
    sound = [check for check in whole if check["group"] == "structure" and check["status"] == "pass"]
    checks = [check for check in whole if check not in sound]
    head = f"{result['verdict'].upper()}: {plain(result['candidate'], 200)} against {against(result)}"
    policy = f"policy sha256 {plain(result.get('policy_sha256') or NOTHING, 64)[:12]}"
    tail = f"{counts(whole)}; {policy}; {result.get('seconds') or 0.0:.1f} s"
    lines = [*_wrapped(head, width), *_wrapped(tail, width), ""]
    rows = [
        (check["status"], label(check, result), value_text(check), limit_text(check), number(check.get("n")))
        for check in checks
    ]
    folded = [("pass", "structure", f"{len(sound)} rules", NOTHING, NOTHING)] if sound else []
    widths = _widths([HEADER, *rows, *folded], width)
    lines.append(_row(HEADER, widths))
    for check, row in zip(checks, rows, strict=True):
        lines.append(_row(row, widths))
        if check["status"] != "pass":
            for sentence in (plain(check["text"]), *remarks(check)):
                lines += textwrap.wrap(f"{MARGIN}{sentence}", width, subsequent_indent=MARGIN, break_on_hyphens=False)
    lines += [_row(row, widths) for row in folded]
    for note in notes(result):
        lines += ["", *_wrapped(f"note: {note}", width)]
    return "\n".join(lines) + "\n"


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)


def _widths(rows: list[tuple[str, ...]], width: int) -> list[int]:
    """Widths of the columns; names give way first, then limits, so that the numbers stay whole."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    for column, least in ((1, 24), (3, 12), (2, 16), (1, 14), (3, 8), (2, 8)):
        too_wide = sum(widths) + 2 * (len(widths) - 1) - width
        if too_wide > 0:
            widths[column] = max(min(least, widths[column]), widths[column] - too_wide)
    return widths


def _row(cells: tuple[str, ...], widths: list[int]) -> str:
    fitted = [
        cell if len(cell) <= width else cell[: width - 1] + "…" for cell, width in zip(cells, widths, strict=True)
    ]
    return "  ".join(cell.ljust(width) for cell, width in zip(fitted, widths, strict=True)).rstrip()
