"""The page says what matters first, stays small, asks the network for nothing, and lets no text become markup."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import compressor.reports.html as package
from compressor.reports import (
    Accuracy,
    Estimate,
    ExpertRow,
    Export,
    Latency,
    LayerRouting,
    Ledger,
    LedgerRow,
    Measurement,
    Memory,
    Report,
)
from compressor.reports.html import MAX_BYTES, to_html

VOID = {"meta", "br", "link", "img", "input", "hr", "base", "source"}
HOSTILE = "</style></pre><script>alert(1)</script><img src=https://evil.example onerror=x>\"'\x00\x1b\u202e\ud800"


class Page(HTMLParser):
    """All elements of a page; fails where they are not nested as they should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def measured(perplexity: float, kl: float | None = None, name: str = "wiki") -> Measurement:
    by_text = {name: Estimate(perplexity, (perplexity - 1, perplexity + 1), 16)}
    reasons = {"kl_mean": "this is the baseline"} if kl is None else {}
    return Measurement(
        accuracy=Accuracy(
            perplexity=by_text,
            kl=None if kl is None else {name: Estimate(kl, (kl / 2, kl * 2), 16)},
            kl_mean=None if kl is None else Estimate(kl, (kl / 2, kl * 2), 16),
            reasons=reasons,
        ),
        memory=Memory(weight_bytes=1_000_000),
        latency=Latency(decode_ms_per_token={"1": Estimate(5.0, (4.0, 6.0), 5)}),
        routing=(LayerRouting(layer=0, tokens=(90, 10), shift=0.125),),
    )


def a_report(name: str = "demo/tiny-moe", text: str = "wiki", reason: str = "norms stay", gate: bool = True) -> Report:
    rows = [
        LedgerRow(name=f"q{k}{name}", action="quantized", reason="", parameters=100, bits=4.0, group_size=64)
        for k in range(6)
    ]
    rows.append(LedgerRow(name="norm", action="kept", reason=reason, parameters=400, bits=16.0))
    ledger = Ledger(weights=tuple(rows), experts=(ExpertRow(layer=1, tokens=(900, 3), starved=(1,), policy=None),))
    report = Report.start("ab" * 32, {"cpu": {"model": name}}, None, name, measured(20.0, name=text))
    report = report.after("prune", "prune", {"ratio": 0.25}, 3.0, None, measured(22.0, 0.1, text), None)
    report = report.after("quantize", "quantize", {"group_size": 128}, 3.0, 9, measured(25.0, 0.2, text), ledger)
    report = report.with_exports([Export(format="onnx", path="onnx", bytes=5, parity_reason="not installed")])
    checks = [
        {"metric": "weight_bytes_ratio", "rule": "weight_bytes_ratio", "status": "pass", "text": "small enough"},
        {
            "metric": "score_drop",
            "rule": "slices.arc/long",
            "group": "slices",
            "status": "fail",
            "text": f"worse {name}",
        },
    ]
    return report.with_gate({"verdict": "regression", "checks": checks}) if gate else report


def a_line(number: int, score: float, **others) -> dict:
    line = {
        "task": "arc",
        "item": number,
        "sha256": f"{number:064x}",
        "score": score,
        "prompt": f"question {number}",
        "prediction": "yes" if score else "no",
        "answer": "yes",
        "slice": "long" if number % 2 else "short",
        "confidence": 0.5 + number % 10 / 20,
        "margin": 0.5,
    }
    return line | others


def some_items(n: int = 40, **others) -> dict[str, list[dict]]:
    before = [a_line(number, float(number % 4 > 0), **others) for number in range(n)]
    after = [a_line(number, float(number % 3 > 0), **others) for number in range(n)]
    return {"baseline": before, "prune": before, "quantize": after}


@pytest.fixture(scope="module")
def usual_page() -> str:
    return to_html(a_report(), some_items())


# --- what it says


def test_the_verdict_comes_first(usual_page):
    """The first heading after the title is the verdict in a word, then the check that decided, then the figures."""
    text = usual_page
    assert re.search(r"<h2[^>]*>", text).start() == text.index('<h2 id="h-verdict" class="verdict regression">')
    assert text.index("✗</span> REGRESSION") < text.index("worse demo/tiny-moe") < text.index("What each step changed")


