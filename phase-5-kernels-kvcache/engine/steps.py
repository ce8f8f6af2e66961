"""What a step of speculative decoding was: the draft, what became of it, and what it took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from .drafting import Draft
from .policies import Judged, Path
from .runner import ModelRunner
from .sequence import Sequence
from .tree import Tree


@dataclass(frozen=True)
class StepStats:
    """What one step did for one sequence. Times are of the whole step, which a batch shares, in milliseconds.

    Draft tokens past an EOS, a stop string or the token limit count as neither proposed nor accepted.
    """

    k: int  # draft tokens asked for; of a tree, levels
    proposed: int  # draft tokens that the target looked at
    depth: int  # of them, those in one chain; of a tree, its levels
    accepted: int  # those that stood
    emitted: int  # tokens that the sequence gained
    length: int  # of the sequence before the step
    computed: int  # positions that the target computed: what it had not seen of the text, and the draft
    plain: int  # of them, those that every step has to; the rest are a prefill, or the draft
    draft_ms: float
    verify_ms: float
    accept_ms: float
    kv_ms: float = 0.0  # moving what stood to its place in the cache
    rss_mib: float | None = None  # of the process after the step, where it was asked for


class Said(Protocol):
    """What a recording asks of a verdict; that of a greedy run has it made only then (greedy.py)."""

    @property
    def ratios(self) -> Tensor:
        """[R, K] the probability with which each draft token was to stand."""
        ...


@dataclass(frozen=True)
class Step:
    """One round of the loop, with all that was decided in it."""

    sequences: list[Sequence]
    starts: list[int]  # output length of each sequence before the step
    draft: Draft
    trees: list[Tree]  # the same, a tree for every sequence: a chain is one
    judged: Judged | None  # what the target said, [R, K+1, V]; None where nothing was drafted
    verdict: Said | None  # of chains
    paths: list[Path]  # the draft tokens that stood, and what followed
    stats: list[StepStats]
    logits: Tensor | None = None  # instead of what the target said, where the step was one of plain decoding: [R, V]


class StepTimes(NamedTuple):
    """Of the parts of a step, in seconds."""

    draft: float
    verify: float
    accept: float
    keep: float


def step_stats(
    sequence: Sequence,
    asked: int,
    start: int,
    length: int,
    tree: Tree,
    path: Path,
    computed: int,
    plain: int,
    times: StepTimes,
) -> StepStats:
    """start, length: the sequence's output and its whole length before the step. The rest as in StepStats."""
    emitted = len(sequence.tokens) - start
    # Where the text ended inside the accepted part, what lies past its end was never looked at.
    reach = emitted if emitted <= len(path.nodes) else tree.depth
    return StepStats(
        k=asked,
        proposed=sum(depth <= reach for depth in tree.depths),
        depth=reach,
        accepted=min(len(path.nodes), emitted),
        emitted=emitted,
        length=length,
        computed=computed,
        plain=plain,
        draft_ms=times.draft * 1e3,
        verify_ms=times.verify * 1e3,
        accept_ms=times.accept * 1e3,
        kv_ms=times.keep * 1e3,
    )


def take(runner: ModelRunner, sequence: Sequence, tokens: list[int]) -> None:
    """The sequence gains these tokens, up to where it ends."""
    for token in tokens:
        if not sequence.append(token):
            runner.release(sequence)
            return
