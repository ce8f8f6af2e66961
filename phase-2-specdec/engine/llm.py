"""A loaded model and the options to run it with: what the command line, the demo and the benches all call.

llm = LLM(Options(max_tokens=16))
print(llm.generate(["from pathlib import"])[0].text)
for piece in llm.stream("class Stack:"):
    print(piece, end="")
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

from common.device import available_memory, each_within, memory, resolve_device, resolve_dtype, torch_threads
from common.errors import UserError
from common.results import environment

from .beam import beam_search
from .cost import forward_bytes, ranking_bytes
from .drafting import ModelDrafter
from .fake import FakeModel, is_fake
from .generate import Generation, Watch, decode, finish
from .load import LoadedModel, load
from .options import Options
from .pair import check_pair, fit_vocabulary, load_fake, resolve_draft
from .sampling import SamplingParams
from .sequence import Sequence
from .speculative import Step, speculative_decode
from .verify import random_source


class LLM:
    """Loads the models that the options name. UserError if one cannot be loaded."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.params = options.sampling_params()  # of requests that bring none
        self.loaded = self._load(options.model)
        name = resolve_draft(options.draft, self.loaded)
        self.draft = self._load(name) if name else None
        if self.draft:
            check_pair(self.loaded, self.draft)
            fit_vocabulary(self.draft.model, self.loaded.config.vocab_size)

    def _load(self, name: str) -> LoadedModel:
        if is_fake(name):
            return load_fake(name)
        device = resolve_device(self.options.device)
        return load(name, resolve_dtype(self.options.dtype, device), device)

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

    def header(self) -> dict[str, object]:
        """Return the header of a recording: the models, the settings, the machine."""
        weight, models = self.loaded.model.embedding.weight, [each for each in (self.loaded, self.draft) if each]
        trained = [each.checkpoint for each in models if not isinstance(each.model, FakeModel)]
        hashes = {checkpoint.name: checkpoint.content_hash() for checkpoint in trained}
        return {
            "model": self.loaded.checkpoint.name,
            "draft": self.draft.checkpoint.name if self.draft else None,
            "settings": self.options.model_dump(mode="json", by_alias=True),
            "environment": environment(
                weight.device, weight.dtype, self.options.threads or torch.get_num_threads(), hashes
            ),
        }

    def computing(self) -> AbstractContextManager[None]:
        """Return the context of every step: torch has `--threads` threads inside."""
        return torch_threads(self.options.threads)

    def run(self, sequences: list[Sequence], watch: Watch | None = None) -> Iterator[Step | None]:
        """Decode to the end; yield every step of speculation, or None. `watch` sees the steps of plain decoding."""
        return each_within(self.computing, self._decode(sequences, watch))

    def _decode(self, sequences: list[Sequence], watch: Watch | None) -> Iterator[Step | None]:
        for sequence in sequences:
            sequence.progress.began = time.perf_counter()
        if self.options.beams > 1:
            yield from self._search(sequences)
            return
        if self.draft:
            yield from self._speculate(sequences)
            return
        for active in decode(self.loaded.model, sequences, watch=watch):
            for sequence in active:
                sequence.progress.mark()
            yield None

    def _speculate(self, sequences: list[Sequence]) -> Iterator[Step]:
        assert self.draft is not None, "run() asks for this only with a draft"
        source = random_source(sequence.params for sequence in sequences)
        drafter = ModelDrafter(self.draft.model, source)
        for step in speculative_decode(self.loaded.model, drafter, sequences, self.options.k, source):
            for sequence, stats in zip(step.sequences, step.stats, strict=True):
                sequence.progress.mark()
                if self.options.metrics_detailed:
                    stats = dataclasses.replace(stats, rss_mib=memory(self.loaded.model.embedding.weight.device)["rss"])
                sequence.steps.append(stats)
            yield step

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
            yield None

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
