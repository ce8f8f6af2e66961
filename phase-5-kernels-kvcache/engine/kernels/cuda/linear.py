"""`linear` and `gated_linear`: see linear.cuh, and weights.cuh for the storage of matrices.

The bits of a row do not depend on other rows of the batch. A sequence with more than 64 tokens, more than any step or
tree has, is a prefill, which is limited by arithmetic: torch computes the product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...model import Linear
from ...quantize import QuantLinear
from .. import fused, reference
from .support import FORMATS, address, floating, of_dtype, on_device, require, rows_of, stream_of

BUSY = 264  # blocks of 16 outputs that fill a large GPU: two for each of 132 multiprocessors
MOST_PARTS = 8
MANY = 64  # tokens of a sequence; torch computes more


class Matrix(NamedTuple):
    """A layer's matrix, or some of its outputs, in the layout of the kernels."""

    bits: int  # 16 (or 32) unquantised, 8, 4
    values: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    factor: Tensor | None
    bias: Tensor | None
    outputs: int
    inputs: int
    group: int

    def numbers(self) -> list[int]:
        """Return the members in the order of ops.h."""
        bias_format = 0 if self.bias is None else FORMATS[self.bias.dtype]
        tensors = (self.values, self.scales, self.zeros, self.factor, self.bias)
        return [self.bits, self.group, *map(address, tensors), bias_format, self.outputs, self.inputs]

    def parts(self, columns: int) -> int:
        """Return how many blocks share the inputs of an output; it depends on the matrix only, not on the rows."""
        chunk = {4: 128, 8: 64}.get(self.bits, 32)  # inputs; a block's warps share runs of 32 of them: linear.cuh
        parts = 1
        while -(-columns // 16) * parts < BUSY and self.inputs >= 2 * parts * 32 * chunk and parts < MOST_PARTS:
            parts *= 2
        return parts


def matrix_of(op: str, layer: nn.Module, start: int, stop: int | None) -> Matrix:
    """Return a layer's matrix. UserError for a storage format that the kernels do not support."""
    if isinstance(layer, QuantLinear):
        bits, group = (8, layer.in_features) if layer.format.name == "int8" else (4, layer.format.group)
        values, scales, zeros, factor = layer.values, layer.scales, layer.zeros, layer.factor
    elif isinstance(layer, nn.Linear):
        bits, group, values, scales, zeros, factor = 16, layer.in_features, layer.weight, None, None, None
    else:
        wanted = f"{Linear.__name__} or {QuantLinear.__name__}"
        require(op, False, f"a {type(layer).__name__} stores its matrix in another format", wanted)
        raise AssertionError
    total = len(values)
    stop = total if stop is None else stop
    require(op, 0 <= start <= stop <= total, f"outputs {start} .. {stop} are asked for", f"some of 0 .. {total}")
    require(op, values.is_contiguous(), "the matrix is not contiguous", "contiguous rows")
    cut = slice(start, stop)
    bias = layer.bias if isinstance(layer.bias, Tensor) else None
    parts = [None if tensor is None else tensor[cut] for tensor in (scales, zeros)]
    own_bias = None if bias is None else bias[cut].contiguous()
    return Matrix(bits, values[cut], parts[0], parts[1], factor, own_bias, stop - start, int(layer.in_features), group)


def _run(
    op: str, layer: nn.Module, x: Tensor, start: int, stop: int | None, gated: bool, padded: bool = True
) -> Tensor:
    matrix = matrix_of(op, layer, start, stop)
    floating(op, x=x, bias=matrix.bias)
    require(op, x.shape[-1] == matrix.inputs, f"x has {x.shape[-1]} features", str(matrix.inputs))
    if matrix.bits == 16:
        of_dtype(op, x.dtype, matrix=matrix.values)
    require(op, not gated or matrix.outputs % 2 == 0, f"there are {matrix.outputs} outputs", "two halves")
    library = on_device(op, x=x, weight=matrix.values, bias=matrix.bias)
    rows = rows_of(layer.ordered(x) if isinstance(layer, QuantLinear) else x)
    columns = matrix.outputs // 2 if gated else matrix.outputs
    M = len(rows)
    if x.ndim > 1 and x.shape[-2] > MANY:
        whole = fused.gated_linear(layer, x) if gated else reference.linear(layer, x, start, start + matrix.outputs)
        return whole.contiguous()
    out = x.new_empty(*x.shape[:-1], columns)
    if x.dtype == torch.float32 or not padded:
        library.linear_rows(
            FORMATS[x.dtype], address(rows), rows.stride(0), M, matrix.numbers(), gated, address(out), stream_of(x)
        )
        return out
    parts = 1 if gated else matrix.parts(columns)  # one block needs a gate and its partner
    sums = x.new_empty(parts, M, columns, dtype=torch.float32) if parts > 1 else None
    library.linear(
        FORMATS[x.dtype], address(rows), rows.stride(0), M, matrix.numbers(), gated, parts, address(sums), address(out),
        stream_of(x),
    )  # fmt: skip
    return out


def linear(layer: nn.Module, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Multiply x [..., in] -> [..., out], or only the outputs start .. stop, in x's dtype; sums in float32."""
    return _run("linear", layer, x, start, stop, gated=False)


def gated_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Return SiLU(first half of the outputs) * second half: x [..., in] -> [..., out / 2], rounded once."""
    return _run("gated_linear", layer, x, 0, None, gated=True)


def unconstrained(layer: nn.Module, x: Tensor) -> Tensor:
    """Run `linear` without tensor cores; the bench measures the cost of equal bits for 1 and 16 rows against it."""
    return _run("linear", layer, x, 0, None, gated=False, padded=False)
