"""The figures of the bench, drawn from its rows: a continued run draws what all of its parts found."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.figures import figure
from engine.drafters.heads import find_heads
from engine.policies import LOSSLESS

from .controllers import ADAPTING
from .policies import STRENGTHS
from .runs import Lab

Row = dict[str, Any]


def draw(lab: Lab, folder: Path) -> None:
    """Whatever the rows allow."""
    if lab.rows("drafter") and lab.rows("forced"):
        heat_map(lab, folder / "drafters.png")
        survival(lab, folder / "survival.png")
    if lab.rows("policy") and lab.rows("distance"):
        speed_against_distance(lab, folder / "policies.png")
    if lab.rows("controller"):
        trajectories(lab, folder / "controllers.png")
    if logs := training_logs(lab):
        training_curves(logs, folder / "training.png")


def unique(rows: list[Row], name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))


def heat_map(lab: Lab, file: Path) -> None:
    """Drafter x shape: tokens per target forward on forced text, and times as fast as plain decoding."""
    panels = [("forced", "tokens_per_forward", "tokens per target forward, forced text")]
    panels += [("drafter", "speedup", "times as fast as plain decoding")]
    temperatures = unique(lab.rows("forced"), "temperature")
    # In the order of the shapes, whichever drafter has them first.
    order = sorted({(r["shape"].split()[0] != "chain", r["shape"].split()[0] == "dynamic", r["nodes"], r["shape"])
                    for r in lab.rows("drafter")})  # fmt: skip
    shapes, drafters = [shape for *_, shape in order], unique(lab.rows("drafter"), "drafter")
    size = (max(4.8, 1.4 + 0.75 * len(shapes)), 0.9 + 0.5 * len(drafters))
    with figure(file, len(temperatures), 2, size, f"drafters and shapes{lab.mark}") as axes:
        for panel, (temperature, (kind, value, title)) in zip(
            axes, [(t, p) for t in temperatures for p in panels], strict=True
        ):
            found = {(r["drafter"], r["shape"]): r[value] for r in lab.rows(kind) if r["temperature"] == temperature}
            cells = np.array([[found.get((drafter, shape), np.nan) for shape in shapes] for drafter in drafters])
            bright = np.nanmin(cells) + 0.6 * (np.nanmax(cells) - np.nanmin(cells))
            panel.imshow(cells, cmap="viridis", aspect="auto")
            panel.grid(False)
            for y, x in zip(*np.nonzero(~np.isnan(cells)), strict=True):
                ink = "black" if cells[y, x] > bright else "white"
                panel.text(x, y, f"{cells[y, x]:.2f}", ha="center", va="center", color=ink, fontsize=8)
            panel.set_xticks(range(len(shapes)), shapes, rotation=40, ha="right", fontsize=8)
            panel.set_yticks(range(len(drafters)), drafters)
            panel.set_title(f"{title}, temperature {temperature:g}", fontsize=9)


def survival(lab: Lab, file: Path) -> None:
    """How far a draft is followed, on forced text: the longest chain of every drafter, and the largest trees."""
    rows = lab.rows("forced")
    temperatures = unique(rows, "temperature")
    with figure(file, columns=len(temperatures), size=(5.0, 3.8), title=f"survival{lab.mark}", sharey=True) as axes:
        for panel, temperature in zip(axes, temperatures, strict=True):
            here = [row for row in rows if row["temperature"] == temperature]
            for at, drafter in enumerate(unique(here, "drafter")):
                for kind, style in (("chain", "o-"), ("static", "s--"), ("dynamic", "^:")):
                    of_kind = [r for r in here if r["drafter"] == drafter and r["shape"].startswith(kind)]
                    if of_kind:
                        shares = max(of_kind, key=lambda row: (row["k"], row["nodes"]))
                        label = f"{drafter}, {shares['shape']}"
                        places = range(1, len(shares["survival"]) + 1)
                        panel.plot(places, shares["survival"], style, color=f"C{at}", label=label, markersize=4)
            panel.set(title=f"forced text, temperature {temperature:g}", xlabel="position (of a tree: level)")
            panel.set_xticks(range(1, 1 + max(row["k"] for row in here)))
        axes[0].set_ylabel("share of drafts that stand up to here")
        axes[-1].legend(fontsize=7)


def speed_against_distance(lab: Lab, file: Path) -> None:
    """One curve per lossy policy, its parameter along it; the lossless ones stand at distance 0."""
    temperatures = unique(lab.rows("policy"), "temperature")
    colours = {policy: f"C{at}" for at, policy in enumerate(["plain", *LOSSLESS, *STRENGTHS])}
    with figure(file, columns=len(temperatures), size=(4.6, 3.9), title=f"what truth costs{lab.mark}") as axes:
        for panel, temperature in zip(axes, temperatures, strict=True):
            speeds = [row for row in lab.rows("policy") if row["temperature"] == temperature]
            far = {(r["policy"], r["strength"]): r for r in lab.rows("distance") if r["temperature"] == temperature}
            for policy in unique(speeds, "policy"):
                of_policy = [row for row in speeds if row["policy"] == policy]
                points = [far.get((row["policy"], row["strength"]), {"first_token_tv": 0.0}) for row in of_policy]
                xs, ys = [point["first_token_tv"] for point in points], [row["speedup"] for row in of_policy]
                style: Row = {"marker": "o", "markersize": 5} if len(xs) > 1 else {"marker": "*", "markersize": 9}
                panel.plot(xs, ys, label=policy, color=colours[policy], **style)
                for x, y, row in zip(xs, ys, of_policy, strict=True):
                    if row["strength"] is not None:
                        panel.annotate(f"{row['strength']:g}", (x, y), (3, 3), textcoords="offset points", fontsize=7)
            panel.set(title=f"temperature {temperature:g}", xlabel="total variation of a step's first token")
        axes[0].set_ylabel("times as fast as plain decoding")
        axes[-1].legend(fontsize=7)


def trajectories(lab: Lab, file: Path) -> None:
    """Draft tokens of every step of one prompt, for the controllers that choose."""
    rows = [row for row in lab.rows("controller") if not row["controller"].startswith("fixed")]
    panels = list(dict.fromkeys((row["suite"], row["temperature"]) for row in rows))
    with figure(file, -(-len(panels) // 2), 2, (5.0, 3.0), f"draft tokens per step{lab.mark}", sharey=True) as axes:
        for panel, (suite, temperature) in zip(axes, panels, strict=False):
            for row in rows:
                if (row["suite"], row["temperature"]) == (suite, temperature):
                    places, colour = range(1, len(row["trajectory"]) + 1), f"C{ADAPTING.index(row['controller'])}"
                    panel.step(places, row["trajectory"], where="mid", label=row["controller"], color=colour)
            panel.set(title=f"{suite}, temperature {temperature:g}", xlabel="step", ylabel="draft tokens")
        axes[0].legend(fontsize=8)
        for panel in axes[len(panels) :]:
            panel.set_visible(False)


def training_logs(lab: Lab) -> dict[str, list[Row]]:
    """The log of every kind of heads that came with the target and brought its log along."""
    logs = {}
    for kind in ("medusa", "eagle"):
        with suppress(UserError):
            file = find_heads("auto", lab.target, kind) / "log.jsonl"
            if file.is_file():
                logs[kind] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return logs


def training_curves(logs: dict[str, list[Row]], file: Path) -> None:
    """What a chain would give on held-out text, as training went on."""
    with figure(file) as [axes]:
        for kind, rows in logs.items():
            seen = [row for row in rows if "heldout" in row]
            gains = [1 + sum(row["heldout"]["survival"]) for row in seen]
            axes.plot([row["step"] + 1 for row in seen], gains, "o-", label=kind)
        axes.set(xlabel="training step", ylabel="expected tokens per target forward, held-out text")
        axes.legend()
