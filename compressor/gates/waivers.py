"""Failures that somebody answers for: they stay visible, and stop counting until their day."""

import datetime
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from compressor.gates.check import Check
from compressor.gates.policy import Waiver


def waive(checks: Sequence[Check], waivers: Sequence[Waiver], today: datetime.date) -> list[Check]:
    """The checks, those that a waiver covers marked as waived; one that has run out is mentioned and does nothing."""
    return [_waived(check, waivers, today) for check in checks]


def unused(checks: Sequence[Check], waivers: Sequence[Waiver]) -> list[Waiver]:
    """Waivers that cover no check: their rule is misspelt, or what they excused is mended."""
    return [waiver for waiver in waivers if not any(_covers(waiver, check) for check in checks)]


def _waived(check: Check, waivers: Sequence[Waiver], today: datetime.date) -> Check:
    if check.status in ("pass", "skipped"):
        return check
    for waiver in waivers:
        if not _covers(waiver, check):
            continue
        if waiver.expires < today:
            check = replace(check, text=f"{check.text}; the waiver of {waiver.owner} ran out on {waiver.expires}")
            continue
        text = f"{check.text}; waived ({check.status}) by {waiver.owner} until {waiver.expires}: {waiver.reason}"
        return replace(check, status="waived", text=text, waiver=waiver)
    return check


def _covers(waiver: Waiver, check: Check) -> bool:
    # Structural damage is nothing that anybody can answer for.
    return check.group != "structure" and fnmatchcase(check.rule or check.metric, waiver.rule)
