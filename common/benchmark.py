"""Shared parts of every bench: its options, one run's outcome, the refusal of wrong results, and timing in turns.

Machines are noisy and drift, so variants take turns and are compared round by round, as ratios within one run. Every
timed output is checked (`refuse_if_different`). The other parts are in common/statistics.py (intervals and claims),
common/harness.py (comparisons as rows), common/results.py (results folders) and common/tables.py (derived tables).

    python -c "from common.benchmark import *; print(interleave({'sum': lambda: sum(range(10**6))}, repeats=3))"
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import torch
from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from common.device import memory, reset_peak, synchronize
from common.prompts import Half, Prompt, hash_of, load_prompts, prompt_of_file, read_prompts
from common.results import Results, environment
from common.statistics import williams
from common.terminal import print_document, print_table, progress

__all__ = [
    "BenchOptions",
    "Outcome",
    "Results",
    "Timed",
    "WrongResult",
    "environment",
    "interleave",
    "median",
    "print_document",
    "print_table",
    "progress",
    "refuse_if_different",
    "seconds",
]

T = TypeVar("T")


class BenchOptions(BaseSettings):
    """The options that all benches share; a phase's bench subclasses it for common.options.parse_options."""

    model_config = SettingsConfigDict(env_prefix="SPECDEC_")
    suite: ClassVar[str] = "code"  # where the user names no prompts

    model: str = Field("stdlib-10m", description="an embedded model, a folder, or a hub id")
    prompt_file: list[Path] = Field([], description="file whose whole text is a prompt; repeatable")
    prompts_from: Path | None = Field(None, description='JSONL file of prompts: {"prompt": ..., "continuation": ...}')
    prompts: int = Field(50, ge=1, description="how many prompts are timed")
    max_tokens: int = Field(48, ge=1, description="new tokens per prompt")
    quick: bool = Field(False, description="the same bench at a size that ends within 60 s: two rounds, no intervals")
    rounds: int | None = Field(None, ge=1, description="exactly this many rounds, instead of until --precision")
    precision: float = Field(0.02, gt=0, lt=1, description="rounds are added until ratios are known to this half-width")
    budget: float = Field(60, gt=0, description="or until one comparison has taken this many seconds")
    output: Path | None = Field(None, description="folder that keeps rows, manifest, tables and pictures")
    resume: bool = Field(False, description="continue the results in --output: run what is missing")
    dry_run: bool = Field(False, description="go through the whole grid without computing; rows are marked synthetic")
    seed: int = Field(0, ge=0, description="seed of all random numbers")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where to compute")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="number format")
    threads: int | None = Field(None, ge=1, description="CPU threads for torch; none: torch's own choice")

    @model_validator(mode="after")
    def _resume_needs_output(self) -> Self:
        if self.resume and self.output is None:
            raise ValueError("--resume needs --output FOLDER, the folder with the results to continue")
        return self

    @property
    def round_limit(self) -> int | None:
        """Return the exact number of rounds; None: until `precision` or `budget` is reached."""
        return 1 if self.dry_run else self.rounds or (2 if self.quick else None)

    @property
    def own_prompts(self) -> list[Prompt]:
        """Return the user's prompts, from `prompt_file` and `prompts_from`. UserError for a file that holds none."""
        own = [prompt_of_file(path) for path in self.prompt_file]
        return own + (read_prompts(self.prompts_from) if self.prompts_from else [])

    def load_prompts(self, half: Half = "test") -> list[Prompt]:
        """Return the user's own prompts, or a half of the suite. Two or more own prompts are split into halves."""
        own = self.own_prompts
        if not own:
            return load_prompts(self.suite, half)
        return own if len(own) == 1 else own[half == "test" :: 2]

    def prompts_sha256(self) -> str:
        """Hash every text that may be measured."""
        return hash_of(self.load_prompts("calibrate") + self.load_prompts("test"))


@dataclass(frozen=True)
class Outcome:
    """The result of one run of a variant, as its row keeps it."""

    tokens: float = 1  # new tokens (or calls) by which the time is divided
    figures: Mapping[str, Any] = field(default_factory=dict)  # everything else that was counted
    output: Sequence[int] = ()  # compared with the baseline's where both must be equal; not kept
    seconds: float | None = None  # of the timed part; none: the whole run


class WrongResult(RuntimeError):
    """A timed variant gave a wrong output, so its speed means nothing."""


def refuse_if_different(name: str, expected_tokens: Sequence[int], got_tokens: Sequence[int]) -> None:
    """Raise WrongResult, naming the first position that differs, unless both token sequences are the same."""
    for position, (expected, got) in enumerate(zip(expected_tokens, got_tokens, strict=False)):
        if expected != got:
            raise WrongResult(
                f"refuses to time what is wrong: {name} gives token {got} at position {position}, expected {expected}"
            )
    if len(expected_tokens) != len(got_tokens):
        raise WrongResult(
            f"refuses to time what is wrong: {name} gives {len(got_tokens)} tokens, expected {len(expected_tokens)} "
            f"(they differ first at position {min(len(expected_tokens), len(got_tokens))})"
        )


@dataclass(frozen=True)
class Timed(Generic[T]):
    """One timed run: wall time in seconds, the returned value, and the memory of the process in MiB after the run.

    The peaks in `memory` (names as in common.device.memory) are of this run alone; `peak_rss` is absent if the system
    cannot restart the host's peak.
    """

    seconds: float
    value: T
    memory: dict[str, float]


def _timed(run: Callable[[], T], device: torch.device) -> Timed[T]:
    peak_is_ours = reset_peak(device)
    synchronize(device)
    start = time.perf_counter()
    value = run()
    synchronize(device)
    elapsed = time.perf_counter() - start
    used = memory(device)
    if not peak_is_ours:
        del used["peak_rss"]
    return Timed(elapsed, value, used)


def interleave(
    variants: Mapping[str, Callable[[], T]],
    repeats: int,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    on_run: Callable[[str], None] | None = None,
) -> dict[str, list[Timed[T]]]:
    """Time the variants in turns: `warmup` untimed runs of each, then `repeats` rounds in which each runs once.

    The order changes from round to round (A B, B A; common.statistics.williams), so that no variant is always first or
    always follows the same other. The device is synchronised before and after each run. Entry i of every list is from
    round i. `on_run(name)` is called after every run, warm-ups included: len(variants) * (warmup + repeats) calls (see
    `progress`).
    """
    device = torch.device(device)
    names, orders = list(variants), williams(len(variants))
    results: dict[str, list[Timed[T]]] = {name: [] for name in names}
    for round_ in range(-warmup, repeats):
        for name in (names[index] for index in orders[max(round_, 0) % len(orders)]):
            timed = _timed(variants[name], device)
            if round_ >= 0:
                results[name].append(timed)
            if on_run is not None:
                on_run(name)
    return results


def seconds(runs: Sequence[Timed[Any]]) -> list[float]:
    """Return the wall times of runs, in seconds."""
    return [run.seconds for run in runs]


def median(values: Sequence[float]) -> float:
    """Return the middle value (the mean of the two middle ones for an even number)."""
    return statistics.median(values)
