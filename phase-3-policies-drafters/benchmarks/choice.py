"""Chooses the fastest fixed K, and the fastest drafter with its shape or controller, on the `calibrate` half.

The speed of the choice is measured again, on the `test` half.
"""

from __future__ import annotations

from common.tables import AGAIN

from .drafters import shapes
from .runs import GREEDY_PROMPTS, PLAIN, Choice, Lab

CHOICE = {"choice": "plain decoding over this variant's wall time per token, on prompts of the calibrate half"}


def candidates(lab: Lab) -> dict[str, Choice]:
    """List every fixed K and the `cost` controller with the draft model, and the chains and trees of the drafters."""
    found: dict[str, Choice] = {fixed(k): {"k": k} for k in lab.options.fixed}
    found["model cost"] = {"controller": "cost"}
    for drafter in (name for name in lab.drafters if name != "extrapolate"):
        for shape in shapes(lab, drafter):
            found.setdefault(f"{drafter} {shape.label}", {"drafter": drafter, **shape.options})
    return found


def fixed(k: int) -> str:
    return f"model chain {k}"


def fastest(lab: Lab, temperature: float, labels: list[str]) -> str | None:
    """Return the label with the largest speed-up. The first call times all candidates. None if none could run."""
    once = lab.with_options(rounds=lab.options.rounds or 1)
    prompts = lab.prompts(min(lab.options.prompts, GREEDY_PROMPTS), half="calibrate")
    once.timed("choice", {"temperature": temperature}, candidates(lab), prompts)
    found = {line["variant"]: line.get("speedup", 1.0) for line in lab.table("choice") if possible(line, temperature)}
    return max((label for label in labels if label in found), key=lambda label: found[label], default=None)


def possible(line: dict[str, object], temperature: float) -> bool:
    timed = line["temperature"] == temperature and "status" not in line
    return timed and line["variant"] not in (PLAIN, PLAIN + AGAIN)


def best_fixed(lab: Lab, temperature: float) -> int | None:
    """Return the K of the draft model's fastest chain."""
    ks = {fixed(k): k for k in lab.options.fixed}
    label = fastest(lab, temperature, list(ks))
    return None if label is None else ks[label]
