"""Pictures of a sweep: throughput, latency, acceptance and memory against the first numeric axis of its variants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.figures import GREY, figure, look
from common.tables import AGAIN

from .grid import DRAFTING, PLAIN, label

PANELS = {
    "throughput": ("speedup", "times as fast as the baseline"),
    "latency": ("tpot_ms", "ms per further token"),
    "acceptance": ("acceptance", "accepted / proposed draft tokens"),
    "memory": ("peak_rss_mib", "most memory of the cell's process, MiB"),
}
Line = Mapping[str, Any]


def number_axis(lines: Sequence[Line]) -> str | None:
    """Return the option of the horizontal axis: `k` if it varies, else another number that does."""
    varied = [
        name
        for name in dict.fromkeys(name for line in lines for name in line)
        if len({line[name] for line in lines if isinstance(line.get(name), int | float)}) > 1
        and (name in DRAFTING or all(name in line for line in lines if line.get("variant") != PLAIN))
    ]
    options = [
        name for name in varied if name in DRAFTING or name in ("max_tokens", "kv_slots", "phase", "temperature")
    ]
    return "k" if "k" in options else next(iter(options), None)


def series(lines: Sequence[Line], axis: str) -> dict[str, list[Line]]:
    """Group lines by all settings but the axis; a group is one curve."""
    skip = ("speedup", "tokens_per_s", "seconds_per_token")
    names = [name for name in dict.fromkeys(n for line in lines for n in line) if name not in skip]
    names = [name for name in names if name != axis and _is_setting(name, lines)]
    found: dict[str, list[Line]] = {}
    for line in lines:
        if axis in line:
            settings = {name: line[name] for name in names if name in line and _varies(name, lines)}
            found.setdefault(label(settings), []).append(line)
    return {name: sorted(group, key=lambda line: float(line[axis])) for name, group in found.items()}


def _is_setting(name: str, lines: Sequence[Line]) -> bool:
    first = list(lines[0])
    return name in DRAFTING or name in first[: first.index("variant")]


def _varies(name: str, lines: Sequence[Line]) -> bool:
    return len({str(line.get(name)) for line in lines if line.get("variant") != PLAIN}) > 1


def draw(lines: Sequence[Line], folder: Path, mark: str = "") -> None:
    """Draw a PNG for every quantity that the lines have, against the numeric axis; without one, nothing is drawn."""
    lines = [line for line in lines if not str(line["variant"]).endswith(AGAIN)]
    axis = number_axis(lines)
    if axis is None:
        return
    groups = series(lines, axis)
    for name, (column, quantity) in PANELS.items():
        if not any(column in line for line in lines):
            continue
        with figure(folder / f"{name}.png", size=(8.0, 4.8), title=f"{name}{mark}") as [axes]:
            for at, (group, members) in enumerate(groups.items()):
                shown = [line for line in members if line.get(column) is not None]
                x, y = [line[axis] for line in shown], [line[column] for line in shown]
                low, high = ([line.get(f"{column}_{end}") for line in shown] for end in ("low", "high"))
                if None in low or None in high:
                    axes.plot(x, y, label=group or column, **look(at))
                else:
                    errors = [
                        [a - b for a, b in zip(y, low, strict=True)],
                        [b - a for a, b in zip(y, high, strict=True)],
                    ]
                    axes.errorbar(x, y, errors, label=group or column, capsize=3, **look(at))
            if column == "speedup":
                axes.axhline(1, color=GREY, linewidth=0.8)
            axes.set_xlabel(axis)
            axes.set_xticks(sorted({line[axis] for members in groups.values() for line in members}))
            axes.set_ylabel(quantity)
            axes.legend(fontsize=8)
