"""What people and CI see of a gate: short enough, worst first, and harmless whatever a checkpoint calls its tensors."""

import re
import xml.etree.ElementTree as ET

import pytest

from compressor.gates.output import COMMENT_BYTES, SUMMARY_BYTES, to_github, to_junit, to_markdown, to_text


def a_check(status: str, rule: str = "perplexity_ratio", **others) -> dict:
    check = {
        "rule": rule,
        "group": "fidelity",
        "metric": rule,
        "baseline": None,
        "status": status,
        "value": 1.07,
        "ci95": [1.02, 1.12],
        "limit": {"max": 1.05},
        "n": 80,
        "items_needed": None,
        "minimum_detectable_effect": None,
        "where": None,
        "text": f"{rule} is 1.07 [1.02, 1.12]; at most 1.05 is allowed",
        "waiver": None,
    }
    return check | others


def a_result(*checks: dict, verdict: str = "regression", **others) -> dict:
    result = {
        "verdict": verdict,
        "candidate": "runs/int4",
        "baselines": ["runs/base"],
        "policy": {},
        "policy_sha256": "ab" * 32,
        "checks": list(checks),
        "seconds": 12.34,
    }
    return result | others


WAIVER = {"owner": "ana", "expires": "2027-01-31", "reason": "known, #12"}
ONE_OF_EACH = a_result(
    a_check("pass", "weight_bytes_ratio", group="cost"),
    a_check("waived", "tasks.piqa", group="tasks", waiver=WAIVER),
    a_check("unmeasured", "decode_latency_ratio", group="cost", value=None, ci95=None),
    a_check("inconclusive", "tasks.arc", group="tasks", items_needed=2100, minimum_detectable_effect=0.021),
    a_check("skipped", "kl_p99"),
    a_check("fail", "kl_mean"),
    a_check("fail", "scales", group="structure", value=None, ci95=None, limit=None, n=None, where="experts.7.w1_scale"),
)
WORST_FIRST = ["scales", "kl_mean", "tasks.arc", "decode_latency_ratio", "tasks.piqa", "kl_p99", "weight_bytes_ratio"]
HOSTILE = "a\x1b[31m\x00\r\n::error::owned <b>| `x` \u202e ]]> & \ud800 *all*"


def annotations(text: str, command: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(f"::{command} ")]


# --- all of them


@pytest.mark.parametrize("render", [to_text, to_markdown, to_junit])
def test_every_check_is_there_worst_first(render):
    """Structure before fidelity among the failures, then what is undecided, waived, passed."""
    text = render(ONE_OF_EACH)
    places = [re.search(rf"(?<=[`\" ]){rule}(?=[`\" ])", text).start() for rule in WORST_FIRST]
    assert places == sorted(places)


@pytest.mark.parametrize("render", [to_text, to_markdown, to_junit, to_github])
def test_names_from_a_stranger_do_no_harm(render):
    """No control character and no half of a pair survives, and no line of our own begins with a workflow command."""
    name = HOSTILE
    result = a_result(a_check("fail", name, where=name, text=name), candidate=name, baselines=[name, "b"])
    text = render(result)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]", text)
    assert text.encode()
    commands = [line for line in text.splitlines() if line.lstrip().startswith("::")]
    assert len(commands) == (1 if render is to_github else 0)


@pytest.mark.parametrize("render", [to_text, to_markdown, to_junit, to_github])
def test_the_same_result_gives_the_same_text(render):
    """Nothing depends on the time or on the order in which equal checks of other groups were made."""
    assert render(ONE_OF_EACH) == render(ONE_OF_EACH | {"checks": list(reversed(ONE_OF_EACH["checks"]))})


def test_among_failures_the_largest_excess_comes_first():
    """0.3 over a limit of 1 is worse than 0.2 over 10, and a value that is no number is worst."""
    mild = a_check("fail", "mild", limit={"max": 10.0}, ci95=[10.1, 10.2])
    strong = a_check("fail", "strong", limit={"min": 1.0}, ci95=[0.7, 0.9])
    broken = a_check("fail", "broken", value=None, ci95=None)
    text = to_text(a_result(mild, strong, broken))
    assert [line.split()[1] for line in text.splitlines() if line.startswith("fail ")] == ["broken", "strong", "mild"]


def test_a_waiver_is_told_with_owner_day_and_reason():
    """Who lets a failure pass answers for it in public."""
    assert "waived by ana until 2027-01-31: known, #12" in to_text(ONE_OF_EACH)


