"""Measures controllers against the best fixed K, with the draft model and with a draft that is always rejected."""

from __future__ import annotations

from common.results import Scalar

from .choice import best_fixed
from .runs import FAILING, Choice, Lab

CONTROLLERS = {
    "controllers": "draft `own`: the model's; `failing`: the same draft with its output negated, so that its every "
    "token is rejected. `best fixed K`: the K that was fastest on the calibrate half (section `choice`)",
    "depths": "draft tokens of every step of one run",
}
ADAPTING = ("adaptive", "confidence", "cost")
SECTION, OWN, NEGATED, BEST = "controllers", "own", "failing", "best fixed K"


def measure_controllers(lab: Lab) -> None:
    adapting: dict[str, Choice] = {name: {"controller": name} for name in ADAPTING}
    for temperature in lab.options.temperatures:
        cell: dict[str, Scalar] = {"draft": OWN, "temperature": temperature}
        k = best_fixed(lab, temperature)
        if k is None:
            lab.refuse(SECTION, cell, BEST, "no fixed K could be chosen on the calibrate half")
        else:
            lab.timed(SECTION, cell, {BEST: {"k": k}, **adapting})
    first = lab.options.temperatures[0]
    choices = {"fixed 4": {"k": 4}, **adapting}
    failing = {label: {**choice, "draft": FAILING + lab.draft} for label, choice in choices.items()}
    lab.timed(SECTION, {"draft": NEGATED, "temperature": first}, failing)
