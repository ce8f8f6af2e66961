"""Packs a model's matrices into panels, one after the other; the rows are split over threads.

Quantised matrices keep their levels; others are rounded to nearest, as in engine/quantize.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.errors import UserError

from ...config import ModelConfig
from ...model import Linear, Transformer
from ...packing import PackedLinear
from ...quantize import Format, QuantLinear, replace, rtn
from ...weights import give_back_freed
from .library import library

Weights = Literal["float32", "bfloat16", "float16", "int8", "int4"]
KINDS = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int4": 4}
KIND_OF = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}
ROWS = 128  # rows that a thread packs at a time; a multiple of a panel


@dataclass(frozen=True)
class Plan:
    """One matrix: its source module, its place in the engine, and its format."""

    layer: int
    which: str  # qkv, output, up, down, head
    module: nn.Linear | QuantLinear
    format: Weights
    pair: bool  # gate and up in one matrix

    def shape(self, exact: bool) -> Any:
        """Return the shape for C++. `exact`: activations stay float32."""
        quantised = self.module if isinstance(self.module, QuantLinear) else None
        group = 0
        if self.format == "int4":
            group = quantised.format.group if quantised is not None else int4_format(self.module.in_features).group
        return library().Shape(
            kind=KINDS[self.format],
            outputs=self.module.out_features,
            inputs=self.module.in_features,
            wide=exact,
            pair=self.pair,
            scale_group=group,
            zeros=quantised is not None and quantised.zeros is not None,
            factor=quantised is not None and quantised.factor is not None,
            bias=self.module.bias is not None,
        )


def int4_format(width: int) -> Format:
    return Format("int4", 64 if width % 64 == 0 else 32)


def quantised(module: nn.Module, format: Format | None) -> nn.Module:
    """Return a copy whose matrices are in this format; the module itself without a format, or if it is quantised."""
    if format is None or isinstance(module, QuantLinear):
        return module
    if isinstance(module, nn.Linear):
        return QuantLinear.of(rtn(module.weight.detach(), format), format, module.bias)
    module = copy.deepcopy(module)
    for name in [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]:
        replace(module, name, quantised(module.get_submodule(name), format))
    return module


def why_not_model(model: nn.Module) -> str | None:
    """Return why the kernels do not support a model, or None."""
    if not isinstance(model, Transformer) or not model.has_cache:
        return f"the C++ kernels run Transformer checkpoints, and this is a {type(model).__name__}"
    config = model.config
    if config.head_dim % 2:
        return f"the C++ kernels take even head widths, and this model's is {config.head_dim}"
    if config.heads % config.kv_heads:
        return f"{config.heads} heads cannot share {config.kv_heads} key-value heads evenly"
    device = model.embedding.weight.device.type
    if device != "cpu":
        return f"the C++ kernels run on the CPU, and this model is on {device}"
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        return "the model's matrices are in oneDNN's blocks already; load it unpacked"
    if model.embedding.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the embedding is {model.embedding.weight.dtype}; float32, bfloat16 and float16 are taken"
    return None


def plan(layer: int, which: str, module: nn.Module, wanted: Weights, pair: bool = False) -> Plan:
    """Plan a matrix; one that is quantised keeps its format. UserError as for `plans`."""
    assert isinstance(module, nn.Linear | QuantLinear)
    if isinstance(module, QuantLinear):
        wanted = module.format.name
    elif wanted == "int4" and module.in_features % 32:
        name = which if layer < 0 else f"layers.{layer}.{which}"
        raise UserError(
            f"{name} has {module.in_features} input features, and groups of 32 or 64 do not divide them: use int8"
        )
    return Plan(layer, which, module, wanted, pair)


def plans(model: Any, weights: Weights, head: Weights) -> Iterator[Plan]:
    """Yield a plan for every matrix. UserError for int4 if no group size divides the inputs."""
    for number, layer in enumerate(model.layers):
        gated = model.config.gated
        yield plan(number, "qkv", layer.attention.qkv, weights)
        yield plan(number, "output", layer.attention.output, weights)
        yield plan(number, "up", layer.ffn.gate_up if gated else layer.ffn.up, weights, gated)
        yield plan(number, "down", layer.ffn.down, weights)
    if model.head is not None:
        yield plan(-1, "head", model.head, head)


def pack(plan: Plan, arena: Any, exact: bool, threads: int) -> Any:
    """Pack a matrix into panels in the arena's memory, with `threads` threads."""
    packed = library().Packed(arena, plan.shape(exact))
    module = plan.module
    quantised = module if isinstance(module, QuantLinear) else None
    format = None
    if quantised is None and plan.format in ("int8", "int4"):
        format = Format("int8") if plan.format == "int8" else int4_format(module.in_features)

    def fill(first: int) -> None:
        rows = slice(first, first + ROWS)
        if quantised is not None:
            zeros = None if quantised.zeros is None else quantised.zeros[rows]
            fill_levels(packed, first, quantised.values[rows], quantised.scales[rows], zeros)
            return
        weight = module.weight.detach()[rows].contiguous()
        if format is None:
            packed.fill(first, len(weight), weight.data_ptr(), KIND_OF[weight.dtype])
        else:
            rounded = QuantLinear.of(rtn(weight, format), format, None)
            fill_levels(packed, first, rounded.values, rounded.scales, rounded.zeros)

    starts = range(0, module.out_features, ROWS)
    if format is None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, starts))
    else:  # torch quantises with its own threads
        for first in starts:
            fill(first)
    if quantised is not None and quantised.factor is not None:
        factor = quantised.factor.float().contiguous()
        packed.set_factor(factor.data_ptr())
    if module.bias is not None:
        bias = module.bias.detach().float().contiguous()
        packed.set_bias(bias.data_ptr())
    return packed


