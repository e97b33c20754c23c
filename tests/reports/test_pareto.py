"""Which points are worth their bytes, and a picture that needs no colour."""

import itertools
import random
import re
from xml.etree import ElementTree

from compressor.reports.estimate import Estimate
from compressor.reports.pareto import Point, dominators, front_table, pareto_svg

SVG = "{http://www.w3.org/2000/svg}"
LABELS = {"x_label": "MB", "y_label": "KL"}


def point(name, size, loss, ci95=None):
    return Point(name, size, Estimate(loss, ci95, 8))


def drawn(points):
    return ElementTree.fromstring(pareto_svg(points, title="a < b", **LABELS))


def test_the_front_is_what_no_other_point_beats():
    """Against the definition, over 200 random points with ties; each dominator is on the front and really dominates."""
    generator = random.Random(0)
    points = [point(str(i), generator.randint(1, 30), generator.randint(1, 30) / 10) for i in range(200)]
    beaten = dominators(points)

    def beats(one, other):
        sizes, losses = (one.bytes, other.bytes), (one.loss.value, other.loss.value)
        return sizes[0] <= sizes[1] and losses[0] <= losses[1] and (sizes[0], losses[0]) != (sizes[1], losses[1])

    front = {p.name for p in points if not any(beats(q, p) for q in points)}
    assert {name for name, by in beaten.items() if not by} == front
    by_name = {p.name: p for p in points}
    for name, by in beaten.items():
        assert set(by) == {other for other in front if beats(by_name[other], by_name[name])}


def test_equal_points_are_both_on_the_front():
    """Neither is better in anything."""
    assert dominators([point("a", 5, 0.1), point("b", 5, 0.1)]) == {"a": (), "b": ()}


def test_the_best_dominator_is_named_with_what_it_gains():
    """c is beaten by a (lower KL) and b; the table names a first, and the gain."""
    table = front_table([point("a", 4e6, 0.1), point("b", 3e6, 0.2), point("c", 5e6, 0.3)])
    assert "| c | 5.00 MB | 0.3 | dominated by a: 20 % smaller, KL 0.2 lower; 1 more do |" in table
    assert "| b | 3.00 MB | 0.2 | on the front |" in table


def test_dominance_within_noise_is_marked():
    """A point whose loss cannot be told from its dominator's is not called worse without saying so."""
    points = [point("a", 4e6, 0.10), point("b", 5e6, 0.11)]
    assert "cannot be told apart" in front_table(points, lambda one, other: {one, other} == {"a", "b"})
    assert "cannot be told apart" not in front_table(points)


def test_the_drawing_fills_the_front_and_hollows_the_rest():
    """Three points, one dominated: two black circles and a white one, each where it belongs."""
    circles = list(drawn([point("a", 4e6, 0.1), point("b", 3e6, 0.2), point("c", 5e6, 0.3)]).iter(f"{SVG}circle"))
    circles.sort(key=lambda circle: -float(circle.get("cy")))  # lowest loss first
    assert [circle.get("fill") for circle in circles] == ["#000000", "#000000", "#ffffff"]
    across = [float(circle.get("cx")) for circle in circles]
    assert across[1] < across[0] < across[2]


def test_the_drawing_is_grey_whole_and_described():
    """Every colour is a grey, nothing is fetched, names are escaped, the description has each point's figures."""
    text = pareto_svg([point("bits=2 <&>", 4e6, 0.1, (0.05, 0.2)), point("b", 3e6, 0.2)], title="t", **LABELS)
    colours = re.findall(r"#([0-9a-f]{6})", text)
    assert colours
    assert all(colour[:2] == colour[2:4] == colour[4:] for colour in colours)
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"]
    tree = ElementTree.fromstring(text)
    assert "bits=2 <&>" in [node.text for node in tree.iter(f"{SVG}text")]
    description = tree.find(f"{SVG}desc").text
    assert "bits=2 <&>: 4.00 MB, KL 0.1 [0.05, 0.2], on the front." in description


def test_error_bars_end_at_the_interval():
    """On a linear axis the bar's ends lie as far from the point as the interval's ends from the value."""
    points = [point("a", 4e6, 0.2, (0.1, 0.5)), point("b", 3e6, 0.4, (0.3, 0.45))]
    tree = drawn(points)
    centres = [float(circle.get("cy")) for circle in tree.iter(f"{SVG}circle")]
    unit = (centres[0] - centres[1]) / 0.2  # pixels a nat
    bars = [node.get("d") for node in tree.iter(f"{SVG}path") if node.get("stroke") == "#555555"]
    low, high = map(float, re.match(r"M[\d.]+ ([\d.]+)V([\d.]+)", bars[0]).groups())
    assert abs(low - centres[0] - 0.1 * unit) < 0.2
    assert abs(centres[0] - high - 0.3 * unit) < 0.2


def test_losses_of_different_orders_get_a_logarithmic_axis():
    """Points at 0.001, 0.1 and 10 are equally far apart."""
    heights = [float(c.get("cy")) for c in drawn([point("a", 3, 10), point("b", 4, 0.1), point("c", 5, 0.001)]).iter(f"{SVG}circle")]  # fmt: skip  # noqa: E501
    assert abs((heights[1] - heights[0]) - (heights[2] - heights[1])) < 0.2


def test_labels_do_not_cover_each_other():
    """Ten points in one place still have ten readable names."""
    points = [point(f"variant number {i}", 3e6 + i * 1e3, 0.2 + i * 1e-4) for i in range(10)]
    names = [node for node in drawn(points).iter(f"{SVG}text") if (node.text or "").startswith("variant")]
    boxes = [(float(n.get("x")), float(n.get("y")), 6.4 * len(n.text)) for n in names]
    assert len(boxes) == 10
    for (x, y, width), (x2, y2, width2) in itertools.combinations(boxes, 2):
        assert x + width <= x2 or x2 + width2 <= x or abs(y - y2) >= 12 - 0.1


def test_no_points_make_a_drawing_too():
    """A sweep in which every run failed still writes its picture."""
    assert "nothing was measured" in [node.text for node in drawn([]).iter(f"{SVG}text")]