def test_the_sentence_is_not_repeated():
    """Where the sentence names the place and the items already, no remark does so again."""
    text = "experts.7 has NaN scales; about 2,100 items would settle it"
    check = a_check("inconclusive", where="experts.7", items_needed=2100, text=text)
    assert to_text(a_result(check)).count("2,100") == 1
    assert to_text(a_result(check)).count("experts.7") == 1


@pytest.mark.parametrize("render", [to_text, to_markdown, to_junit, to_github])
def test_notes_are_told(render):
    """Ten of them, and how many more there are."""
    text = render(ONE_OF_EACH | {"notes": [f"waiver number {place} covers nothing" for place in range(13)]})
    assert text.count("covers nothing") == 10
    assert "3 more notes are in the JSON output" in text


def test_several_baselines_are_told_apart():
    """With two baselines each check says which one it means."""
    check = a_check("pass", baseline="runs/last")
    assert "perplexity_ratio against runs/last" in to_text(a_result(check, baselines=["runs/base", "runs/last"]))


# --- terminal


@pytest.mark.parametrize("width", [60, 100])
def test_the_table_keeps_to_the_width(width):
    """Long names give way, sentences are wrapped."""
    long = a_check("fail", "tasks." + "long-name-" * 20, where="model.layers.11.mlp.experts.7." * 5)
    lines = to_text(a_result(long, *ONE_OF_EACH["checks"]), width).splitlines()
    assert max(map(len, lines)) <= width


def test_long_names_give_way_to_the_numbers():
    """A number that is cut would be another number."""
    text = to_text(a_result(a_check("fail", "tasks." + "long-name-" * 20)), 80)
    assert re.search(r"^fail +tasks\.long-name-[^ ]*…  1\.07 \[1\.02, 1\.12\] +at most 1\.05  80$", text, re.M)


def test_the_terminal_needs_no_colour():
    """The verdict and each status are words."""
    text = to_text(ONE_OF_EACH)
    assert text.startswith("REGRESSION: runs/int4 against runs/base\n")
    summary = " ".join(text.split())
    assert "2 fail, 1 inconclusive, 1 unmeasured, 1 waived, 1 skipped, 1 pass; policy sha256 abababababab;" in summary
    assert "\x1b" not in text


# --- Markdown


def test_a_short_result_is_whole():
    """Nothing is left out where all fits; what passed is folded away."""
    text = to_markdown(ONE_OF_EACH)
    assert "left out" not in text
    assert text.index("<details>") < text.index("`weight_bytes_ratio`")


@pytest.mark.parametrize("limit", [COMMENT_BYTES, SUMMARY_BYTES])
def test_markdown_keeps_to_its_bytes(limit):
    """20,000 checks with long sentences in three-byte letters: the size holds, failures stay, others are counted."""
    passed = [a_check("pass", f"slices.t/{place}", group="slices", text="長" * 500) for place in range(12_000)]
    undecided = [a_check("inconclusive", f"tasks.{place}", text="長" * 500) for place in range(8_000)]
    text = to_markdown(a_result(*passed, *undecided, a_check("fail", "kl_mean")), limit)
    assert 0.9 * limit < len(text.encode()) <= limit
    shown = len(re.findall(r"^\| (?:\*\*fail|inconclusive|pass)", text, re.M))
    left_out = int(re.search(r"([\d,]+) more checks are left out", text).group(1).replace(",", ""))
    assert shown + left_out == 20_001
    assert "**fail** | `kl_mean`" in text


def test_markdown_refuses_a_limit_that_nothing_fits():
    """The possible range is named."""
    with pytest.raises(ValueError, match="possible are 30000 to 1048576"):
        to_markdown(ONE_OF_EACH, 2_000_000)


