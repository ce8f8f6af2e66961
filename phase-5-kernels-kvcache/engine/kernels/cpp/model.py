"""A Transformer in C++: steps, drafts and whole sequences over a KV cache. packed.py loads its matrices.

fast = CppModel(load("stdlib-10m", torch.float32, torch.device("cpu")).model, "bfloat16")
cache = fast.new_cache(rows=1, tokens=300)
stepped = fast.step(cache, [prompt])       # prefill: logits of the last token
cache.keep(0, range(len(prompt)))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from common.errors import UserError

from ...kv_cache import CacheShape, PagedCache, RingCache, StaticCache
from ...rope import frequencies
from ...sampling import SamplingParams, not_finite
from ..arguments import address
from .library import library
from .ops import sampling_of
from .packed import PackedModel
from .weights import KIND_OF

Cache = StaticCache | RingCache | PagedCache


class Stepped(NamedTuple):
    """Results of the wanted tokens, in order; float32."""

    hidden: Tensor | None  # [W, D] normed output of the last layer
    logits: Tensor | None  # [W, V]
    tapped: Tensor | None  # [W, taps * D] outputs of the tapped layers side by side


class Decoded(NamedTuple):
    """What one step of a call decided for R sequences, and its times."""

    drafts: list[list[int]]
    accepted: list[int]
    next: list[int]
    computed: list[int]  # positions
    draft_ms: float
    verify_ms: float
    accept_ms: float


class CppModel(PackedModel):
    """Computes what `model` computes, over a static, ring or paged cache. For the arguments see PackedModel."""

    def _finish(self) -> None:
        super()._finish()
        self._rotations = 0  # positions for which the engine has cosines and sines
        self._views: WeakKeyDictionary[Cache, Any] = WeakKeyDictionary()

    def new_cache(self, rows: int, tokens: int, dtype: torch.dtype = torch.float32) -> StaticCache:
        """Return an empty cache with `rows` rows of at most `tokens` tokens each, drafts included."""
        config = self.config
        shape = CacheShape(config.layers, config.kv_heads, config.head_dim)
        return StaticCache(shape, rows, tokens, dtype, torch.float32, torch.device("cpu"))

    def why_not_cache(self, cache: object) -> str | None:
        """Return why the kernels cannot write into this cache, or None."""
        if not isinstance(cache, Cache):
            name = type(cache).__name__
            return f"the C++ kernels write into caches of one tensor, and this is a {name}: use --kv static or paged"
        dtype = cache.keys[0].values.dtype
        if dtype not in KIND_OF:
            return f"the C++ kernels take caches of float32, bfloat16, float16 and int8, not {dtype}"
        return None

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
        """Compute one forward over new tokens of some rows; write their keys and values after the rows' lengths.

        tokens[r]: those of row rows[r] (0, 1, ... by default). parents[r][i]: the index, within the row's tokens, of
        the token that token i follows, -1 for the row's last cached token: a tree. By default each token follows the
        one before it. positions: by default what the parents give. wanted: indices into the rows' tokens laid end to
        end, ascending; by default the last token of each row. inputs [T, D] replace the tokens' embeddings in the
        first layer. The lengths do not change: the caller accepts tokens with `cache.keep`.

        UserError for a cache that the kernels do not support, ValueError for numbers that are out of range.
        """
        if rows is None:
            rows = range(len(tokens))
        counts = [len(of_row) for of_row in tokens]
        held = [cache.lengths[row] for row in rows]
        if positions is None and parents is None:
            positions = [range(length, length + count) for length, count in zip(held, counts, strict=True)]
        elif positions is None:
            positions = [positions_of(length, of_row) for length, of_row in zip(held, parents or (), strict=True)]
        if wanted is None:
            ends = [sum(counts[: at + 1]) for at in range(len(counts))]
            wanted = [end - 1 for end, count in zip(ends, counts, strict=True) if count]
        W, D = len(wanted), self.config.width
        if inputs is not None:
            inputs = inputs.float().contiguous()
            if inputs.shape != (sum(counts), D):
                raise ValueError(f"inputs must be [{sum(counts)}, {D}], and are {list(inputs.shape)}")
        out_hidden = torch.empty(W, D) if hidden else None
        out_logits = torch.empty(W, self.config.vocab_size) if logits else None
        out_tapped = torch.empty(W, len(taps) * D) if taps else None
        self._engine.step(
            flat(tokens), flat(positions), [self.row(cache, row) for row in rows], counts,
            [] if parents is None else flat(parents), list(wanted), list(taps),
            *map(address, (out_hidden, out_logits, out_tapped, inputs)),
        )  # fmt: skip
        return Stepped(out_hidden, out_logits, out_tapped)

    def decode(
        self,
        batch: list[Any],
        drafter: Any,
        counts: list[int],
        steps: int,
        *,
        limits: Sequence[int] = (),
        own: Sequence[bool] = (),
        ends: Sequence[int] = (),
        taps: tuple[int, ...] | None = None,
        new: int = 0,
        budget_ms: float = 0.0,
    ) -> tuple[list[Decoded], Tensor | None]:
        """Make up to `steps` steps of R sequences in one call; return those that were made.

        batch: of `sequence`. drafter: a drafter of the library over the same sequences, or None; it drafts counts[r]
        tokens after sequence r. own[r]: a draft token is accepted if this model draws the same token, with the noise of
        plain sampling; otherwise, and by default, the rule is rejection (Leviathan et al. 2023). The call returns after
        the step in which a sequence gains one of `ends`, or which uses up budget_ms (0: no limit). Afterwards the row
        of a sequence has keys and values of its new tokens and of all that it gained but the last token.

        limits: the call returns before a step in which some sequence r could gain its token number limits[r] + 1; by
        default never.

        taps: return hidden states as well, with the outputs of these layers beside them, [n, F], step by step and
        sequence by sequence: of the new tokens (in the first step `new` in all) and of the accepted draft tokens.
        """
        limits = list(limits) or [steps * (count + 1) for count in counts]
        states, room = None, 0
        if taps is not None:
            width = self.config.width * (1 + len(taps))
            states = torch.empty(new + sum(limits), width)
            room = states.numel()
        try:
            made = library().decode(
                self._engine, batch, drafter, counts, steps, limits, list(own) or [False] * len(batch), list(ends),
                0 if states is None else states.data_ptr(), room, list(taps or ()), budget_ms,
            )  # fmt: skip
        except OverflowError:
            raise not_finite(torch.float32) from None
        return [Decoded(*step) for step in made], states

    def propose(self, drafter: Any, counts: list[int]) -> tuple[list[list[int]], list[Tensor]]:
        """Draft counts[r] tokens after sequence r; return them and their distributions [counts[r], V] (greedy: logits).

        drafter: one of the library's.
        """
        probs = torch.empty(sum(counts), self.config.vocab_size)
        try:
            tokens = drafter.propose(counts, probs.data_ptr())
        except OverflowError:
            raise not_finite(torch.float32) from None
        rows: list[list[int]] = [[] for _ in counts]  # they are written position by position
        at = 0
        for i in range(max(counts, default=0)):
            for row, count in enumerate(counts):
                if i < count:
                    rows[row].append(at)
                    at += 1
        return tokens, [probs[of_row] for of_row in rows]

    def sequence(
        self,
        cache: Cache,
        row: int,
        new_tokens: Sequence[int],
        params: SamplingParams,
        sample: int = 0,
        position: int | None = None,
    ) -> Any:
        """Describe a sequence for `decode` and its drafters.

        new_tokens: tokens of the sequence that are not cached yet, at least one. position: that of the first drawn
        token, for its random number; by default the one after the new tokens. UserError for penalties, which depend on
        the whole sequence.
        """
        if params.penalised:
            raise UserError("penalties need the whole sequence: the C++ kernels draw without them; use --kernels torch")
        if not new_tokens:
            raise ValueError("new_tokens is empty: at least one token of the sequence must not be cached yet")
        at = cache.lengths[row] + len(new_tokens) if position is None else position
        return library().Sequence(self.row(cache, row), list(new_tokens), sampling_of(params), sample, at)

    def row(self, cache: Cache, number: int) -> Any:
        """Describe a row of a cache, as far as it has room now. UserError: see step."""
        view = self._views.get(cache) or self.view(cache)
        held, slots = cache.lengths[number], cache.keys[0].values.shape[2]
        pages = cache.tables[number] if isinstance(cache, PagedCache) else [number]
        if (positions := held + slots if isinstance(cache, RingCache) else len(pages) * slots) > self._rotations:
            self._rotate_to(positions)
        return library().Row(view, pages, held)

    def view(self, cache: Cache) -> Any:
        """Return the addresses of the cache's tensors, which stay the same while it lives. UserError: see step."""
        if (known := self._views.get(cache)) is not None:
            return known
        if (reason := self.why_not_cache(cache)) is not None:
            raise UserError(reason)

        def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
            assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
            return [tensor.data_ptr() for tensor in tensors if tensor is not None]

        both, (pages, _, slots, _) = (cache.keys, cache.values), cache.keys[0].values.shape
        view = library().View(
            KIND_OF[cache.keys[0].values.dtype], pages, cache.shape.kv_heads, slots, cache.shape.head_dim,
            isinstance(cache, RingCache), *(addresses([s.values for s in each]) for each in both),
            *(addresses([s.scales for s in each]) for each in both), [*cache.keys, *cache.values],
        )  # fmt: skip
        self._views[cache] = view
        return view

    def _rotate_to(self, positions: int) -> None:
        """Give the engine cosines and sines for so many positions, computed as the torch model computes them."""
        self._rotations = positions = max(positions, 2 * self._rotations)
        if self.config.positions != "rope":
            return
        inverse, scale = frequencies(self.config.rope, self.config.head_dim)
        angles = torch.arange(positions).float()[:, None] * inverse
        cos, sin = (angles.cos() * scale).contiguous(), (angles.sin() * scale).contiguous()
        self._engine.set_rotation(cos.data_ptr(), sin.data_ptr(), cos.numel())


def idle() -> Any:
    """Return a placeholder, in a batch, for a sequence after which a drafter of the library drafts nothing."""
    return library().Sequence(library().Row(None, [], 0), [], library().Sampling(0.0, 0, 1.0, 0.0, 0), 0, 0)


def positions_of(held: int, parents: Sequence[int]) -> list[int]:
    """Return the positions of tokens with these parents after `held` cached tokens."""
    found: list[int] = []
    for parent in parents:
        found.append(held if parent < 0 else found[parent] + 1)
    return found


def flat(of_rows: Sequence[Sequence[int]]) -> list[int]:
    return list(of_rows[0]) if len(of_rows) == 1 else [number for of_row in of_rows for number in of_row]
