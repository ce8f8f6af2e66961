"""What rank 0 tells the other ranks to do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from ..kv_cache import KVOptions
from ..quantize import Format


@dataclass(frozen=True)
class Load:
    """Load the next model, a part of it."""

    name: str
    dtype: torch.dtype
    format: Format | None
    quant_head: bool


@dataclass(frozen=True)
class MakeCache:
    """Make a cache of a model, with the number that its steps name; forget those that rank 0 has freed."""

    number: int
    model: int
    options: KVOptions
    rows: int
    tokens: int
    freed: list[int]


@dataclass(frozen=True)
class Move:
    """Copy entries of a cache, as Storage.move does in each layer."""

    cache: int
    source: Any
    target: Any


@dataclass(frozen=True)
class Trace:
    """Begin to note every message, or end and report them."""

    on: bool


@dataclass(frozen=True)
class Ping:
    """Exchange so many numbers so many times, with nothing to compute: the bench measures the latency."""

    gather: bool  # all ranks; otherwise from rank 0 to the last one, and back
    floats: int
    times: int
    pause: float  # seconds for which a rank is busy before each, as it is within a step
    turns: bool = False  # one rank is busy at a time, as where each has layers of one micro-batch


@dataclass(frozen=True)
class Row:
    """A row of a cache, as far as rank 0 knows it."""

    number: int
    length: int
    table: list[int]  # block table


@dataclass(frozen=True)
class Step:
    """What rank 0 tells the others to compute: arguments of CppModel.step."""

    cache: int
    rows: list[Row]
    tokens: list[list[int]]
    parents: list[list[int]] | None
    wanted: list[int]
    taps: tuple[int, ...]  # layers of the whole model
    logits: bool
    hidden: bool

    @property
    def asks(self) -> bool:
        """Return whether anything of the wanted tokens is to come back."""
        return self.logits or self.hidden or bool(self.taps)

    def of_rows(self, first: int, last: int) -> Step:
        """Return the part of some neighbouring rows."""
        counts = [len(of_row) for of_row in self.tokens]
        start, stop = sum(counts[:first]), sum(counts[:last])
        parents = None if self.parents is None else self.parents[first:last]
        wanted = [token - start for token in self.wanted if start <= token < stop]
        rows, tokens = self.rows[first:last], self.tokens[first:last]
        return dataclasses.replace(self, rows=rows, tokens=tokens, parents=parents, wanted=wanted)
