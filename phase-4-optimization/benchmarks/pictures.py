"""The figures of the bench, drawn from its derived tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.figures import COLOURS, figure, look

from .profile import FAMILIES
from .runs import Lab

Line = Mapping[str, Any]
RANGES = {"draft_share": "draft", "verify_share": "verify", "accept_share": "accept", "sample_share": "sample"}


def draw(lab: Lab, folder: Path) -> None:
    """Draw every figure for which there are rows."""
    if lines := [line for line in lab.table("speed") if "speedup" in line or line.get("synthetic")]:
        speed(lines, folder / "speed.png", lab.mark)
    if lines := [line for line in lab.table("profile") if "ms_per_token" in line]:
        profile(lines, lab.table("trace"), folder / "profile.png", lab.mark)
    if lines := [line for line in lab.table("quality") if "variant" in line and "status" not in line]:
        quality(lines, folder / "quality.png", lab.mark)


def with_interval(axes: Any, lines: Sequence[Line], heights: Sequence[float], column: str, **style: Any) -> None:
    """Draw points at the values of a column, with error bars for intervals."""
    values = [line.get(column) or 0.0 for line in lines]
    ends = [(line.get(f"{column}_low"), line.get(f"{column}_high")) for line in lines]
    bars = [
        (value - low, high - value) if low is not None and high is not None else (0.0, 0.0)
        for value, (low, high) in zip(values, ends, strict=True)
    ]
    axes.errorbar(values, heights, xerr=[list(each) for each in zip(*bars, strict=True)], linestyle="", **style)


def speed(lines: Sequence[Line], file: Path, mark: str) -> None:
    """Draw every setting against phase 3, plain and drafted, in one panel per temperature."""
    temperatures = list(dict.fromkeys(line["temperature"] for line in lines))
    names = list(dict.fromkeys(str(line["variant"]).rpartition(" ")[0] for line in lines if not is_base(line)))
    size = (6.4, 1.6 + 0.4 * len(names))
    with figure(file, 1, len(temperatures), size, f"times as fast as phase 3{mark}", sharey=True) as panels:
        for axes, temperature in zip(panels, temperatures, strict=True):
            for at, (shift, decoding) in enumerate(((-0.12, "plain"), (0.12, "drafted"))):
                found = [
                    line
                    for line in lines
                    if line["temperature"] == temperature
                    and not is_base(line)
                    and str(line["variant"]).endswith(f" {decoding}")
                ]
                if found:
                    heights = [names.index(str(line["variant"]).rpartition(" ")[0]) + shift for line in found]
                    with_interval(axes, found, heights, "speedup", capsize=3, label=decoding, **look(at))
            axes.axvline(1, color="black", linewidth=0.8)
            axes.set(title=f"temperature {temperature:g}", xlabel="times as fast, with 95% intervals")
            axes.set_yticks(range(len(names)), names)
            axes.legend()
        panels[0].invert_yaxis()


def is_base(line: Line) -> bool:
    """Return True for phase 3 and its null arm."""
    return str(line["variant"]).startswith("phase ")


def quality(lines: Sequence[Line], file: Path, mark: str) -> None:
    """Draw the increase of perplexity of every storage format, labelled with its size."""
    names = [f"{line['variant']}, {line.get('linear_mib', 1):.1f} MiB" for line in lines]
    with figure(file, 1, 1, (7.2, 1.4 + 0.35 * len(lines)), f"perplexity of smaller weights{mark}") as (axes,):
        with_interval(axes, lines, range(len(lines)), "perplexity_percent", capsize=3, **look(0))
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(lines)), names)
        axes.invert_yaxis()
        axes.set_xlabel("perplexity above the first line's, %, with 95% intervals")


def profile(lines: Sequence[Line], traces: Sequence[Line], file: Path, mark: str) -> None:
    """Draw stacked bars: milliseconds per token by range, and the target's forward by family of operators."""
    labels = [str(line["variant"]) for line in lines if not str(line["variant"]).endswith(", again")]
    at, of = ({str(line["variant"]): line for line in table} for table in (lines, traces))
    size = (6.2, 1.6 + 0.34 * len(labels))
    with figure(file, columns=2, size=size, title=f"where the time goes{mark}", sharey=True) as (left, right):
        ms = [float(at[label]["ms_per_token"]) for label in labels]
        shares = {name: [at[label].get(column, 0.25) for label in labels] for column, name in RANGES.items()}
        stack(left, labels, {n: [a * b for a, b in zip(ms, each, strict=True)] for n, each in shares.items()})
        left.set(xlabel="ms per token")
        left.invert_yaxis()
        inside = {family: f"in_{name}" for name, family in FAMILIES.items()}
        parts = {f: [of.get(label, {}).get(column, 0.0) for label in labels] for f, column in inside.items()}
        stack(right, labels, parts)
        right.set(xlabel="share of the target's forwards")


def stack(axes: Any, labels: Sequence[str], parts: Mapping[str, Sequence[float]]) -> None:
    begun = [0.0] * len(labels)
    for colour, (name, lengths) in zip(COLOURS, parts.items(), strict=False):
        axes.barh(labels, lengths, left=begun, label=name, color=colour, edgecolor="white", linewidth=0.5)
        begun = [a + b for a, b in zip(begun, lengths, strict=True)]
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(parts), frameon=False)
