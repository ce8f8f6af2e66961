"""One way to decode some prompts, timed against plain decoding: what all sections of the bench are made of.

plain = lab.variant(texts, draft="none")
rows = lab.speed("ngram", plain, {"K=4": lab.variant(texts, plain, drafter="ngram")})
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Self, get_args

import torch
from pydantic import Field, model_validator

import engine
from common.benchmark import BenchOptions, median, refuse_if_different
from common.device import dtype_name
from common.errors import UserError
from common.harness import Bench
from common.loops import loop_share
from common.prompts import Half, load_prompts
from engine.explain import survival
from engine.options import DrafterName
from engine.policies import OwnChoice

Section = Literal["drafters", "policies", "controllers", "ngram", "phases"]
FAILING = "failing:"  # before the name of a draft: its output is turned around, and every guess falls

SPEED = {
    "speedup": "plain over this variant's wall time per token, same engine, taking turns; median of the paired rounds "
    "with its bootstrap 95% interval",
    "tokens_per_s": "new tokens / wall time, median of the rounds; at temperature > 0 every round has its own seed",
    "tokens_per_forward": "new tokens / target forwards",
    "acceptance": "accepted / proposed draft tokens",
    "survival": "share of the drafts whose first 1, 2, ... tokens (of trees: levels) all stand",
    "draft_share": "time spent drafting / time of all steps",
    "loop_share": "share of the tokens that end an 8-gram which the same output held before",
}


class Options(BenchOptions):
    """Policies, controllers, drafters and trees, against plain decoding."""

    draft: str = Field("auto", description="the draft model; auto: the model's own")
    prompts: int = Field(3, ge=1, le=25, description="prompts that are timed; what is only counted takes more of them")
    max_tokens: int = Field(48, ge=8, description="new tokens per prompt")
    only: list[Section] = Field([], description="measure this section alone; repeatable")
    calibrate: bool = Field(False, description="measure acceptance by depth and rank, write tree_acceptance.json")

    @model_validator(mode="after")
    def _calibration_is_whole(self) -> Self:
        if self.calibrate and (self.quick or self.dry_run or self.only or self.output):
            raise ValueError(
                "--calibrate measures nothing else and writes beside the model, so it goes with none of --quick, "
                "--dry-run, --only and --output; --prompts and --max-tokens set its size"
            )
        return self


@dataclass(frozen=True)
class Grid:
    """How much is measured."""

    temperatures: tuple[float, ...] = (0.0, 1.0)
    policy_temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    chains: tuple[int, ...] = (2, 4, 6, 8)  # K, of the drafters that can branch; 4 of the others
    nodes: tuple[int, ...] = (8, 16, 32)
    fixed: tuple[int, ...] = tuple(range(1, 9))
    strengths: int = 4  # settings of every lossy policy
    spread: int = 4  # how many times as many prompts are used where nothing is timed


SMALL = Grid(policy_temperatures=(0.0, 1.0), chains=(4,), nodes=(16,), fixed=(2, 4, 8), strengths=2, spread=2)
QUICK = dataclasses.replace(SMALL, temperatures=(1.0,), policy_temperatures=(1.0,), fixed=(2, 4))


class Session(engine.Session):
    """A session that does not load again what another has loaded."""

    def __init__(self, options: engine.Options, loaded: dict[str, engine.LoadedModel]) -> None:
        self._loaded = loaded
        super().__init__(options)

    def _load(self, name: str) -> engine.LoadedModel:
        if name not in self._loaded:
            loaded = super()._load(name.removeprefix(FAILING))
            if name.startswith(FAILING):
                with torch.no_grad():
                    for parameter in loaded.model.norm.parameters():  # what it finds least likely comes first now
                        parameter.neg_()
            self._loaded[name] = loaded
        return self._loaded[name]


@dataclass(frozen=True)
class Run:
    """What came of all texts, each list by text."""

    tokens: list[list[int]]
    steps: list[list[Any]]
    forwards: int

    @property
    def count(self) -> int:
        return sum(map(len, self.tokens))


@dataclass
class Variant:
    """Decodes the texts, one after the other, every time with the next seed, and remembers what came of it."""

    session: Any  # of any phase
    texts: list[str]
    same_as: Variant | None = None  # must give the same tokens as this one
    runs: list[Run] = field(default_factory=list)

    def __call__(self) -> None:
        """WrongResult where the tokens are not as they must be, so that nothing wrong is timed."""
        session, run = self.session, len(self.runs)
        session.params = dataclasses.replace(session.params, seed=session.options.seed + run)
        tokens, steps, forwards = [], [], 0
        for text in self.texts:
            (done,) = session.complete([text])
            kept = getattr(session, "steps", {})  # phase 1's has none
            steps.append([stats for of_sequence in kept.values() for stats in of_sequence])
            kept.clear()
            tokens.append(done.tokens)
            forwards += done.stats.target_forwards
        self.runs.append(Run(tokens, steps, forwards))
        if self.same_as and run < len(self.same_as.runs):  # in the untimed round, always: plain decoding goes first
            name = ", ".join(
                f"{n} {getattr(session.options, n)}" for n in ("drafter", "tree", "policy", "controller", "k")
            )
            for number, (mine, other) in enumerate(zip(tokens, self.same_as.runs[run].tokens, strict=True)):
                refuse_if_different(f"{name}, prompt {number}", other, mine)

    @property
    def different(self) -> list[Run]:
        """At temperature 0 all runs write the same."""
        return self.runs[:1] if self.session.params.greedy else self.runs

    def figures(self) -> dict[str, Any]:
        """What SPEED defines, but for the times."""
        runs = self.different
        steps = [stats for run in runs for of_text in run.steps for stats in of_text]
        spent = [stats for run in self.runs[1:] or self.runs for of_text in run.steps for stats in of_text]
        proposed, depth = sum(s.proposed for s in steps), max((s.depth for s in steps), default=0)
        whole = sum(s.draft_ms + s.verify_ms + s.accept_ms for s in spent)
        texts = [tokens for run in runs for tokens in run.tokens]
        return {
            "tokens": sum(map(len, texts)),
            "tokens_per_forward": sum(map(len, texts)) / sum(run.forwards for run in runs),
            "acceptance": sum(s.accepted for s in steps) / proposed if proposed else None,
            "survival": survival(steps, depth),
            "draft_share": sum(s.draft_ms for s in spent) / whole if whole else 0.0,
            "loop_share": sum(map(loop_share, texts)) / len(texts),
        }


@dataclass(frozen=True)
class Lab(Bench):
    """A bench with the models at hand."""

    options: Options
    grid: Grid
    draft: str  # the draft model's name
    loaded: dict[str, engine.LoadedModel]

    @property
    def target(self) -> engine.LoadedModel:
        return self.loaded[self.options.model]

    def session(self, **wanted: Any) -> Session:
        """With options of generate.py. UserError where what they name is not there."""
        chosen = {
            "model": self.options.model,
            "draft": self.draft,
            "seed": self.options.seed,
            "max_tokens": self.options.max_tokens,
            "device": self.device.type,
            "dtype": dtype_name(self.target.model.embedding.weight.dtype),
            **wanted,
        }
        return Session(engine.Options(**chosen), self.loaded)

    @cached_property
    def drafters(self) -> list[str]:
        """Those that can run here; of the others it is said why not."""
        found = []
        for name in get_args(DrafterName):
            try:
                self.session(drafter=name)
                found.append(name)
            except UserError as error:
                print(f"note: --drafter {name} is left out: {error}", file=sys.stderr)
        return found

    def texts(self, times: int = 1, half: Half = "test") -> list[str]:
        """The prompts that are timed, or so many times as many."""
        return [prompt.text for prompt in load_prompts("code", half)[: times * self.options.prompts]]

    def variant(self, texts: list[str], plain: Variant | None = None, **wanted: Any) -> Variant:
        """With `plain`, its tokens are compared where they must be the same: in half precision they need not be."""
        session = self.session(**wanted)
        repeats_plain = session.policy.lossless and (session.params.greedy or isinstance(session.policy, OwnChoice))
        exact = self.target.model.embedding.weight.dtype == torch.float32
        return Variant(session, texts, plain if repeats_plain and exact else None)

    def speed(
        self, title: str, plain: Variant, others: Mapping[str, Variant], repeats: int | None = None
    ) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
        """What SPEED defines, of each variant, and seconds per token, round by round. `plain` is timed with them."""
        every = {"plain": plain, **others}
        times = self.times(title, every, repeats or self.options.repeats)
        rates, rows = {}, {}
        for name, variant in every.items():  # the first run of each is the untimed one
            counts = [run.count for run in variant.runs[1:]] or [1] * len(times[name])
            rates[name] = [seconds / count for seconds, count in zip(times[name], counts, strict=True)]
        for name, variant in every.items():
            figures = dict.fromkeys(SPEED, 1.0) | {"survival": [1.0]} if self.options.dry_run else variant.figures()
            speed = {"tokens_per_s": 1 / median(rates[name]), **self.ratio("speedup", rates["plain"], rates[name])}
            rows[name] = {**figures, **speed}
        return rows, rates
