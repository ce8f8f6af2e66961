"""One more token after n tokens: its time without a cache and with each kind, and the memory of the cache.

Without a cache a sequence of n tokens costs n^2 in total. The embedded model is measured up to its context, a Llama
shape with random weights up to 4,096 tokens.
"""

from __future__ import annotations

import dataclasses
import time
from functools import cache

import torch

import engine
from common.benchmark import Outcome
from common.device import synchronize
from common.harness import Variant
from common.prompts import Prompt
from engine.kv_cache import KVOptions
from engine.runner import CachedRunner, ModelRunner, make_runner
from engine.weights import lay_out

from .runs import Lab

LENGTHS = {
    "lengths": "time of the next token's logits after `length` cached tokens; without a cache, of the "
    "whole sequence; shape: the embedded model, or one of 4 layers, 512 wide, 8 heads over 2 of keys, random weights",
    "prefill_ms": "time of a forward pass over the sequence, in chunks of 512; measured once",
    "append_ms": "writing one token's keys and values in all layers, and reading them for attention; no arithmetic",
    "cache_mib": "memory of the cache for this sequence, with room for a tree of 64 draft tokens",
}
RANDOM = "random Llama shape"
SIZES = (32, 64, 128, 256, 512, 1000)
LONG = (1024, 2048, 4096)
CACHES: dict[str, KVOptions] = {
    "static": KVOptions("static"),
    "off": KVOptions("off"),
    "dynamic": KVOptions("dynamic"),
    "static, float16": KVOptions("static", "float16"),
    "static, int8": KVOptions("static", "int8"),
    "paged": KVOptions("paged"),
}


def measure_lengths(lab: Lab) -> None:
    grid = {
        lab.options.model: SIZES[:3] if lab.options.quick else SIZES,
        RANDOM: LONG[:1] if lab.options.quick else LONG,
    }
    for shape, sizes in grid.items():
        for size in sizes:
            runs = {name: one_more(lab, shape, options, size) for name, options in CACHES.items()}
            lab.short().compare("lengths", {"shape": shape, "length": size}, runs)


@cache
def random_llama(like: engine.Transformer) -> engine.Transformer:
    config = dataclasses.replace(
        like.config, layers=4, width=512, heads=8, kv_heads=2, head_dim=64, ffn_width=1408, context=LONG[-1] + 128
    )
    model = engine.Transformer(config).eval().requires_grad_(False)
    lay_out(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.02, generator=generator)
    return model.to(like.embedding.weight)


def one_more(lab: Lab, shape: str, options: KVOptions, size: int) -> Variant:
    """Time one token after the sequence; each run replaces the token of the run before."""

    @cache
    def made() -> tuple[engine.Transformer, ModelRunner, list[int], float]:
        model = lab.load().model if shape != RANDOM else random_llama(lab.load().model)
        generator = torch.Generator().manual_seed(lab.options.seed)
        text = torch.randint(1, model.config.vocab_size, (size,), generator=generator).tolist()
        runner = make_runner(model, options, 1, size + 8)
        if isinstance(runner, CachedRunner):
            runner.max_inline = 1
        runner.forward(["text"], [text])
        return model, runner, text, runner.prefill_ms

    def run(prompt: Prompt | None, round_: int) -> Outcome:
        model, runner, text, prefill_ms = made()
        began = time.perf_counter()
        runner.forward(["text"], [[*text, 1 + round_ % 100]])
        synchronize(lab.device)
        seconds = time.perf_counter() - began
        figures = {"prefill_ms": prefill_ms}
        if isinstance(runner, CachedRunner):
            figures["append_ms"] = appending_ms(model, runner)
            figures["cache_mib"] = runner.manager.cache.nbytes() / 2**20
        return Outcome(1, figures, seconds=seconds)

    return run


@torch.inference_mode()
def appending_ms(model: engine.Transformer, runner: CachedRunner) -> float:
    """Time the append and read of one token in every layer."""
    config, kept = model.config, runner.manager.cache
    number = runner.manager.rows["text"].number
    key = torch.randn(1, config.kv_heads, config.head_dim).to(model.embedding.weight)
    began = time.perf_counter()
    kept.make_room(number, 1)
    for layer in range(config.layers):
        kept.append(layer, number, key, key)
        kept.read(layer, number, 1)
    return (time.perf_counter() - began) * 1e3
