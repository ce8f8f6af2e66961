"""End to end on a GPU: our decoding loop with each backend's kernels, against two peers that use torch.compile.

The peers are transformers' `generate` with its static cache, whose forward it compiles, and a plain loop in the manner
of gpt-fast: a static cache, and one compiled decoding step that is replayed as a CUDA graph. Same weights, same prompt,
greedy. gpt2-xl and Llama-3.1-8B have random weights.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.benchmark import Outcome
from common.errors import UserError
from common.harness import Variant
from common.peers import TransformersPeer
from common.prompts import Prompt
from engine.kernels import registry
from engine.load import load
from engine.model import Transformer

from .gpu_shapes import SHAPES, shape_folder
from .runs import Lab

GPU_PEERS = {
    "gpu_peers": "the whole request, prompt included. weights: random, of that model's shape alone, for speed; else "
    "the checkpoint's own. compiled loop (the baseline): static cache, one compiled step, replayed as a CUDA graph; "
    "ours with a backend's kernels, and with a draft where the model has one; transformers' generate with a static "
    "cache and torch.compile",
    "agreement": "of gpu_peers: share of the tokens before the first one that differs from the compiled loop's; in "
    "bfloat16 roundings differ, and the first different token changes all later ones",
}
EMBEDDED = ("stdlib-10m", "stdlib-1m")
Decode = Callable[[Prompt | None], list[int]]


class CompiledLoop:
    """Greedy decoding by a compiled step for one token; its position is a tensor, so that one graph serves all."""

    def __init__(self, model: Transformer, tokens: int, compiled: bool = True) -> None:
        """Allocate the cache. `tokens`: most tokens of prompt and output."""
        config, weight = model.config, model.embedding.weight
        self.model, self.tokens = model, tokens
        size = (config.layers, 1, config.kv_heads, tokens, config.head_dim)
        self.keys = torch.zeros(size, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self.positions = torch.arange(tokens, device=weight.device)
        self.tables = model.rotation_at(self.positions, weight) if config.positions == "rope" else None
        mode = "reduce-overhead" if weight.is_cuda else "default"
        self.step: Callable[[Tensor, Tensor], Tensor] = self.forward
        if compiled:
            self.step = torch.compile(self.forward, mode=mode, fullgraph=True)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the most likely token after the last: tokens int64 [1, T] at positions [T] -> int64 [1, 1]."""
        model, config = self.model, self.model.config
        x = model.embedding(tokens)
        rotation = None
        if self.tables is None:
            x = x + model.positions(positions + config.position_offset)
        else:
            rotation = self.tables[0][positions], self.tables[1][positions]
        away = positions[:, None] - self.positions[None, :]  # [T, tokens]
        masks = {window: (away >= 0) & (away < (window or self.tokens)) for window in set(config.windows)}
        for number, layer in enumerate(model.layers):
            query, key, value = layer.before(x, rotation, None)  # type: ignore[operator]
            self.keys[number].index_copy_(2, positions, key.transpose(1, 2))
            self.values[number].index_copy_(2, positions, value.transpose(1, 2))
            mask = masks[config.window_of(number)]
            mixed = F.scaled_dot_product_attention(
                query.transpose(1, 2), self.keys[number], self.values[number], mask, enable_gqa=True
            )
            x = layer.after(x, mixed.transpose(1, 2), None)  # type: ignore[operator]
        return model.logits(model.norm(x[:, -1:])).argmax(-1)

    @torch.inference_mode()
    def generate(self, prompt: list[int], count: int) -> list[int]:
        """Decode `count` tokens, without stopping at EOS; the prompt uses the forward that is not compiled."""
        if len(prompt) + count > self.tokens:
            raise ValueError(f"{len(prompt) + count} tokens; there is room for {self.tokens}")
        at = len(prompt)
        token = self.forward(torch.tensor([prompt], device=self.positions.device), self.positions[:at])
        found = [token]
        for position in range(at, at + count - 1):
            token = self.step(token, self.positions[position : position + 1]).clone()  # a graph's output is overwritten
            found.append(token)
        return torch.cat(found, 1)[0].tolist()