def test_every_row_of_markdown_has_six_cells():
    """A bar in a name or a sentence does not open another column."""
    text = to_markdown(a_result(a_check("fail", "a|b", text="c|d *e* <script> _f_ g_h")))
    row = next(line for line in text.splitlines() if line.startswith("| **fail**"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 7
    assert row.endswith(r"| c\|d \*e\* &lt;script&gt; \_f\_ g_h |")


# --- JUnit


# What the schema of Jenkins' xunit plug-in (junit-10.xsd) allows where.
JUNIT = {
    "testsuites": ({"name", "time", "tests", "failures", "errors"}, {"testsuite"}),
    "testsuite": ({"name", "time", "tests", "failures", "errors", "skipped"}, {"properties", "testcase", "system-out"}),
    "properties": (set(), {"property"}),
    "property": ({"name", "value"}, set()),
    "testcase": ({"name", "classname", "time"}, {"failure", "error", "skipped", "system-out"}),
    "failure": ({"type", "message"}, set()),
    "error": ({"type", "message"}, set()),
    "skipped": ({"type", "message"}, set()),
    "system-out": (set(), set()),
}


def test_junit_has_the_shape_of_the_schema():
    """Only known elements and attributes, each where it belongs, also with names that XML cannot hold."""
    root = ET.fromstring(to_junit(a_result(*ONE_OF_EACH["checks"], a_check("fail", HOSTILE))))
    for parent in root.iter():
        attributes, children = JUNIT[parent.tag]
        assert set(parent.attrib) <= attributes
        assert {child.tag for child in parent} <= children
        if parent.tag == "testcase":
            assert {"name", "classname"} <= set(parent.attrib)


@pytest.mark.parametrize(("undecided", "outcomes"), [("fail", (2, 2, 2)), ("warn", (2, 0, 4)), ("pass", (2, 0, 4))])
def test_junit_counts_failures_errors_and_skipped(undecided, outcomes):
    """Undecided is an error, unless it is let through: then it is skipped, as what is waived."""
    suite = ET.fromstring(to_junit(ONE_OF_EACH | {"on_inconclusive": undecided})).find("testsuite")
    counted = tuple(len(list(suite.iter(kind))) for kind in ("failure", "error", "skipped"))
    assert counted == outcomes
    assert tuple(int(suite.get(kind)) for kind in ("failures", "errors", "skipped")) == outcomes
    assert suite.get("tests") == "7"


def test_junit_tells_the_statistics_of_each_check():
    """What a person wants to see of a test stands in its output."""
    cases = ET.fromstring(to_junit(ONE_OF_EACH)).iter("testcase")
    case = next(case for case in cases if case.get("name") == "tasks.arc")
    output = case.find("system-out").text
    for line in (
        "value: 1.07 [1.02, 1.12]",
        "limit: at most 1.05",
        "n: 80",
        "about 2,100 items would settle it (now 80)",
    ):
        assert line in output


def test_junit_names_are_unique():
    """CI systems merge test cases of one name."""
    root = ET.fromstring(to_junit(a_result(a_check("fail"), a_check("fail"), a_check("fail", where="x"))))
    names = [case.get("name") for case in root.iter("testcase")]
    assert sorted(names) == ["perplexity_ratio", "perplexity_ratio #2", "perplexity_ratio (x)"]


# --- GitHub


def test_github_escapes_as_its_runner_undoes_it():
    """Percent and line ends in the message, colon and comma in the title as well."""
    check = a_check("fail", "a:b,c%", text="100 % of: x, y", where="t")
    (line,) = to_github(a_result(check)).splitlines()
    assert line == "::error title=compress gate%3A fail%3A a%3Ab%2Cc%25::100 %25 of: x, y%0Awhere: t"


def test_github_gets_ten_of_a_type():
    """Of 25 failures nine are told and the tenth counts the other sixteen; warnings have ten of their own."""
    failures = [a_check("fail", f"tasks.{place}") for place in range(25)]
    warnings = [a_check("unmeasured", f"kl.{place}") for place in range(10)]
    text = to_github(a_result(*failures, *warnings) | {"on_inconclusive": "warn"})
    errors = annotations(text, "error")
    assert len(errors) == 10
    assert errors[9].startswith("::error title=compress gate%3A 16 more checks::16 fail")
    assert len(annotations(text, "warning")) == 10
    assert "more checks" not in "".join(annotations(text, "warning"))


def test_github_says_what_is_undecided_as_loudly_as_the_exit_code():
    """Inconclusive is an error, a warning if it is let through; waived is a notice, pass is silent."""
    text = to_github(ONE_OF_EACH)
    assert [len(annotations(text, command)) for command in ("error", "warning", "notice")] == [4, 0, 1]
    text = to_github(ONE_OF_EACH | {"on_inconclusive": "warn"})
    assert [len(annotations(text, command)) for command in ("error", "warning", "notice")] == [2, 2, 1]
    assert len(text.splitlines()) == 5


def test_notes_share_the_ten_notices():
    """Twelve waived checks and two notes: eight checks, the count of the others, the notes."""
    waived = [a_check("waived", f"tasks.{place}", waiver=WAIVER) for place in range(12)]
    notices = annotations(to_github(a_result(*waived, notes=["first", "second"])), "notice")
    assert len(notices) == 10
    assert notices[8].startswith("::notice title=compress gate%3A 4 more checks::")
    assert notices[9] == "::notice title=compress gate%3A notes::first%0Asecond"
