"""A loaded model and the options to run it with: what the command line, the demo and the benches all call.

llm = LLM(Options(max_tokens=16))
print(llm.generate(["from pathlib import"])[0].text)
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import cast

import torch

from common.checkpoint import open_checkpoint
from common.device import available_memory, memory, resolve_device
from common.errors import UserError
from common.results import environment

from .backends import Backends
from .beam import beam_search
from .compile import Compiler
from .config import ModelConfig
from .cost import forward_bytes, ranking_bytes
from .cost_model import CostModel
from .drafters import DynamicTreeDrafter, StaticTreeDrafter, TreeDrafter, make_drafter
from .drafters.heads import Heads, find_heads, load_heads
from .drafting import Brancher, Drafter
from .fake import FakeModel
from .generate import Clock, Generation, finish
from .kv_cache import PAGE, needed_bytes
from .load import LoadedModel, load
from .model import Transformer
from .options import Options, QuantName
from .packing import pack_matrices
from .pair import check_pair, fit_vocabulary, load_fake, resolve_draft
from .precision import Precision, computing, each_within, resolve_precision
from .profiler import stage
from .quantize import Format
from .runner import CHUNK, DRAFT_ROOM, CachedRunner, ModelRunner, cache_shape
from .sequence import Sequence
from .speculative import decode
from .steps import Step, StepStats
from .tokenizer_cache import TokenizerCache
from .tree_shapes import best_shape, measured_acceptance
from .verify import GreedySource, KeyedSource, RandomSource
from .weights import lay_out


def is_fake(name: str) -> bool:
    return name.partition(":")[0] == "fake"


class LLM:
    """Loads what the options name. UserError where that cannot be had."""

    def __init__(self, options: Options) -> None:
        if options.threads:
            torch.set_num_threads(options.threads)
        self.options = options
        self.params = options.sampling_params()
        self.precision: dict[str, Precision] = {}  # of each model that was loaded here
        self.backends = self._backends()
        self.loaded = self._load(options.model, options.quant)
        self.encoder = TokenizerCache(self.loaded.tokenizer)
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
        self.runner: ModelRunner | None = None  # of the target, in the last run
        self.cost_model = CostModel()  # of time, by which `--controller cost` goes
        self.steps: dict[Sequence, list[StepStats]] = defaultdict(list)  # what each sequence's steps did
        drafting = [module for module in (self.draft.model if self.draft else None, self.heads) if module is not None]
        models = [self.loaded.model, *([self.draft.model] if self.draft else [])]
        self.backends.take(models, [self.policy, *([self.heads] if self.heads else [])])
        if self.backends.whole_steps:
            for model in models:
                if not isinstance(model, FakeModel) and not self.backends.in_cpp(model):
                    lay_out(model.layers)
        self.compiler = Compiler() if options.compile else None
        if self.compiler:
            self.compiler.compile(self.loaded.model, *drafting)
            self.compiler.warm_up(self._warm_up)
        elif self.backends.multiplies_in_torch:  # others read matrices as they were loaded
            for module in (self.loaded.model, *drafting):
                if not self.backends.in_cpp(module):
                    pack_matrices(module)

    def _backends(self) -> Backends:
        """Who computes, chosen before a weight is read: matrices that C++ will pack are loaded as files have them."""
        if is_fake(self.options.model):
            return Backends(self.options, torch.device("cpu"), torch.float32)
        return Backends(self.options, resolve_device(self.options.device), self._resolve(self.options.model).dtype)

    def _resolve(self, name: str) -> Precision:
        if name not in self.precision:
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
        format = None
        if quant != "none":
            format = Format(quant, self.options.quant_group, self.options.quant_asymmetric)
        return load(
            name,
            self._resolve(name).dtype,
            device,
            format,
            self.options.quant_head,
            as_stored=self.backends.whole_steps,
        )

    def sequences(self, texts: list[str]) -> list[Sequence]:
        """One sequence for every sample of every prompt. UserError if all at once would not fit in memory."""
        stage("tokenize")
        prompts = self.encoder.encode(texts)
        self._check_slots(prompts)
        self._check_memory(prompts)
        return [
            Sequence(prompt, self.params, self.loaded.ending, sample)
            for prompt in prompts
            for sample in range(self.options.n)
        ]

    def _check_slots(self, prompts: list[list[int]]) -> None:
        """Now, and not midway. Slots are as many for every text; of pages, what serves the shortest may be enough."""
        options, config = self.options, self.loaded.config
        if options.kv == "off" or options.beams > 1 or not self.loaded.model.has_cache:
            return
        tree = options.tree_nodes if self.speculative and options.tree != "off" else 0
        lengths = [min(len(prompt) + self.params.max_new_tokens, config.context) + tree for prompt in prompts]
        what = "prompt, new tokens and a tree" if tree else "prompt and new tokens"
        if 0 < options.kv_slots < max(lengths):
            raise UserError(
                f"the KV cache holds {options.kv_slots} tokens per text, and {max(lengths)} are needed ({what}): give "
                "a larger --kv-slots, or 0 for as many as the request can need"
            )
        if 0 < options.kv_pages < (pages := -(-min(lengths) // PAGE)):
            raise UserError(
                f"out of pages: there are {options.kv_pages} of {PAGE} tokens, and {pages} are needed ({what}): give "
                "more --kv-pages, or 0 for as many as the request can need"
            )

    def _check_memory(self, prompts: list[list[int]]) -> None:
        """All completions are decoded together; better to say now that it is too much than to be killed midway."""
        rows = len(prompts) * self.options.n * self.options.beams
        length = min(max(map(len, prompts)) + self.params.max_new_tokens, self.loaded.config.context)
        needed, free = self._needed_bytes(rows, length), available_memory(self.loaded.model.embedding.weight.device)
        if needed > free:
            raise UserError(
                f"{rows} completions of up to {length} tokens need about {needed / 2**30:.1f} GiB at once, and "
                f"{free / 2**30:.1f} GiB are free: give fewer prompts, or a smaller --n, --beams or --max-tokens"
            )

    def _needed_bytes(self, rows: int, length: int) -> int:
        """Without a cache, of one forward over all; with one, of the cache, of a chunk of a prompt and of a step."""
        config, weight, kv = self.loaded.config, self.loaded.model.embedding.weight, self.options.kv_options()
        if kv.kind == "off" or self.options.beams > 1 or not self.loaded.model.has_cache:
            return forward_bytes(config, rows, length, weight.itemsize) + ranking_bytes(config, self.options.beams)
        cache = needed_bytes(kv, cache_shape(config), rows, length + DRAFT_ROOM, weight.dtype, config.window)
        chunk = forward_bytes(config, 1, length, weight.itemsize) * min(CHUNK, length) // length
        return cache + chunk + forward_bytes(config, rows, 1, weight.itemsize)

    def _warm_up(self) -> None:
        """A few tokens behind prompts of several lengths, so that all is compiled before anything is timed."""
        params = dataclasses.replace(self.params, max_new_tokens=16, stop=(), ignore_eos=True)
        for length in (33, 8, 1):  # torch makes a graph of its own for what is 1
            for _ in self.run([Sequence([0] * length, params, self.loaded.ending)], Clock()):
                pass
        self.steps.clear()

    @property
    def compiled_graphs(self) -> int:
        return self.compiler.graphs if self.compiler else 0

    @property
    def speculative(self) -> bool:
        """Whether anything drafts: a model, or a drafter that needs none."""
        return self.options.draft != "none" and (self.draft is not None or self.options.drafter != "model")

    @property
    def draft_name(self) -> str | None:
        if not self.speculative:
            return None
        return self.draft.checkpoint.name if self.draft else self.options.drafter

    def header(self) -> dict[str, object]:
        """What a recording says of the run: the models, the settings, the machine."""
        weight, models = self.loaded.model.embedding.weight, [each for each in (self.loaded, self.draft) if each]
        trained = [each.checkpoint for each in models if not isinstance(each.model, FakeModel)]
        hashes = {checkpoint.name: checkpoint.content_hash() for checkpoint in trained}
        return {
            "model": self.loaded.checkpoint.name,
            "draft": self.draft_name,
            "settings": self.options.model_dump(mode="json", by_alias=True),
            "environment": environment(weight.device, weight.dtype, torch.get_num_threads(), hashes),
        }

    def computing(self) -> AbstractContextManager[object]:
        """What `--amp` puts around every forward."""
        return computing(self.options.amp, self.loaded.model.embedding.weight.device)

    def run(self, sequences: list[Sequence], clock: Clock, multi_step: bool = True) -> Iterator[Step | None]:
        """Decode to the end, marking each sequence's tokens on the clock; yields every step, None in a beam search.

        multi_step: several steps may be made in one call, which keeps no logits of them.
        """
        yield from each_within(self.computing, self._decode(sequences, clock, multi_step))

    def _decode(self, sequences: list[Sequence], clock: Clock, multi_step: bool) -> Iterator[Step | None]:
        if self.options.beams > 1:
            yield from self._search(sequences, clock)
            return
        source = GreedySource() if self.params.greedy else KeyedSource(self.params.seed)
        runner = self.runner = self.make_runner(self.loaded.model, sequences)
        drafter = self._drafter(sequences, source) if self.speculative else None
        controller = partial(self.options.make_controller, self.cost_model)
        several = self.backends.multi_step if multi_step else None
        for step in decode(runner, drafter, sequences, self.params, self.policy, controller, source, several):
            for sequence, stats in zip(step.sequences, step.stats, strict=True):
                clock.mark(sequence)
                if drafter is not None:
                    self._keep(sequence, stats)
            yield step

    def _keep(self, sequence: Sequence, stats: StepStats) -> None:
        if self.options.metrics_detailed:
            stats = dataclasses.replace(stats, rss_mib=memory(self.loaded.model.embedding.weight.device)["rss"])
        self.steps[sequence].append(stats)

    def _drafter(self, sequences: list[Sequence], source: RandomSource) -> Drafter:
        draft = self.make_runner(self.draft.model, sequences) if self.draft else None
        drafter = make_drafter(
            self.options,
            self.loaded.model,
            draft,
            self.params,
            source,
            self.policy.draft_noise,
            self.heads,
            self.backends.heads,
            draft_in_cpp=self.draft is not None and self.backends.in_cpp(self.draft.model),
        )
        return self._tree_drafter(cast(Brancher, drafter), source) if self.options.tree != "off" else drafter

    def remembered(self) -> dict[str, object]:
        """What the target's cache was, and what it took; or why there was none."""
        if not isinstance(self.runner, CachedRunner):
            reasons = {"--kv off": self.options.kv == "off", "beam search computes whole texts": self.options.beams > 1}
            why = next((why for why, holds in reasons.items() if holds), "the model has nothing to remember")
            return {"kind": "off", "why": why}
        texts = self.runner.texts
        return {
            "kind": self.options.kv,
            "dtype": self.options.kv_dtype,
            "mib": texts.cache.nbytes() / 2**20,
            "positions": texts.positions,
            "prefill_ms": self.runner.prefill_ms,
        }

    def make_runner(self, model: Transformer, sequences: list[Sequence]) -> ModelRunner:
        """With room for these sequences and their output."""
        longest = max(len(sequence.prompt) for sequence in sequences) + self.params.max_new_tokens
        return self.backends.runner(model, self.options.kv_options(), len(sequences), longest)

    def _tree_drafter(self, drafter: Brancher, source: RandomSource) -> TreeDrafter:
        if self.options.tree == "dynamic":
            return DynamicTreeDrafter(drafter, self.params, self.options.tree_nodes)
        shape = best_shape(self.tree_acceptance()[: self.options.k], self.options.tree_nodes)
        policy = self.policy
        return StaticTreeDrafter(drafter, self.params, shape, source, policy.draft_noise, policy.draws_children)

    def tree_acceptance(self) -> list[list[float]]:
        """By depth and rank: as measured for the model's own drafters, else a typical one."""
        return measured_acceptance(self.loaded.checkpoint.folder, self.options.drafter)

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
            yield None

    def generate(self, texts: list[str]) -> list[Generation]:
        """All completions, in the order of the prompts."""
        sequences, clock = self.sequences(texts), Clock()
        for _ in self.run(sequences, clock):
            pass
        return [finish(sequence, clock.stats(sequence)) for sequence in sequences]
