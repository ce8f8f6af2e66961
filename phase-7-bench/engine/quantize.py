"""Weight-only quantisation: matrices are stored as small integers with scales; activations are not quantised.

A group of weights shares a scale. A group of int8 is a whole output feature, one of int4 is 32, 64 or 128 neighbouring
weights of an output feature. A weight is (level - zero) * scale, with 255 levels in int8 and 16 in int4. Every product
first dequantises the matrix, in plain torch. That saves memory and costs time, and is the reference for faster kernels.
(Without a cache a forward has many rows and is bound by arithmetic; bytes matter once a token costs one row.)

python generate.py --quant int4 --prompt "from pathlib import"
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError

from .model import Linear, Transformer
from .packing import PackedLinear

GROUPS = (32, 64, 128)
ROWS = 64  # rounded at a time, so that intermediate tensors stay in the CPU's cache


@dataclass(frozen=True)
class Format:
    """The storage format of weights."""

    name: Literal["int8", "int4"]
    group: int = 64  # int4: input features that share a scale
    asymmetric: bool = False  # int4: a zero point per group; otherwise the middle of the levels

    def __str__(self) -> str:
        zero = ", asymmetric" if self.asymmetric else ""
        return self.name if self.name == "int8" else f"int4 in groups of {self.group}{zero}"

    @property
    def levels(self) -> tuple[int, int]:
        """Return the lowest and the highest level."""
        return (-127, 127) if self.name == "int8" else (0, 15)

    @property
    def has_zeros(self) -> bool:
        return self.name == "int4" and self.asymmetric

    @property
    def signed(self) -> bool:
        """Return whether scales may be negative, so that the largest weight of a group is level -8."""
        return self.name == "int4" and not self.asymmetric

    def grouped(self, weight: Tensor, where: str = "a matrix") -> Tensor:
        """Reshape [out, in] to float32 [out, groups, group]. UserError names a matrix that groups do not divide."""
        width = weight.shape[1]
        size = width if self.name == "int8" else self.group
        if width % size:
            fitting = [str(group) for group in GROUPS if width % group == 0]
            instead = f"groups of {' or '.join(fitting)}, or int8" if fitting else "int8"
            raise UserError(f"{where} has {width} input features, and groups of {size} do not divide them: {instead}")
        return weight.detach().float().reshape(len(weight), -1, size)


class Grid(NamedTuple):
    """The values that a group's weights may take: (level - zero) * scale. Both [out, groups, 1].

    A zero is float16. A scale is bfloat16, because it needs the range of float32: in float16 the scales of weights
    around 1e-5 are subnormal, with few bits, and those of weights around 1e7 are infinite. The 8 bits of its mantissa
    cost no accuracy, because levels are computed from the stored scale.
    """

    scale: Tensor
    zero: Tensor

    def levels(self, weights: Tensor, format: Format) -> Tensor:
        """Round each weight [out, groups, group] to its nearest level, in float32."""
        levels = weights / self.scale.float()
        if format.name == "int4":  # the zero of int8 is 0
            levels += self.zero.float()
        return levels.round_().clamp_(*format.levels)

    def values(self, levels: Tensor) -> Tensor:
        return (levels.float() - self.zero.float()) * self.scale.float()


class Rounded(NamedTuple):
    """A quantised matrix before it is packed."""

    grid: Grid
    levels: Tensor  # [out, groups, group], integers in float32
    factor: Tensor | None = None  # [in], float16: activations are multiplied by it first


def whole_range(weights: Tensor, format: Format, clip: Tensor | float = 1.0) -> Grid:
    """Make the grid that covers the share `clip` of the range of each group's weights [out, groups, group].

    Symmetric int4 has levels -8 .. 7 around its zero. The weight of largest magnitude becomes level -8, as in Q4_0 of
    llama.cpp and in AutoRound, so a positive one makes the scale negative. A weight of nearly that size and the other
    sign is clipped to level 7, but all others get a finer grid than with a step of the largest magnitude / 7.
    """
    low, high = weights.amin(-1, keepdim=True), weights.amax(-1, keepdim=True)
    if format.has_zeros:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = usable((high - low) * clip / 15)
        return Grid(scale, (-low.float() * clip / scale.float()).half())
    if format.signed:
        scale, zero = torch.where(-low > high, low, high) * clip / -8, 8
    else:
        scale, zero = torch.maximum(-low, high) * clip / 127, 0
    scale = usable(scale)
    return Grid(scale, torch.full_like(scale, zero, dtype=torch.float16))


def usable(scale: Tensor) -> Tensor:
    """Cast to bfloat16, the stored dtype. The scale of a group of zeros becomes 1."""
    stored = scale.bfloat16()
    return torch.where(stored == 0, 1, stored)


def rtn(weight: Tensor, format: Format) -> Rounded:
    """Round to nearest: the grid has the whole range, and each weight becomes its nearest grid value."""
    grouped = format.grouped(weight)
    grid = whole_range(grouped, format)
    return Rounded(grid, grid.levels(grouped, format))


def pack(levels: Tensor) -> Tensor:
    """Pack levels 0 .. 15, [..., group] into uint8 [..., group / 2]: the group's first half in the low four bits."""
    low, high = levels.to(torch.uint8).chunk(2, -1)
    return low | high << 4


