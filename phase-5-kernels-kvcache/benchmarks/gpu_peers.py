"""End to end on a card: our decode loop with each backend's kernels, against two peers that use torch.compile.

The peers are transformers' `generate` with its static cache, whose forward it compiles; and a plain loop written for
this bench in the manner of gpt-fast: a static cache, and one compiled decode step that is replayed as a CUDA graph.
Same weights, same prompt, greedy. For gpt2-xl and Llama-3.1-8B the weights are random, and so is the text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.benchmark import median
from common.errors import UserError
from common.peers import TransformersPeer
from engine.kernels import registry
from engine.load import load
from engine.model import Transformer

from .gpu_shapes import SHAPES, shape_folder
from .runs import Lab, Variant

GPU_PEERS = {
    "weights": "random: of that model's shape alone, for speed; else the checkpoint's own",
    "variant": "ours with a backend's kernels, and with a draft where the model has one; transformers' generate with a "
    "static cache and torch.compile; compiled loop: static cache, one compiled step, replayed as a CUDA graph",
    "tokens_per_s": "new tokens / wall time of the whole request, prompt included; median of the rounds",
    "over_transformers": "wall time of transformers over this one's, taking turns; median of the paired rounds with "
    "its bootstrap 95% interval",
    "over_compiled": "the compiled loop's, likewise",
    "same_tokens": "how many of the first tokens are the compiled loop's: in bfloat16 roundings differ, and the first "
    "that differs changes all behind it",
}
EMBEDDED = ("stdlib-10m", "stdlib-1m")
VARIANTS = ("compiled loop", "ours, cuda", "ours, triton", "ours, torch", "transformers")  # of a dry run
PROMPT = "import os\n\n\ndef read(path):\n    "


class CompiledLoop:
    """Greedy decoding by a compiled step over one token at a position that is a tensor: one graph for all of them."""

    def __init__(self, model: Transformer, tokens: int, compiled: bool = True) -> None:
        """`tokens`: prompt and output at most."""
        config, weight = model.config, model.embedding.weight
        self.model, self.tokens = model, tokens
        size = (config.layers, 1, config.kv_heads, tokens, config.head_dim)
        self.keys = torch.zeros(size, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self.places = torch.arange(tokens, device=weight.device)
        self.tables = model.rotation_at(self.places, weight) if config.positions == "rope" else None
        mode = "reduce-overhead" if weight.is_cuda else "default"
        self.step: Callable[[Tensor, Tensor], Tensor] = self.forward
        if compiled:
            self.step = torch.compile(self.forward, mode=mode, fullgraph=True)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens int64 [1, T] at positions [T] -> the most likely token behind the last: int64 [1, 1]."""
        model, config = self.model, self.model.config
        x = model.embedding(tokens)
        rotation = None
        if self.tables is None:
            x = x + model.positions(positions + config.position_offset)
        else:
            rotation = self.tables[0][positions], self.tables[1][positions]
        mask = self.places[None, :] <= positions[:, None]  # [T, tokens]
        if config.window is not None:
            mask = mask & (positions[:, None] - self.places[None, :] < config.window)
        for number, layer in enumerate(model.layers):
            query, key, value = layer.before(x, rotation, None)  # type: ignore[operator]
            self.keys[number].index_copy_(2, positions, key.transpose(1, 2))
            self.values[number].index_copy_(2, positions, value.transpose(1, 2))
            mixed = F.scaled_dot_product_attention(
                query.transpose(1, 2), self.keys[number], self.values[number], mask, enable_gqa=True
            )
            x = layer.after(x, mixed.transpose(1, 2), None)  # type: ignore[operator]
        return model.logits(model.norm(x[:, -1:])).argmax(-1)

    @torch.inference_mode()
    def generate(self, prompt: list[int], count: int) -> list[int]:
        """`count` tokens, whatever they are; the prompt goes through the plain forward."""
        if len(prompt) + count > self.tokens:
            raise ValueError(f"{len(prompt) + count} tokens; there is room for {self.tokens}")
        at = len(prompt)
        token = self.forward(torch.tensor([prompt], device=self.places.device), self.places[:at])
        found = [token]
        for position in range(at, at + count - 1):
            token = self.step(token, self.places[position : position + 1]).clone()  # a graph's output is overwritten
            found.append(token)
        return torch.cat(found, 1)[0].tolist()


