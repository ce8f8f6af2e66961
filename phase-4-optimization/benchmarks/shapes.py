"""Measures the speed of plain decoding at the shapes of GPT-2 XL and Llama 3.1 8B, with random weights.

A step without a cache is one forward over the whole sequence, so tokens/s decrease with the length. Short sequences are
bound by reading the weights (GB/s), long ones by arithmetic (GFLOP/s). Runs of every variant alternate with bfloat16.
Quantised matrices are dequantised for every product, in plain torch: slower, and the reference for later kernels. A CPU
would take hours, so every variant is skipped there.

    python bench.py --only shapes --device cuda
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from common.benchmark import Outcome
from common.device import DTYPES, available_memory
from common.errors import UserError
from common.harness import Bench, Variant
from common.prompts import Prompt
from engine import ModelConfig, RopeConfig, Transformer
from engine.cost import forward_bytes, forward_flops, weight_bytes
from engine.precision import check_device_has, computing
from engine.quantize import Format, quantize_model

SHAPES = {
    "shapes": "random weights in the shape of a model; length: tokens in the sequence whose next token is computed, "
    "without a cache. variant: dtype of the weights; amp: float32 weights under autocast; int8, int4 (groups of 64): "
    "plain-torch reference in bfloat16. gb_per_s: bytes of weights that the forward must read, as stored / time; "
    "gflop_per_s: operations of the forward (engine/cost.py) / time; speedup: over bfloat16",
    "attention": "attention of one layer in bfloat16: scaled_dot_product_attention over the mix as phases 1 to 3 write "
    "it out, with a float32 softmax",
}
CONFIGS = {
    "gpt2-xl": ModelConfig(
        family="gpt2",
        vocab_size=50257,
        layers=48,
        width=1600,
        heads=25,
        kv_heads=25,
        head_dim=64,
        ffn_width=6400,
        context=1024,
        norm="layer",
        norm_eps=1e-5,
        positions="learned",
        activation="gelu_tanh",
        gated=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied=True,
    ),
    "llama-3.1-8b": ModelConfig(
        family="llama",
        vocab_size=128256,
        layers=32,
        width=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ffn_width=14336,
        context=131072,
        norm="rms",
        norm_eps=1e-5,
        positions="rope",
        rope=RopeConfig(500_000.0, "llama3", factor=8.0, original_context=8192),
        activation="silu",
        gated=True,
    ),
}
LENGTHS = (16, 128, 512, 1000)
BASE = "bfloat16"
QUANTISED = {"int8": Format("int8"), "int4": Format("int4", group=64)}
VARIANTS = ("float32", "float16", "amp", *QUANTISED)


def measure_shapes(lab: Bench) -> None:
    for name, config in CONFIGS.items():
        if lab.device.type == "cpu" and not lab.options.dry_run:
            lab.refuse("shapes", {"shape": name}, BASE, "models of this size need a GPU: --device cuda")
        else:
            measure_shape(lab, name, config, LENGTHS[:2] if lab.options.quick else LENGTHS)


def measure_shape(lab: Bench, name: str, config: ModelConfig, lengths: tuple[int, ...]) -> None:
    """Measure each variant against bfloat16, with two models on the device at a time."""
    base = cache(partial(variant_of, BASE, config, lab.device))  # made at the first run
    for variant in VARIANTS:
        if reason := cannot_run(lab, config, variant, bool(base.cache_info().currsize)):
            lab.refuse("shapes", {"shape": name, "beside": variant}, variant, reason)
            continue
        other = cache(partial(variant_of, variant, config, lab.device))
        for length in lengths:
            runs = {BASE: forward(base, config, BASE, length), variant: forward(other, config, variant, length)}
            lab.compare("shapes", {"shape": name, "length": length, "beside": variant}, runs)
        del other, runs
        release(lab.device)
    del base
    release(lab.device)
    for length in lengths:
        attention(lab, name, config, length)


def forward(model: Callable[[], Transformer], config: ModelConfig, variant: str, length: int) -> Variant:
    """Make the step after `length` tokens, with its operations and the bytes of weights that it reads."""
    head = 2 * config.width * config.vocab_size if variant in QUANTISED else 0  # in bfloat16
    read = weight_bytes(dataclasses.replace(config, vocab_size=0) if head else config, stored_bits(variant) / 8) + head
    figures = {"gb": read / 1e9, "gflop": forward_flops(config, length) / 1e9}
    tokens = torch.arange(length)[None] % config.vocab_size

    def run(prompt: Prompt | None, round_: int) -> Outcome:
        step(model(), tokens.to(model().embedding.weight.device), variant == "amp")
        return Outcome(1, figures)

    return run


def stored_bits(variant: str) -> float:
    """Return the bits per weight of a linear layer, with its share of the scales."""
    return {"float32": 32, "amp": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4 + 16 / 64}[variant]


def cannot_run(lab: Bench, config: ModelConfig, variant: str, has_base: bool = False) -> str | None:
    """Return the reason to skip a variant, or None: an unsupported dtype, or too little memory for two models."""
    if lab.options.dry_run:
        return None
    try:
        for dtype in (dtype_of(variant), DTYPES[BASE]):
            check_device_has(dtype, lab.device)
    except UserError as error:
        return str(error)
    weights = weight_bytes(config, 1) + (0 if config.tied else config.width * config.vocab_size)
    mine, other = dtype_of(variant).itemsize, 0 if has_base else DTYPES[BASE].itemsize
    needed = (mine + other) * weights + 2 * forward_bytes(config, 1, LENGTHS[-1], 4)
    free = available_memory(lab.device)
    return f"needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free" if needed > free else None


def dtype_of(variant: str) -> torch.dtype:
    return DTYPES.get(variant, torch.float32 if variant == "amp" else DTYPES[BASE])


def variant_of(variant: str, config: ModelConfig, device: torch.device) -> Transformer:
    model = random_model(config, dtype_of(variant), device)
    if variant in QUANTISED:
        quantize_model(model, QUANTISED[variant])
    return model


def random_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Transformer:
    """Make a model with random weights of a plausible size directly on the device."""
    with torch.device("meta"):
        model = Transformer(config)
    model.to(dtype).to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.02)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    if config.tied:
        model.head.weight = model.embedding.weight
    return model.requires_grad_(False).eval()


@torch.inference_mode()
def step(model: Transformer, tokens: Tensor, amp: bool = False) -> Tensor:
    """Compute the logits of the next token as plain decoding does."""
    last = torch.tensor([[tokens.shape[1] - 1]], device=tokens.device)
    with computing(amp, tokens.device):
        return model.logits(model.hidden(tokens, wanted=last)[:, 0])


def attention(lab: Bench, name: str, config: ModelConfig, length: int) -> None:
    """Measure attention of one layer in bfloat16: as separate operations, as in phases 1 to 3, and as one kernel."""

    @cache
    def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kv, rows = config.kv_heads, config.heads // config.kv_heads * length
        new = partial(torch.randn, device=lab.device, dtype=DTYPES[BASE])
        keys, value = new(2, 1, kv, length, config.head_dim)
        mask = torch.full((length, length), float("-inf"), device=lab.device, dtype=DTYPES[BASE]).triu(1)
        return new(1, kv, rows, config.head_dim), keys, value, mask.repeat(rows // length, 1)

    def run(mix: Callable[..., Tensor], prompt: Prompt | None, round_: int) -> Outcome:
        mix(*inputs())
        return Outcome()

    runs = {"written out": partial(run, written_out), "sdpa": partial(run, F.scaled_dot_product_attention)}
    lab.compare("attention", {"shape": name, "length": length}, runs)


def written_out(query: Tensor, keys: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    scores = torch.baddbmm(mask[None], query[0], keys[0].transpose(1, 2), alpha=query.shape[-1] ** -0.5)
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value[0]


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
