"""The figures of the bench, drawn from its derived tables; a resumed run draws the rows of all its parts."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.figures import figure, look
from common.tables import AGAIN
from engine.drafters.heads import find_heads
from engine.policies import LOSSLESS

from .controllers import ADAPTING
from .policies import STRENGTHS
from .runs import PLAIN, Lab

Line = dict[str, Any]
BESIDE: Line = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}  # for a legend that would cover points


def draw(lab: Lab, folder: Path) -> None:
    """Draw every figure for which there are rows."""
    if measured(lab, "drafters") and measured(lab, "forced"):
        heat_map(lab, folder / "drafters.png")
        survival(lab, folder / "survival.png")
    if measured(lab, "policies") and measured(lab, "distance"):
        speed_against_distance(lab, folder / "policies.png")
    if lab.rows("controllers"):
        depths(lab, folder / "controllers.png")
    if logs := training_logs(lab):
        training_curves(logs, folder / "training.png")


def measured(lab: Lab, section: str) -> list[Line]:
    """List the lines of a section that ran, without plain decoding. A dry run counts nothing; its figures become 1."""
    lines = [line for line in lab.table(section) if line["variant"] not in (PLAIN, PLAIN + AGAIN)]
    blank = {"tokens_per_forward": 1.0, "speedup": 1.0, "first_token_tv": 1.0, "survival": [1.0]}
    return [blank | line if line.get("synthetic") else line for line in lines if "status" not in line]


def unique(lines: list[Line], name: str) -> list[Any]:
    return list(dict.fromkeys(line[name] for line in lines))


def drafter_and_shape(line: Line) -> tuple[str, str]:
    drafter, _, shape = line["variant"].partition(" ")
    return drafter, shape


def in_order(shape: str) -> tuple[int, int]:
    """Return a sort key: chains, static trees, dynamic trees, each by size."""
    kind, _, size = shape.partition(" ")
    return ("chain", "static", "dynamic").index(kind), int(size)


def heat_map(lab: Lab, file: Path) -> None:
    """Draw tokens per target forward on forced text, and the speed-up, by drafter and shape."""
    panels = [("forced", "tokens_per_forward", "tokens per target forward, forced text")]
    panels += [("drafters", "speedup", "times as fast as plain decoding")]
    lines = {section: measured(lab, section) for section, *_ in panels}
    temperatures = unique(lines["drafters"], "temperature")
    names = [drafter_and_shape(line) for line in lines["forced"] + lines["drafters"]]
    shapes = sorted({shape for _, shape in names}, key=in_order)
    drafters = list(dict.fromkeys(drafter for drafter, _ in names))
    size = (max(4.8, 1.4 + 0.75 * len(shapes)), 1.2 + 0.5 * len(drafters))
    with figure(file, len(temperatures), 2, size, f"drafters and shapes{lab.mark}") as axes:
        for panel, (temperature, (section, value, title)) in zip(
            axes, [(t, p) for t in temperatures for p in panels], strict=True
        ):
            here = [line for line in lines[section] if line["temperature"] == temperature]
            found = {drafter_and_shape(line): line.get(value, np.nan) for line in here}
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
    """Draw survival by position on forced text: the longest chain of every drafter, and the largest trees."""
    lines = measured(lab, "forced")
    temperatures = unique(lines, "temperature")
    with figure(file, columns=len(temperatures), size=(5.0, 4.4), title=f"survival{lab.mark}", sharey=True) as axes:
        for panel, temperature in zip(axes, temperatures, strict=True):
            here = [line for line in lines if line["temperature"] == temperature]
            drafters = list(dict.fromkeys(drafter_and_shape(line)[0] for line in here))
            for at, drafter in enumerate(drafters):
                shapes = {drafter_and_shape(line)[1]: line for line in here if drafter_and_shape(line)[0] == drafter}
                for kind, style in (("chain", "-"), ("static", "--"), ("dynamic", ":")):
                    of_kind = [shape for shape in shapes if shape.startswith(kind)]
                    if of_kind:
                        shape = max(of_kind, key=in_order)
                        shares = shapes[shape]["survival"]
                        drawn: Line = {**look(at), "linestyle": style, "markersize": 4}
                        panel.plot(range(1, len(shares) + 1), shares, label=f"{drafter} {shape}", **drawn)
            panel.set(title=f"forced text, temperature {temperature:g}", xlabel="position (of a tree: level)")
            panel.set_xticks(range(1, 1 + max(len(line["survival"]) for line in here)))
        axes[0].set_ylabel("share of drafts accepted up to here")
        axes[-1].legend(fontsize=7, **BESIDE)


def error_of(line: Line) -> tuple[float, float]:
    """Return the distances from a speed-up to the ends of its interval; 0 without one."""
    low, high = line.get("speedup_low"), line.get("speedup_high")
    return (0.0, 0.0) if low is None or high is None else (line["speedup"] - low, high - line["speedup"])


def speed_against_distance(lab: Lab, file: Path) -> None:
    """Draw one curve per lossy policy, the stricter parameter first; lossless policies have distance 0."""
    speeds, far = measured(lab, "policies"), measured(lab, "distance")
    temperatures = unique(speeds, "temperature")
    with figure(file, columns=len(temperatures), size=(5.0, 4.2), title=f"speed against distance{lab.mark}") as axes:
        for panel, temperature in zip(axes, temperatures, strict=True):
            distance = {line["variant"]: line["first_token_tv"] for line in far if line["temperature"] == temperature}
            here = [line for line in speeds if line["temperature"] == temperature]
            for at, policy in enumerate((*LOSSLESS, *STRENGTHS)):
                points = [line for line in here if line["variant"].split()[0] == policy and "speedup" in line]
                if policy in STRENGTHS:
                    points = [line for line in points if line["variant"] in distance]
                if not points:
                    continue
                xs, ys = [distance.get(line["variant"], 0.0) for line in points], [line["speedup"] for line in points]
                errors = np.array([error_of(line) for line in points]).T
                values = ", then ".join(line["variant"].partition(" ")[2] for line in points)
                label = f"{policy} {values}".strip()
                panel.errorbar(xs, ys, errors, **look(at), markersize=5, capsize=2, label=label)
            panel.set(title=f"temperature {temperature:g}", xlabel="total variation of a step's first token")
        axes[0].set_ylabel("times as fast as plain decoding")
        axes[-1].legend(fontsize=7, **BESIDE)


def depths(lab: Lab, file: Path) -> None:
    """Draw the draft tokens of every step of one run (the first prompt, round 0), for controllers that vary K."""
    rows = [row for row in lab.rows("controllers") if row.variant in ADAPTING and row.round == 0 and row.status == "ok"]
    panels = list({json.dumps(row.cell): row.cell for row in rows}.values())
    with figure(file, -(-len(panels) // 2), 2, (5.0, 3.0), f"draft tokens per step{lab.mark}", sharey=True) as axes:
        for panel, cell in zip(axes, panels, strict=False):
            for at, name in enumerate(ADAPTING):
                first = next((row for row in rows if row.cell == cell and row.variant == name), None)
                ks = first.figures.get("depths", [1]) if first else []
                style: Line = {**look(at), "markersize": 4, "where": "mid"}
                panel.step(range(1, len(ks) + 1), ks, label=name, alpha=0.8, **style)
            title = f"{cell['draft']} draft, temperature {cell['temperature']:g}"
            panel.set(title=title, xlabel="step", ylabel="draft tokens")
        axes[0].legend(fontsize=8)
        for panel in axes[len(panels) :]:
            panel.set_visible(False)


def training_logs(lab: Lab) -> dict[str, list[Line]]:
    """Read the training logs of the target's heads, by kind, as far as there are any."""
    logs = {}
    for kind in ("medusa", "eagle"):
        with suppress(UserError):
            file = find_heads("auto", lab.target, kind) / "log.jsonl"
            if file.is_file():
                logs[kind] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return logs


def training_curves(logs: dict[str, list[Line]], file: Path) -> None:
    """Draw the expected tokens per target forward of a chain on held-out text, by training step."""
    with figure(file) as [axes]:
        for at, (kind, rows) in enumerate(logs.items()):
            seen = [row for row in rows if "heldout" in row]
            gains = [1 + sum(row["heldout"]["survival"]) for row in seen]
            axes.plot([row["step"] + 1 for row in seen], gains, label=kind, **look(at))
        axes.set(xlabel="training step", ylabel="expected tokens per target forward, held-out text")
        axes.legend()
