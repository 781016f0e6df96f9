"""What every chart in a page keeps to."""

import re
import xml.etree.ElementTree

from launch import charts


def drawn():
    figure = charts.new_figure(400, 200)
    axes = charts.add_axes(figure, (60, 10, 390, 160), x="step, <n>", y="loss")
    axes.plot([0, 1], [2, 1], color=charts.SERIES[0], gid=charts.gid("line"), label="one", clip_on=False)
    charts.add_dot(axes, 1, 1, 8, charts.SERIES[1], css="mark", title="a <b> & \"c\" 'd'")
    axes.legend()
    return charts.svg(figure, 'of "us" & them', "chart")


def test_the_same_chart_gives_the_same_text():
    assert drawn() == drawn()


def test_text_stays_text_and_is_escaped():
    root = xml.etree.ElementTree.fromstring(drawn().replace("role=img", ""))
    texts = [element.text for element in root.iter() if element.tag in ("text", "title")]
    assert {"step, <n>", "loss", "one", "a <b> & \"c\" 'd'"} <= set(texts)
    assert root.get("aria-label") == 'of "us" & them'


def test_a_chart_refers_to_nothing_and_has_no_colours_of_its_own():
    text = drawn()
    assert not re.search(r"href|url\(|\bid=|https?:", text)
    for colour in (charts.INK, charts.SOFT, charts.LINE, *charts.SERIES):
        assert colour not in text
    defined = set(re.findall(r"--(\w+):", charts.palette()))
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= defined


def test_light_and_dark_define_the_same_colours():
    light, dark = charts.palette().split("@media")
    assert re.findall(r"--(\w+):", light) == re.findall(r"--(\w+):", dark)
