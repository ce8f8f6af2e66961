"""A model in C++ whose steps are divided between ranks.

Tensor parallel: all ranks make the same step with their own matrices, and exchange numbers within it. Layer parallel:
the hidden states of the step's tokens go from rank to rank, and what rank 0 wants of them back to rank 0. Rank 0 calls
`step` as that of any CppModel; the others make the same step in `follow`.
"""

from __future__ import annotations

import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor, nn

from ..kernels.cpp.model import Cache, CppModel, Stepped
from ..kv_cache import KVOptions, PagedCache
from ..kv_cache.manager import CacheManager
from ..kv_cache.static import InPlaceCache
from ..kv_cache.storage import Storage
from ..model import Linear, Transformer
from .group import Group, uninterrupted
from .messages import MakeCache, Move, Row, Step
from .shard import Shard

if TYPE_CHECKING:
    from ..kernels.cpp.weights import Weights
    from ..options import Options


def row_of(cache: Cache, number: int) -> Row:
    return Row(number, cache.lengths[number], list(cache.tables[number]) if isinstance(cache, PagedCache) else [])


def set_rows(cache: Cache, rows: list[Row]) -> None:
    """Give the rows of a rank's cache the lengths and block tables of rank 0's."""
    for row in rows:
        cache.lengths[row.number] = row.length
        if isinstance(cache, PagedCache):
            cache.tables[row.number] = row.table


class SplitModel(CppModel, ABC):
    """The part of one rank. `numbers`: by which its ranks know its caches."""

    def __init__(self, group: Group, shard: Shard, model: Transformer, *arguments: Any, **options: Any) -> None:
        self.group, self.shard = group, shard
        self.numbers = WeakKeyDictionary[Cache, int]()
        super().__init__(model, *arguments, **options)
        head = model.head  # drafters read `Ends`, and no part of it
        if isinstance(head, Linear) and head.weight is not model.embedding.weight:
            head.weight = nn.Parameter(head.weight.new_empty(0), requires_grad=False)

    def step(
        self,
        cache: Cache,
        tokens: Sequence[Sequence[int]],
        *,
        rows: Sequence[int] | None = None,
        positions: Sequence[Sequence[int]] | None = None,
        parents: Sequence[Sequence[int]] | None = None,
        wanted: Sequence[int] | None = None,
        taps: tuple[int, ...] = (),
        logits: bool = True,
        hidden: bool = False,
        inputs: Tensor | None = None,
    ) -> Stepped:
        """As CppModel.step, on all ranks. ValueError for `inputs` and `positions`."""
        if inputs is not None or positions is not None:
            raise ValueError("a split model takes tokens, each at the position after its parent's")
        if wanted is None:
            ends = [sum(len(of_row) for of_row in tokens[: at + 1]) for at in range(len(tokens))]
            wanted = [end - 1 for end in ends]
        numbers = list(range(len(tokens)) if rows is None else rows)
        step = Step(
            self.numbers[cache],
            [row_of(cache, number) for number in numbers],
            [list(of_row) for of_row in tokens],
            None if parents is None else [list(of_row) for of_row in parents],
            list(wanted),
            taps,
            logits,
            hidden,
        )
        with uninterrupted():
            return self.lead(cache, step)

    @abstractmethod
    def lead(self, cache: Cache, step: Step) -> Stepped:
        """Compute a step on rank 0, which the others are told of."""

    @abstractmethod
    def follow(self, cache: Cache, step: Step) -> None:
        """Compute rank 0's step on another rank."""

    def _own(self, cache: Cache, step: Step, **options: Any) -> Stepped:
        rows = [row.number for row in step.rows]
        return super().step(cache, step.tokens, rows=rows, parents=step.parents, **options)


class TensorModel(SplitModel):
    """Some heads, inner features and words of the vocabulary."""

    def _finish(self) -> None:
        shard = self.shard
        by_outputs = shard.mode == "gather"
        self._engine.set_split(shard.rank, shard.ranks, by_outputs, shard.vocab, self.group.exchange)
        super()._finish()

    def lead(self, cache: Cache, step: Step) -> Stepped:
        self.group.tell(step)
        return self._own(cache, step, wanted=step.wanted, taps=step.taps, logits=step.logits, hidden=step.hidden)

    def follow(self, cache: Cache, step: Step) -> None:
        """Compute this rank's part; hidden states are whole on every rank, and rank 0 has read its own."""
        self._own(cache, step, wanted=step.wanted if step.logits else [], logits=step.logits)


