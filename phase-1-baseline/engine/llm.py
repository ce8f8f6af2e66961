"""A loaded model and the options to run it with: what the command line, the demo and the benches all call.

llm = LLM(Options(max_tokens=16))
print(llm.generate(["from pathlib import"])[0].text)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from common.device import available_memory, resolve_device, resolve_dtype
from common.errors import UserError

from .beam import beam_search
from .cost import forward_bytes, ranking_bytes
from .generate import Clock, Generation, decode, finish
from .load import load
from .options import Options
from .sampling import KeyedSampler
from .sequence import Sequence


class LLM:
    """Loads what the options name. UserError where that cannot be had."""

    def __init__(self, options: Options) -> None:
        if options.threads:
            torch.set_num_threads(options.threads)
        self.options = options
        self.params = options.sampling_params()
        device = resolve_device(options.device)
        self.loaded = load(options.model, resolve_dtype(options.dtype, device), device)

    def sequences(self, texts: list[str]) -> list[Sequence]:
        """One sequence for every sample of every prompt. UserError if one forward over all would not fit in memory."""
        prompts = [self.loaded.tokenizer.encode(text) for text in texts]
        self._check_memory(prompts)
        return [
            Sequence(prompt, self.params, self.loaded.ending, sample)
            for prompt in prompts
            for sample in range(self.options.n)
        ]

    def _check_memory(self, prompts: list[list[int]]) -> None:
        """All completions share one forward; better to say now that it is too large than to be killed midway."""
        config, weight = self.loaded.config, self.loaded.model.embedding.weight
        rows = len(prompts) * self.options.n * self.options.beams
        length = min(max(map(len, prompts)) + self.params.max_new_tokens, config.context)
        needed = forward_bytes(config, rows, length, weight.itemsize) + ranking_bytes(config, self.options.beams)
        free = available_memory(weight.device)
        if needed > free:
            raise UserError(
                f"{rows} completions of up to {length} tokens need about {needed / 2**30:.1f} GiB in one forward, and "
                f"{free / 2**30:.1f} GiB are free: give fewer prompts, or a smaller --n, --beams or --max-tokens"
            )

    def run(self, sequences: list[Sequence], clock: Clock) -> Iterator[None]:
        """Decode to the end, marking each sequence's tokens on the clock; yields after every step."""
        if self.options.beams > 1:
            yield from self._search(sequences, clock)
            return
        for active in decode(self.loaded.model, sequences, self.params, KeyedSampler(self.params.seed)):
            for sequence in active:
                clock.mark(sequence)
            yield

    def _search(self, sequences: list[Sequence], clock: Clock) -> Iterator[None]:
        """Beam search, one prompt after the other: no token is certain before its search ends."""
        for sequence in sequences:
            best = beam_search(
                self.loaded.model,
                sequence.prompt,
                self.params,
                self.loaded.ending,
                self.options.beams,
                self.options.length_penalty,
            )
            for token in best.tokens:
                sequence.append(token)
            clock.mark(sequence, best.forwards)
            yield

    def generate(self, texts: list[str]) -> list[Generation]:
        """All completions, in the order of the prompts."""
        sequences, clock = self.sequences(texts), Clock()
        for _ in self.run(sequences, clock):
            pass
        return [finish(sequence, clock.stats(sequence)) for sequence in sequences]
