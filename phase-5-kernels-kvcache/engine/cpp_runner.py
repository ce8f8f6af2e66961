"""A runner whose forwards are one call into C++: all layers of a step, or several tokens drawn one after the other.

The bookkeeping of sequences and cache rows is that of runner.py; only the computation differs.

    python generate.py --kernels cpp --prompt "from pathlib import"
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from .drawing import Drawing, Speculated
from .kernels.cpp import CppModel
from .kv_cache import KVOptions, StaticCache
from .kv_cache.manager import CacheManager
from .model import Transformer
from .runner import NO_DRAFT, CachedRunner, Work, make_manager


class CppRunner(CachedRunner):
    """Over a static cache, into which the kernels write."""

    def __init__(self, model: Transformer, fast: CppModel, manager: CacheManager) -> None:
        super().__init__(model, manager)
        self.fast = fast
        assert isinstance(manager.cache, StaticCache)
        self.cache = manager.cache

    def _verify(
        self, works: list[Work], wants_states: bool, taps: tuple[int, ...]
    ) -> tuple[Tensor, list[Tensor] | None]:
        wanted, counts, start = list[int](), list[int](), 0
        for work in works:
            self.cache.make_room(work.row.number, work.count)
            first = work.skip if wants_states else len(work.new) - 1
            wanted += range(start + first, start + work.count)
            counts.append(work.count - first)
            start += work.count
        done = self.fast.step(
            self.cache,
            [work.new + work.draft.tokens for work in works],
            rows=[work.row.number for work in works],
            parents=None if all(work.draft.is_chain for work in works) else [work.parents for work in works],
            wanted=wanted,
            taps=taps,
            hidden=wants_states,
        )
        assert done.logits is not None
        K = max(len(work.draft.tokens) for work in works)
        logits = done.logits
        if len(works) == 1:
            logits = logits[-1 - K :][None]
        else:
            ends = torch.tensor(counts).cumsum(0).tolist()
            read = [
                [min(end - 1 - len(work.draft.tokens) + j, end - 1) for j in range(K + 1)]
                for work, end in zip(works, ends, strict=True)
            ]
            logits = logits[torch.tensor(read)]
        if not wants_states:
            return logits, None
        outputs = self._outputs(done.hidden, done.tapped).split(counts)
        return logits, [torch.cat((*work.states, mine)) for work, mine in zip(works, outputs, strict=True)]

    def _prefill(self, work: Work, wants_states: bool, taps: tuple[int, ...]) -> list[Tensor]:
        self.cache.make_room(work.row.number, work.count)
        done = self.fast.step(
            self.cache,
            [work.new],
            rows=[work.row.number],
            wanted=range(work.skip, work.count) if wants_states else [],
            taps=taps if wants_states else (),
            logits=False,
            hidden=wants_states,
        )
        return [self._outputs(done.hidden, done.tapped)] if wants_states else []

    def _outputs(self, hidden: Tensor | None, tapped: Tensor | None) -> Tensor:
        """In the format in which the torch model gives them: a drafter's heads read them."""
        assert hidden is not None
        whole = hidden if tapped is None else torch.cat((hidden, tapped), -1)
        return whole.to(self.model.embedding.weight.dtype)

    def draw(
        self, owner: Hashable, text: list[int], count: int, how: Drawing
    ) -> tuple[list[int], Tensor | None] | None:
        """Draw `count` tokens one after the other, and give the distributions [count, V] if `how` asks for them.

        Or, with taps, the states of the token before each, [count, F]. None where C++ lacks the random numbers, or a
        window would jump.
        """
        if not how.keyed or len(text) + count > self.model.config.context:
            return None
        params = how.params
        work = self._begin(owner, text, NO_DRAFT, None, ())
        row, at = work.row.number, how.position
        self.cache.make_room(row, len(work.new) + count)
        probs = None
        if how.taps is not None:
            if len(work.new) > 1:  # their states are wanted as well, and a step has them
                return None
            hidden = torch.empty(count, self.fast.config.width)
            tapped = torch.empty(count, len(how.taps) * self.fast.config.width) if how.taps else None
            drawn = self.fast.generate_plain(
                self.cache, row, work.new, count, params,
                sample=how.key[1], position=at, hidden=hidden, tapped=tapped, taps=how.taps,
            )  # fmt: skip
            probs = self._outputs(hidden, tapped)
        elif how.probs:
            drawn, probs = self.fast.draft_chain(
                self.cache, row, work.new, count, params, sample=how.key[1], position=at, noise=how.purpose
            )
        else:
            drawn = self.fast.generate_plain(self.cache, row, work.new, count, params, sample=how.key[1], position=at)
        self.computed = [work.prefilled + len(work.new) + len(drawn) - 1]
        self.manager.appended(work.row, work.new + drawn[:-1], [])
        return drawn, None if params.greedy and how.taps is None else probs

    def speculate(
        self,
        owner: Hashable,
        text: list[int],
        count: int,
        how: Drawing,
        drafter: CppRunner,
        sample_match: bool,
        steps: int,
    ) -> list[Speculated]:
        most = steps * (count + 1) - 1  # tokens past the sequence that are computed
        context = min(self.model.config.context, getattr(drafter.model, "config", self.model.config).context)
        if not how.keyed or len(text) + most > context:
            return []
        mine, its = (runner._begin(owner, text, NO_DRAFT, None, ()) for runner in (self, drafter))
        self.cache.make_room(mine.row.number, len(mine.new) + most)
        drafter.cache.make_room(its.row.number, len(its.new) + most)
        done = self.fast.speculate(
            self.cache,
            mine.row.number,
            mine.new,
            drafter.fast,
            drafter.cache,
            its.row.number,
            its.new,
            count,
            how.params,
            own=sample_match,
            sample=how.key[1],
            position=how.position,
            noise=how.purpose,
            steps=steps,
        )
        self.computed = [mine.prefilled + done[0].computed]
        gained = [token for each in done for token in (*each.draft[: each.accepted], each.next_token)]
        last = done[-1]
        self.manager.appended(mine.row, mine.new + gained[:-1], [])
        drafter.manager.appended(its.row, its.new + gained[: -2 if last.accepted == count else -1], [])
        self.manager.positions += sum(count - each.accepted for each in done)  # rejected draft tokens
        return done


def make_cpp_runner(model: Transformer, fast: CppModel, options: KVOptions, rows: int, tokens: int) -> CppRunner:
    """Make a runner, with a cache of its own. UserError if the kernels do not take such a cache."""
    return CppRunner(model, fast, make_manager(model, options, rows, tokens, torch.float32))
