"""Measures number formats and execution settings against phase 3, plain and drafted.

The fastest drafter is chosen on prompts of the `calibrate` half, for every setting, because a setting changes the costs
of drafting and of verifying. It is then measured on the `test` half.

    python bench.py --only speed --settings float32 --settings int8 --temperatures 0
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from common.benchmark import Outcome
from common.errors import UserError
from common.prompts import Prompt
from common.results import Scalar
from engine.packing import PackedLinear

from .runs import OWN, Lab, SettingName, decode, engine_of

SPEED = {
    "choice": "ways to draft, on the calibrate half: the fastest of a setting is what `speed` times",
    "speed": "variant: a setting (dtype of the weights, and what else; beside quantised matrices the rest is float32), "
    "plain or drafted. speedup: plain variants over `phase 3 plain`, drafted ones over `phase 3 drafted`, float32; "
    "drafter: what was fastest on the calibrate half; tokens_per_forward: new tokens / target forwards; agreement: "
    "share of the tokens before the first that phase 3 does not write; weights_mib: the target's weights as they are "
    "kept, embedding and output matrix included; new_graphs: graphs that were compiled during a run; loop_share: share "
    "of the tokens that end an 8-gram which the same text held before",
}
SETTINGS: dict[SettingName, dict[str, Any]] = {
    "float32": {},
    "float32 compiled": {"compile": True},
    "float32 autocast": {"amp": True},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16 compiled": {"dtype": "bfloat16", "compile": True},
    "int8": {"quant": "int8"},
    "int4": {"quant": "int4"},
    "int8 bfloat16": {"quant": "int8", "dtype": "bfloat16"},
    "float32 with int8 draft": {"draft_quant": "int8"},
}
QUICK: tuple[SettingName, ...] = ("float32", "int8")
SAMPLED: tuple[SettingName, ...] = ("float32", "bfloat16")  # above temperature 0, which needs many prompts
SAME = {"float32", "float32 compiled", "float32 with int8 draft"}  # must give the tokens of phase 3
CHOOSING = 4  # prompts for the choice of a drafter
PREVIOUS = f"phase {OWN - 1}"


@dataclass
class Run:
    """An LLM that decodes, with additional figures of its rows."""

    llm: Any  # of any phase; None in a dry run
    greedy: bool
    about: Mapping[str, Any] = field(default_factory=dict)
    reference: Run | None = None  # the run whose greedy tokens the others are compared with; None: this one
    tokens: dict[str, list[int]] = field(default_factory=dict)  # greedy tokens of each prompt

    def __call__(self, prompt: Prompt | None, round_: int) -> Outcome:
        assert prompt is not None
        before = getattr(self.llm, "compiled_graphs", 0)
        outcome = decode(self.llm, prompt, round_)
        figures = {**outcome.figures, **self.about, "weights_mib": weights_mib(self.llm.loaded.model)}
        if getattr(self.llm, "compiler", None):
            figures["new_graphs"] = self.llm.compiled_graphs - before
        if self.greedy:
            self.tokens[prompt.id] = list(outcome.output)
            figures["agreed"] = agreed(self.tokens[prompt.id], (self.reference or self).of(prompt))
        return replace(outcome, figures=figures)

    def of(self, prompt: Prompt) -> list[int]:
        """Return the greedy tokens after a prompt, and decode them if this run has not done so yet."""
        if prompt.id not in self.tokens:
            self(prompt, 0)
        return self.tokens[prompt.id]


def agreed(mine: list[int], others: list[int]) -> int:
    """Count the tokens before the first difference."""
    return next(
        (at for at, (a, b) in enumerate(zip(mine, others, strict=False)) if a != b), min(len(mine), len(others))
    )


def weights_mib(model: torch.nn.Module) -> float:
    """Sum the sizes of parameters, buffers and packed matrices, each storage once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    packed = sum(sum(m.weight_bytes) for m in model.modules() if isinstance(m, PackedLinear))
    return (sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) + packed) / 2**20


