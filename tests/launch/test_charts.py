"""What every chart in a page keeps to."""

import itertools
import re
import xml.etree.ElementTree

import numpy as np
import pytest

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


# How colours look to those who lack one of three kinds of cones: Machado, Oliveira and Fernandes (2009), severity 1.
SIGHT = {
    "all cones": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(colour: str, sight: object) -> np.ndarray:
    """CIELAB of a colour as somebody sees it."""
    srgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    xyz = to_xyz @ np.clip(np.array(sight) @ linear, 0, 1) / [0.95047, 1.0, 1.08883]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("theme", [charts._LIGHT, charts._DARK], ids=["light", "dark"])
def test_the_first_six_colours_differ_for_the_colour_blind_too(theme, sight):
    seen = [lab(theme[f"s{i}"], SIGHT[sight]) for i in range(6)]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 20
