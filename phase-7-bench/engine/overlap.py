"""Drafts the next block while the target verifies the present one, in the hope that it is accepted whole.

PEARL (Liu et al. 2024). The draft model runs on a thread of its own, over the text with the whole present draft. Its
first token is a guess of the token that follows the draft; if the guess is right, the tokens after it are the next
draft, and nothing is left to draft. They are the tokens that would be drafted otherwise, so no text changes.

    python generate.py --kernels cpp --parallel-streams --prompt "from pathlib import"

The target keeps all threads but one. With K draft tokens, d to draft one, v to verify and a to accept on so many
threads, and a share p of blocks whose guess is right, a step takes

    --sync-mode event      max((K + 1) d, v + a) + (1 - p) K d      instead of      K d + v + a on all threads
    --sync-mode barrier    max((K + 1) d, v) + a + (1 - p) K d

event: the target waits for the draft when the texts are about to change; barrier: as soon as its forward has ended.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from common.errors import UserError

from .drafters.model_fast import FastModelDrafter
from .drafting import Draft, Drafter, Outcome, Stop
from .sequence import Sequence

if TYPE_CHECKING:
    from .options import Options


SyncMode = Literal["event", "barrier"]


@dataclass(frozen=True)
class Ahead:
    """A draft after a text that did not exist yet: the output up to and with the guess."""

    output: list[int]
    tokens: list[int]
    probs: Tensor | None  # [n, V]


@dataclass
class OverlapStats:
    drafted: int = 0  # blocks that were drafted ahead
    used: int = 0  # of them, those whose guess was right
    waited_ms: float = 0.0  # for drafts that were not done when the target was


class OverlapDrafter(Drafter):
    """A draft model in C++, with what it drafted ahead."""

    def __init__(self, inner: Drafter, stats: OverlapStats, sync: SyncMode = "event") -> None:
        assert isinstance(inner, FastModelDrafter)
        self.inner, self.stats, self.sync = inner, stats, sync
        self.kept: dict[Sequence, Ahead] = {}
        self.thread = ThreadPoolExecutor(1, "draft")
        self.work: Future[None] | None = None

    def propose(self, sequences: list[Sequence], widths: list[int], stop: Stop | None = None) -> Draft:
        found = [self._found(sequence, width) for sequence, width in zip(sequences, widths, strict=True)]
        self.kept = {}
        lacking = [0 if ahead else width for ahead, width in zip(found, widths, strict=True)]
        late = self.inner.propose(sequences, lacking, stop) if any(lacking) else Draft.nothing(len(sequences))
        if not any(found):
            return late
        longest = max(widths)
        tokens = torch.zeros(len(sequences), longest, dtype=torch.long)
        tokens[:, : late.tokens.shape[1]] = late.tokens
        known = [late.probs, *(ahead.probs for ahead in found if ahead)]
        some, probs = next((each for each in known if each is not None), None), None
        if some is not None:
            probs = some.new_ones(len(sequences), longest, some.shape[-1])
            if late.probs is not None:
                probs[:, : late.probs.shape[1]] = late.probs
        for row, (ahead, width) in enumerate(zip(found, widths, strict=True)):
            if ahead:
                tokens[row, :width] = torch.tensor(ahead.tokens[:width])
                if probs is not None and ahead.probs is not None:
                    probs[row, :width] = ahead.probs[:width]
        self.stats.used += sum(ahead is not None for ahead in found)
        return Draft(tokens, probs, widths)

    def _found(self, sequence: Sequence, width: int) -> Ahead | None:
        ahead = self.kept.get(sequence)
        fits = ahead is not None and ahead.output == sequence.tokens and 0 < width <= len(ahead.tokens)
        return ahead if fits else None

    @contextmanager
    def ahead(self, sequences: list[Sequence], draft: Draft) -> Iterator[None]:
        """Draft after these drafts while the block runs, and with `event` until `meet`."""
        context = self.inner.runner.model.config.context
        rows = [
            (sequence, width)
            for sequence, width in zip(sequences, draft.widths, strict=True)
            if width
            and len(sequence.tokens) + width + 2 < sequence.params.max_new_tokens
            and sequence.length + 2 * width + 1 <= context
        ]
        drafts = [draft.tokens[sequences.index(sequence), :width].tolist() for sequence, width in rows]
        self.work = self.thread.submit(self._draft, rows, drafts) if rows else None
        try:
            yield
        except BaseException:
            self.meet()
            raise
        if self.sync == "barrier" or any(sequence.params.penalised for sequence in sequences):  # accept reads the texts
            self.meet()

    def meet(self) -> None:
        """Wait for the draft, and raise what its thread raised."""
        work, self.work = self.work, None
        if work is not None:
            began = time.perf_counter()
            work.result()
            self.stats.waited_ms += (time.perf_counter() - began) * 1e3

    @torch.inference_mode()
    def _draft(self, rows: list[tuple[Sequence, int]], drafts: list[list[int]]) -> None:
        """Draft as if the drafts had been accepted. Until `meet`, nobody else looks at the sequences' tokens."""
        asked = [sequence for sequence, _ in rows]
        before = [len(sequence.tokens) for sequence in asked]
        try:
            for sequence, tokens in zip(asked, drafts, strict=True):
                sequence.tokens += tokens
            made = self.inner.propose(asked, [width + 1 for _, width in rows])
            for row, (sequence, width) in enumerate(rows):
                guess, *tokens = made.tokens[row, : width + 1].tolist()
                probs = None if made.probs is None else made.probs[row, 1 : width + 1]
                self.kept[sequence] = Ahead([*sequence.tokens, guess], tokens, probs)
                self.stats.drafted += 1
        except UserError:  # no room in the cache for so many
            pass
        finally:
            for sequence, length in zip(asked, before, strict=True):
                del sequence.tokens[length:]

    def observe(self, outcome: Outcome) -> None:
        self.inner.observe(outcome)


@contextmanager
def met(drafter: Drafter | None) -> Iterator[None]:
    """Let a drafter that drafts ahead finish with the block: the sequences change after it."""
    try:
        yield
    finally:
        if isinstance(drafter, OverlapDrafter):
            drafter.meet()


def overlap_of(options: Options, in_cpp: list[bool]) -> OverlapStats | None:
    """Return what counts the blocks of `--parallel-streams`; None without it. UserError where it cannot be.

    in_cpp: of the target, then of the draft model, if there is one.
    """
    if not options.parallel_streams:
        if options.sync_mode != "event":
            raise UserError(f"--sync-mode {options.sync_mode} is for --parallel-streams, which is off")
        return None
    wrong = {
        "there is no draft model": len(in_cpp) < 2,
        "the models do not run in C++ (--kernels cpp)": not all(in_cpp),
        f"--tree {options.tree} drafts no chain": options.tree != "off",
        f"--controller {options.controller} does not know the next block yet": options.controller != "fixed",
    }
    reason = next((why for why, holds in wrong.items() if holds), None)
    if reason is not None:
        raise UserError(f"--parallel-streams drafts a block while the one before is verified, and {reason}")
    return OverlapStats()
