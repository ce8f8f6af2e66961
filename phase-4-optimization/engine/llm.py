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
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch

from common.checkpoint import open_checkpoint
from common.device import available_memory, each_within, memory, resolve_device, torch_threads
from common.errors import UserError
from common.results import environment

from .beam import beam_search
from .compile import Compiler
from .config import ModelConfig
from .controllers import CostModel
from .cost import forward_bytes, ranking_bytes
from .drafters import DynamicTreeDrafter, StaticTreeDrafter, TreeDrafter, make_drafter
from .drafters.heads import Heads, find_heads, load_heads
from .drafting import Brancher, Drafter
from .fake import FakeModel, is_fake
from .generate import Generation, finish
from .load import LoadedModel, load
from .options import Options, QuantName
from .packing import pack_matrices
from .pair import check_pair, fit_vocabulary, load_fake, resolve_draft
from .precision import Precision, computing, resolve_precision
from .profiler import stage
from .sampling import SamplingParams
from .sequence import Sequence
from .speculative import decode
from .steps import Step, StepStats
from .tokenizer_cache import TokenizerCache
from .tree_shapes import best_shape, measured_acceptance
from .verify import RandomSource, random_source


class LLM:
    """Loads the models that the options name. UserError if one cannot be loaded."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.params = options.sampling_params()  # of requests that bring none
        self.precision: dict[str, Precision] = {}  # of each model that was loaded here
        self.loaded = self._load(options.model, options.quant)
        self.encoder = TokenizerCache(self.loaded.tokenizer)
        self.amp = computing(options.amp, self.loaded.model.embedding.weight.device)
        self.policy = options.acceptance_policy()
        name = resolve_draft(options.draft, self.loaded)
        self.draft = self._load(name, options.draft_quant) if name and options.drafter == "model" else None
        kind = options.drafter
        self.heads: Heads | None = None
        if (kind == "medusa" or kind == "eagle") and options.draft != "none":
            self.heads = load_heads(find_heads(options.heads, self.loaded, kind), self.loaded, kind)
        if self.draft:
            check_pair(self.loaded, self.draft)
            fit_vocabulary(self.draft.model, self.loaded.config.vocab_size)
        self.costs = CostModel()  # of time, by which `--controller cost` goes
        self.compiler = Compiler() if options.compile else None
        if self.compiler:
            drafting = self.draft.model if self.draft else self.heads
            self.compiler.compile(self.loaded.model, *([drafting] if drafting else []))
            self.compiler.warm_up(self._warm_up)
        else:
            for module in (self.loaded.model, self.draft.model if self.draft else None, self.heads):
                if module is not None:
                    pack_matrices(module)

    def _load(self, name: str, quant: QuantName) -> LoadedModel:
        if is_fake(name):
            if quant != "none":
                raise UserError(f"the fake model has no matrices to quantise; leave out {quant} for it")
            return load_fake(name)
        device = resolve_device(self.options.device)
        format = self.options.weight_format(quant)
        with torch_threads(self.options.threads):
            self.precision[name] = resolve_precision(
                self.options.dtype,
                self.options.amp,
                device,
                lambda: ModelConfig.from_hf(open_checkpoint(name, ModelConfig.from_hf).config),
            )
            return load(name, self.precision[name].dtype, device, format, self.options.quant_head)

    def sequences(
        self, texts: list[str], params: SamplingParams | list[SamplingParams] | None = None
    ) -> list[Sequence]:
        """Make one sequence for every sample of every prompt.

        params: for all, or one for each prompt; by default the options'. UserError if one forward over all would not
        fit in memory.
        """
        stage("tokenize")
        if not isinstance(params, list):
            params = [params or self.params] * len(texts)
        if len(params) != len(texts):
            raise UserError(
                f"{len(params)} sampling parameters for {len(texts)} prompts: give one for each, or one for all"
            )
        prompts = zip(self.encoder.encode(texts), params, strict=True)
        firsts = [Sequence(prompt, mine, self.loaded.ending) for prompt, mine in prompts]
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

    def _warm_up(self) -> None:
        """Decode a few tokens after prompts of several lengths, so that all is compiled before anything is timed."""
        params = dataclasses.replace(self.params, max_new_tokens=16, stop=(), ignore_eos=True)
        for length in (33, 8, 1):  # torch makes a graph of its own for what is 1
            for _ in self.run([Sequence([0] * length, params, self.loaded.ending)]):
                pass

    @property
    def compiled_graphs(self) -> int:
        return self.compiler.graphs if self.compiler else 0

    @property
    def speculative(self) -> bool:
        """Return whether anything drafts: a model, or a drafter that needs none."""
        return self.options.draft != "none" and (self.draft is not None or self.options.drafter != "model")

    @property
    def draft_name(self) -> str | None:
        if not self.speculative:
            return None
        return self.draft.checkpoint.name if self.draft else self.options.drafter

    def header(self) -> dict[str, object]:
        """Return the header of a recording: the models, the settings, the machine."""
        weight, models = self.loaded.model.embedding.weight, [each for each in (self.loaded, self.draft) if each]
        trained = [each.checkpoint for each in models if not isinstance(each.model, FakeModel)]
        hashes = {checkpoint.name: checkpoint.content_hash() for checkpoint in trained}
        return {
            "model": self.loaded.checkpoint.name,
            "draft": self.draft_name,
            "settings": self.options.model_dump(mode="json", by_alias=True),
            "environment": environment(
                weight.device, weight.dtype, self.options.threads or torch.get_num_threads(), hashes
            ),
        }

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Enter the context of every step: `--threads` and `--amp`."""
        threads = self.options.threads
        with torch_threads(threads), self.amp:
            yield

    def run(self, sequences: list[Sequence]) -> Iterator[Step | None]:
        """Decode to the end; yield every step, None in a beam search."""
        return each_within(self.computing, self._decode(sequences))

    def _decode(self, sequences: list[Sequence]) -> Iterator[Step | None]:
        for sequence in sequences:
            sequence.progress.began = time.perf_counter()
        if self.options.beams > 1:
            yield from self._search(sequences)
            return
        source = random_source(sequence.params for sequence in sequences)
        drafter = self._drafter(source) if self.speculative else None
        controller = partial(self.options.make_controller, self.costs)
        for step in decode(self.loaded.model, drafter, sequences, self.policy, controller, source):
            for sequence, stats in zip(step.sequences, step.stats, strict=True):
                sequence.progress.mark()
                if drafter is not None:
                    self._keep(sequence, stats)
            yield step

    def _keep(self, sequence: Sequence, stats: StepStats) -> None:
        if self.options.metrics_detailed:
            stats = dataclasses.replace(stats, rss_mib=memory(self.loaded.model.embedding.weight.device)["rss"])
        sequence.steps.append(stats)

    def _drafter(self, source: RandomSource) -> Drafter:
        draft = self.draft.model if self.draft else None
        noise = self.policy.draft_noise
        drafter = make_drafter(self.options, self.loaded.model, draft, source, noise, self.heads)
        return self._tree_drafter(cast(Brancher, drafter), source) if self.options.tree != "off" else drafter

    def _tree_drafter(self, drafter: Brancher, source: RandomSource) -> TreeDrafter:
        if self.options.tree == "dynamic":
            return DynamicTreeDrafter(drafter, self.options.tree_nodes)
        shape = best_shape(self.tree_acceptance()[: self.options.k], self.options.tree_nodes)
        policy = self.policy
        return StaticTreeDrafter(drafter, shape, source, policy.draft_noise, policy.draws_children)

    def tree_acceptance(self) -> list[list[float]]:
        """Return the acceptance by depth and rank: as measured for the model's own drafters, else a typical one."""
        return measured_acceptance(self.loaded.checkpoint.folder, self.options.drafter)

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
