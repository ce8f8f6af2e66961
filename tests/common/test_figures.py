"""Figures: a PNG of the given size, written only when the drawing is complete, without touching pyplot."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.figures import COLOURS, distributions, figure, look
from common.phases import ROOT


def png_size(file: Path) -> tuple[int, int]:
    header = file.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def test_panels_come_row_by_row_and_the_size_is_that_of_one(tmp_path: Path) -> None:
    file = tmp_path / "grid.png"
    with figure(file, rows=2, columns=3, size=(2.0, 1.5), title="six", sharey=True) as panels:
        assert [axes.get_subplotspec().rowspan.start for axes in panels] == [0, 0, 0, 1, 1, 1]  # type: ignore[union-attr]
        panels[0].plot([0, 1], [0, 100])
        assert panels[5].get_ylim()[1] >= 100  # one scale for all
    assert png_size(file) == (3 * 220, 2 * 165)


def _break_off(file: Path) -> None:
    with figure(file) as [axes]:
        axes.plot([1, 2])
        raise ValueError("broken")


def test_a_drawing_that_fails_leaves_the_older_file(tmp_path: Path) -> None:
    file = tmp_path / "old.png"
    file.write_bytes(b"old")
    with pytest.raises(ValueError, match="broken"):
        _break_off(file)
    assert file.read_bytes() == b"old"
    with figure(file) as [axes]:
        axes.plot([1, 2])
    assert png_size(file) == (770, 462)


def test_pyplot_is_not_imported(tmp_path: Path) -> None:
    before = "matplotlib.pyplot" in sys.modules
    with figure(tmp_path / "one.png"):
        pass
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_distributions_fill_their_panels_and_tokens_are_no_formulas(tmp_path: Path) -> None:
    file = tmp_path / "bars.png"
    panels = {f"knob {n}": [0.5, 0.25] for n in range(5)}
    distributions(file, ["'$x_{'", "'$'"], panels, title="what follows $x_{", columns=4)
    assert png_size(file)[0] == 4 * 330


SEEN = {  # Machado, Oliveira and Fernandes (2009): colours as seen without one kind of cone, in linear RGB
    "no red cones": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green cones": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
}


def lab(colour: str, seen: list[list[float]] | None) -> np.ndarray[Any, Any]:
    """Convert a colour `#rrggbb`, as some viewer sees it, to CIELAB."""
    srgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    if seen is not None:
        linear = np.clip(np.array(seen) @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ linear / np.array([0.9505, 1.0, 1.089]))  # near black this is off, and far from the rest
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen", [None, *SEEN.values()], ids=["all cones", *SEEN])
def test_colours_differ_for_every_reader(seen: list[list[float]] | None) -> None:
    for one, other in itertools.combinations(COLOURS, 2):
        difference = float(np.linalg.norm(lab(one, seen) - lab(other, seen)))
        assert difference > 15, (one, other)  # 1 is hardly seen; tab:orange and tab:green are that close to some


def test_markers_and_colours_of_a_panel_are_distinct() -> None:
    looks = [tuple(look(at).values()) for at in range(84)]
    assert len(set(looks)) == 84
    assert len({colour for colour, _ in looks[:7]}) == len({marker for _, marker in looks[:7]}) == 7


def test_no_picture_has_colours_of_its_own() -> None:
    """Named colours and matplotlib's cycle are used only for black, white and light grey."""
    own = re.compile(r"""["'](tab:\w+|C\d|red|green|orange|blue|gr[ae]y)["']|f["']C\{|zip\(["'][osD^v]+["']""")
    files = [*ROOT.glob("phase-*/*.py"), *ROOT.glob("phase-*/benchmarks/*.py"), *ROOT.glob("common/**/*.py")]
    files += ROOT.glob("phase-*/lesson.ipynb")
    drawing = [file for file in files if "plt" in (text := file.read_text()) or "figure(" in text]
    assert len(drawing) > 8
    assert [f"{file.name}: {found[0]}" for file in drawing for found in own.finditer(file.read_text())] == []
