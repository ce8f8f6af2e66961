"""One PNG from a grid of plots: no display, room for every label, a light grid, colours and markers that all readers
can tell apart. An existing file is replaced.

matplotlib is imported when a figure is drawn, because the import takes a second. `pyplot` is not used: it keeps every
figure in a global list and expects a display.

    with figure(Path("speed.png")) as [axes]:
        axes.plot([1, 2, 3], [3, 1, 2], **look(0), label="measured")
        axes.legend()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# From Okabe and Ito (2008, "Color Universal Design"), for readers who cannot tell red from green. Their eighth colour,
# yellow, is too faint on white.
BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, "#000000")
GREY = "#7F7F7F"  # for lines drawn only for comparison
MARKERS = "osD^vP*Xph<>"


def look(at: int) -> dict[str, Any]:
    """Return colour and marker of the at-th line of a panel; the first 84 combinations differ."""
    return {"color": COLOURS[at % len(COLOURS)], "marker": MARKERS[at % len(MARKERS)]}


@contextmanager
def figure(
    file: Path,
    rows: int = 1,
    columns: int = 1,
    size: tuple[float, float] = (7.0, 4.2),
    title: str = "",
    sharex: bool = False,
    sharey: bool = False,
) -> Iterator[list[Axes]]:
    """Yield the axes of all panels, row by row; `file` is written when the block ends without an error.

    `size` is the width and height of one panel in inches. With `sharex` and `sharey` all panels have the same scale,
    and only the outer ones show its numbers.
    """
    from matplotlib.figure import Figure

    whole = Figure(figsize=(columns * size[0], rows * size[1]), layout="constrained")
    panels: list[Axes] = list(whole.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False).flat)
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.set_prop_cycle(color=COLOURS)
    if title:
        whole.suptitle(title, parse_math=False)
    yield panels
    whole.savefig(file, dpi=110)


def distributions(
    file: Path, tokens: Sequence[str], panels: Mapping[str, Sequence[float]], title: str = "", columns: int = 4
) -> None:
    """Draw one panel of bars for each distribution over the same few tokens, the first token on top.

    The first panel's distribution is drawn as an outline behind the others. The keys of `panels` are their titles.
    """
    first = next(iter(panels.values()))
    positions = range(len(tokens))
    size = (3.0, 0.9 + 0.17 * len(tokens))
    with figure(file, -(-len(panels) // columns), columns, size, title, sharex=True, sharey=True) as axes:
        axes[0].invert_yaxis()
        for panel in axes:  # parse_math: a token may hold a $
            panel.set_yticks(positions, tokens, family="monospace", fontsize=8, parse_math=False)
        for panel, (name, probabilities) in zip(axes, panels.items(), strict=False):
            panel.barh(positions, probabilities, color=BLUE)
            panel.barh(positions, first, fill=False, edgecolor=GREY, linewidth=0.8)
            panel.set_title(name, fontsize=10)
            panel.margins(y=0.01)
        for panel in axes[-columns:]:
            panel.set_xlabel("probability")
        for panel in axes[len(panels) :]:
            panel.set_visible(False)