def unpack(packed: Tensor) -> Tensor:
    return torch.cat((packed & 15, packed >> 4), -1)


class QuantLinear(nn.Module):
    """A Linear with a quantised matrix. Scales are bfloat16 and zeros float16, in every dtype of the activations."""

    values: Tensor  # int8: [out, in]; int4: uint8 [out, groups, group / 2]
    scales: Tensor  # [out, groups]
    zeros: Tensor | None  # [out, groups]
    factor: Tensor | None  # [in]
    order: Tensor | None  # int64 [in]: the input feature of each column of the levels; None: in order

    def __init__(self, shape: tuple[int, int], format: Format, bias: bool, factor: bool, device: torch.device) -> None:
        """Allocate the tensors without filling them. `shape` is (out, in)."""
        super().__init__()
        self.out_features, self.in_features = shape
        self.format = format
        groups = 1 if format.name == "int8" else self.in_features // format.group
        packed = (groups, format.group // 2) if format.name == "int4" else (self.in_features,)
        kind = torch.uint8 if format.name == "int4" else torch.int8

        def reserve(*size: int, dtype: torch.dtype = torch.float16) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        self.register_buffer("values", torch.empty(self.out_features, *packed, dtype=kind, device=device))
        self.register_buffer("scales", reserve(self.out_features, groups, dtype=torch.bfloat16))
        self.register_buffer("zeros", reserve(self.out_features, groups) if format.has_zeros else None)
        self.register_buffer("factor", reserve(self.in_features) if factor else None)
        self.register_buffer("order", None)
        self.bias = nn.Parameter(torch.empty(self.out_features, device=device), requires_grad=False) if bias else None

    @staticmethod
    def of(rounded: Rounded, format: Format, bias: nn.Parameter | None) -> QuantLinear:
        grid, levels, factor = rounded
        shape = len(levels), levels[0].numel()
        linear = QuantLinear(shape, format, False, factor is not None, levels.device)
        linear.put(0, grid, levels)
        linear.factor, linear.bias = factor, bias
        return linear

    def put(self, first: int, grid: Grid, levels: Tensor) -> None:
        """Store rows `first`, `first` + 1, ...: levels [rows, groups, group]."""
        rows = slice(first, first + len(levels))
        self.values[rows] = pack(levels) if self.format.name == "int4" else levels.flatten(1)
        self.scales[rows] = grid.scale[..., 0]
        if self.zeros is not None:
            self.zeros[rows] = grid.zero[..., 0]

    def round_rows(self, first: int, weight: Tensor, where: str, columns: slice = slice(None)) -> None:
        """Round weight [rows, in] to nearest, and store it from row `first` on. UserError for non-finite weights.

        columns: those of the weight that this matrix has, whole groups of int4; scales are those of the whole weight.
        """
        for start in range(0, len(weight), ROWS):
            grid, levels, _ = rtn(weight[start : start + ROWS].to(self.values.device), self.format)
            if not bool(torch.isfinite(grid.scale).all()):
                raise UserError(f"{where} holds weights that are no finite numbers, and cannot be quantised")
            if self.format.name == "int8":
                self.put(first + start, grid, levels[:, :, columns])
            else:
                edges = (None if at is None else at // self.format.group for at in (columns.start, columns.stop))
                groups = slice(*edges)
                self.put(first + start, Grid(*(each[:, groups] for each in grid)), levels[:, groups])

    def resized(self, rows: int) -> QuantLinear:
        """Copy with `rows` outputs, truncated or padded with zeros, and without a bias."""
        fitted = QuantLinear((rows, self.in_features), self.format, False, self.factor is not None, self.values.device)
        for name, tensor in self.named_buffers():
            if name not in ("factor", "order"):
                added = tensor.new_zeros(max(0, rows - len(tensor)), *tensor.shape[1:])
                tensor = torch.cat((tensor[:rows], added))
            setattr(fitted, name, tensor)
        return fitted

    def matrix(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """Dequantise the rows start .. stop to [rows, in]: columns in `order`, without `factor`."""
        rows = slice(start, stop)
        levels = self.values[rows]
        if self.format.name == "int8":
            return (levels * self.scales[rows].float()).to(dtype)
        zeros = 8.0 if self.zeros is None else self.zeros[rows, :, None].float()
        return ((unpack(levels) - zeros) * self.scales[rows, :, None].float()).flatten(1).to(dtype)

    @property
    def weight(self) -> Tensor:
        """Return the equivalent matrix of a Linear: float32 [out, in], with `factor` and in the order of the inputs."""
        matrix = self.matrix(torch.float32)
        matrix = matrix if self.factor is None else matrix * self.factor.float()
        return matrix if self.order is None else matrix[:, self.order.argsort()]

    def ordered(self, x: Tensor) -> Tensor:
        """Reorder x [..., in] to the order of the columns."""
        return x if self.order is None else x[..., self.order]

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Multiply x [..., in] to [..., out], or to the outputs start .. stop only: [..., stop - start]."""
        x = self.ordered(x)
        if self.factor is not None:
            x = x * self.factor.to(x.dtype)
        return F.linear(x, self.matrix(x.dtype, start, stop), None if self.bias is None else self.bias[start:stop])

    @property
    def weight_bytes(self) -> tuple[int, int]:
        """Return the bytes of the values, scales, zeros, factor and order together."""
        parts = (self.scales, self.zeros, self.factor, self.order)
        others = [tensor.nbytes for tensor in parts if tensor is not None]
        return self.values.nbytes, sum(others)


def linear_names(model: Transformer, head: bool) -> list[str]:
    """List the matrices to quantise: the layers', and the output matrix if `head`. UserError if some already are."""
    modules = [(f"layers.{name}", module) for name, module in model.layers.named_modules()] + [("head", model.head)]
    for _, module in modules:
        if isinstance(module, QuantLinear):
            raise UserError(f"the model's matrices are quantised already, {module.format}; leave out --quant")
    return [name for name, module in modules if isinstance(module, Linear) and (head or name != "head")]


def replace(model: nn.Module, name: str, part: nn.Module | Tensor) -> None:
    """Set the module, parameter or buffer of this name."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, part)


Rounding = Callable[[Tensor, Format], Rounded]


def quantized_linear(model: Transformer, name: str, format: Format, device: torch.device) -> QuantLinear:
    """Return the QuantLinear of this name; a Linear is replaced by an empty QuantLinear first.

    UserError names a matrix whose width groups do not divide.
    """
    linear = model.get_submodule(name)
    if isinstance(linear, QuantLinear):
        return linear
    assert isinstance(linear, Linear)
    format.grouped(linear.weight[:1], name)
    made = QuantLinear((linear.out_features, linear.in_features), format, False, False, device)
    made.bias = linear.bias
    replace(model, name, made)
    return made


def quantize_linear(model: Transformer, name: str, format: Format, rounding: Rounding | None = None) -> None:
    """Replace the Linear of this name, rounded to nearest or by `rounding`.

    UserError names a matrix whose width groups do not divide, or whose weights are not finite.
    """
    linear = model.get_submodule(name)
    assert isinstance(linear, Linear)
    weight = linear.weight.detach()
    if rounding is None:
        quantized_linear(model, name, format, weight.device).round_rows(0, weight, name)
        return
    format.grouped(weight[:1], name)
    if not bool(torch.isfinite(weight).all()):
        raise UserError(f"{name} holds weights that are no finite numbers, and cannot be quantised")
    replace(model, name, QuantLinear.of(rounding(weight, format), format, linear.bias))


def quantize_model(model: Transformer, format: Format, head: bool = False) -> None:
    """Round the matrices to nearest, one after the other: at most one exists in both forms at a time.

    A head tied to the embedding gets a matrix of its own; the embedding is not quantised.
    """
    for name in linear_names(model, head):
        quantize_linear(model, name, format)


def stored_bytes(model: Transformer, head: bool = False) -> tuple[int, int]:
    """Count the bytes of the linear layers' matrices, and of their scales; biases are left out."""
    values = others = 0
    for name, module in linears(model):
        if name == "head" and not head:
            continue
        mine, its_others = module.weight_bytes
        values, others = values + mine, others + its_others
    return values, others


def linears(model: Transformer) -> Iterator[tuple[str, Linear | QuantLinear | PackedLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, Linear | QuantLinear | PackedLinear):
            yield name, module
