"""A Transformer in C++: steps, drafts and whole sequences over a static cache. packed.py loads its matrices.

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
    """Results of the wanted tokens, in order; float32."""

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
        """Return an empty cache with `rows` rows of at most `tokens` tokens each, drafts included."""
        config = self.config
        shape = CacheShape(config.layers, config.kv_heads, config.head_dim)
        return StaticCache(shape, rows, tokens, dtype, torch.float32, torch.device("cpu"))

    def why_not_cache(self, cache: object) -> str | None:
        """Return why the kernels cannot write into this cache, or None."""
        if not isinstance(cache, StaticCache):
            return f"the C++ kernels write into a static cache, and this is a {type(cache).__name__}: use --kv static"
        dtype = cache.keys[0].values.dtype
        if dtype not in KIND_OF:
            return f"the C++ kernels take caches of float32, bfloat16, float16 and int8, not {dtype}"
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
            self.view(cache), flat(tokens), flat(positions), list(rows), counts, held,
            [] if parents is None else flat(parents), list(wanted), list(taps),
            *map(address, (out_hidden, out_logits, out_tapped, inputs)),
        )  # fmt: skip
        return Stepped(out_hidden, out_logits, out_tapped)

    def draft_chain(
        self,
        cache: StaticCache,
        row: int,
        new_tokens: Sequence[int],
        count: int,
        params: SamplingParams,
        *,
        sample: int = 0,
        position: int | None = None,
        noise: Purpose = Purpose.DRAFT,
    ) -> tuple[list[int], Tensor]:
        """Draw `count` tokens, each after the one before, in one call; return them and their distributions [count, V].

        new_tokens: tokens of the sequence that are not cached yet, at least one. position: that of the first drawn
        token, for its random number; by default the one after the new tokens. Tokens are drawn as drafters/chains.py
        draws them. Afterwards the row has keys and values of the new tokens and of all drawn tokens but the last:
        `cache.keep` the accepted ones. UserError for penalties, which depend on the whole sequence.
        """
        self._check_sequence(new_tokens, params)
        probs = torch.empty(max(0, count), self.config.vocab_size)
        at = cache.lengths[row] + len(new_tokens) if position is None else position
        with finite_logits():
            drawn = self._engine.draft(
                self.view(cache), row, cache.lengths[row], list(new_tokens), sample, at, count, sampling_of(params),
                int(noise), probs.data_ptr(),
            )  # fmt: skip
        return drawn, probs

    def generate_plain(
        self,
        cache: StaticCache,
        row: int,
        new_tokens: Sequence[int],
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
        """Decode plainly in one call, up to `count` tokens, or until one of `ends`, which is then the last token.

        Arguments as for draft_chain; the noise is that of plain sampling. Afterwards the row has keys and values of
        new_tokens and of all generated tokens but the last: `cache.keep` them. For each generated token, the states of
        the token before it are written to hidden [count, D] and tapped [count, taps * D], as `step` returns them.
        """
        self._check_sequence(new_tokens, params)
        at = cache.lengths[row] + len(new_tokens) if position is None else position
        for name, tensor, width in (("hidden", hidden, 1), ("tapped", tapped, len(taps))):
            wanted = (count, width * self.config.width)
            if tensor is not None and (tensor.shape != wanted or tensor.dtype != torch.float32):
                raise ValueError(f"{name} must be float32 {list(wanted)}, and is {tensor.dtype} {list(tensor.shape)}")
            if tensor is not None and not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous")
        with finite_logits():
            made: list[int] = self._engine.generate(
                self.view(cache), row, cache.lengths[row], list(new_tokens), sample, at, count, sampling_of(params),
                list(ends), list(taps), address(hidden), address(tapped),
            )  # fmt: skip
        return made

    def speculate(
        self,
        cache: StaticCache,
        row: int,
        new_tokens: Sequence[int],
        drafter: CppModel,
        its_cache: StaticCache,
        its_row: int,
        its_new_tokens: Sequence[int],
        count: int,
        params: SamplingParams,
        *,
        own: bool,
        sample: int,
        position: int,
        noise: Purpose = Purpose.DRAFT,
        steps: int = 1,
    ) -> list[Speculated]:
        """Make steps of speculative decoding in one call: `drafter` draws `count` tokens, this model verifies them.

        new_tokens, its_new_tokens: tokens of the sequence that each model has not cached yet, at least one. own: a
        draft token is accepted if this model draws the same token, with the noise of plain sampling; otherwise the rule
        is rejection (Leviathan et al. 2023). Afterwards the row has keys and values of new_tokens and of all accepted
        and next tokens but the last. The drafter's row has the same, without the last token of a draft that was
        accepted whole. `cache.keep` them. UserError for penalties.
        """
        self._check_sequence(new_tokens, params)
        self._check_sequence(its_new_tokens, params)
        vocab = self.config.vocab_size
        draft_probs, target_probs = torch.empty(steps, 1, count, vocab), torch.empty(steps, 1, count + 1, vocab)
        tokens, ratios = torch.empty(steps, 1, count, dtype=torch.long), torch.empty(steps, 1, count)
        with finite_logits():
            done = library().speculate(
                self._engine, self.view(cache), row, cache.lengths[row], new_tokens,
                drafter._engine, drafter.view(its_cache), its_row, its_cache.lengths[its_row], its_new_tokens,
                sample, position, count, sampling_of(params), own, int(noise), steps,
                tokens.data_ptr(), draft_probs.data_ptr(), target_probs.data_ptr(), ratios.data_ptr(),
            )  # fmt: skip
        drafted = [None] * steps if params.greedy else draft_probs.unbind()
        tensors = zip(tokens.unbind(), drafted, target_probs.unbind(), ratios.unbind(), strict=True)
        return [
            Speculated(*of_step, s.draft, s.accepted, s.next, s.computed, s.draft_ms, s.verify_ms, s.accept_ms)
            for of_step, s in zip(tensors, done, strict=True)
        ]

    def _check_sequence(self, new_tokens: Sequence[int], params: SamplingParams) -> None:
        if params.penalised:
            raise UserError("penalties need the whole sequence: the C++ kernels draw without them; use --kernels torch")
        if not new_tokens:
            raise ValueError("new_tokens is empty: at least one token of the sequence must not be cached yet")

    def view(self, cache: StaticCache) -> Any:
        """Return the addresses of the cache's tensors, which stay the same while it lives. UserError: see step."""
        if (known := self._views.get(cache)) is not None:
            return known
        if (reason := self.why_not_cache(cache)) is not None:
            raise UserError(reason)

        def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
            assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
            return [tensor.data_ptr() for tensor in tensors if tensor is not None]

        both = (cache.keys, cache.values)
        view = library().View(
            KIND_OF[cache.keys[0].values.dtype], len(cache.lengths), cache.shape.kv_heads, cache.capacity,
            cache.shape.head_dim, *(addresses([s.values for s in each]) for each in both),
            *(addresses([s.scales for s in each]) for each in both),
        )  # fmt: skip
        self._views[cache] = view
        self._rotate_to(cache.capacity)
        return view

    def _rotate_to(self, positions: int) -> None:
        """Give the engine cosines and sines for so many positions, computed as the torch model computes them."""
        if self.config.positions != "rope" or positions <= self._rotations:
            return
        inverse, scale = frequencies(self.config.rope, self.config.head_dim)
        angles = torch.arange(positions).float()[:, None] * inverse
        cos, sin = (angles.cos() * scale).contiguous(), (angles.sin() * scale).contiguous()
        self._engine.set_rotation(cos.data_ptr(), sin.data_ptr(), cos.numel())
        self._rotations = positions


@contextmanager
def finite_logits() -> Iterator[None]:
    """Raise UserError if the kernels report logits that are not finite."""
    try:
        yield
    except OverflowError:
        raise not_finite(torch.float32) from None


def positions_of(held: int, parents: Sequence[int]) -> list[int]:
    """Return the positions of tokens with these parents after `held` cached tokens."""
    found: list[int] = []
    for parent in parents:
        found.append(held if parent < 0 else found[parent] + 1)
    return found


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def flat(of_rows: Sequence[Sequence[int]]) -> list[int]:
    return list(of_rows[0]) if len(of_rows) == 1 else [number for of_row in of_rows for number in of_row]
