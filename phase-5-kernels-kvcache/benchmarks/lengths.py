"""One more token behind a text of n tokens: what it costs without a cache, with each kind, and what the cache takes.

The with-and-without curve is the lesson's picture: a text of n tokens costs n^2 in all where nothing is remembered. The
embedded model ends at its context; a Llama shape with random weights goes on to 8,192 tokens.
"""

from __future__ import annotations

import dataclasses
import time
from functools import cache
from typing import Any

import torch

import engine
from common.benchmark import median
from common.device import synchronize
from engine.kv_cache import KVOptions
from engine.runner import CachedRunner, make_runner
from engine.tree import Tree
from engine.weights import lay_out

from .runs import Lab

LENGTHS = {
    "shape": "the embedded model, or one of 4 layers, 512 wide, 8 heads over 2 of keys, with random weights",
    "prefill_ms": "all tokens of the text but its last go through the model, in chunks of 512",
    "token_ms": "the next token's logits, the rest of the text being in the cache; without one, of the whole text",
    "append_ms": "writing one token's keys and values in all layers, and reading them for attention; no arithmetic",
    "cache_mib": "memory that the cache takes for this text, with room for a tree of 64 guesses",
}
RANDOM = "random Llama shape"
SIZES = (32, 64, 128, 256, 512, 1000)
LONG = (1024, 2048, 4096, 8192)
CACHES: dict[str, KVOptions] = {
    "off": KVOptions("off"),
    "dynamic": KVOptions("dynamic"),
    "static": KVOptions("static"),
    "static, float16": KVOptions("static", "float16"),
    "static, int8": KVOptions("static", "int8"),
    "paged": KVOptions("paged"),
}
NOTHING = Tree([], [])


def measure_lengths(lab: Lab) -> None:
    grid = {
        lab.options.model: SIZES[:3] if lab.options.quick else SIZES,
        RANDOM: LONG[:1] if lab.options.quick else LONG,
    }
    for shape, sizes in grid.items():
        for name, options in CACHES.items():
            for size in sizes:
                if not lab.done(kind="length", shape=shape, cache=name, length=size):
                    lab.add(kind="length", shape=shape, cache=name, length=size, **one(lab, shape, options, size))


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
    return model.to(like.embedding.weight.device)


def one(lab: Lab, shape: str, options: KVOptions, size: int) -> dict[str, Any]:
    if lab.options.dry_run:
        return {"prefill_ms": 1.0, "token_ms": 1.0, "append_ms": 1.0, "cache_mib": 1.0}
    model = lab.load().model if shape != RANDOM else random_llama(lab.load().model)
    generator = torch.Generator().manual_seed(lab.options.seed)
    text = torch.randint(1, model.config.vocab_size, (size,), generator=generator).tolist()
    whole = options.kind == "off" and size > SIZES[-1]  # seconds, and hardly any scatter
    prefill, token, append, runner = [], [], [], None
    for _ in range(1 if whole else lab.options.repeats + 1):
        runner = make_runner(model, options, 1, size + 8)
        if isinstance(runner, CachedRunner):
            runner.together = 1
        runner.logits(["text"], [text])
        prefill.append(runner.prefill_ms)
        for more in range(1, 2 if whole else 6):  # each token goes on from the one before
            began = time.perf_counter()
            runner.logits(["text"], [text + [7] * more])
            synchronize(lab.device)
            token.append((time.perf_counter() - began) * 1e3)
        if isinstance(runner, CachedRunner):
            append.append(appending_ms(model, runner))
    taken = runner.texts.cache.nbytes() / 2**20 if isinstance(runner, CachedRunner) else 0.0
    return {
        "prefill_ms": median(prefill[1:] or prefill),
        "token_ms": median(token[5:] or token),
        "append_ms": median(append[1:]) if append else 0.0,
        "cache_mib": taken,
    }


@torch.inference_mode()
def appending_ms(model: engine.Transformer, runner: CachedRunner) -> float:
    """One token more in every layer, as a forward does it, and back."""
    config, cache = model.config, runner.texts.cache
    number = runner.texts.rows["text"].number
    key = torch.randn(1, config.kv_heads, config.head_dim).to(model.embedding.weight)
    began = time.perf_counter()
    cache.make_room(number, 1)
    for layer in range(config.layers):
        cache.append(layer, number, key, key)
        cache.read(layer, number, 1)
    return (time.perf_counter() - began) * 1e3
