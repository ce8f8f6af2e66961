"""A loaded model and the options to run it with: what the command line, the demo and the benches all call.

llm = LLM(Options(max_tokens=16))
print(llm.generate(["from pathlib import"])[0].text)
for piece in llm.stream("class Stack:"):
    print(piece, end="")
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager

from common.device import available_memory, each_within, resolve_device, resolve_dtype, torch_threads
from common.errors import UserError

from .beam import beam_search
from .cost import forward_bytes, ranking_bytes
from .generate import Generation, decode, finish
from .load import load
from .options import Options
from .sampling import SamplingParams
from .sequence import Sequence


class LLM:
    """Loads the models that the options name. UserError if one cannot be loaded."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.params = options.sampling_params()  # of requests that bring none
        device = resolve_device(options.device)
        self.loaded = load(options.model, resolve_dtype(options.dtype, device), device)

    def sequences(
        self, texts: list[str], params: SamplingParams | list[SamplingParams] | None = None
    ) -> list[Sequence]:
        """Make one sequence for every sample of every prompt.

        params: for all, or one for each prompt; by default the options'. UserError if one forward over all would not
        fit in memory.
        """
        if not isinstance(params, list):
            params = [params or self.params] * len(texts)
        if len(params) != len(texts):
            raise UserError(
                f"{len(params)} sampling parameters for {len(texts)} prompts: give one for each, or one for all"
            )
        firsts = [
            Sequence(self.loaded.tokenizer.encode(text), mine, self.loaded.ending)
            for text, mine in zip(texts, params, strict=True)
        ]
        self._check_memory(firsts)
        return [
            Sequence(first.prompt, first.params, self.loaded.ending, sample)
            for first in firsts
            for sample in range(self.options.n)
        ]

    def _check_memory(self, firsts: list[Sequence]) -> None:
        """Raise UserError if the forward that all completions share does not fit in memory."""
        config, weight = self.loaded.config, self.loaded.model.embedding.weight
        rows = len(firsts) * self.options.n * self.options.beams
        length = min(max(each.length + each.params.max_new_tokens for each in firsts), config.context)
        needed = forward_bytes(config, rows, length, weight.itemsize) + ranking_bytes(config, self.options.beams)
        free = available_memory(weight.device)
        if needed > free:
            raise UserError(
                f"{rows} completions of up to {length} tokens need about {needed / 2**30:.1f} GiB in one forward, and "
                f"{free / 2**30:.1f} GiB are free: give fewer prompts, or a smaller --n, --beams or --max-tokens"
            )

    def computing(self) -> AbstractContextManager[None]:
        """Return the context of every step: torch has `--threads` threads inside."""
        return torch_threads(self.options.threads)

    def run(self, sequences: list[Sequence]) -> Iterator[None]:
        """Decode to the end; yield after every step."""
        return each_within(self.computing, self._decode(sequences))

    def _decode(self, sequences: list[Sequence]) -> Iterator[None]:
        for sequence in sequences:
            sequence.progress.began = time.perf_counter()
        if self.options.beams > 1:
            yield from self._search(sequences)
            return
        for active in decode(self.loaded.model, sequences):
            for sequence in active:
                sequence.progress.mark()
            yield

    def _search(self, sequences: list[Sequence]) -> Iterator[None]:
        """Search prompt by prompt; no token is certain before its search ends."""
        for sequence in sequences:
            best = beam_search(
                self.loaded.model,
                sequence.prompt,
                sequence.params,
                self.loaded.ending,
                self.options.beams,
                self.options.length_penalty,
            )
            for token in best.tokens:
                sequence.append(token)
            sequence.progress.mark(best.forwards)
            yield

    def generate(
        self, texts: list[str], params: SamplingParams | list[SamplingParams] | None = None
    ) -> list[Generation]:
        """Return all completions, in the order of the prompts. params as in `sequences`."""
        sequences = self.sequences(texts, params)
        for _ in self.run(sequences):
            pass
        return [finish(sequence) for sequence in sequences]

    def stream(self, text: str, params: SamplingParams | None = None) -> Iterator[str]:
        """Yield the text of one completion, piece by piece, as soon as it can no longer change."""
        sequence = self.sequences([text], params)[0]
        for _ in self.run([sequence]):
            if piece := sequence.take_text():
                yield piece
