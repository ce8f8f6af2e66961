"""A Transformer that runs in C++: steps, drafts and whole texts over a static cache. packed.py loads its matrices.

fast = CppModel(load("stdlib-10m", torch.float32, torch.device("cpu")).model, "bfloat16")
cache = fast.new_cache(rows=1, tokens=300)
stepped = fast.step(cache, [prompt])       # prefill: logits of the last token
cache.keep(0, range(len(prompt)))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from common.errors import UserError
from common.philox import Purpose

from ...drawing import Speculated
from ...kv_cache import CacheShape, StaticCache
from ...rope import frequencies
from ...sampling import SamplingParams, not_finite
from .library import library
from .ops import sampling_of
from .packed import PackedModel
from .weights import KIND_OF


class Stepped(NamedTuple):
    """Of the wanted tokens, in order; float32."""

    hidden: Tensor | None  # [W, D] normed output of the last layer
    logits: Tensor | None  # [W, V]
    tapped: Tensor | None  # [W, taps * D] outputs of the tapped layers side by side


class CppModel(PackedModel):
    """Computes what `model` computes, over a static cache. For the arguments see PackedModel."""

    def _finish(self) -> None:
        super()._finish()
        self._rotations = 0  # positions for which the engine has cosines and sines
        self._views: WeakKeyDictionary[StaticCache, Any] = WeakKeyDictionary()

    def new_cache(self, rows: int, tokens: int, dtype: torch.dtype = torch.float32) -> StaticCache:
        """An empty cache for so many rows of at most so many tokens, drafts included."""
        config = self.config
        shape = CacheShape(config.layers, config.kv_heads, config.head_dim)
        return StaticCache(shape, rows, tokens, dtype, torch.float32, torch.device("cpu"))

    def why_not_cache(self, cache: object) -> str | None:
        """Why the kernels cannot write into this cache, or None."""
        if not isinstance(cache, StaticCache):
            return f"the C++ kernels write into a static cache, and this is a {type(cache).__name__}: use --kv static"
        if cache.keys[0].values.dtype not in KIND_OF:
            return (
                f"the C++ kernels take caches of float32, bfloat16, float16 and int8, not {cache.keys[0].values.dtype}"
            )
        return None

    def step(
        self,
        cache: StaticCache,
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
        """One forward over new tokens of some rows; their keys and values are written behind the rows' lengths.

        tokens[r] are those of row rows[r] (0, 1, ... by default). parents[r][i] is the number, within the row's tokens,
        of the one that token i follows, -1 for the row's last held token: a tree; by default each follows the one
        before it. positions default to what that gives. wanted are numbers in the rows' tokens one behind the other,
        ascending; by default the last token of each row. inputs [T, D] enter the first layer in place of the tokens'
        embeddings. The caller says which are accepted: `cache.keep`.
        UserError where the cache is none that the kernels take, ValueError for numbers that cannot be.
        """
        if rows is None:
            rows = range(len(tokens))
        counts = [len(of_row) for of_row in tokens]
        held = [cache.lengths[row] for row in rows]
        if positions is None:
            positions = [
                places(length, of_row) for length, of_row in zip(held, parents or map(chain, counts), strict=True)
            ]
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
            self.view(cache),
            flat(tokens),
            flat(positions),
            list(rows),
            counts,
            held,
            [] if parents is None else flat(parents),
            list(wanted),
            list(taps),
            0 if out_hidden is None else out_hidden.data_ptr(),
            0 if out_logits is None else out_logits.data_ptr(),
            0 if out_tapped is None else out_tapped.data_ptr(),
            0 if inputs is None else inputs.data_ptr(),
        )
        return Stepped(out_hidden, out_logits, out_tapped)

    def draft_chain(
        self,
        cache: StaticCache,
        row: int,
        known: Sequence[int],
        count: int,
        params: SamplingParams,
        *,
        sample: int = 0,
        position: int | None = None,
        noise: Purpose = Purpose.DRAFT,
    ) -> tuple[list[int], Tensor]:
        """`count` tokens, each drawn after the one before, in one call; and the distributions [count, V].

        known: tokens of the text that the row does not hold yet, at least one. position: of the first drawn token, for
        its random number; by default behind the known ones. They are drawn as drafters/chains.py draws them. The row
        afterwards has keys and values of the known tokens and of all drawn but the last: `cache.keep` the accepted
        ones. UserError for penalties, which need the text.
        """
        self._check_text(cache, row, known, params)
        probs = torch.empty(max(0, count), self.config.vocab_size)
        at = cache.lengths[row] + len(known) if position is None else position
        with finite_logits():
            drawn = self._engine.draft(
                self.view(cache), row, cache.lengths[row], list(known), sample, at, count, sampling_of(params),
                int(noise), probs.data_ptr(),
            )  # fmt: skip
        return drawn, probs

    def generate_plain(
        self,
        cache: StaticCache,
        row: int,
        known: Sequence[int],
        count: int,
        params: SamplingParams,
        *,
        ends: Sequence[int] = (),
        sample: int = 0,
        position: int | None = None,
        hidden: Tensor | None = None,
        tapped: Tensor | None = None,
        taps: tuple[int, ...] = (),
    ) -> list[int]:
        """Plain decoding in one call: until `count` tokens, or one of `ends`, which is the last then.

        Arguments as for draft_chain; the noise is that of plain sampling. The row afterwards has keys and values of the
        known tokens and of all new ones but the last: `cache.keep` them. hidden [count, D] and tapped [count, taps * D]
        are written, as `step` gives them of the token before each new one.
        """
        self._check_text(cache, row, known, params)
        at = cache.lengths[row] + len(known) if position is None else position
        for name, tensor, width in (("hidden", hidden, 1), ("tapped", tapped, len(taps))):
            wanted = (count, width * self.config.width)
            if tensor is not None and (tensor.shape != wanted or tensor.dtype != torch.float32):
                raise ValueError(f"{name} must be float32 {list(wanted)}, and is {tensor.dtype} {list(tensor.shape)}")
            if tensor is not None and not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous")
        with finite_logits():
            made: list[int] = self._engine.generate(
                self.view(cache),
                row,
                cache.lengths[row],
                list(known),
                sample,
                at,
                count,
                sampling_of(params),
                list(ends),
                list(taps),
                0 if hidden is None else hidden.data_ptr(),
                0 if tapped is None else tapped.data_ptr(),
            )
        return made

    def speculate(
        self,
        cache: StaticCache,
        row: int,
        known: Sequence[int],
        drafter: CppModel,
        its_cache: StaticCache,
        its_row: int,
        its_known: Sequence[int],
        count: int,
        params: SamplingParams,
        *,
        own: bool,
        sample: int,
        position: int,
        noise: Purpose = Purpose.DRAFT,
        steps: int = 1,
    ) -> list[Speculated]:
        """Steps of speculative decoding in one call: `drafter` draws `count` tokens, this model verifies them.

        known, its_known: tokens of the text that each model's row does not hold yet, at least one. own: a draft token
        is accepted while this model draws the same one, with the noise of plain sampling; otherwise by rejection
        (Leviathan et al. 2023). The row afterwards has keys and values of the known tokens and of all that the text
        gained but its last token; the drafter's row too, but for the last token of a fully accepted draft: `cache.keep`
        them. UserError for penalties.
        """
        self._check_text(cache, row, known, params)
        drafter._check_text(its_cache, its_row, its_known, params)
        vocab = self.config.vocab_size
        draft_probs, target_probs = torch.empty(steps, 1, count, vocab), torch.empty(steps, 1, count + 1, vocab)
        tokens, ratios = torch.empty(steps, 1, count, dtype=torch.long), torch.empty(steps, 1, count)
        with finite_logits():
            done = library().speculate(
                self._engine, self.view(cache), row, cache.lengths[row], known,
                drafter._engine, drafter.view(its_cache), its_row, its_cache.lengths[its_row], its_known,
                sample, position, count, sampling_of(params), own, int(noise), steps,
                tokens.data_ptr(), draft_probs.data_ptr(), target_probs.data_ptr(), ratios.data_ptr(),
            )  # fmt: skip
        drafted = [None] * steps if params.greedy else draft_probs.unbind()
        tensors = zip(tokens.unbind(), drafted, target_probs.unbind(), ratios.unbind(), strict=True)
        return [
            Speculated(*of_step, s.draft, s.accepted, s.next, s.computed, s.draft_ms, s.verify_ms, s.accept_ms)
            for of_step, s in zip(tensors, done, strict=True)
        ]

    def _check_text(self, cache: StaticCache, row: int, known: Sequence[int], params: SamplingParams) -> None:
        if params.penalised:
            raise UserError("penalties need the whole text: the C++ kernels draw without them; use --kernels torch")
        if not known:
            raise ValueError("the text has no token that the cache does not hold: nothing to go on from")

    def view(self, cache: StaticCache) -> Any:
        """The cache as the kernels see it. Its memory stays where it is as long as it lives."""
        if (known := self._views.get(cache)) is not None:
            return known
        if (reason := self.why_not_cache(cache)) is not None:
            raise UserError(reason)

        def addresses(tensors: list[Tensor]) -> list[int]:
            for tensor in tensors:
                assert tensor.is_contiguous()
            return [tensor.data_ptr() for tensor in tensors]

        scales = [[s.scales for s in of if s.scales is not None] for of in (cache.keys, cache.values)]
        view = library().View(
            KIND_OF[cache.keys[0].values.dtype], len(cache.lengths), cache.shape.kv_heads, cache.capacity,
            cache.shape.head_dim, addresses([s.values for s in cache.keys]),
            addresses([s.values for s in cache.values]), addresses(scales[0]), addresses(scales[1]),
        )  # fmt: skip
        self._views[cache] = view
        self._rotate_to(cache.capacity)
        return view

    def _rotate_to(self, places: int) -> None:
        """Tables of cosines and sines for so many positions, computed as the torch model computes them."""
        if self.config.positions != "rope" or places <= self._rotations:
            return
        inverse, scale = frequencies(self.config.rope, self.config.head_dim)
        angles = torch.arange(places).float()[:, None] * inverse
        cos, sin = (angles.cos() * scale).contiguous(), (angles.sin() * scale).contiguous()
        self._engine.set_rotation(cos.data_ptr(), sin.data_ptr(), cos.numel())
        self._rotations = places


@contextmanager
def finite_logits() -> Iterator[None]:
    """UserError where the kernels met logits that are not finite."""
    try:
        yield
    except OverflowError:
        raise not_finite(torch.float32) from None


def chain(count: int) -> list[int]:
    return list(range(-1, count - 1))


def places(held: int, parents: Sequence[int]) -> list[int]:
    """Positions of tokens with these parents behind `held` others."""
    found: list[int] = []
    for parent in parents:
        found.append(held if parent < 0 else found[parent] + 1)
    return found


def flat(of_rows: Sequence[Sequence[int]]) -> list[int]:
    return list(of_rows[0]) if len(of_rows) == 1 else [number for of_row in of_rows for number in of_row]
