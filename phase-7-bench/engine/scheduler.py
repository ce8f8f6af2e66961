"""Which sequences run in the next step: continuous batching (Yu et al. 2022, Orca; Kwon et al. 2023, vLLM).

Requests wait in the order of their arrival, and run while the cache has rows and blocks for them. In every step each
running sequence whose prompt is cached decodes; what the budget of tokens leaves goes to prompts, in chunks, the oldest
first (Agrawal et al. 2024, Sarathi-Serve). If a sequence finds no block, the youngest one is preempted: its blocks are
freed, and it waits again, in front of all that came after it. Later its cache is computed again.

The order is strict, so nobody waits without end. The oldest request is never preempted, and in every step it gains a
token or at least BLOCK positions of its prompt. A request is therefore first scheduled after at most

    sum over earlier requests of  new tokens + (1 + preemptions + jumps of the window) * ceil(length / BLOCK)   steps.
"""

from __future__ import annotations

import time
from collections import deque

from .context import window_start
from .controllers import CostController
from .kv_cache import PAGE, OutOfBlocks
from .kv_cache.manager import common_prefix
from .runner import CachedRunner, ModelRunner
from .sequence import Sequence

BLOCK = PAGE
BUDGET = 256  # tokens of a step: those that decode, and prompts in chunks


