"""Runs one cell of a sweep: a process of its own, so that a crash or a lack of memory costs this cell and no other.

The process reads a task, one JSON document on a line, from stdin, and writes every row to stdout as it ends. It leaves
when stdin is closed, so it does not outlive the sweep.

    python -m instruments.cell < task.json
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, TextIO

import torch
from pydantic import ValidationError

import engine
from common.benchmark import BenchOptions, Outcome
from common.device import resolve_device
from common.errors import UserError
from common.harness import Bench, Variant
from common.loops import loop_share
from common.prompts import Half, Prompt
from common.results import Results, Row
from engine.cost_model import CostModel
from engine.kernels import registry
from engine.policies import LOSSLESS
from engine.prices import Prices
from engine.tree import Tree

from .grid import OWN, Cell, Settings

SECTION, QUALITY = "sweep", "perplexity"
# Options that an LLM can change without loading anything again.
LIGHT = {
    *("k", "policy", "tau", "agree_k", "epsilon", "delta", "controller", "min_k", "max_k", "target_acceptance"),
    *("confidence", "synthetic_acceptance"),
}
NO_DRAFT = ("draft", "none")
PIECE = 16  # tokens of held-out text that one forward judges


@dataclass(frozen=True)
class Task:
    """One cell and all that a process needs to measure it."""

    cell: Cell
    options: dict[str, Any]  # of BenchOptions
    half: Half
    perplexity: bool = False
    predict: bool = False  # survey the cell instead of measuring it
    rows: list[dict[str, Any]] = field(default_factory=list)  # those that the cell has already

    def line(self) -> str:
        return json.dumps(dataclasses.asdict(self)) + "\n"

    @classmethod
    def read(cls, line: str) -> Task:
        found = json.loads(line)
        return cls(**{**found, "cell": Cell(**found["cell"])})

    @property
    def section(self) -> str:
        return "cost" if self.predict else SECTION


class Sent(Results):
    """Rows that are written to a stream, one a line."""

    def __init__(self, rows: list[dict[str, Any]], to: TextIO) -> None:
        super().__init__(None, {}, {})
        self.to = to
        for row in rows:
            super().add(Row.model_validate(row))

    def add(self, row: Row) -> None:
        super().add(row)
        self.say({"row": self.rows[-1].model_dump(exclude_defaults=True)})

    def say(self, message: dict[str, Any]) -> None:
        self.to.write(json.dumps(message) + "\n")
        self.to.flush()


@dataclass
class Models:
    """The LLMs of one cell. Variants that differ in LIGHT options share the loaded models."""

    base: Settings
    cell: Settings  # the part of them that is the cell's
    made: dict[str, Any] = field(default_factory=dict)

    def axes(self, settings: Mapping[str, Any]) -> list[str]:
        """List the options that the grid names; an earlier phase need not have the others."""
        return [name for name in {**self.cell, **settings} if name != "phase"]

    def llm(self, settings: Mapping[str, Any]) -> Any:
        """Return an LLM of the phase that the settings name. UserError for options that do not go together."""
        wanted = {**self.base, **settings}
        phase = wanted.pop("phase", OWN)
        module = engine if phase == OWN else importlib.import_module(f"phase{phase}")
        fields = module.Options.model_fields
        if unknown := [name for name in self.axes(settings) if name not in fields and (name, wanted[name]) != NO_DRAFT]:
            raise UserError(f"phase {phase} has no option {', '.join(unknown)}")
        chosen = {name: value for name, value in wanted.items() if name in fields}
        try:
            options = module.Options(**chosen)
        except ValidationError as error:
            raise UserError(error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")) from None
        if phase != OWN:
            return module.LLM(options)
        heavy = json.dumps({name: value for name, value in chosen.items() if name not in LIGHT}, sort_keys=True)
        if heavy not in self.made:
            self.made[heavy] = module.LLM(options)
        return changed(self.made[heavy], options)


def changed(llm: Any, options: Any) -> Any:
    """Return an LLM with the same models and caches, and other LIGHT options."""
    other = copy.copy(llm)
    other.options, other.params, other.policy = options, options.sampling_params(), options.acceptance_policy()
    registry.use(other.policy, llm.backends.kernels)
    other.cost_model, other.prices = CostModel(), Prices(other)
    return other


def decode(llm: Any, prompt: Prompt, round_: int) -> Outcome:
    """Decode one prompt and count tokens; only decoding is timed. No prompt is known from an earlier run."""
    for manager in getattr(llm, "caches", {}).values():
        getattr(manager.cache, "forget_all", lambda: None)()
    params = dataclasses.replace(llm.params, seed=llm.options.seed + round_)
    (sequence,) = llm.sequences([prompt.text], params)
    began = time.perf_counter()
    for _ in llm.run([sequence]):
        pass
    seconds, tokens, progress = time.perf_counter() - began, sequence.tokens, sequence.progress
    figures: dict[str, Any] = {
        "forwards": progress.forwards,
        "ttft_ms": progress.first * 1e3,
        "later_ms": (progress.last - progress.first) * 1e3,
        "later_tokens": len(tokens) - 1,
        "looped": round(loop_share(tokens) * len(tokens)),
    }
    if steps := getattr(sequence, "steps", []):
        figures |= counts(steps)
    return Outcome(len(tokens), figures, tokens, seconds)


def counts(steps: list[Any]) -> dict[str, Any]:
    """Sum the StepStats of one sequence."""
    depths = [getattr(step, "depth", step.proposed) for step in steps]
    accepted = [step.accepted for step, depth in zip(steps, depths, strict=True) if depth]
    return {
        "proposed": sum(step.proposed for step in steps),
        "accepted": sum(accepted),
        "drafts": len(accepted),
        "survived": [sum(each >= j for each in accepted) for j in range(1, max([*depths, 0]) + 1)],
        "draft_s": sum(step.draft_ms for step in steps) / 1e3,
        "steps_s": sum(step.draft_ms + step.verify_ms + step.accept_ms for step in steps) / 1e3,
    }


def must_repeat(llm: Any, baseline: Any) -> bool:
    """Return True if the tokens must equal the baseline's, which drafts nothing.

    float32, and in every dtype where C++ computes all steps: elsewhere in half precision, wide and narrow forwards
    round differently.
    """
    options = llm.options
    if baseline.options.draft != "none" or getattr(options, "draft", "none") == "none":
        return False
    if getattr(options, "synthetic_acceptance", None) is not None:
        return False
    policy = getattr(options, "policy", "auto")
    same = policy in ("coupled", "longest_prefix") or (options.temperature == 0 and policy in ("auto", *LOSSLESS))
    exact = "float32" in str(llm.loaded.model.embedding.weight.dtype) or getattr(llm.backends, "whole_steps", False)
    return same and exact


def base_settings(bench: Bench, cell: Cell) -> Settings:
    """Return the options that all variants of a cell share."""
    options = bench.options
    return {
        "model": options.model,
        "dtype": options.dtype,
        "device": bench.device.type,
        "threads": options.threads or 0,
        "seed": options.seed,
        "max_tokens": options.max_tokens,
        **cell.settings,
    }


def way(models: Models, settings: Settings) -> Variant:
    """Return a variant that decodes with these options; its LLM is made at the first run."""
    llm = cache(lambda: models.llm(settings))

    def run(prompt: Prompt | None, round_: int) -> Outcome:
        assert prompt is not None
        done = decode(llm(), prompt, round_)
        about = {name: value for name, value in settings.items() if (name, value) != NO_DRAFT}
        return dataclasses.replace(done, figures={**done.figures, **about})

    return run


def measure(bench: Bench, task: Task) -> None:
    """Compare the variants of a cell; with `perplexity`, first judge held-out text."""
    cell = task.cell
    models = Models(base_settings(bench, cell), cell.settings)
    first, *others = cell.variants
    prompts = bench.prompts(half=task.half)
    for prompt in prompts if task.perplexity else []:
        if prompt.continuation:
            bench.count(QUALITY, cell.settings, first, prompt.id, partial(judge, models, prompt))
    exact = []
    for name in [] if bench.options.dry_run else others:
        try:
            if must_repeat(models.llm(cell.variants[name]), models.llm(cell.variants[first])):
                exact.append(name)
        except UserError:
            continue  # the comparison makes it a row
    runs = {name: way(models, settings) for name, settings in cell.variants.items()}
    bench.compare(SECTION, cell.settings, runs, prompts, exact, warmup=1 if bench.options.quick else 2)


def judge(models: Models, prompt: Prompt) -> Outcome:
    """Return the negative log likelihood of a prompt's true continuation, in nats.

    The continuation is verified like a draft, so that the run's own kernels and cache compute it.
    """
    if models.base.get("phase", OWN) != OWN:
        raise UserError(f"--eval-perplexity reads the engine of phase {OWN}")
    llm = models.llm({"draft": "none"})
    (sequence,) = llm.sequences([prompt.text])
    truth = llm.loaded.tokenizer.encode(prompt.continuation)[: llm.options.max_tokens]
    runner = llm.make_runner(llm.loaded.model, 1, sequence.length + len(truth) + PIECE)
    total = 0.0
    with llm.computing():
        for at in range(0, len(truth), PIECE):
            piece = truth[at : at + PIECE]
            output = runner.forward([sequence], [sequence.prompt + truth[:at]], [Tree.chain(piece)])
            runner.commit(sequence, list(range(len(piece) - 1)), piece[:-1])
            scores = output.logits[0, : len(piece)].float().log_softmax(-1)
            total -= float(scores.gather(1, torch.tensor(piece, device=scores.device)[:, None]).sum())
    runner.release(sequence)
    return Outcome(len(truth), {"nll_sum": total})


def main() -> int:
    task = Task.read(sys.stdin.readline())
    threading.Thread(target=_leave_with_the_sweep, daemon=True).start()
    rows = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is no row
    options = BenchOptions(**{**task.options, "output": None, "resume": False})
    options.model_fields_set.discard("budget")  # a sweep's cells have at least one round
    sent = Sent(task.rows, rows)
    bench = Bench(options, sent, resolve_device(options.device))
    try:
        if task.predict:
            from .predict import survey  # it imports this module

            survey(bench, task)
        else:
            measure(bench, task)
    except UserError as error:
        sent.say({"refused": str(error)})
    return 0


def _leave_with_the_sweep() -> None:
    sys.stdin.read()
    os._exit(3)


if __name__ == "__main__":
    sys.exit(main())
