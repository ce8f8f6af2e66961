"""A layer's weight matrix as GPU kernels read it, in the layout of nn.Linear or of quantize.py."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ..quantize import QuantLinear
from .arguments import require


class Matrix(NamedTuple):
    """All outputs of a layer, or some."""

    kind: str  # "plain", "int8" or "int4"
    values: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    factor: Tensor | None
    bias: Tensor | None
    outputs: int
    inputs: int
    group: int  # int4: inputs that share a scale


def matrix_of(op: str, layer: nn.Module, start: int, stop: int | None) -> Matrix:
    """Return the outputs start .. stop of a layer. UserError for a storage format that the kernels do not support."""
    if isinstance(layer, QuantLinear):
        kind, values, group = str(layer.format.name), layer.values, layer.format.group
        scales, zeros, factor = layer.scales, layer.zeros, layer.factor
        require(op, kind != "int4" or values.is_contiguous(), "the int4 matrix is not contiguous", "a contiguous one")
    else:
        wrong = f"a {type(layer).__name__} stores its matrix in another format"
        require(op, isinstance(layer, nn.Linear), wrong, "Linear or QuantLinear")
        assert isinstance(layer, nn.Linear)
        kind, values, group, scales, zeros, factor = "plain", layer.weight, 0, None, None, None
    total = len(values)
    stop = total if stop is None else stop
    require(op, 0 <= start <= stop <= total, f"outputs {start} .. {stop} are asked for", f"some of 0 .. {total}")
    scales, zeros, bias = (None if each is None else each[start:stop] for each in (scales, zeros, layer.bias))
    bias = None if bias is None else bias.contiguous()
    return Matrix(kind, values[start:stop], scales, zeros, factor, bias, stop - start, layer.in_features, group)
