"""The parts shared by all sections of the bench: options, LLMs, and one prompt decoded to a row.

llm = lab.llm(draft="none", dtype="bfloat16")
lab.compare("speed", {}, {"bfloat16": partial(decode, llm)}, lab.prompts())
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field

import engine
from common.benchmark import BenchOptions, Outcome
from common.errors import UserError
from common.harness import Bench
from common.loops import loop_share
from common.phases import phase_of
from common.prompts import Prompt
from engine.options import DrafterName

Section = Literal["speed", "quality", "memory", "tokens", "profile", "shapes"]
SettingName = Literal[
    "float32",
    "float32 compiled",
    "float32 autocast",
    "bfloat16",
    "bfloat16 compiled",
    "int8",
    "int4",
    "int8 bfloat16",
    "float32 with int8 draft",
]
OWN = phase_of(__file__)
GREEDY_PROMPTS = 12  # enough for greedy output, which is equal in every round; samples use --prompts


class Options(BenchOptions):
    """Number formats, quantisation and execution: speed, memory and quality of the same loop."""

    max_tokens: int = Field(32, ge=8, description="new tokens per prompt")
    budget: float = Field(120, gt=0, description="or until one comparison has taken so many seconds")
    only: list[Section] = Field([], description="measure this section alone; repeatable")
    temperatures: list[Annotated[float, Field(ge=0)]] = Field([0.0, 1.0], description="of `speed`; repeatable")
    settings: list[SettingName] = Field(
        [], description="of `speed`; repeatable; none: all at temperature 0, the two dtypes above it"
    )
    drafters: list[DrafterName] = Field(
        ["model", "eagle"], description="drafters to choose from in `speed`; repeatable"
    )
    k: list[Annotated[int, Field(ge=1)]] = Field([4], description="draft tokens to choose from; repeatable")
    draft: str = Field("auto", description="the draft model; auto: the model's own")
    qat: str | None = Field(None, description="folder of a checkpoint from common.models.train --qat, for `quality`")


@dataclass(frozen=True)
class Lab(Bench):
    """A bench that makes LLMs of this phase and of earlier ones."""

    options: Options

    def with_rounds(self, rounds: int) -> Self:
        """Return this bench with a fixed number of rounds, unless the options name one."""
        wanted = self.options.round_limit or rounds
        return self.with_options(rounds=wanted)

    @property
    def greedy_prompts(self) -> list[Prompt]:
        return self.prompts(min(self.options.prompts, GREEDY_PROMPTS))

    @cached_property
    def no_bfloat16(self) -> str | None:
        """The reason to skip bfloat16, or None: a CPU without its instructions would take minutes."""
        if torch.bfloat16 in self.with_rounds(3).dtypes():
            return None
        if self.options.dtype != "auto":
            return f"--dtype {self.options.dtype} leaves bfloat16 out"
        found = {line["variant"]: line["seconds_per_token"] for line in self.table("dtypes")}
        return f"a matrix product takes {found['bfloat16'] / found['float32']:.1f} times as long as in float32 here"

    def llm(self, of: Any = engine, **wanted: Any) -> Any:
        """Make an LLM of a phase with options of its generate.py; None in a dry run. UserError if it cannot be made."""
        if self.options.dry_run:
            return None
        chosen = {
            "model": self.options.model,
            "seed": self.options.seed,
            "max_tokens": self.options.max_tokens,
            "device": self.device.type,
            "dtype": "float32",
            **wanted,
        }
        return of.LLM(of.Options(**chosen))


Measure = Callable[[Lab], None]


def engine_of(number: int) -> ModuleType:
    """Import the engine of a phase. UserError if it is not installed."""
    if number == OWN:
        return engine
    try:
        return importlib.import_module(f"phase{number}")
    except ModuleNotFoundError as error:
        raise UserError(f"phase {number} is not there ({error}); `make install` installs the phases") from None


def decode(llm: Any, prompt: Prompt | None, round_: int) -> Outcome:
    """Decode one prompt; every round has its own seed."""
    assert prompt is not None
    params = dataclasses.replace(llm.params, seed=llm.options.seed + round_)
    began = time.perf_counter()
    [sequence] = llm.sequences([prompt.text], params)
    for _ in llm.run([sequence]):
        pass
    seconds, tokens = time.perf_counter() - began, sequence.tokens
    figures = {"forwards": sequence.progress.forwards, "looped": round(loop_share(tokens) * len(tokens))}
    if steps := sequence.steps:
        figures |= {name: sum(getattr(step, name) for step in steps) for name in ("proposed", "accepted")}
    return Outcome(len(tokens), figures, tokens, seconds)