class Scheduler:
    """Sequences that wait and that run, both by arrival; all that run are older than all that wait."""

    def __init__(self, target: ModelRunner, draft: ModelRunner | None, rows: int, budget: int = BUDGET) -> None:
        """rows: sequences that may run at once. `draft` is the runner of the draft model, if there is one."""
        self.target, self.draft = target, draft
        self.rows, self.budget, self.context = rows, budget, target.model.config.context
        self.inline = target.max_inline if isinstance(target, CachedRunner) else 1
        # Those that keep a cache of a sequence: without a draft model, and with one.
        self.plain = [target] if isinstance(target, CachedRunner) else []
        self.drafted = [*self.plain, draft] if isinstance(draft, CachedRunner) else self.plain
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.prefills = False  # prompts were computed in the last step
        self._refused: Sequence | None = None  # who found too few blocks; until some are released, there are no more

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended, and free its blocks."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._release(sequence)

    def schedule(self) -> tuple[list[tuple[Sequence, int]], list[Sequence]]:
        """Return which prompts to compute now, and how many tokens of each; then the sequences that decode afterwards.

        All of them have the blocks that they need. UserError if nothing can run, because others use the cache.
        """
        self._admit()
        chunks, ready = list[tuple[Sequence, int]](), list[Sequence]()
        missing = [self._missing(sequence) for sequence in self.running]
        each = zip(self.running, missing, strict=True)
        decoding = [sequence for sequence, lacks in each if lacks <= (1 if sequence.unscored else self.inline)]
        self.prefills, left = len(decoding) < len(self.running), self.budget
        if self.prefills:
            left -= sum(1 + self._ahead(sequence, self._length(sequence)) for sequence in decoding)
        for sequence, lacks in list(zip(self.running, missing, strict=True)):
            if sequence not in self.running:
                break  # it was preempted, and so were all after it
            count, inline = 0, 1 if sequence.unscored else self.inline
            if lacks > inline:
                self._begin_rows(sequence)  # after a jump of the window
                lacks = self._missing(sequence)
                count = min(lacks - 1, left if chunks else max(left, BLOCK))
                if count < min(1, lacks - 1):
                    continue  # the budget is spent
            last = lacks - count <= inline
            if self._reserve(sequence, None if last else count):
                if count:
                    chunks.append((sequence, count))
                    left -= count
                if last:
                    ready.append(sequence)
        if self.waiting and not self.running:
            raise OutOfBlocks("out of pages: other runs hold them; let them end first, or give more --kv-pages", -1)
        return chunks, ready

    @property
    def changes(self) -> bool:
        """Return True if other sequences may run in the next step: one waits for blocks, or prompts are computed."""
        return self.prefills or (bool(self.waiting) and len(self.running) < self.rows)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.rows and self._enter(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            progress = sequence.progress
            if progress.scheduled is None:
                progress.scheduled = time.perf_counter() - progress.began

    def _enter(self, sequence: Sequence) -> bool:
        """Give the sequence rows, if there are blocks for all its tokens and those that the others still lack."""
        runners = self._runners(sequence)
        if self._refused is sequence or any(self._shares(sequence, other) for other in self.running):
            return False
        self._begin_rows(sequence)
        for runner in runners:
            everyone = [each for each in (*self.running, sequence) if runner in self._runners(each)]
            lengths = {each: self._length(each) + max(1, self._ahead(each, self._length(each))) for each in everyone}
            if self.running and runner.manager.lacking_blocks(lengths) > runner.manager.free_blocks:
                self._release(sequence)
                self._refused = sequence
                return False
        return True

    def _begin_rows(self, sequence: Sequence) -> None:
        """Give the sequence rows, or cut them back to what it sees now, with what the caches know of it."""
        drafter = sequence.drafter
        for runner in self._runners(sequence):
            first = None
            if drafter is not None and drafter.taps is not None and runner is self.target:
                first = drafter.states_from(sequence)
            if sequence.unscored and runner is self.target:
                first = 0  # known blocks have no logits
            runner.admit(sequence, sequence.prompt + sequence.tokens, first)

    def _shares(self, sequence: Sequence, other: Sequence) -> bool:
        """Return True if the other one is computing a block that this one can use as well: better wait for it."""
        if self._missing(other) <= self.inline or other.prompt[:BLOCK] != sequence.prompt[:BLOCK]:
            return False
        shared = common_prefix(other.prompt, sequence.prompt[:-1])
        return shared - (other.length - self.target.missing(other, other.length)) >= BLOCK

    def _reserve(self, sequence: Sequence, count: int | None) -> bool:
        """Allocate blocks for a chunk of so many tokens; None: for the whole sequence, and a draft after it.

        The youngest sequences are preempted, as long as there are too few. False if this one is the youngest.
        """
        length = self._length(sequence)
        most = length + self._ahead(sequence, length)
        for runner in self._runners(sequence):
            upto = most
            if count is not None:
                upto = min(length - runner.missing(sequence, sequence.length) + count, most)
            while not runner.manager.reserve(sequence, upto):
                youngest = self.running[-1]
                self.preempt(youngest)
                if youngest is sequence:
                    return False
            if runner is self.target:
                sequence.progress.blocks = max(sequence.progress.blocks, runner.manager.held_blocks(sequence))
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Free the blocks of a running sequence; it waits in front of all that came after it."""
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)
        sequence.progress.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self._refused = None
        for runner in (self.target, self.draft):
            if runner is not None:
                runner.release(sequence)

    def _runners(self, sequence: Sequence) -> list[CachedRunner]:
        """Return those that keep a cache of the sequence."""
        return self.plain if sequence.draft is None else self.drafted

    def _missing(self, sequence: Sequence) -> int:
        """Return how many tokens the rows lack, the last one included.

        Only the controller `cost` lets a draft model miss many tokens while drafts do not pay.
        """
        length = sequence.length
        missing = self.target.missing(sequence, length)
        if sequence.draft is not None and not isinstance(sequence.controller, CostController):
            missing = max(missing, sequence.draft.missing(sequence, length))
        return missing

    def _length(self, sequence: Sequence) -> int:
        """Count the tokens that the model sees."""
        length = sequence.length
        return length - window_start(length, self.context)

    def _ahead(self, sequence: Sequence, length: int) -> int:
        """Return how many draft tokens may follow the sequence, of which the model sees `length` tokens, in a step."""
        if sequence.branches:
            return sequence.reach
        remaining = sequence.params.max_new_tokens - len(sequence.tokens)
        return max(0, min(sequence.reach, remaining - 1, self.context - length))
