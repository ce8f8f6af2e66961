"""The parts of a decoding step: draft, target output, accepted path, and statistics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from .drafting import Draft
from .sampling import probabilities
from .sequence import Sequence
from .transfers import Staged
from .tree import Tree


@dataclass(frozen=True)
class TargetOutput:
    """The result of one forward for R sequences: column 0 follows the sequence, column 1 + i its draft token i."""

    logits: Tensor  # [R, K+1, V]
    states: list[Tensor] | None = None
    """R of [n, F], for a drafter that reads them: at the sequence's positions that it asked for, then the draft's.

    Hidden states, and the outputs of tapped layers beside them.
    """

    def states_of(self, row: int, nodes: list[int], draft: int) -> Tensor:
        """[n, F]: the sequence's positions that were asked for, then the given ones of `draft` draft tokens."""
        assert self.states is not None, "the drafter did not ask for states"
        before = len(self.states[row]) - draft
        return self.states[row][[*range(before), *(before + node for node in nodes)]]


class Verified(NamedTuple):
    """A draft, and the target's output after it."""

    draft: Draft  # its tokens are on the device
    widths: Staged  # int64 [R]: its widths, likewise
    trees: list[Tree]  # the same; of chains that the host has not read, the tokens are placeholders
    output: TargetOutput
    draft_s: float
    verify_s: float

    @property
    def plain(self) -> bool:
        """Return True if no token was drafted."""
        return not any(tree.tokens for tree in self.trees)


class Trial(NamedTuple):
    """A child that recursive rejection tried, and the distributions [V] that decided about it."""

    node: int
    target: Tensor
    draft: Tensor


@dataclass(frozen=True)
class Path:
    """The accepted nodes of a sequence's tree, and the token that follows them."""

    nodes: list[int]  # from the root downwards
    next_token: int
    trials: list[Trial] = field(default_factory=list)  # in a tree of drawn children, in the order of the attempts


@dataclass(slots=True)
class StepStats:
    """What one step did for one sequence. Times are of the whole step, which a batch shares, in milliseconds.

    Draft tokens past an EOS, a stop string or the token limit count as neither proposed nor accepted. A step without a
    draft counts as verification alone.
    """

    k: int  # draft tokens asked for; of a tree, levels
    proposed: int  # draft tokens that the target computed
    depth: int  # of them, those in one chain; of a tree, its levels
    accepted: int
    emitted: int  # tokens that the sequence gained
    length: int  # of the sequence before the step
    computed: int  # positions that the target computed: those of the sequence that its cache lacked, and the draft
    plain: int  # of them, those that a step without a draft computes as well
    draft_ms: float
    verify_ms: float
    accept_ms: float
    kv_ms: float = 0.0  # moving accepted keys and values to their place in the cache
    rss_mib: float | None = None  # of the process after the step, where it was asked for


@dataclass(slots=True)
class Step:
    """One round of the loop, with all that was decided in it."""

    sequences: list[Sequence]
    starts: list[int]  # output length of each sequence before the step
    draft: Draft
    trees: list[Tree]  # the same, a tree for every sequence: a chain is one
    output: TargetOutput | None  # None for steps of a call that makes several
    paths: list[Path]
    stats: list[StepStats]

    def target_probs(self, row: int) -> Tensor:
        """[K+1, V]: the distributions that the target's tokens are sampled from."""
        assert self.output is not None, "a call that makes several steps keeps no logits"
        sequence, tree = self.sequences[row], self.trees[row]
        logits = self.output.logits[row, : len(tree.tokens) + 1]
        outputs = outputs_before(sequence.tokens[: self.starts[row]], tree)
        n = len(logits)
        return probabilities(logits, [sequence.params] * n, [sequence.prompt] * n, outputs)


def outputs_before(output: list[int], tree: Tree) -> list[list[int]]:
    """Return plain decoding's output at each column: without the tree, then up to each of its nodes."""
    return [output, *(output + tree.line(node) for node in range(len(tree.tokens)))]


class StepTimes(NamedTuple):
    """Of the parts of a step, in seconds."""

    draft: float
    verify: float
    accept: float
    keep: float = 0.0


def step_stats(
    sequence: Sequence, asked: int, start: int, tree: Tree, path: Path, computed: int, plain: int, times: StepTimes
) -> StepStats:
    """asked: draft tokens, of a tree levels. start: output length before the step. The rest as in StepStats."""
    length, emitted, proposed, reach = len(sequence.prompt) + start, len(sequence.tokens) - start, 0, 0
    if tree.tokens:  # where the sequence ended inside the accepted part, draft tokens past its end do not count
        reach = emitted if emitted <= len(path.nodes) else tree.depth
        proposed = sum(depth <= reach for depth in tree.depths)
    return StepStats(
        k=asked,
        proposed=proposed,
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
