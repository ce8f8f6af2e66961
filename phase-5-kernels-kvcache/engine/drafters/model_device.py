"""The draft model with its whole chain on the device: the host neither chooses nor reads a draft token.

Each forward takes the token that the last one drew from device memory. Positions, lengths and what a token sees follow
from the numbers of the forward before (the op `advance`). The tokens are those of model.py.
"""

from __future__ import annotations

import time
from typing import cast

import torch

from common.device import synchronize
from common.philox import Purpose

from ..context import window_start
from ..device_runner import DeviceRunner
from ..drafting import Draft, Outcome
from ..inputs import following, sampling_metadata
from ..kernels.tokens import UNLIMITED
from ..kv_cache import SPARE, DynamicCache, RingCache
from ..profiler import stage
from ..runner import ModelRunner, Work
from ..sampling import KeyedSampler
from ..sequence import Sequence
from ..steps import Verified
from ..verify import GreedySource, RandomSource
from .model import ModelDrafter


class DeviceModelDrafter(ModelDrafter):
    """For runners over kernels of a GPU backend; `propose` drafts as its parent does, where `able` says no."""

    runner: DeviceRunner

    def __init__(self, runner: DeviceRunner, source: RandomSource, noise: Purpose = Purpose.DRAFT) -> None:
        super().__init__(runner, source, noise)
        self._drafted: dict[Sequence, tuple[Work, int]] = {}  # by the last draft: what it computed, how many tokens

    def able(self, target: ModelRunner, sequences: list[Sequence], widths: list[int]) -> bool:
        """Return True if chains of these sequences can be drawn on the device, with one window for all their tokens."""
        if not isinstance(target, DeviceRunner) or not any(widths):
            return False
        sources = isinstance(self.source, KeyedSampler | GreedySource)
        cache = self.runner.manager.cache  # a dynamic one is another tensor after every token
        fits = not isinstance(cache, DynamicCache) and (not isinstance(cache, RingCache) or max(widths) <= SPARE)
        context = self.runner.model.config.context
        stays = (
            window_start(s.length, context) == window_start(s.length + max(width - 1, 0), context)
            for s, width in zip(sequences, widths, strict=True)
        )
        hosts = any(s.params.penalised or s.controller.ends_early for s in sequences)  # the host has to see the tokens
        return sources and fits and all(stays) and not hosts

    def propose_and_verify(self, target: ModelRunner, sequences: list[Sequence], widths: list[int]) -> Verified:
        """Draw exactly widths[r] tokens for sequence r, and run the target's forward, which is staged before them."""
        began, target = time.perf_counter(), cast(DeviceRunner, target)
        staged_widths = target.upload.put_longs(widths, len(widths))
        works, inputs = target.prepare(list(sequences), [s.prompt + s.tokens for s in sequences], widths)
        staged = time.perf_counter()
        stage("draft")
        draft = self.draw(sequences, widths)
        synchronize(target.upload.device)
        drafted = time.perf_counter()
        stage("verify")
        output = target.finish(works, inputs, draft.tokens)
        synchronize(target.upload.device)
        verify = time.perf_counter() - drafted + staged - began
        return Verified(draft, staged_widths, [work.draft for work in works], output, drafted - staged, verify)

    @torch.inference_mode()
    def draw(self, sequences: list[Sequence], widths: list[int]) -> Draft:
        """Draw chains of exactly these widths, at least one above 0; their tokens stay on the device."""
        runner, K = self.runner, max(widths)
        opened = [r for r, width in enumerate(widths) if width]
        mine, counts = [sequences[r] for r in opened], [widths[r] for r in opened]
        works, inputs = runner.prepare(list(mine), [s.prompt + s.tokens for s in mine], counts, ahead=True)
        self._drafted = {sequence: (work, width) for sequence, work, width in zip(mine, works, counts, strict=True)}
        upload, R = runner.upload, len(opened)
        rows = sampling_metadata(upload, mine, self.source)
        more = upload.put((int(j < width) for j in range(1, K) for width in counts), K - 1, R)
        limits = list(inputs.metadata.ranges)
        windows = upload.put([UNLIMITED if window is None else window for window in limits], len(limits))
        at = upload.put_longs(opened, R)

        model, device = runner.model, upload.device
        tokens, probs = torch.empty(R, K, dtype=torch.long, device=device), None
        if not rows.greedy:
            probs = torch.empty(R, K, model.config.vocab_size, device=device)
        for j in range(K):
            if j:
                known = [int(j < width) for width in counts]
                inputs = following(model.kernels, inputs, j, more.tensor[j - 1], known, windows.tensor)
            hidden = inputs.read_from(runner.run(inputs, draft=tokens)[0])[:, 0]
            logits = model.logits(hidden)
            if probs is None:
                model.kernels.sample(logits, rows, out=tokens[:, j])
            else:
                model.kernels.probabilities(logits, rows, out=probs[:, j])
                model.kernels.draw(probs[:, j], *rows.keyed, self.source, self.noise, first=j, out=tokens[:, j])
        if len(sequences) > R:  # rows without a draft: what they hold is never read
            tokens = tokens.new_zeros(len(sequences), K).index_copy_(0, at.tensor, tokens)
            if probs is not None:
                probs = probs.new_ones(len(sequences), *probs.shape[1:]).index_copy_(0, at.tensor, probs)
        return Draft(tokens, probs, widths)

    def observe(self, outcome: Outcome) -> None:
        """Keep the cache entries of the sequences, and of accepted tokens but the last, which was not computed."""
        drafted, self._drafted = self._drafted, {}
        for sequence, accepted in zip(outcome.sequences, outcome.accepted, strict=True):
            if sequence in drafted and sequence.finish_reason is None:
                (work, width), first = drafted[sequence], len(sequence.tokens) - accepted - 1
                kept = sequence.tokens[first : first + min(accepted, width - 1)]
                self.runner.manager.appended(work.row, work.new + kept)
        super().observe(outcome)