@pytest.mark.parametrize(
    "said",
    [
        '<span class="delta">×1.25 <span class="ci">[1.143, 1.368]</span></span>',  # perplexity against the baseline
        '<span class="delta">step: ×1.136 ',  # and against the step before: 25 / 22
        '<span class="delta">step: +0.1 ',  # growth of the KL
        "<li>accuracy.kl_mean: this is the baseline (baseline)</li>",
        "<b>10</b> <span>of 40 items; 6 wrong → right</span>",
        "<b>norms stay</b>: 1 weight, 400 parameters: <code>norm</code>",
        "<b>group size 64 instead of 128</b>: 6 weights, 600 parameters",
        " and 2 more</li>",
        "<li>layer 1: expert 1 (3 tokens)</li>",
        "<td>10 (expert 1)</td>",
        "not compared: not installed",
        '<pre class="command">compress run recipe.yaml</pre>',
        "All 16 flips on unperturbed prompts",
        "<dt>Since step</dt><dd>quantize</dd>",
        '<td class="name">long</td>',
        '<span class="status fail">✗ fail</span>',
    ],
)
def test_the_page_says(usual_page, said):
    """Every part of the report reaches the reader."""
    assert said in usual_page


def test_what_became_slower_is_said():
    """The whole interval above 1: the sentence stands under the verdict."""
    slow = replace(measured(20.0, 0.1), latency=Latency(decode_ms_per_token={"1": Estimate(9.0, (8.0, 10.0), 5)}))
    report = Report.start("0", {}, None, "m", measured(20.0)).after("prune", "prune", {}, 1.0, None, slow, None)
    assert "<b>Slower than the baseline</b>: decode at batch 1 (×1.8 [1.333, 2.5])." in to_html(report, {})


def test_a_report_without_items_or_gate_or_steps_is_a_page():
    """What is not there has no section."""
    page = to_html(a_report(gate=False), {})
    assert "No verdict" in page
    assert 'id="flips"' not in page
    bare = to_html(Report.start("0", {}, None, "m", measured(20.0)), {})
    assert "No step has been applied" in bare
    Page(bare)


def test_items_that_do_not_pair_are_said_so():
    """The figures stay, the flips are missing with the reason."""
    items = some_items()
    items["quantize"] = items["quantize"][:-1]
    page = to_html(a_report(), items)
    assert "the candidate has no item 39" in page
    assert "What each step changed" in page


def test_behaviour_is_shown_whatever_its_kind(monkeypatch):
    """A measured kind that this version does not know gets its table too."""
    report = a_report()
    document = report.to_json()
    measure = {"value": 0.25, "ci95": [0.2, 0.3], "n": 9}
    behaviour = {"robustness": {"arc": {"typos": measure, "case": None, "case_reason": "no letters"}}, "new": {"a": 3}}
    for part in (document["baseline"], *document["steps"]):
        part["measurement"]["behaviour"] = behaviour | {"calibration": {"arc": {"brier": measure}}}
    monkeypatch.setattr(Report, "to_json", lambda self: document)
    text = to_html(report, {})
    for said in ("<caption>Robustness</caption>", "arc · typos", "<caption>new</caption>", "arc · brier"):
        assert said in text
    assert "arc.case: no letters (baseline, prune, quantize)" in text


def test_a_text_that_broke_is_not_hidden():
    """A perplexity that is no number any more has no bar; its reason stands in the table."""
    report = Report.start("0", {}, None, "m", measured(20.0))
    report = report.after("prune", "prune", {}, 1.0, None, measured(float("nan"), 0.1), None)
    text = to_html(report, {})
    assert "<td>the ratio is not a finite number</td>" in text
    assert "<dt>Perplexity, worst text</dt><dd><b>no number</b> <span>wiki</span>" in text


# --- that it is well made


