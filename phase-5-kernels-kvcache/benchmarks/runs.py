"""What the sections of the bench share: options, sessions of this phase and others, and a way to decode that is timed.

lab.variant("static", texts, draft="none", kv="static")()
"""

from __future__ import annotations

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

Section = Literal["speed", "lengths", "verification", "quality", "fast", "ladder", "peers", "kernels"]


class Options(BenchOptions):
    """What remembering keys and values gives: speed, memory, and what a verified token costs."""

    prompts: int = Field(4, ge=1, le=25, description="prompts that are timed")
    max_tokens: int = Field(256, ge=8, description="new tokens per prompt")
    only: list[Section] = Field([], description="measure this section alone; repeatable")
    ladder: bool = Field(False, description="the same as --only ladder")
    peers: bool = Field(False, description="the same as --only peers")
    tokens: int = Field(50_000, ge=512, description="of quality: held-out tokens")


@dataclass
class Variant:
    """Decodes the texts one after the other, each time anew, and remembers the last run."""

    name: str
    session: Any  # of any phase
    texts: list[str]
    same_as: Variant | None = None  # its tokens must be this one's
    tokens: list[list[int]] = field(default_factory=list)
    stats: list[Any] = field(default_factory=list)

    def __call__(self) -> None:
        """WrongResult where the tokens are not as they must be, so that nothing wrong is timed."""
        done = [self.session.complete([text])[0] for text in self.texts]
        getattr(self.session, "steps", {}).clear()
        self.tokens, self.stats = [each.tokens for each in done], [each.stats for each in done]
        if self.same_as:
            for number, (mine, other) in enumerate(zip(self.tokens, self.same_as.tokens, strict=True)):
                refuse_if_different(f"{self.name}, prompt {number}", other, mine)

    @property
    def count(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def tokens_per_forward(self) -> float:
        return self.count / sum(each.target_forwards for each in self.stats) if self.stats else 1.0


@dataclass(frozen=True)
class Lab(Bench):
    """A bench with models at hand."""

    options: Options
    loaded: dict[torch.dtype, Any] = field(default_factory=dict)

    def load(self, dtype: torch.dtype = torch.float32) -> engine.LoadedModel:
        if dtype not in self.loaded:
            self.loaded[dtype] = engine.load(self.options.model, dtype, self.device)
        found: engine.LoadedModel = self.loaded[dtype]
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
            **({"kernels": "torch"} if of is engine else {}),
            **wanted,
        }
        return of.Session(of.Options(**chosen))

    def variant(
        self, name: str, texts: list[str], of: Any = engine, same_as: Variant | None = None, **wanted: Any
    ) -> Variant:
        """A dry run loads nothing."""
        return Variant(name, None if self.options.dry_run else self.session(of, **wanted), texts, same_as)


Measure = Callable[[Lab], None]
