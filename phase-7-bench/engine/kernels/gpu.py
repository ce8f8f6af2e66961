"""The ops of a GPU backend: checks and prepares the arguments, alike for CUDA and Triton, then launches a kernel.

python -c "from engine.kernels.gpu import GpuOps; print(GpuOps.decode_attention.__doc__)"
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kv_cache import DynamicCache
from ..quantize import QuantLinear
from . import Kernels, fused, reference
from .arguments import dense, floating, of_dtype, on_device, require, rows_of, same_shape
from .gpu_tokens import TokenOps
from .key_ranges import KeyRanges
from .launches import PART, Launches, Rotation
from .matrix import matrix_of
from .metadata import AttentionMetadata, layer_of, row_of

BUSY = 264  # programs that fill a large GPU: two for each of 132 multiprocessors


class GpuOps(TokenOps):
    """All ops, with the arguments and results of their references. UserError for arguments that do not fit."""

    def __init__(self, name: str, launches: Launches, most_tokens: int | None = None) -> None:
        """Take a backend's kernels. torch multiplies sequences of more than most_tokens: arithmetic limits them."""
        super().__init__(name, launches)
        self.most_tokens = most_tokens

    def ops(self) -> dict[str, Callable[..., Any]]:
        return {op: getattr(self, op) for op in Kernels._fields}

    def linear(
        self, layer: nn.Module, x: Tensor, start: int = 0, stop: int | None = None, invariant: bool = True
    ) -> Tensor:
        """Multiply x [..., in] -> [..., out], or only the outputs start .. stop, in x's dtype; sums in float32.

        Not invariant: the bits may depend on other rows. The bench measures the cost of equal bits against it.
        """
        return self._linear("linear", layer, x, start, stop, gated=False, invariant=invariant)

    def gated_linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return SiLU(first half of the outputs) * second half: x [..., in] -> [..., out / 2], rounded once."""
        return self._linear("gated_linear", layer, x, 0, None, gated=True, invariant=True)

    def _linear(
        self, op: str, layer: nn.Module, x: Tensor, start: int, stop: int | None, gated: bool, invariant: bool
    ) -> Tensor:
        matrix = matrix_of(f"{self.name} {op}", layer, start, stop)
        op = self._checked(op, x=x, weight=matrix.values, bias=matrix.bias)
        floating(op, x=x, bias=matrix.bias)
        require(op, x.shape[-1] == matrix.inputs, f"x has {x.shape[-1]} features", str(matrix.inputs))
        if matrix.kind == "plain":
            of_dtype(op, x.dtype, matrix=matrix.values)
        require(op, not gated or matrix.outputs % 2 == 0, f"there are {matrix.outputs} outputs", "two halves")
        if self.most_tokens is not None and x.ndim > 1 and x.shape[-2] > self.most_tokens:
            whole = fused.gated_linear(layer, x) if gated else reference.linear(layer, x, start, start + matrix.outputs)
            return whole.contiguous()
        rows = rows_of(layer.ordered(x) if isinstance(layer, QuantLinear) else x)
        out = x.new_empty(*x.shape[:-1], matrix.outputs // 2 if gated else matrix.outputs)
        self.launch.linear(op, rows, matrix, gated, invariant, out)
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension of [..., D]; statistics in float32."""
        return self._norm("rms_norm", x, None, weight, eps)[0]

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return (norm of x + residual, x + residual), with the sum rounded to its dtype."""
        return self._norm("add_rms_norm", x, residual, weight, eps)

    def _norm(self, op: str, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        op = self._checked(op, x=x, weight=weight, residual=residual)
        floating(op, x=x, weight=weight)
        of_dtype(op, x.dtype, residual=residual)
        same_shape(op, "weight", weight, x.shape[-1])
        out = total = torch.empty_like(x, memory_format=torch.contiguous_format)
        if residual is not None:
            same_shape(op, "residual", residual, *x.shape)
            residual, total = rows_of(residual), torch.empty_like(out)
        self.launch.norm(op, rows_of(x), residual, weight.contiguous(), eps, out, total)
        return out, total

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate x [B, T, H, head_dim] (RoPE); the tables are [T, 1, head_dim] or [B, T, 1, head_dim]."""
        rotation = self._rotation("rope", x, cos, sin)
        self.launch.rope(f"{self.name} rope", rotation)
        return rotation.out

    def _rotation(self, op: str, x: Tensor, cos: Tensor, sin: Tensor) -> Rotation:
        B, T, _, D = x.shape
        op = self._checked(op, x=x, cos=cos, sin=sin)
        floating(op, x=x, cos=cos, sin=sin)
        require(op, D % 2 == 0, f"a head has {D} features", "an even number")
        for name, table in (("cos", cos), ("sin", sin)):
            good = table.shape in ((T, 1, D), (1, T, 1, D), (B, T, 1, D))
            require(op, good, f"{name} has shape {list(table.shape)}", f"[{T}, 1, {D}] or [{B}, {T}, 1, {D}]")
        require(op, cos.shape == sin.shape, "cos and sin differ in shape", "two tables of one shape")
        strides = T * D if cos.ndim == 4 and len(cos) == B > 1 else 0, D
        return Rotation(dense(x), cos.contiguous(), sin.contiguous(), strides, x.new_empty(x.shape))

    def kv_append(self, metadata: AttentionMetadata, layer: int, keys: Tensor, values: Tensor) -> None:
        """Append the first counts[r] of keys and values [R, T, kv_heads, head_dim] to row rows[r] of the cache.

        A dynamic cache copies its content for every token; torch does that here too.
        """
        self._append("kv_append", metadata, layer, keys, values, None)

    def rope_append(
        self,
        metadata: AttentionMetadata,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """Rotate query [R, T, H, head_dim] and key, append key and value as kv_append does; return the query."""
        op = "rope_append"
        same_shape(f"{self.name} {op}", "query", query, *key.shape[:2], query.shape[2], key.shape[3])
        if isinstance(metadata.cache, DynamicCache):
            self._append(op, metadata, layer, self.rope(key, cos, sin), value, None)
            return self.rope(query, cos, sin)
        rotation = self._rotation(op, query, cos, sin)
        self._append(op, metadata, layer, key, value, rotation)
        return rotation.out

    def _append(
        self, op: str, metadata: AttentionMetadata, layer: int, keys: Tensor, values: Tensor, rotation: Rotation | None
    ) -> None:
        cache, counts = metadata.cache, metadata.counts
        (R, T), shape, query = keys.shape[:2], cache.shape, None if rotation is None else rotation.x
        op = self._checked(op, keys=keys, values=values, query=query)
        same_shape(op, "keys", keys, R, T, shape.kv_heads, shape.head_dim)
        same_shape(op, "values", values, *keys.shape)
        floating(op, keys=keys, values=values)
        require(op, len(counts) == R, f"the metadata of {len(counts)} rows", f"of {R}")
        require(op, all(0 <= c <= T for c in counts), f"counts {counts}", f"numbers from 0 to {T}, the new tokens")
        if isinstance(cache, DynamicCache):
            reference.kv_append(metadata, layer, keys, values)
            return
        to = layer_of(cache, layer)
        on_device(op, self.launch.needs, keys=keys, cache=to.keys.values)
        self.launch.append(op, to, metadata, dense(keys), dense(values), rotation)

    def decode_attention(
        self, query: Tensor, metadata: AttentionMetadata, layer: int, ranges: KeyRanges, part: int | None = PART
    ) -> Tensor:
        """Attend with query [R, W, H, head_dim] to each row's tokens and its counts[r] just appended; same shape.

        Sums are float32. `part`: positions of one program, a multiple of 64; the bits depend on it. None: parts that
        fill the GPU; the bench measures the cost of fixed parts against it.
        """
        if part is None:
            (R, W, H, _), heads = query.shape, metadata.cache.shape.kv_heads
            programs = max(1, BUSY // max(1, R * heads * -(-W * (H // heads) // 16)))
            part = -(-max([1, *metadata.ends]) // (64 * programs)) * 64
        return self._attend("decode_attention", query, metadata, layer, ranges, part)

    def flash_prefill(self, query: Tensor, metadata: AttentionMetadata, layer: int, ranges: KeyRanges) -> Tensor:
        """Attend as decode_attention does, for many queries; trees, whose queries see paths, use decode_attention."""
        return self._attend("flash_prefill", query, metadata, layer, ranges, None)

    def _attend(
        self, op: str, query: Tensor, metadata: AttentionMetadata, layer: int, ranges: KeyRanges, part: int | None
    ) -> Tensor:
        (R, W, H, D), cache = query.shape, metadata.cache
        shape = cache.shape
        op = self._checked(op, query=query)
        floating(op, query=query)
        require(op, shape.head_dim == D, f"a head of query has {D} features", f"{shape.head_dim}, as the cache")
        require(op, H % shape.kv_heads == 0, f"{H} query heads over {shape.kv_heads} of keys", "a multiple")
        require(op, len(metadata.rows) == R, f"the metadata of {len(metadata.rows)} rows", f"of {R}")
        same_shape(op, "the ranges", ranges.lo.tensor, R, W)
        require(op, part is None or part % 64 == 0 < part, f"parts of {part} positions", "a multiple of 64")
        query, out = dense(query), query.new_empty(query.shape)
        if isinstance(cache, DynamicCache):  # every row has a tensor of its own
            calls = [
                (*row_of(metadata, layer, r), ranges.of_row(r), query[r : r + 1], out[r : r + 1]) for r in range(R)
            ]
        else:
            calls = [(layer_of(cache, layer), metadata, ranges, query, out)]
        for call in calls:
            on_device(op, self.launch.needs, query=query, cache=call[0].keys.values)
            if part is None and ranges.lines is None:
                self.launch.prefill(op, *call)
            else:
                self.launch.decode(op, part or PART, *call)
        return out
