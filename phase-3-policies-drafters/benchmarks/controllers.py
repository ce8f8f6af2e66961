"""Controllers against every fixed K, with the draft model; and where every guess falls, against plain decoding."""

from __future__ import annotations

from typing import Any

from .runs import FAILING, Lab

CONTROLLERS = {
    "controller": "suite `code`: prompts of the test half; `failing`: the same with a draft whose output is turned "
    "around, so that its every guess falls",
    "of_best": "wall time per token of the best fixed K of this run, over this controller's: 1 is as fast; median of "
    "the paired rounds with its bootstrap 95% interval",
    "trajectory": "draft tokens of every step of the first prompt",
}
ADAPTING = ("adaptive", "confidence", "cost")


def measure_controllers(lab: Lab) -> None:
    fixed = {f"fixed {k}": {"controller": "fixed", "k": k} for k in lab.grid.fixed}
    adapting: dict[str, dict[str, Any]] = {name: {"controller": name} for name in ADAPTING}
    for temperature in lab.grid.temperatures:
        suite(lab, "code", temperature, lab.draft, fixed | adapting)
        few = {name: adapting[name] for name in ADAPTING[-1:]} if lab.options.quick else adapting
        suite(lab, "failing", temperature, FAILING + lab.draft, {"fixed 4": {"k": 4}} | few)


def suite(lab: Lab, name: str, temperature: float, draft: str, controllers: dict[str, dict[str, Any]]) -> None:
    key = {"kind": "controller", "suite": name, "temperature": temperature}
    if lab.done(**key, controller=list(controllers)[-1]):
        return
    texts = lab.texts()
    plain = lab.variant(texts, draft="none", temperature=temperature)
    runs = {
        label: lab.variant(texts, plain, draft=draft, temperature=temperature, **options)
        for label, options in controllers.items()
    }
    rows, rates = lab.speed(f"controllers, {name}, temperature {temperature:g}", plain, runs)
    best = max((label for label in runs if label.startswith("fixed")), key=lambda label: rows[label]["speedup"])
    for label, run in runs.items():
        steps = run.runs[0].steps[0] if run.runs else []
        lab.add(
            **key,
            controller=label,
            best_fixed=best,
            **rows[label],
            **lab.ratio("of_best", rates[best], rates[label]),
            trajectory=[stats.depth for stats in steps],
        )
