"""Charts put their marks where the numbers are, and say what they show without being seen."""

import math
import xml.etree.ElementTree as ET

import pytest

from compressor.reports import Estimate
from compressor.reports.html.charts import interval_bars, reliability_diagram, ticks, token_bars
from compressor.reports.html.reliability import Bin


def drawn(svg: str) -> ET.Element:
    return ET.fromstring(svg)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 0.0101), (0.9967, 1.0085), (-3, 900), (0, 0), (1, 1), (1.0, 1e6), (-2e-9, 0)]
)
def test_ticks_are_round_and_cover_the_range(low, high):
    """Steps of 1, 2 or 5 times a power of ten, at most eight of them."""
    marks = ticks(low, high)
    step = marks[1] - marks[0]
    assert marks[0] <= low + 1e-9 * step
    assert marks[-1] >= high - 1e-9 * step
    assert 2 <= len(marks) <= 8
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)


def test_bars_reach_from_the_origin_to_the_value():
    """On an axis from 0.9 to 1.2, bars from 1 to 1.2 and to 0.9 lie on either side of 1, one twice the other."""
    rows = [("a", Estimate(1.2, (1.1, 1.2), 9)), ("b", Estimate(0.9, None, 9))]
    svg = drawn(interval_bars("c", "Ratio", rows, 1.0))
    first, second = ({key: float(bar.get(key)) for key in ("x", "width")} for bar in svg.iter("rect"))
    origin = float(next(path for path in svg.iter("path") if path.get("class") == "origin").get("d")[1:].split()[0])
    assert first["x"] == pytest.approx(origin)
    assert second["x"] + second["width"] == pytest.approx(origin, abs=0.2)
    assert first["width"] == pytest.approx(2 * second["width"], abs=0.3)
    assert len([path for path in svg.iter("path") if path.get("class") == "whisker"]) == 1


def test_the_diagram_puts_marks_at_confidence_and_accuracy():
    """On the diagonal a mark is as far to the right as it is up; the two models have different shapes."""
    before, after = (Bin(0.25, 0.25, (0.1, 0.4), 20),), (Bin(0.75, 0.5, (0.4, 0.6), 20),)
    svg = drawn(reliability_diagram("r", "Reliability", before, after))
    circle = next(svg.iter("circle"))
    square = next(element for element in svg.iter("rect") if element.get("class") == "after")
    left, bottom, side = 46, 350, 340
    assert float(circle.get("cx")) - left == pytest.approx(0.25 * side)
    assert bottom - float(circle.get("cy")) == pytest.approx(0.25 * side)
    assert float(square.get("x")) + 4 - left == pytest.approx(0.75 * side)
    assert bottom - float(square.get("y")) - 4 == pytest.approx(0.5 * side)


def test_a_chart_tells_its_numbers_to_those_who_do_not_see_it():
    """Title and description are there and referred to; names are escaped."""
    svg = drawn(interval_bars("c", "KL by text", [('a<b> & "c"', Estimate(0.5, (0.4, 0.6), 9))], 0.0))
    assert svg.get("aria-labelledby").split() == [svg.find("title").get("id"), svg.find("desc").get("id")]
    assert svg.find("title").text == "KL by text"
    assert 'a<b> & "c": 0.5 [0.4, 0.6]' in svg.find("desc").text


def test_token_bars_have_one_bar_an_expert():
    """The tallest is as high as the drawing, an expert without tokens has no height, the line is the equal share."""
    svg = drawn(token_bars("Layer 0", (0, 300, 100, 0)))
    bars = svg.find("path").get("d").split("M")[1:]
    assert [bar.partition("v")[2].partition("h")[0] for bar in bars] == ["-0.0", "-30.0", "-10.0", "-0.0"]
    assert float(svg.find("line").get("y1")) == pytest.approx(20.0)
    assert svg.get("aria-label") == "Layer 0"