def fill_levels(packed: Any, first: int, levels: Tensor, scales: Tensor, zeros: Tensor | None) -> None:
    levels, scales = levels.contiguous(), scales.contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    at_zeros = 0 if zeros is None else zeros.data_ptr()
    packed.fill_levels(first, len(levels), levels.data_ptr(), scales.data_ptr(), at_zeros)


def describe(config: ModelConfig) -> dict[str, object]:
    """Return the constructor arguments of the engine."""
    same = "layers", "width", "heads", "kv_heads", "head_dim", "position_offset", "gated", "norm_eps"
    return {name: getattr(config, name) for name in same} | {
        "ffn": config.ffn_width,
        "vocab": config.vocab_size,
        "rope": config.positions == "rope",
        "activation": ACTIVATIONS[config.activation],
    }


def set_vector(engine: Any, layer: int, name: str, values: Tensor | None) -> None:
    if values is not None:
        wide = values.detach().float().contiguous()
        engine.set_vector(layer, name, wide.data_ptr(), wide.numel())


def set_norm(engine: Any, layer: int, name: str, norm: nn.Module) -> None:
    assert isinstance(norm.weight, Tensor)
    set_vector(engine, layer, f"{name}.weight", norm.weight)
    set_vector(engine, layer, f"{name}.bias", getattr(norm, "bias", None))


def set_vectors(engine: Any, model: Any) -> None:
    """Copy the norms, as float32."""
    for number, layer in enumerate(model.layers):
        set_norm(engine, number, "attention_norm", layer.attention_norm)
        set_norm(engine, number, "ffn_norm", layer.ffn_norm)
        if model.config.qk_norm:
            set_vector(engine, number, "query_norm", layer.attention.query_norm.weight)
            set_vector(engine, number, "key_norm", layer.attention.key_norm.weight)
    set_norm(engine, -1, "norm", model.norm)


def release_matrix(plan: Plan) -> None:
    """Free the weights of a packed torch module, which cannot compute any more."""
    if plan.which == "head":
        pass  # drafters still read it
    elif isinstance(plan.module, Linear):
        plan.module.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    elif isinstance(plan.module, QuantLinear):
        plan.module.values = plan.module.values.new_empty(0)
    give_back_freed()
