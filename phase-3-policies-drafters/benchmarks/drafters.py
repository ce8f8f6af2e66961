"""Measures drafters x shapes x temperatures: tokens per target forward, and speed.

On forced text (held-out code, see engine/teacher_forced.py), on samples and on greedy output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import engine
from common.benchmark import Outcome
from common.errors import UserError
from common.prompts import Prompt
from engine.drafters import make_drafter
from engine.options import BRANCHING
from engine.teacher_forced import teacher_forced_acceptance
from engine.verify import random_source

from .runs import LLM, Choice, Lab, survived

DRAFTERS = {
    "drafters": "sampled (temperature 1) or greedy (0) output, by drafter and shape; shape: a chain of K tokens, or a "
    "tree of at most so many nodes",
    "forced": "at each point of held-out text the drafter proposes from the true prefix; the text then moves on by as "
    "many true tokens as the step would have given",
}
FORCED_PROMPTS = 16
LONGEST = 8  # the tokens of every shorter chain follow from this chain's survival


@dataclass(frozen=True)
class Shape:
    """A chain (`off`) of k tokens, or a tree of k levels and at most so many nodes."""

    tree: str
    k: int
    nodes: int

    @property
    def label(self) -> str:
        return f"chain {self.k}" if self.tree == "off" else f"{self.tree} {self.nodes}"

    @property
    def options(self) -> dict[str, Any]:
        return {"k": self.k, "tree": self.tree} | ({} if self.tree == "off" else {"tree_nodes": self.nodes})


def levels(nodes: int) -> int:
    """Choose a tree's levels: 4, as in a chain of K = 4, and more for more nodes."""
    return 4 if nodes <= 8 else 5 if nodes <= 16 else 6


def shapes(lab: Lab, drafter: str, longest: int | None = None) -> list[Shape]:
    """List the chains and trees that the options name, within the drafter's depth; `longest` adds a chain."""
    deepest = getattr(drafter_of(lab.llm(drafter=drafter)), "deepest", LONGEST)
    wanted = sorted({min(k, deepest) for k in (*lab.options.chains, *([longest] if longest else []))})
    trees = [(tree, n) for tree in ("static", "dynamic") for n in lab.options.nodes if drafter in BRANCHING]
    return [*(Shape("off", k, k) for k in wanted), *(Shape(tree, levels(n), n) for tree, n in trees)]


def drafter_of(llm: LLM) -> engine.Drafter:
    """Make the LLM's drafter, with the random numbers of decoding."""
    source = random_source([llm.params])
    draft = llm.draft.model if llm.draft else None
    model, noise = llm.loaded.model, llm.policy.draft_noise
    made: Any = make_drafter(llm.options, model, draft, source, noise, llm.heads)
    return made if llm.options.tree == "off" else llm._tree_drafter(made, source)


def forced(lab: Lab, **wanted: Any) -> Callable[[Prompt], Outcome]:
    """Make a run that counts the accepted draft tokens at each position of a prompt's true continuation."""
    made = cache(lambda: (llm := lab.llm(**wanted), drafter_of(llm)))

    def count(prompt: Prompt) -> Outcome:
        llm, drafter = made()
        params = dataclasses.replace(llm.params, max_new_tokens=10**6, ignore_eos=True)
        source = random_source([params])
        k, tokenizer = llm.options.k, llm.loaded.tokenizer
        # Drop the BOS token that some tokenizers add.
        truth = [token for token in tokenizer.encode(prompt.continuation) if token not in tokenizer.special_ids]
        truth = truth[: lab.options.max_tokens + k]
        if len(truth) <= k:
            raise UserError(f"{prompt.id} goes on for {len(truth)} tokens; more than {k} are needed")
        text = tokenizer.encode(prompt.text)[-(llm.loaded.config.context - len(truth)) :]
        model, policy = llm.loaded.model, llm.policy
        accepted = teacher_forced_acceptance(model, drafter, text, truth, params, policy, k, source)
        drafts = len(accepted)
        figures = {"forwards": drafts, "drafts": drafts, "survived": survived(accepted, k)}
        return Outcome(sum(accepted) + drafts, figures)

    return count


def measure_drafters(lab: Lab) -> None:
    for temperature in lab.options.temperatures:
        cell = {"temperature": temperature}
        for name, reason in lab.left_out.items():
            lab.refuse("drafters", cell, name, reason)
        choices: dict[str, Choice] = {
            f"{drafter} {shape.label}": {"drafter": drafter, **shape.options}
            for drafter in lab.drafters
            for shape in shapes(lab, drafter)
        }
        lab.timed("drafters", cell, choices)
        on_forced_text(lab, temperature)


def on_forced_text(lab: Lab, temperature: float) -> None:
    cell, prompts = {"temperature": temperature}, lab.continued(FORCED_PROMPTS)
    if not prompts:
        lab.refuse("forced", cell, "", "the prompts have no continuation (in JSONL: `continuation`)")
    for drafter in lab.drafters:
        for shape in shapes(lab, drafter, LONGEST):
            run = forced(lab, drafter=drafter, temperature=temperature, **shape.options)
            for prompt in prompts:
                lab.count("forced", cell, f"{drafter} {shape.label}", prompt.id, partial(run, prompt))
