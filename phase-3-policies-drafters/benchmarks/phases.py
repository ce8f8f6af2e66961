"""Measures end to end: this phase's best drafter against phase 2 with its best K, and both against phase 1.

The best options are chosen on prompts of the `calibrate` half (choice.py), and measured on the `test` half.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from common.benchmark import Outcome
from common.harness import Variant
from common.phases import phase_of
from common.prompts import Prompt

from .choice import best_fixed, candidates, fastest
from .runs import Lab, decode

PHASES = {
    "phases": "speedup: phase 1's wall time per token over this variant's, same prompts, in turns; what: what was "
    "fastest on the calibrate half (phase 2's K is that of this phase's fastest chain of the draft model)",
}
SECTION, OWN = "phases", f"phase {phase_of(__file__)}"


def earlier(lab: Lab, module: Any, temperature: float, **wanted: Any) -> Variant:
    """Make a variant that decodes with an earlier phase, with the same model, device, dtype and seed."""

    @cache
    def llm() -> Any:
        options = lab.llm(temperature=temperature).options
        names = ("model", "max_tokens", "temperature", "seed", "device", "dtype")
        return module.LLM(module.Options(**{name: getattr(options, name) for name in names}, **wanted))

    def run(prompt: Prompt | None, round_: int) -> Outcome:
        assert prompt is not None
        return decode(llm(), prompt, round_)

    return run


def named(run: Variant, what: str) -> Variant:
    """Add a figure to a variant that names its options."""

    def also(prompt: Prompt | None, round_: int) -> Outcome:
        outcome = run(prompt, round_)
        return replace(outcome, figures={**outcome.figures, "what": what})

    return also


def measure_phases(lab: Lab) -> None:
    try:
        engines = {name: importlib.import_module(name.replace(" ", "")) for name in ("phase 1", "phase 2")}
    except ModuleNotFoundError as error:
        lab.refuse(SECTION, {}, OWN, f"{error}; `make install` installs the phases")
        return
    for temperature in lab.options.temperatures:
        measure(lab, engines, temperature)


def measure(lab: Lab, engines: Mapping[str, Any], temperature: float) -> None:
    cell, found = {"temperature": temperature}, candidates(lab)
    k, label = best_fixed(lab, temperature), fastest(lab, temperature, list(found))
    if k is None or label is None:
        lab.refuse(SECTION, cell, OWN, "nothing could be chosen on the calibrate half")
        return
    second = earlier(lab, engines["phase 2"], temperature, k=k, draft=lab.draft)
    variants = {
        "phase 1": named(earlier(lab, engines["phase 1"], temperature), "plain"),
        "phase 2": named(second, f"K = {k}"),
        OWN: named(lab.way(temperature=temperature, **found[label]), label),
    }
    exact = list(variants)[1:] if lab.repeats_plain(temperature, {}) else []
    lab.in_turns(SECTION, cell, variants, lab.prompts_at(temperature), exact)
