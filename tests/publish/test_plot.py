import copy
import struct
import zlib
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from abliterate.publish import plot
from abliterate.publish.plot import plot_selection

TOKENS = ["<|im_end|>", "\n", "<|im_start|>", "$x_1$", "日本"]


@pytest.fixture
def selection(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["selection"]


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Keeps the figures that are drawn."""
    drawn: list[Figure] = []

    class Kept(Figure):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **keywords)
            drawn.append(self)

    monkeypatch.setattr(plot, "Figure", Kept)
    return drawn


def _chunks(png: bytes) -> list[bytes]:
    kinds, at = [], 8
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        assert (
            zlib.crc32(png[at + 4 : at + 8 + length]) == struct.unpack(">I", png[at + 8 + length : at + 12 + length])[0]
        )
        kinds.append(kind)
        at += 12 + length
    return kinds


@pytest.mark.filterwarnings("error")
def test_same_selection_same_bytes(tmp_path: Path, selection: dict[str, Any]) -> None:
    before = dict(matplotlib.rcParams)
    for name in ("a.png", "b.png"):
        plot_selection(copy.deepcopy(selection), tmp_path / name, TOKENS)
    first = (tmp_path / "a.png").read_bytes()
    assert first == (tmp_path / "b.png").read_bytes()
    assert set(_chunks(first)) == {b"IHDR", b"pHYs", b"IDAT", b"IEND"}, "no texts or times"
    assert struct.unpack(">II", first[16:24]) == (1400, 1330)
    assert dict(matplotlib.rcParams) == before


def test_every_measured_score_is_a_point(tmp_path: Path, selection: dict[str, Any], figure: list[Figure]) -> None:
    plot_selection(selection, tmp_path / "a.png", TOKENS)
    for axes, score in zip(figure[0].axes, ("bypass", "induce", "kl"), strict=True):
        marks = [line for line in axes.lines if line.get_marker() not in ("None", "") and line.get_markersize() < 17]
        drawn = [(x, round(y, 9)) for line in marks for x, y in zip(*line.get_data(), strict=True)]
        measured = [(c["layer"], round(c[score], 9)) for c in selection["candidates"] if c[score] is not None]
        assert sorted(drawn) == sorted(measured)
        early = {c["layer"] for c in selection["candidates"] if c["status"] == "screened" and c[score] is not None}
        faint = {int(x) for line in marks if (line.get_alpha() or 1) < 0.5 for x in line.get_xdata()}
        assert faint == early


def test_pick_and_thresholds(tmp_path: Path, selection: dict[str, Any], figure: list[Figure]) -> None:
    plot_selection(selection, tmp_path / "a.png")
    bypass, induce, kl = figure[0].axes
    for axes, score in ((bypass, "bypass"), (induce, "induce"), (kl, "kl")):
        rings = [line for line in axes.lines if line.get_markersize() == 17]
        assert [(list(r.get_xdata()), list(r.get_ydata())) for r in rings] == [([14], [selection["pick"][score]])]
    levels = [
        {line.get_ydata()[0] for line in axes.lines if line.get_linestyle() in ("--", ":")} for axes in figure[0].axes
    ]
    assert levels == [{8.713}, {0.0, -10.42}, {0.1}]
    assert [patch.get_x() for patch in bypass.patches] == [23.5]
    assert "layer 14" in figure[0].get_suptitle()
    assert "no candidate" not in figure[0].get_suptitle()


def test_tokens_name_the_positions(tmp_path: Path, selection: dict[str, Any], figure: list[Figure]) -> None:
    plot_selection(selection, tmp_path / "a.png", TOKENS)
    texts = [text.get_text() for text in figure[0].legends[0].get_texts()]
    expected = ["−1  '\\u65e5\\u672c'", "−2  '$x_1$'", "−3  '<|im_start|>'", "−4  '\\n'", "−5  '<|im_end|>'"]
    assert texts == expected
    assert not any(text.get_parse_math() for text in figure[0].legends[0].get_texts())


def test_odd_selections(tmp_path: Path, selection: dict[str, Any], figure: list[Figure]) -> None:
    row = {"position": -12, "layer": 0, "bypass": None, "induce": 1.0, "kl": 0.0, "prompts": 1, "status": "picked"}
    pick = {key: row[key] for key in ("position", "layer", "bypass", "induce", "kl")}
    odd = {
        **selection,
        "candidates": [row],
        "pick": pick,
        "relaxed": True,
        "baseline": {"harmful": None, "harmless": None},
    }
    plot_selection(odd, tmp_path / "a.png", None)
    assert "no candidate passed the KL bound" in figure[0].get_suptitle()
    many = [{**row, "position": p, "layer": i, "bypass": 1.0} for p in range(-12, 0) for i in range(3)]
    plot_selection({**odd, "candidates": many}, tmp_path / "b.png", ["tok" * 20] * 12)
    pixels = imread(tmp_path / "b.png")[..., :3]
    assert np.all(pixels[:, :3] == 1) and np.all(pixels[:, -3:] == 1), "nothing runs over the edges"


def test_colours_differ_without_colour_vision() -> None:
    """Any two neighbouring positions differ in lightness or in marker."""
    lightness = [
        sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), to_rgb(colour), strict=True)) for colour in plot._COLOURS
    ]
    pairs = zip(
        zip(lightness, plot._MARKERS, strict=False), zip(lightness[1:], plot._MARKERS[1:], strict=False), strict=False
    )
    assert all(a[1] != b[1] and abs(a[0] - b[0]) > 0.04 for a, b in pairs)
