"""The figures of the bench, drawn from its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.figures import figure

from .profile import draw_profile
from .runs import Lab


def draw(lab: Lab, folder: Path) -> None:
    """Whatever the rows allow."""
    if lab.rows("speed"):
        speed(lab, folder / "speed.png")
    if lab.rows("profile"):
        draw_profile(lab, folder / "profile.png")
    if lab.rows("quality"):
        quality(lab, folder / "quality.png")


def speed(lab: Lab, file: Path) -> None:
    """Every setting against phase 3, plain and drafted, with intervals."""
    rows = lab.rows("speed")
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    with figure(file, 1, 1, (7.2, 1.4 + 0.5 * len(settings)), f"times as fast as phase 3{lab.mark}") as (axes,):
        for shift, mode, colour in ((-0.18, "plain", "tab:gray"), (0.18, "drafted", "tab:blue")):
            found = {row["setting"]: row for row in rows if row["mode"] == mode}
            values = np.array([found[setting]["over_3"] for setting in settings])
            low = np.array([found[setting]["over_3_low"] for setting in settings])
            high = np.array([found[setting]["over_3_high"] for setting in settings])
            at = np.arange(len(settings)) + shift
            axes.barh(at, values, height=0.34, color=colour, label=mode, xerr=(values - low, high - values))
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks(range(len(settings)), settings)
        axes.invert_yaxis()
        axes.legend(loc="lower right")


def quality(lab: Lab, file: Path) -> None:
    """Bytes of the linear layers against the loss of perplexity."""
    rows: list[dict[str, Any]] = lab.rows("quality")
    with figure(file, 1, 1, (7.2, 4.2), f"what smaller weights cost{lab.mark}") as (axes,):
        for row in rows:
            axes.plot(row["linear_mib"], 100 * row["loss"], "o")
            axes.annotate(row["variant"], (row["linear_mib"], 100 * row["loss"]), (5, 4), textcoords="offset points")
        axes.set_xlabel("MiB in linear layers")
        axes.set_ylabel("perplexity above float32, %")
