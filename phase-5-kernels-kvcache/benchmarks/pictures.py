"""Draws the figures of the bench from its derived tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.figures import figure, look

from .batch import draw_batch
from .cpu_ladder import draw_roofline
from .gpu_ladder import draw_gpu_ladder
from .runs import Lab


def draw(lab: Lab, folder: Path) -> None:
    """Draw every figure that has rows."""
    if lab.rows("lengths"):
        lengths(lab, folder / "lengths.png")
    if lab.rows("verification"):
        verification(lab, folder / "verification.png")
    for section in ("speed", "fast_drafters"):
        survival(lab, section, folder / f"survival-{section.replace('_', '-')}.png")
    draw_roofline(lab, folder / "cpu-ladder.png")
    draw_batch(lab, folder / "batch.png")
    draw_gpu_ladder(lab, folder / "gpu-ladder.png")


def lines_of(lab: Lab, section: str, column: str) -> list[dict[str, Any]]:
    """Return the lines of a table with a value in `column`, without the null arm."""
    return [line for line in lab.table(section) if column in line and not line["variant"].endswith(", again")]


def lengths(lab: Lab, file: Path) -> None:
    """Draw the time of one more token after n, with and without a cache, and the memory of the cache."""
    lines = lines_of(lab, "lengths", "ms_per_token")
    shapes = list(dict.fromkeys(line["shape"] for line in lines))
    with figure(file, max(1, len(shapes)), 2, (5.6, 4.0), f"One more token after a sequence{lab.mark}") as panels:
        for shape, (time, memory) in zip(shapes, zip(panels[::2], panels[1::2], strict=True), strict=False):
            of_shape = [line for line in lines if line["shape"] == shape]
            for number, name in enumerate(dict.fromkeys(line["variant"] for line in of_shape)):
                mine = [line for line in of_shape if line["variant"] == name]
                at = [line["length"] for line in mine]
                time.plot(at, [line["ms_per_token"] for line in mine], label=name, **look(number))
                if all("cache_mib" in line for line in mine):
                    memory.plot(at, [line["cache_mib"] for line in mine], label=name, **look(number))
            time.set_yscale("log")
            time.set_ylabel("ms (logarithmic)")
            memory.set_ylabel("MiB of cache")
            for axes in (time, memory):
                axes.set_title(shape, fontsize="medium")
                axes.set_xlabel("tokens in the text")
                if axes.get_legend_handles_labels()[0]:
                    axes.legend(fontsize="small")


def verification(lab: Lab, file: Path) -> None:
    """Draw the cost of m tokens in forward passes of one token, the inverse of the ratio, with its interval."""
    lines = lines_of(lab, "verification", "ms_per_token")
    with figure(file, 1, 1, (7.2, 4.2), f"Cost of verification{lab.mark}") as (axes,):
        cells = dict.fromkeys((line["cache"], line["length"]) for line in lines)
        for number, (kind, length) in enumerate(cells):
            mine = [line for line in lines if (line["cache"], line["length"]) == (kind, length)]
            costs = [1 / line.get("speedup", 1.0) for line in mine]
            axes.errorbar(
                [int(line["variant"]) for line in mine], costs, errors(mine, costs),
                linestyle="--" if kind == "off" else "-", capsize=2, label=f"{kind}, {length}", **look(number),
            )  # fmt: skip
        axes.set_xlabel("new tokens in one forward")
        axes.set_ylabel("time, in forwards of one token")
        axes.legend(title="cache, tokens in the text", fontsize="small")


def errors(lines: Sequence[dict[str, Any]], costs: Sequence[float]) -> list[list[float]]:
    """Return the distances of the interval's ends from the cost; 0 without an interval."""
    below, above = list[float](), list[float]()
    for line, cost in zip(lines, costs, strict=True):
        low, high = line.get("speedup_low"), line.get("speedup_high")
        below.append(max(0.0, cost - 1 / high) if high else 0.0)
        above.append(max(0.0, 1 / low - cost) if low else 0.0)
    return [below, above]


def survival(lab: Lab, section: str, file: Path) -> None:
    """Draw the share of drafts accepted up to token j, by drafter; samples only, because greedy text loops."""
    lines = [line for line in lines_of(lab, section, "survival") if line["temperature"] > 0]
    if not lines:
        return
    with figure(file, title=f"Accepted draft tokens, {lab.options.model}{lab.mark}") as (axes,):
        for number, line in enumerate(lines):
            depth = range(1, len(line["survival"]) + 1)
            axes.plot(depth, line["survival"], label=f"{line['variant']}, {line['temperature']:g}", **look(number))
        axes.set_ylim(0, 1)
        axes.set_xlabel("position in the draft")
        axes.set_ylabel("share of drafts accepted up to here")
        axes.legend(title="drafter, temperature", fontsize="small")
