"""What the sections of the bench share: options, models and sessions, and a way to decode prompts that can be timed.

lab.variant("phase 4", texts, draft="none", dtype="bfloat16")()
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field

import engine
from common.benchmark import BenchOptions, refuse_if_different
from common.device import dtype_name
from common.harness import Bench
from common.prompts import Half, load_prompts

Section = Literal["speed", "quality", "memory", "tokens", "profile", "shapes"]


class Options(BenchOptions):
    """Number formats, quantisation and execution: speed, memory and quality of the same loop."""

    prompts: int = Field(4, ge=1, le=25, description="prompts that are timed")
    max_tokens: int = Field(64, ge=8, description="new tokens per prompt")
    only: list[Section] = Field([], description="measure this section alone; repeatable")
    qat: str | None = Field(None, description="folder of a checkpoint from common.models.train --qat, for `quality`")


@dataclass
class Variant:
    """Decodes the texts one after the other, each time anew, and remembers the last run."""

    name: str
    session: Any  # of any phase
    texts: list[str]
    same_as: Variant | None = None  # its tokens must be this one's
    tokens: list[list[int]] = field(default_factory=list)
    forwards: int = 0

    def __call__(self) -> None:
        """WrongResult where the tokens are not as they must be, so that nothing wrong is timed."""
        done = [self.session.complete([text])[0] for text in self.texts]
        getattr(self.session, "steps", {}).clear()
        self.tokens = [each.tokens for each in done]
        self.forwards = sum(each.stats.target_forwards for each in done)
        if self.same_as:
            for number, (mine, other) in enumerate(zip(self.tokens, self.same_as.tokens, strict=True)):
                refuse_if_different(f"{self.name}, prompt {number}", other, mine)

    @property
    def count(self) -> int:
        return sum(map(len, self.tokens))

    def agreement(self, other: Variant) -> float:
        """The share of tokens before the first one, prompt by prompt, that is not the other's."""
        same = 0
        for mine, theirs in zip(self.tokens, other.tokens, strict=True):
            pairs = enumerate(zip(mine, theirs, strict=False))
            same += next((at for at, (a, b) in pairs if a != b), min(len(mine), len(theirs)))
        return same / self.count


@dataclass(frozen=True)
class Lab(Bench):
    """A bench with models at hand: `loaded` holds what was loaded, by name, dtype and the rest that decides."""

    options: Options
    loaded: dict[tuple[object, ...], Any] = field(default_factory=dict)

    def load(self, name: str | None = None, dtype: torch.dtype = torch.float32) -> engine.LoadedModel:
        key = (name or self.options.model, dtype)
        if key not in self.loaded:
            self.loaded[key] = engine.load(name or self.options.model, dtype, self.device)
        found: engine.LoadedModel = self.loaded[key]
        return found

    def texts(self, half: Half = "test") -> list[str]:
        return [prompt.text for prompt in load_prompts("code", half)[: self.options.prompts]]

    def session(self, of: Any = engine, **wanted: Any) -> Any:
        """A session of this phase or of another, with options of its generate.py."""
        chosen = {
            "model": self.options.model,
            "seed": self.options.seed,
            "max_tokens": self.options.max_tokens,
            "device": self.device.type,
            "dtype": dtype_name(torch.float32),
            **wanted,
        }
        return of.Session(of.Options(**chosen))

    def variant(
        self, name: str, texts: list[str], of: Any = engine, same_as: Variant | None = None, **wanted: Any
    ) -> Variant:
        """A dry run loads nothing."""
        return Variant(name, None if self.options.dry_run else self.session(of, **wanted), texts, same_as)


def with_texts(variant: Variant, texts: list[str], same_as: Variant | None = None) -> Variant:
    """The same session on other texts."""
    return dataclasses.replace(variant, texts=texts, same_as=same_as, tokens=[], forwards=0)


Measure = Callable[[Lab], None]
