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
from common.device import each_within, memory, resolve_device, torch_threads
from common.errors import UserError
from common.results import environment

from .backends import Backends
from .beam import beam_search
from .capacity import check_capacity
from .compile import Compiler
from .config import ModelConfig
from .cost_model import CostModel
from .drafters import DynamicTreeDrafter, StaticTreeDrafter, TreeDrafter, make_drafter
from .drafters.heads import Heads, find_heads, load_heads
from .drafting import Brancher, Drafter
from .fake import FakeModel, is_fake
from .generate import Generation, finish
from .kv_cache.manager import CacheManager
from .load import LoadedModel, load
from .model import Transformer
from .options import Options, QuantName
from .packing import pack_matrices
from .pair import check_pair, fit_vocabulary, load_fake, resolve_draft
from .precision import Precision, computing, resolve_precision
from .prices import Prices
from .profiler import stage
from .runner import CachedRunner, ModelRunner, UncachedRunner
from .sampling import SamplingParams
from .sequence import Sequence
from .speculative import decode_calls
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
        self.backends = self._backends()
        self.loaded = self._load(options.model, options.quant)
        self.encoder = TokenizerCache(self.loaded.tokenizer)
        self.amp = computing(options.amp, self.loaded.model.embedding.weight.device)
        self.policy = options.acceptance_policy()
        self.runner: ModelRunner | None = None  # of the target, in the last run
        self.caches: dict[Transformer, CacheManager] = {}  # of each model
        self.compiler = Compiler() if options.compile else None
        self.load_drafter(self.loaded.model)

    def load_drafter(self, *loaded: Transformer) -> None:
        """Load the drafter's models; `loaded` are to be compiled or packed with them. UserError if that cannot be."""
        options, kind, name = self.options, self.options.drafter, resolve_draft(self.options.draft, self.loaded)
        self.draft = self._load(name, options.draft_quant) if name and kind == "model" else None
        self.heads: Heads | None = None
        if (kind == "medusa" or kind == "eagle") and options.draft != "none":
            self.heads = load_heads(find_heads(options.heads, self.loaded, kind), self.loaded, kind)
        if self.draft:
            check_pair(self.loaded, self.draft)
            fit_vocabulary(self.draft.model, self.loaded.config.vocab_size)
        self.cost_model, self.prices = CostModel(), Prices(self)  # by which `--controller cost` goes
        drafting = [module for module in (self.draft.model if self.draft else None, self.heads) if module is not None]
        models = [self.loaded.model, *([self.draft.model] if self.draft else [])]
        self.backends.take(models, [self.policy, *([self.heads] if self.heads else [])])
        if self.compiler:
            self.compiler.compile(*loaded, *drafting)
            self.compiler.warm_up(self._warm_up)
        elif self.backends.multiplies_in_torch:  # others read matrices as they were loaded
            for module in (*loaded, *drafting):
                if not self.backends.in_cpp(module):
                    pack_matrices(module)

    def _backends(self) -> Backends:
        """Choose the backends before a weight is read: matrices that C++ will pack are loaded as stored."""
        if is_fake(self.options.model):
            return Backends(self.options, torch.device("cpu"), torch.float32)
        return Backends(self.options, resolve_device(self.options.device), self._resolve(self.options.model).dtype)

    def _resolve(self, name: str) -> Precision:
        if name not in self.precision:
            with torch_threads(self.options.threads):
                self.precision[name] = resolve_precision(
                    self.options.dtype,
                    self.options.amp,
                    resolve_device(self.options.device),
                    lambda: ModelConfig.from_hf(open_checkpoint(name, ModelConfig.from_hf).config),
                )
        return self.precision[name]

    def _load(self, name: str, quant: QuantName) -> LoadedModel:
        if is_fake(name):
            if quant != "none":
                raise UserError(f"the fake model has no matrices to quantise; leave out {quant} for it")
            return load_fake(name)
        device = resolve_device(self.options.device)
        format = self.options.weight_format(quant)
        dtype = self._resolve(name).dtype
        with torch_threads(self.options.threads):
            return load(name, dtype, device, format, self.options.quant_head, as_stored=self.backends.whole_steps)

    def sequences(
        self, texts: list[str], params: SamplingParams | list[SamplingParams] | None = None
    ) -> list[Sequence]:
        """Make one sequence for every sample of every prompt.

        params: for all, or one for each prompt; by default the options'. UserError if all at once would not
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
        tree = self.options.tree_nodes if self.speculative and self.options.tree != "off" else 0
        options, caches = self.options.kv_options(), self.caches.values()
        check_capacity(self.loaded, firsts, options, tree, self.options.n, self.options.beams, caches)
        return [
            Sequence(first.prompt, first.params, self.loaded.ending, sample)
            for first in firsts
            for sample in range(self.options.n)
        ]

    def _warm_up(self) -> None:
        """Decode a few tokens after prompts of several lengths, so that all is compiled before anything is timed."""
        params = dataclasses.replace(self.params, max_new_tokens=16, stop=(), ignore_eos=True)
        for length in (33, 8, 1):  # torch makes a graph of its own for what is 1
            for _ in self.run([Sequence([0] * length, params, self.loaded.ending)]):
                pass

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
        threads = 1 if self.backends.fast else self.options.threads  # torch's spinning threads would slow C++
        with torch_threads(threads), self.amp:
            yield

    def run(self, sequences: list[Sequence], multi_step: bool = True) -> Iterator[Step | None]:
        """Decode to the end; yield every step, None in a beam search.

        multi_step: several steps may be made in one call, which keeps no logits of them.
        """
        for steps in each_within(self.computing, self._decode(sequences, multi_step)):
            yield from steps

    def _decode(self, sequences: list[Sequence], multi_step: bool) -> Iterator[list[Step | None]]:
        for sequence in sequences:
            sequence.progress.began = time.perf_counter()
        if self.options.beams > 1:
            for step in self._search(sequences):
                yield [step]
            return
        if self.speculative and self.options.controller == "cost":
            self.prices.provide(self.cost_model, sequences[0].params, len(sequences))
        source = random_source(sequence.params for sequence in sequences)
        self.runner = None  # its cache is freed before a larger one is allocated
        runner = self.runner = self.make_runner(self.loaded.model, sequences)
        draft = self.make_runner(self.draft.model, sequences) if self.draft and self.speculative else None
        drafter = self.new_drafter(draft, source) if self.speculative else None
        controller = partial(self.options.make_controller, self.cost_model)
        several = self.backends.multi_step if multi_step else None
        try:
            for steps in decode_calls(runner, drafter, sequences, self.policy, controller, source, several):
                for step in steps:
                    for sequence, stats in zip(step.sequences, step.stats, strict=True):
                        sequence.progress.mark()
                        if drafter is not None:
                            self._keep(sequence, stats)
                yield list(steps)
        finally:  # of an interrupted run, rows are still taken
            for each in filter(None, (runner, draft)):
                for sequence in sequences:
                    each.release(sequence)

    def _keep(self, sequence: Sequence, stats: StepStats) -> None:
        if self.options.metrics_detailed:
            stats = dataclasses.replace(stats, rss_mib=memory(self.loaded.model.embedding.weight.device)["rss"])
        sequence.steps.append(stats)

    def new_drafter(self, draft: ModelRunner | None, source: RandomSource) -> Drafter:
        drafter = make_drafter(
            self.options,
            self.loaded.model,
            draft,
            source,
            self.policy.draft_noise,
            self.heads,
            self.backends.heads,
            draft_in_cpp=self.draft is not None and self.backends.in_cpp(self.draft.model),
        )
        return self._tree_drafter(cast(Brancher, drafter), source) if self.options.tree != "off" else drafter

    def remembered(self) -> dict[str, object]:
        """Describe the target's cache and its bytes, or why there was none."""
        if not isinstance(self.runner, CachedRunner):
            reasons = {"--kv off": self.options.kv == "off", "beam search computes whole texts": self.options.beams > 1}
            why = next((why for why, holds in reasons.items() if holds), "the model has nothing to remember")
            return {"kind": "off", "why": why}
        manager = self.runner.manager
        return {
            "kind": self.options.kv,
            "dtype": self.options.kv_dtype,
            "mib": manager.cache.nbytes() / 2**20,
            "positions": manager.positions,
            "prefill_ms": self.runner.prefill_ms,
        }

    def make_runner(self, model: Transformer, sequences: list[Sequence]) -> ModelRunner:
        """Return a runner with room for these sequences and their output.

        A model's cache lives as long as this LLM. It is replaced if it is too small, unless another run is using it.
        """
        options, rows = self.options.kv_options(), len(sequences)
        if options.kind == "off" or not model.has_cache:
            return UncachedRunner(model)
        longest = max(len(sequence.prompt) + sequence.params.max_new_tokens for sequence in sequences)
        manager = self.caches.get(model)
        if manager is None or not manager.fits(rows, longest):
            keep = manager is None or manager.idle
            if keep:
                manager = self.caches.pop(model, None)
                del manager  # frees its memory before the next is allocated
            manager = self.backends.manager(model, options, rows, longest)
            if keep:
                self.caches[model] = manager
        if manager.idle:
            manager.positions = 0
        return self.backends.runner(model, manager)

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
