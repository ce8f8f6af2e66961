"""Measuring that can be believed: interleaved timing, ratios with an interval, and the options of every bench.

Machines are noisy and drift, so variants take turns (A B, B A, ...) and are compared round by round: a bar is a ratio
within one run. What is timed is first checked (`refuse_if_different`), and everything that a bench needs is importable
from here: timing (this file), result files (common/results.py), tables, progress and JSON (common/terminal.py).

    python -c "from common.benchmark import *; print(interleave({'sum': lambda: sum(range(10**6))}, repeats=3))"
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeVar

import numpy as np
import torch
from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from common.device import memory, reset_peak, synchronize
from common.results import SCHEMA_VERSION, Results, environment
from common.terminal import print_document, print_table, progress

__all__ = [
    "SCHEMA_VERSION",
    "BenchOptions",
    "Ratio",
    "Results",
    "Timed",
    "WrongResult",
    "environment",
    "interleave",
    "median",
    "print_document",
    "print_table",
    "progress",
    "ratio_interval",
    "refuse_if_different",
    "seconds",
]

T = TypeVar("T")


class BenchOptions(BaseSettings):
    """The options that all benches share; a phase subclasses this and reads it with common.options.parse_options."""

    model_config = SettingsConfigDict(env_prefix="SPECDEC_")

    model: str = Field("stdlib-10m", description="an embedded model, a folder, or a hub id")
    quick: bool = Field(False, description="the same bench at a size that ends within 60 s")
    repeats: int = Field(5, ge=2, description="timed rounds; every variant runs once in each")
    output: Path | None = Field(None, description="folder that keeps the results as JSONL, CSV, JSON and PNG")
    resume: bool = Field(False, description="go on with the results in --output: skip what is there already")
    dry_run: bool = Field(False, description="walk the whole grid without computing; rows are marked synthetic")
    seed: int = Field(0, ge=0, description="seed of all random numbers")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where to compute")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="number format")
    threads: int | None = Field(None, ge=1, description="CPU threads for torch; none: torch's own choice")

    @model_validator(mode="after")
    def _resume_needs_output(self) -> Self:
        if self.resume and self.output is None:
            raise ValueError("--resume needs --output FOLDER, the folder with the results to go on with")
        return self


class WrongResult(RuntimeError):
    """What was to be timed gives a wrong answer, so its speed means nothing."""


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
    """One timed run: wall time in seconds, what the run returned, and the memory of the process in MiB after it.

    The peaks in `memory` (names as in common.device.memory) are of this run alone; a system that cannot restart the
    host's peak has no `peak_rss` here.
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

    The order is rotated by one from round to round (A B C, B C A, ...), so that none is always first, and none always
    follows the same clock speed. The device is synchronised before and after each run. Entry i of every list is from
    round i, as `ratio_interval` wants it. `on_run(name)` is called after every run, the warm-ups too: there are
    len(variants) * (warmup + repeats) calls (see `progress`).
    """
    device = torch.device(device)
    names = list(variants)
    results: dict[str, list[Timed[T]]] = {name: [] for name in names}
    for round_ in range(-warmup, repeats):
        first = max(round_, 0) % len(names)
        for name in names[first:] + names[:first]:
            timed = _timed(variants[name], device)
            if round_ >= 0:
                results[name].append(timed)
            if on_run is not None:
                on_run(name)
    return results


def seconds(runs: Sequence[Timed[Any]]) -> list[float]:
    """The wall times of some runs, in seconds."""
    return [run.seconds for run in runs]


def median(values: Sequence[float]) -> float:
    """The middle value (the mean of the two middle ones for an even number)."""
    return statistics.median(values)


@dataclass(frozen=True)
class Ratio:
    """A ratio of times with its 95% interval, low <= median <= high."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio_interval(
    numerator_seconds: Sequence[float], denominator_seconds: Sequence[float], seed: int = 0, resamples: int = 10_000
) -> Ratio:
    """How many times as long the numerator takes: the median of the per-round ratios, with a bootstrap 95% interval.

    The speed-up of a new variant is `ratio_interval(baseline, new)`. Pairing by round cancels what slows a whole round
    down. The interval is the percentile bootstrap of the median (Efron 1979): rounds are drawn with replacement, and
    the same seed gives the same interval. With few rounds it is too narrow: with two it is just the two ratios.

    Raises ValueError for fewer than two rounds, unequal numbers of rounds, and times that are not positive.
    """
    numerator, denominator = np.asarray(numerator_seconds, float), np.asarray(denominator_seconds, float)
    if numerator.shape != denominator.shape or numerator.ndim != 1 or len(numerator) < 2:
        raise ValueError(
            f"expected two lists of the same 2 or more rounds, got {len(numerator)} and {len(denominator)}"
        )
    if not (np.minimum(numerator, denominator) > 0).all():
        raise ValueError("times must be positive")
    ratios = numerator / denominator
    rounds = np.random.default_rng(seed).integers(len(ratios), size=(resamples, len(ratios)))
    low, high = np.percentile(np.median(ratios[rounds], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))