class StaticPeer(TransformersPeer):
    """transformers' `generate` with its static cache; on a card it compiles the forward itself."""

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


class Ours(Variant):
    def decode(self, prompt: list[int], count: int) -> list[int]:
        self()
        return self.tokens[0]


def measure_gpu_peers(lab: Lab) -> None:
    """UserError where there is no card and nothing was said of a dry run."""
    if not lab.options.dry_run and lab.device.type != "cuda":
        raise UserError(f"the peers on a card need a card, and this is {lab.device.type}; --dry-run walks their grid")
    embedded = EMBEDDED[:1] if lab.options.quick else EMBEDDED
    shapes = () if lab.options.quick else tuple(SHAPES)
    for name in (*embedded, *shapes):
        if not lab.done(kind="gpu_peers", model=name, variant="transformers"):
            of_model(lab, name)


def of_model(lab: Lab, name: str) -> None:
    """A model at a time: it is given back before the next one comes."""
    random, count = name in SHAPES, lab.options.max_tokens
    decoders: dict[str, Any] = dict.fromkeys(VARIANTS)
    found: dict[str, list[int]] = {}
    with ExitStack() as stack:
        if not lab.options.dry_run:
            path = str(stack.enter_context(shape_folder(name, lab.device))) if random else name
            decoders, prompt = real_decoders(lab, path, count, not random)
            for each, decode in decoders.items():  # each is right, and compiled, before any is timed
                found[each] = decode(prompt, count)
                if len(found[each]) != count:
                    raise UserError(f"{each} gives {len(found[each])} tokens of {name}, expected {count}")
            decoders = {each: lambda decode=decode: decode(prompt, count) for each, decode in decoders.items()}
        times = lab.times(f"peers, {name}", decoders, lab.options.repeats)
    wanted = found.get("compiled loop", [])
    for each in sorted(times, key=lambda which: which == "transformers"):  # last: by it `--resume` knows it is done
        pairs = zip(found.get(each, []), wanted, strict=False)
        lab.add(
            kind="gpu_peers",
            model=name,
            weights="random" if random else "own",
            dtype="bfloat16",
            variant=each,
            tokens_per_s=count / median(times[each]),
            same_tokens=next((at for at, (a, b) in enumerate(pairs) if a != b), len(wanted)),
            **lab.ratio("over_transformers", times["transformers"], times[each]),
            **lab.ratio("over_compiled", times["compiled loop"], times[each]),
        )


def real_decoders(lab: Lab, path: str, count: int, drafts: bool) -> tuple[dict[str, Any], list[int]]:
    """By variant a function of prompt and count; and the prompt."""
    loaded = load(path, torch.bfloat16, lab.device)
    prompt = loaded.tokenizer.encode(PROMPT)
    loop = CompiledLoop(loaded.model, len(prompt) + count)
    decoders: dict[str, Any] = {"compiled loop": loop.generate}

    def ours(**options: Any) -> Callable[[list[int], int], list[int]]:
        session = lab.session(
            model=path, kernels="auto", dtype="bfloat16", max_tokens=count, temperature=0.0, **options
        )
        session.params = dataclasses.replace(session.params, ignore_eos=True)
        return Ours("ours", session, [PROMPT]).decode

    for backend in registry.FOR_CARDS:
        if registry.why_not(backend, lab.device) is None:  # type: ignore[arg-type]
            decoders[f"ours, {backend}"] = ours(kernels=backend, draft="none")
    decoders["ours, torch"] = ours(kernels="torch", draft="none")
    if drafts:
        decoders["ours, drafting"] = ours(kernels="cuda", controller="cost")
    decoders["transformers"] = StaticPeer(loaded.checkpoint.folder, torch.bfloat16, lab.device).decode
    return decoders, prompt
