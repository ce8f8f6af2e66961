"""Counts and times the messages between ranks, and measures how long one takes alone.

A message takes from when the last rank reaches it until the last rank has its numbers: waiting for another rank's
computation is not communication. The ranks of a trace are processes of one machine, with one clock.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from .messages import Ping, Trace

if TYPE_CHECKING:
    from .group import Group


class Passage(NamedTuple):
    """A message as one rank saw it."""

    kind: str  # "plan", "all", or from which rank to which one
    floats: int  # that a rank sends; 0 for a plan
    began: float  # when this rank came, in seconds of the machine's clock
    ended: float  # when it had the numbers, or had given them away


@dataclass
class Traffic:
    """How long this rank waited for numbers since the start, without rank 0's plans; and a trace, if one is on."""

    seconds: float = 0.0
    passages: list[Passage] | None = None  # of a trace, plans included

    def note(self, kind: str, floats: int, began: float) -> None:
        if self.passages is not None:
            self.passages.append(Passage(kind, floats, began, time.perf_counter()))


def trace(group: Group, on: bool) -> list[list[Passage]]:
    """Begin or end a trace. At its end rank 0 has what every rank saw; the other ranks, which hear of it, have []."""
    seen, group.traffic.passages = group.traffic.passages or [], None
    if group.rank == 0:
        group.tell(Trace(on))
    elif seen:
        seen.pop()  # the message that ends the trace
    if on:
        group.traffic.passages = []
        return []
    if group.rank:
        group.report(seen)
        return []
    return [seen, *(seen for _, seen in group.reports())]


def ping(group: Group, what: Ping) -> None:
    """Exchange numbers, with nothing to compute. All ranks do this."""
    mine, gathered = torch.zeros(what.floats), torch.zeros(group.ranks, what.floats)
    last = group.ranks - 1
    for _ in range(what.times):
        if not what.turns or group.rank == 0:
            busy(what.pause)
        if what.gather:
            group.gather(mine, gathered)
        elif group.rank == 0:
            group.send(mine, last)
            group.receive(gathered[0], last)
        elif group.rank == last:
            group.receive(gathered[0], 0)
            busy(what.pause)
            group.send(mine, 0)


def busy(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def seconds_of(seen: Sequence[Sequence[Passage]]) -> dict[tuple[str, int], list[float]]:
    """Return the seconds of every message, by its kind and size, from what each rank saw."""
    found = dict[tuple[str, int], list[float]]()
    for kind in dict.fromkeys(passage.kind for of_rank in seen for passage in of_rank):
        ranks = [[passage for passage in of_rank if passage.kind == kind] for of_rank in seen]
        for views in zip(*(of_rank for of_rank in ranks if of_rank), strict=True):
            seconds = max(view.ended for view in views) - max(view.began for view in views)
            found.setdefault((kind, views[0].floats), []).append(seconds)
    return found
