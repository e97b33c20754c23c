"""A gate's result as JUnit XML, which every CI system draws as a list of tests."""

import xml.etree.ElementTree as ET

from compressor.gates.output.checks import (
    UNDECIDED,
    Check,
    Result,
    is_let_through,
    label,
    limit_text,
    notes,
    number,
    plain,
    remarks,
    value_text,
    worst_first,
)

SUITE = "compress gate"


def to_junit(result: Result) -> str:
    """Return one test case a check, worst first: `failure` where it fails, `error` where it could not be decided.

    Waived checks are `skipped`; so is what could not be decided, if `on_inconclusive` lets it through. JUnit has no
    warning: a check that only warns is a passed test that says so in its output.
    """
    checks = worst_first(result)
    root = ET.Element("testsuites", name=SUITE)
    suite = ET.SubElement(root, "testsuite", name=SUITE)
    properties = ET.SubElement(suite, "properties")
    for name in ("candidate", "baselines", "verdict", "policy_sha256"):
        value = result.get(name)
        shown = ", ".join(value) if isinstance(value, list) else value
        ET.SubElement(properties, "property", name=name, value=plain(shown or "none"))
    taken: dict[tuple[str, str], int] = {}
    for check in checks:
        case = ET.SubElement(suite, "testcase", classname=plain(check["group"]), name=_name(check, result, taken))
        if kind := _kind(check, result):
            outcome = ET.SubElement(case, kind, message=plain(check["text"]))
            if kind != "skipped":
                outcome.set("type", check["status"])
                outcome.text = "\n".join([plain(check["text"]), *remarks(check)])
        ET.SubElement(case, "system-out").text = _statistics(check)
    if said := notes(result):
        ET.SubElement(suite, "system-out").text = "\n".join(said)
    for element in (root, suite):
        element.set("tests", str(len(checks)))
        element.set("failures", str(len(suite.findall("testcase/failure"))))
        element.set("errors", str(len(suite.findall("testcase/error"))))
        element.set("time", f"{result.get('seconds') or 0.0:.3f}")
    suite.set("skipped", str(len(suite.findall("testcase/skipped"))))
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _kind(check: Check, result: Result) -> str | None:
    if check["status"] in UNDECIDED:
        return "skipped" if is_let_through(check, result) else "error"
    return {"fail": "failure", "waived": "skipped", "skipped": "skipped"}.get(check["status"])


def _name(check: Check, result: Result, taken: dict[tuple[str, str], int]) -> str:
    """The check's name with its tensor or file, numbered where it repeats: CI systems merge cases of one name."""
    where = f" ({plain(check['where'], 300)})" if check.get("where") else ""
    name = label(check, result) + where
    key = (check["group"], name)
    taken[key] = taken.get(key, 0) + 1
    return name if taken[key] == 1 else f"{name} #{taken[key]}"


def _statistics(check: Check) -> str:
    lines = [f"status: {check['status']}", plain(check["text"])]
    lines += [f"value: {value_text(check)}", f"limit: {limit_text(check)}", f"n: {number(check.get('n'))}"]
    return "\n".join([*lines, *remarks(check)])