class StaticPeer(TransformersPeer):
    """transformers' `generate` with its static cache; on a GPU it compiles the forward."""

    def decode(self, prompt: list[int], count: int) -> list[int]:
        tokens = torch.tensor([prompt], device=self.device)
        output = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            cache_implementation="static",
            pad_token_id=0,
        )
        found: list[int] = output[0, len(prompt) :].tolist()
        return found


def measure_gpu_peers(lab: Lab) -> None:
    """Measure all models. UserError without a GPU, except in a dry run."""
    if not lab.options.dry_run and lab.device.type != "cuda":
        raise UserError(f"the GPU peers need a GPU, and this is {lab.device.type}; --dry-run walks their grid")
    for name in EMBEDDED[:1] if lab.options.quick else (*EMBEDDED, *SHAPES):
        with ExitStack() as stack:  # one model at a time: freed before the next one
            of_model(lab, name, stack)


def of_model(lab: Lab, name: str, stack: ExitStack) -> None:
    """Measure one model with one prompt: another length would compile again."""
    random = name in SHAPES
    cell = {"model": name, "weights": "random" if random else "own", "dtype": "bfloat16"}
    if not lab.finished("gpu_peers", cell):
        path = cache(lambda: str(stack.enter_context(shape_folder(name, lab.device))) if random else name)
        lab.compare("gpu_peers", cell, decoders(lab, path, drafts=not random), lab.prompts(1))


def decoders(lab: Lab, path: Callable[[], str], drafts: bool) -> dict[str, Variant]:
    """Return variants by name, each of exactly `--max-tokens` tokens."""
    count = lab.options.max_tokens
    loaded = cache(lambda: load(path(), torch.bfloat16, lab.device))

    def ids(prompt: Prompt | None) -> list[int]:
        assert prompt is not None
        return loaded().tokenizer.encode(prompt.text)

    @cache
    def wanted(prompt: Prompt | None) -> list[int]:
        return compiled()(prompt)

    @cache
    def compiled() -> Decode:
        longest = max(len(ids(prompt)) for prompt in lab.prompts(1))
        loop = CompiledLoop(loaded().model, longest + count)
        return lambda prompt: loop.generate(ids(prompt), count)

    @cache
    def peer() -> Decode:
        static = StaticPeer(loaded().checkpoint.folder, torch.bfloat16, lab.device)
        return lambda prompt: static.decode(ids(prompt), count)

    def ours(**options: Any) -> Callable[[], Decode]:
        @cache
        def made() -> Decode:
            llm = lab.llm(model=path(), dtype="bfloat16", temperature=0.0, **options)
            llm.params = dataclasses.replace(llm.params, ignore_eos=True)
            return lambda prompt: llm.generate([prompt.text])[0].tokens if prompt else []

        return made

    def timed(make: Callable[[], Decode]) -> Variant:
        def run(prompt: Prompt | None, round_: int) -> Outcome:
            began = time.perf_counter()
            tokens = make()(prompt)
            seconds = time.perf_counter() - began  # the tokens are on the host
            if len(tokens) != count:
                raise UserError(f"{len(tokens)} tokens came, expected {count}")
            pairs = zip(tokens, wanted(prompt), strict=True)
            agreed = next((at for at, (one, other) in enumerate(pairs) if one != other), count)
            return Outcome(count, {"agreed": agreed}, output=tokens, seconds=seconds)

        return run

    makers: dict[str, Callable[[], Decode]] = {"compiled loop": compiled}
    for backend in registry.FOR_CARDS:
        if lab.options.dry_run or registry.why_not(backend, lab.device) is None:  # type: ignore[arg-type]
            makers[f"ours, {backend}"] = ours(kernels=backend, draft="none")
    makers["ours, torch"] = ours(kernels="torch", draft="none")
    if drafts:
        makers["ours, drafting"] = ours(kernels="cuda", controller="cost")
    makers["transformers"] = peer
    return {name: timed(make) for name, make in makers.items()}
