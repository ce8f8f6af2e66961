"""The figures of the bench, drawn from its derived tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.figures import figure, look

from .cpu_ladder import draw_roofline
from .gpu_ladder import draw_gpu_ladder
from .runs import Lab


def draw(lab: Lab, folder: Path) -> None:
    """Whatever the rows allow."""
    if lab.rows("lengths"):
        lengths(lab, folder / "lengths.png")
    if lab.rows("verification"):
        verification(lab, folder / "verification.png")
    for section in ("speed", "fast_drafters"):
        survival(lab, section, folder / f"survival-{section.replace('_', '-')}.png")
    draw_roofline(lab, folder / "cpu-ladder.png")
    draw_gpu_ladder(lab, folder / "gpu-ladder.png")


def lines_of(lab: Lab, section: str, column: str) -> list[dict[str, Any]]:
    """Lines that have a value, without the null arm."""
    return [line for line in lab.table(section) if column in line and not line["variant"].endswith(", again")]


def lengths(lab: Lab, file: Path) -> None:
    """One more token behind a text of n: what it takes with and without a cache, and what the cache takes."""
    lines = lines_of(lab, "lengths", "ms_per_token")
    shapes = list(dict.fromkeys(line["shape"] for line in lines))
    with figure(file, max(1, len(shapes)), 2, (5.6, 4.0), f"one more token behind a text{lab.mark}") as panels:
        for shape, (time, memory) in zip(shapes, zip(panels[::2], panels[1::2], strict=True), strict=False):
            of_shape = [line for line in lines if line["shape"] == shape]
            for place, name in enumerate(dict.fromkeys(line["variant"] for line in of_shape)):
                mine = [line for line in of_shape if line["variant"] == name]
                at = [line["length"] for line in mine]
                time.plot(at, [line["ms_per_token"] for line in mine], label=name, **look(place))
                if all("cache_mib" in line for line in mine):
                    memory.plot(at, [line["cache_mib"] for line in mine], label=name, **look(place))
            time.set_yscale("log")
            time.set_ylabel("ms (logarithmic)")
            memory.set_ylabel("MiB of cache")
            for axes in (time, memory):
                axes.set_title(shape, fontsize="medium")
                axes.set_xlabel("tokens in the text")
                if axes.get_legend_handles_labels()[0]:
                    axes.legend(fontsize="small")


def verification(lab: Lab, file: Path) -> None:
    """Cost in forwards of one token, with its interval: the inverse of the ratio."""
    lines = lines_of(lab, "verification", "ms_per_token")
    with figure(file, 1, 1, (7.2, 4.2), f"what verification costs{lab.mark}") as (axes,):
        cells = dict.fromkeys((line["cache"], line["length"]) for line in lines)
        for place, (kind, length) in enumerate(cells):
            mine = [line for line in lines if (line["cache"], line["length"]) == (kind, length)]
            costs = [1 / line.get("speedup", 1.0) for line in mine]
            axes.errorbar(
                [int(line["variant"]) for line in mine], costs, errors(mine, costs),
                linestyle="--" if kind == "off" else "-", capsize=2, label=f"{kind}, {length}", **look(place),
            )  # fmt: skip
        axes.set_xlabel("new tokens in one forward")
        axes.set_ylabel("times as long as one")
        axes.legend(title="cache, tokens in the text", fontsize="small")


def errors(lines: Sequence[dict[str, Any]], costs: Sequence[float]) -> list[list[float]]:
    """Distances of the interval's ends from the cost; 0 where there is none."""
    below, above = list[float](), list[float]()
    for line, cost in zip(lines, costs, strict=True):
        low, high = line.get("speedup_low"), line.get("speedup_high")
        below.append(max(0.0, cost - 1 / high) if high else 0.0)
        above.append(max(0.0, 1 / low - cost) if low else 0.0)
    return [below, above]


def survival(lab: Lab, section: str, file: Path) -> None:
    """How many drafts stand up to their j-th token, by drafter; samples alone, because greedy text loops."""
    lines = [line for line in lines_of(lab, section, "survival") if line["temperature"] > 0]
    if not lines:
        return
    with figure(file, title=f"draft tokens that stand, {lab.options.model}{lab.mark}") as (axes,):
        for place, line in enumerate(lines):
            depth = range(1, len(line["survival"]) + 1)
            axes.plot(depth, line["survival"], label=f"{line['variant']}, {line['temperature']:g}", **look(place))
        axes.set_ylim(0, 1)
        axes.set_xlabel("position in the draft")
        axes.set_ylabel("share of the drafts that stand so far")
        axes.legend(title="drafter, temperature", fontsize="small")
