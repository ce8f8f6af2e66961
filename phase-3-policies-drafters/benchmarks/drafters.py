"""Drafters x shapes x temperatures: how many tokens a target forward gives, and what that is worth in time.

On text that is forced (held-out code, see engine/forced.py), on samples and on greedy output.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import engine
from common.benchmark import progress
from common.prompts import load_prompts
from engine.drafters import make_drafter
from engine.explain import tokens_per_forward
from engine.forced import forced_acceptance
from engine.options import BRANCHING

from .runs import Lab, Session

DRAFTERS = {
    "drafter": "sampled (temperature 1) or greedy (0) output; shape: a chain of K tokens, or a tree of at most `nodes`",
    "forced": "at each point of held-out text the drafter proposes from the true prefix; the text then moves on by as "
    "many true tokens as the step would have given; by_k: the same for every smaller K, from survival",
}


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

    @property
    def columns(self) -> dict[str, Any]:
        return {"shape": self.label, "k": self.k, "nodes": self.nodes}


def levels(nodes: int) -> int:
    """A chain of K = 4 within few nodes; the more there are, the deeper the tree may go."""
    return 4 if nodes <= 8 else 5 if nodes <= 16 else 6


def shapes(lab: Lab, drafter: str) -> list[Shape]:
    deepest = getattr(drafter_of(lab.session(drafter=drafter)), "deepest", 0)  # of those that can branch
    chains = [k for k in lab.grid.chains if k <= deepest] or [4]
    trees = [(tree, n) for tree in ("static", "dynamic") for n in lab.grid.nodes if drafter in BRANCHING]
    return [*(Shape("off", k, k) for k in chains), *(Shape(tree, levels(n), n) for tree, n in trees)]


def drafter_of(session: Session) -> engine.Drafter:
    """What the session would draft with, its random numbers as in decoding."""
    params, policy = session.params, session.policy
    decisions = engine.Certain() if params.greedy else engine.KeyedDecisions(params.seed)
    draft = session.draft.model if session.draft else None
    model, noise = session.loaded.model, policy.draft_noise
    made: Any = make_drafter(session.options, model, draft, params, decisions, noise, session.heads)
    return made if session.options.tree == "off" else session._tree_drafter(made, decisions)


def forced(lab: Lab, session: Session, title: str, spread: int = 1) -> list[int]:
    """How many draft tokens stood at each point of the continuations of so many times as many prompts."""
    params = dataclasses.replace(session.params, max_new_tokens=10**6, ignore_eos=True)
    decisions = engine.Certain() if params.greedy else engine.KeyedDecisions(params.seed)
    drafter, encode, stood = drafter_of(session), session.loaded.tokenizer.encode, []
    prompts = load_prompts("code", "test")[: spread * lab.options.prompts]
    with progress(title, len(prompts)) as show:
        for prompt in prompts:
            text, truth = encode(prompt.text), encode(prompt.continuation)[: lab.options.max_tokens + session.options.k]
            stood += forced_acceptance(
                session.loaded.model, drafter, text, truth, params, session.policy, session.options.k, decisions
            )
            show(prompt.id)
    return stood


def survival_of(stood: list[int], k: int) -> list[float]:
    return [sum(s >= j for s in stood) / len(stood) for j in range(1, k + 1)]


def measure_drafters(lab: Lab) -> None:
    for temperature in lab.grid.temperatures:
        for drafter in lab.drafters:
            decoded(lab, drafter, temperature)
            for shape in shapes(lab, drafter):
                on_forced_text(lab, drafter, temperature, shape)


def decoded(lab: Lab, drafter: str, temperature: float) -> None:
    """Every shape of one drafter against plain decoding."""
    key = {"kind": "drafter", "drafter": drafter, "temperature": temperature}
    wanted = shapes(lab, drafter)
    if lab.done(**key, shape=wanted[-1].label):
        return
    texts = lab.texts()
    plain = lab.variant(texts, draft="none", temperature=temperature)
    runs = {s.label: lab.variant(texts, plain, drafter=drafter, temperature=temperature, **s.options) for s in wanted}
    rows, _ = lab.speed(f"{drafter}, temperature {temperature:g}", plain, runs)
    for shape in wanted:
        lab.add(**key, **shape.columns, **rows[shape.label])


def on_forced_text(lab: Lab, drafter: str, temperature: float, shape: Shape) -> None:
    key = {"kind": "forced", "drafter": drafter, "temperature": temperature, **shape.columns}
    if lab.done(**key):
        return
    stood = [shape.k]
    if not lab.options.dry_run:
        session = lab.session(drafter=drafter, temperature=temperature, **shape.options)
        stood = forced(lab, session, f"forced, {drafter}, {shape.label}, temperature {temperature:g}", lab.grid.spread)
    shares = survival_of(stood, shape.k)
    by_k = [tokens_per_forward(shares, k) for k in range(1, shape.k + 1)]
    lab.add(**key, steps=len(stood), tokens_per_forward=by_k[-1], survival=shares, by_k=by_k)