@pytest.mark.parametrize("hostile", ["", HOSTILE])
def test_the_page_is_well_formed_and_asks_for_nothing(hostile):
    """Elements nest, ids are unique and found, no script, no reference outside the page, whatever the names are."""
    report = a_report(name=f"m{hostile}", text=f"wiki{hostile}", reason=f"why{hostile}")
    items = some_items(prompt=f"p{hostile}", prediction=f"q{hostile}", answer=f"a{hostile}")
    items = {
        step: [line | {"task": f"t{hostile}", "slice": f"s{hostile}"} for line in lines]
        for step, lines in items.items()
    }
    text = to_html(report, items, reproduce=f"compress run {hostile}")
    page = Page(text)
    assert {tag for tag, _ in page.elements} & {"script", "img", "link", "iframe", "object", "embed", "base"} == set()
    for tag, attributes in page.elements:
        assert {"src", "srcset", "action", "data", "onerror", "onload", "style"} & set(attributes) == set(), tag
        assert attributes.get("href", "#").startswith("#")
    style = re.search(r"<style>(.*?)</style>", text, re.S).group(1)
    assert not re.search(r"url\(|@import|//[a-z]", style)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = [name for _, attributes in page.elements for name in (attributes.get("aria-labelledby") or "").split()]
    wanted += [attributes["href"][1:] for attributes in page.of("a")]
    assert set(wanted) <= set(ids)
    assert not re.search("[\x00-\x08\x0e-\x1f\u202e\ud800]", text)


def test_every_table_and_figure_is_named(usual_page):
    """For those who hear the page: captions, headers with a scope, titles and descriptions, a language, a skip link."""
    page = Page(usual_page)
    assert page.of("html")[0]["lang"] == "en"
    assert page.of("a")[0]["class"] == "skip"
    assert len(page.of("caption")) == len(page.of("table")) >= 8
    assert all("scope" in header for header in page.of("th"))
    assert len(page.of("figure")) == len(page.of("figcaption")) == 3
    for svg in page.of("svg"):
        assert svg.get("aria-labelledby") or svg.get("aria-label") or svg.get("aria-hidden")
    assert all("tabindex" in region for region in page.of("div") if region.get("class") == "scroll")


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_every_text_colour_has_contrast(scheme):
    """At least 4.5 : 1 on both grounds."""
    style = (Path(package.__file__).parent / "style.css").read_text()
    root = re.findall(r":root \{(.*?)\}", style, re.S)[scheme]
    colours = dict(re.findall(r"--(\w+): (#\w{6})", root))
    for name in ("text", "muted", "accent", "bad", "good", "warn"):
        for ground in ("page", "panel"):
            light, dark = sorted((luminance(colours[name]), luminance(colours[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ground)


# --- that it stays small


def test_flips_fill_the_page_and_the_others_are_counted():
    """20,000 flips with long prompts: the page holds under 1.5 MB, uses most of it, and says how many are missing."""
    before = [a_line(number, 1.0, prompt="ü" * 3000, slice=f"s{number % 900}") for number in range(20_000)]
    after = [line | {"score": 0.0} for line in before]
    text = to_html(a_report(), {"baseline": before, "quantize": after})
    assert 0.9 * MAX_BYTES < len(text.encode()) <= MAX_BYTES
    shown, total, left_out = re.search(r"([\d,]+) of ([\d,]+) flips are shown.*?; ([\d,]+) are left out", text).groups()
    assert total == "20,000"
    assert int(shown) == text.count('<details class="flip ')
    assert int(shown) + int(left_out.replace(",", "")) == 20_000


def test_a_report_that_is_too_long_is_cut_not_refused():
    """6,000 texts with names of 5,000 letters, 3,000 checks, 3,000 reasons: still a page under 1.5 MB."""
    names = [f"{number}" + "x" * 5000 for number in range(6000)]
    many = Measurement(accuracy=Accuracy(perplexity={name: Estimate(9.0, (8.0, 10.0), 4) for name in names}))
    rows = [LedgerRow(name=f"w{k}", action="kept", reason=names[k], parameters=1, bits=16.0) for k in range(3000)]
    report = Report.start("0", {}, None, "m", many)
    step = report.after("prune", "prune", {}, 1.0, None, many, Ledger(weights=tuple(rows))).steps[0]
    checks = [{"metric": "m", "status": "fail", "text": names[k]} for k in range(3000)]
    report = replace(report, steps=(step,)).with_gate({"verdict": "regression", "checks": checks})
    text = to_html(report, {})
    assert len(text.encode()) <= MAX_BYTES
    assert "REGRESSION" in text
    assert "more rows are left out here; report.json holds all of them" in text
    Page(text)