def choices(lab: Lab, setting: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """List the drafting options: a chain for every drafter and k, and EAGLE's tree."""
    found: dict[str, dict[str, Any]] = {}
    for drafter in lab.options.drafters[:1] if lab.options.quick else lab.options.drafters:
        if "draft_quant" in setting and drafter != "model":  # only the draft model is quantised
            continue
        own = {"drafter": drafter} | ({"draft": lab.options.draft} if drafter == "model" else {})
        found |= {f"{drafter} chain {k}": {**own, "k": k} for k in lab.options.k}
        if drafter == "eagle" and not lab.options.quick:
            found["eagle static 16"] = {**own, "k": 5, "tree": "static", "tree_nodes": 16}
    return found


def best(lab: Lab, of: Any, name: str, setting: Mapping[str, Any], temperature: float) -> tuple[str, Any]:
    """Choose the fastest drafting options on the calibrate half, with their LLM. UserError if no drafter can run."""
    cell: dict[str, Scalar] = {"temperature": temperature, "setting": name}
    found: dict[str, Any] = {}
    for how, choice in choices(lab, setting).items():
        try:
            llm = lab.llm(of, temperature=temperature, **setting, **choice)
            if llm is not None and not llm.speculative:
                raise UserError(f"{lab.options.model} names no draft model; pass --draft")
            found[how] = llm
        except UserError as error:
            lab.refuse("choice", cell, how, str(error))
    if not found:
        raise UserError("none of --drafters can draft here")
    if len(found) > 1:
        runs = {how: partial(decode, llm) for how, llm in found.items()}
        lab.with_rounds(1).compare("choice", cell, runs, lab.prompts(min(CHOOSING, lab.options.prompts), "calibrate"))
    times = {
        line["variant"]: line.get("seconds_per_token", math.inf)
        for line in lab.table("choice")
        if (line["temperature"], line["setting"]) == (temperature, name)
    }
    how = min(found, key=lambda how: times.get(how, math.inf))
    return how, found[how]


def plain_of(llm: Any) -> Any:
    """Return an LLM with the same loaded models that decodes without a draft."""
    plain = copy.copy(llm)
    if llm is not None:
        plain.options = llm.options.model_copy(update={"draft": "none"})
    return plain


def measure_speed(lab: Lab) -> None:
    for temperature in lab.options.temperatures:
        if not lab.finished("speed", {"temperature": temperature}):
            measure_temperature(lab, temperature)


def measure_temperature(lab: Lab, temperature: float) -> None:
    """Time all settings, in turn with phase 3's plain and drafted decoding."""
    cell, greedy = {"temperature": temperature}, temperature == 0
    names = lab.options.settings or (QUICK if lab.options.quick else tuple(SETTINGS) if greedy else SAMPLED)
    settings: dict[str, tuple[int, dict[str, Any]]] = {PREVIOUS: (OWN - 1, {})}
    settings |= {name: (OWN, SETTINGS[name]) for name in names}
    runs: dict[str, Run] = {}
    for name, (phase, setting) in settings.items():
        for decoding, (llm, about) in llms(lab, phase, name, setting, temperature).items():
            runs[f"{name} {decoding}"] = Run(llm, greedy, about, runs.get(f"{PREVIOUS} plain"))
    if f"{PREVIOUS} plain" not in runs:  # the reason is a row
        return
    exact = [name for name in runs if name.rpartition(" ")[0] in SAME | {PREVIOUS}] if greedy else []
    base = f"{PREVIOUS} drafted"
    baselines = {name: base for name in runs if name.endswith(" drafted") and name != base and base in runs}
    prompts = lab.greedy_prompts if greedy else lab.prompts()
    lab.compare("speed", cell, runs, prompts, exact=exact, baselines=baselines, warmup=2)


def llms(
    lab: Lab, phase: int, name: str, setting: Mapping[str, Any], temperature: float
) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Make the LLMs of a setting, `plain` and `drafted`, with additional figures of their rows. A refusal is a row."""
    cell, found = {"temperature": temperature}, dict[str, tuple[Any, dict[str, Any]]]()
    if ("amp" in setting or setting.get("dtype") == "bfloat16") and lab.no_bfloat16:
        lab.refuse("speed", cell, name, lab.no_bfloat16)
        return found
    try:
        how, drafted = best(lab, engine_of(phase), name, setting, temperature)
        found["drafted"] = drafted, {"drafter": how}
    except UserError as error:
        lab.refuse("speed", cell, f"{name} drafted", str(error))
    if "draft_quant" in setting:  # plain decoding equals another setting's
        return found
    try:
        same = {"temperature": temperature, **setting, "draft": "none"}
        plain = plain_of(found["drafted"][0]) if found else lab.llm(engine_of(phase), **same)
    except UserError as error:
        lab.refuse("speed", cell, f"{name} plain", str(error))
        return found
    return {"plain": (plain, {}), **found}