class LayersModel(SplitModel):
    """Some neighbouring layers; the first rank has the embedding, the last one the output matrix.

    The rows of a step are divided into micro-batches, so that a rank computes one while the next rank computes another
    (Huang et al. 2019, GPipe). Hidden states are float32, as within a step of one process: the bits are the same.
    """

    micro_batches = 1

    def lead(self, cache: Cache, step: Step) -> Stepped:
        self.group.tell(step)
        parts = micro_batches(step, self.micro_batches)
        mine = [self._pass_on(cache, part, None) for part in parts]
        found = [self._result(part, tapped) for part, tapped in zip(parts, mine, strict=True)]
        hidden, logits, tapped = (
            [each for each in of_kind if each is not None] for of_kind in zip(*found, strict=True)
        )
        return Stepped(*(torch.cat(of_kind) if of_kind else None for of_kind in (hidden, logits, tapped)))

    def follow(self, cache: Cache, step: Step) -> None:
        before = self.group.rank - 1
        for part in micro_batches(step, self.micro_batches):
            count = sum(len(of_row) for of_row in part.tokens)
            inputs = self.group.receive(torch.empty(count, self.config.width), before)
            outputs = self._end(cache, part, inputs) if self.shard.last else (self._pass_on(cache, part, inputs),)
            for output in outputs:
                if output is not None and len(output):
                    self.group.send(output, 0)

    def _pass_on(self, cache: Cache, part: Step, inputs: Tensor | None) -> Tensor | None:
        """Send the output of this rank's last layer to the next rank; return what this rank tapped for rank 0."""
        every, taps = range(sum(len(of_row) for of_row in part.tokens)), self._taps(part, self.group.rank)
        layers, width = self.config.layers, self.config.width
        local = (*(tap % layers for tap in taps), layers - 1)
        states = self._own(cache, part, wanted=every, taps=local, logits=False, inputs=inputs).tapped
        assert states is not None
        self.group.send(states[:, -width:].contiguous(), self.group.rank + 1)
        return states[part.wanted, :-width] if taps else None

    def _end(self, cache: Cache, part: Step, inputs: Tensor) -> Stepped:
        """Compute the last rank's layers, and the outputs that rank 0 wants."""
        asked: dict[str, Any] = {"logits": part.logits, "hidden": part.hidden, "inputs": inputs}
        taps = tuple(tap % self.config.layers for tap in self._taps(part, self.group.rank))
        return self._own(cache, part, wanted=part.wanted if part.asks else [], taps=taps, **asked)

    def _result(self, part: Step, tapped: Tensor | None) -> Stepped:
        """Receive the outputs of a micro-batch on rank 0, which has tapped its own layers."""
        W, D, last = len(part.wanted), self.config.width, self.group.ranks - 1

        def received(columns: int, rank: int) -> Tensor | None:
            if not columns:
                return None
            return self.group.receive(torch.empty(W, columns), rank) if W else torch.empty(W, columns)

        of_ranks = [self._taps(part, rank) for rank in range(last + 1)]
        found = [tapped, *(received(D * len(of_ranks[rank]), rank) for rank in range(1, last))]
        hidden = received(D * part.hidden, last)
        logits = received(self.config.vocab_size * part.logits, last)
        found.append(received(D * len(of_ranks[last]), last))
        blocks = dict[int, Tensor]()  # of each tapped layer
        for taps, states in zip(of_ranks, found, strict=True):
            blocks |= {} if states is None else dict(zip(taps, states.split(D, 1), strict=True))
        return Stepped(hidden, logits, torch.cat([blocks[tap] for tap in part.taps], 1) if blocks else None)

    def _taps(self, part: Step, rank: int) -> list[int]:
        """Return those of the tapped layers that a rank has."""
        return [tap for tap in part.taps if tap // self.config.layers == rank]


class Ends(CppModel):
    """Embedding and output matrix of a split model, whole on rank 0, where draft heads read them. It makes no steps."""

    def __init__(self, model: Transformer, weights: Weights, threads: int | None) -> None:
        config = dataclasses.replace(model.config, layers=0)
        positions = getattr(model, "positions", None)
        parts = SimpleNamespace(
            config=config, embedding=model.embedding, positions=positions, layers=[], norm=model.norm, head=model.head
        )
        self._prepare(parts, weights, threads, None, False, release=False)


def micro_batches(step: Step, most: int) -> list[Step]:
    """Divide the rows of a step into at most so many parts of about the same number of rows."""
    rows = len(step.rows)
    parts = max(1, min(most, rows))
    edges = [rows * part // parts for part in range(parts + 1)]
    return [step.of_rows(first, last) for first, last in itertools.pairwise(edges)]


class SharedStorage:
    """All layers' keys and values of a cache: entries that are copied on rank 0 are copied on every rank."""

    def __init__(self, group: Group, number: int, stores: list[Storage]) -> None:
        self.group, self.number, self.stores = group, number, stores
        self.nbytes = sum(storage.nbytes for storage in stores)

    def move(self, source: Any, target: Any) -> None:
        """As Storage.move, in each layer."""
        with uninterrupted():
            self.group.tell(Move(self.number, source, target))
            for storage in self.stores:
                storage.move(source, target)


def share_cache(group: Group, model: SplitModel, number: int, manager: CacheManager, options: KVOptions) -> None:
    """Let the other ranks make a cache as the one of rank 0, for the model that they loaded as number `number`."""
    cache, mine = manager.cache, next(group.caches)
    assert isinstance(cache, InPlaceCache)
    assert isinstance(cache, Cache)
    rows, model.numbers[cache] = len(cache.lengths), mine
    with uninterrupted():
        group.tell(MakeCache(mine, number, options, rows, manager.tokens, group.freed))
    group.freed = []
    finalize(cache, group.freed_later, mine)
    cache.stores = [cast("Storage", SharedStorage(group, mine, cache.stores))]


def split_model(
    group: Group, shard: Shard, options: Options, model: Transformer, weights: Weights, threads: int | None
) -> SplitModel:
    """Pack this rank's part of a model for C++."""
    kind = LayersModel if shard.mode == "layers" else TensorModel
    made = kind(group, shard, model, weights, threads, release=True)
    if isinstance(made, LayersModel):
        made.micro_batches = options.micro_batches or group.ranks
    return made
