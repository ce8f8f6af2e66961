"""Figures: a PNG of the size asked for, written only when the drawing is done, without touching pyplot."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from common.figures import distributions, figure


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
