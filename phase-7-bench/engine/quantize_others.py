"""Converts matrices quantised by GPTQ, AWQ or compressed-tensors to quantize.py's layout, without rounding again.

All formats have weights (level - zero) * scale. Levels and zeros are integers and keep their values; their order in
memory changes. Scales become bfloat16, which the kernels read: scales of a model in bfloat16 keep their values, those
in float16 change by up to 0.4%, which a note reports. Groups larger than the kernels support, such as one over the
whole width, are divided, and the scale is repeated.

    gptq                  qweight [in / 8, out]         qzeros [groups, out / 8]  scales [groups, out]  g_idx [in]
    awq                   qweight [in, out / 8]         qzeros [groups, out / 8]  scales [groups, out]
    compressed-tensors    weight_packed [out, in / 8]   weight_zero_point [out / 8, groups]  weight_scale [out, groups]
                          or weight, int8 [out, in]

An int32 holds eight numbers of four bits (or four of eight), the first in the lowest bits; AWQ's order is AWQ_PLACES.

python generate.py --model Qwen/Qwen2.5-0.5B-Instruct-AWQ --prompt "The sea"
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from common.checkpoint import Checkpoint
from common.errors import UserError

from .quantize import GROUPS, Format, QuantLinear, pack
from .quantize_files import KEY, METHOD
from .quantize_schemes import Scheme, read_scheme

PARTS = ("values", "scales", "zeros", "order")  # of a quantised matrix, in quantize.py
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # the four bits of an int32 in which each of its eight numbers is
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INTS = (torch.int32, torch.int64)


class Stored(NamedTuple):
    """A matrix with the tools' values, in the order [out, in]."""

    levels: Tensor  # [out, in]: uint8 of four bits, or int8
    scales: Tensor  # [out, groups]
    zeros: Tensor | None  # [out, groups]
    group_of: Tensor | None = None  # [in] the group of each input feature; None: in order


def scheme_of(checkpoint: Checkpoint) -> Scheme | None:
    """Read how another tool quantised a checkpoint; None if no other tool did."""
    about = checkpoint.config.get(KEY)
    if about is None or about.get("quant_method") == METHOD:
        return None
    scheme = read_scheme(about)
    if scheme.rounds_activations:
        print(
            f"note: {checkpoint.name} was made for activations that are rounded to int8; here they are not",
            file=sys.stderr,
        )
    return scheme


def quantised(checkpoint: Checkpoint, scheme: Scheme) -> dict[str, int]:
    """Map the file's name of each quantised matrix to its number of tensors."""
    mark, kinds = _kinds(scheme)
    parts = [name.rpartition(".") for name, _ in checkpoint.tensors()]
    matrices = {owner for owner, _, kind in parts if kind == mark}
    return dict(Counter(owner for owner, _, kind in parts if owner in matrices and kind in kinds))


def _kinds(scheme: Scheme) -> tuple[str, tuple[str, ...]]:
    """Return the kind of tensor that marks a quantised matrix, and all kinds that one may have."""
    if scheme.method != "compressed-tensors":
        return "qweight", ("qweight", "qzeros", "scales", "g_idx")
    levels = "weight_packed" if scheme.packed else "weight"
    return "weight_scale", (levels, "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


def format_of(scheme: Scheme, width: int, where: str) -> Format:
    """Choose the format for a matrix with `width` input features. UserError if none fits."""
    if scheme.bits == 8:
        return Format("int8")
    shared = scheme.group or width
    group = next((group for group in reversed(GROUPS) if shared % group == 0 and width % shared == 0), None)
    if group is None:
        raise UserError(
            f"{where} has {width} input features, of which {shared} share a scale; supported are groups that divide "
            f"the features and are multiples of 32: take the model as it was before"
        )
    return Format("int4", group, scheme.asymmetric)


def repacked(checkpoint: Checkpoint, scheme: Scheme) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the file, one at a time; the tensors of a quantised matrix are replaced by its PARTS.

    UserError names a matrix whose tensors are missing or do not fit.
    """
    counts, (_, kinds) = quantised(checkpoint, scheme), _kinds(scheme)
    waiting: dict[str, dict[str, Tensor]] = defaultdict(dict)  # a matrix's tensors are not next to each other
    moved = 0.0
    for name, tensor in checkpoint.tensors():
        owner, _, kind = name.rpartition(".")
        if owner not in counts or kind not in kinds:
            yield name, tensor
            continue
        waiting[owner][kind] = tensor
        if len(waiting[owner]) < counts[owner]:
            continue
        where = f"{checkpoint.name}: {owner}"
        parts = convert(where, read(where, waiting.pop(owner), scheme), scheme)
        exact = parts["scales"].float()
        moved = max(moved, float(((exact.bfloat16().float() - exact) / exact).nan_to_num().abs().max()))
        yield from ((f"{owner}.{part}", tensor) for part, tensor in parts.items())
    if moved:
        print(
            f"note: {checkpoint.name}: scales are kept as bfloat16, which moves weights by up to {moved:.2%}",
            file=sys.stderr,
        )


def read(where: str, tensors: dict[str, Tensor], scheme: Scheme) -> Stored:
    """Read a matrix from its tensors. UserError for a tensor that is missing, or has another dtype or rank."""

    def part(kind: str, *dtypes: torch.dtype, ndim: int = 2) -> Tensor:
        tensor = tensors.get(kind)
        if tensor is None:
            raise UserError(f"{where}.{kind} is missing; copy or download the model again")
        if tensor.dtype not in dtypes or tensor.ndim != ndim:
            raise UserError(
                f"{where}.{kind} is {tensor.dtype} {list(tensor.shape)}; "
                f"expected {' or '.join(map(str, dtypes))} of {ndim} dimensions"
            )
        return tensor

    zeros: Tensor | None = None
    if scheme.method == "compressed-tensors":
        scales, bits = part("weight_scale", *FLOATS), scheme.bits
        if "weight_zero_point" in tensors:
            zeros = part("weight_zero_point", torch.int32, torch.int8)
            packed = zeros.dtype == torch.int32  # older files have int8, minus the middle level
            zeros = unpacked(zeros.T, bits).T[: len(scales)] if packed else zeros.int() + 2 ** (bits - 1)
        if not scheme.packed:
            return Stored(part("weight", torch.int8), scales, zeros)
        levels = unpacked(part("weight_packed", torch.int32), bits)
        levels = levels if bits == 4 else (levels.int() - 128).to(torch.int8)
        return Stored(levels, scales, zeros, part("weight_g_idx", *INTS, ndim=1) if "weight_g_idx" in tensors else None)

    scales = part("scales", *FLOATS).T
    if scheme.method == "awq":
        zeros = unpacked(part("qzeros", torch.int32), 4, AWQ_PLACES).T
        return Stored(unpacked(part("qweight", torch.int32), 4, AWQ_PLACES).T, scales, zeros)

    levels = unpacked(part("qweight", torch.int32).T, 4)
    zeros = unpacked(part("qzeros", torch.int32), 4).T
    if scheme.zeros_less_one:
        zeros = (zeros + 1) & 15  # the file's four bits are zero - 1
    return Stored(levels, scales, zeros, part("g_idx", *INTS, ndim=1) if "g_idx" in tensors else None)


def unpacked(words: Tensor, bits: int, places: Sequence[int] | None = None) -> Tensor:
    """Unpack int32 [..., n] to uint8 [..., n * 32 / bits]: number i of a word begins at bit places[i] * bits."""
    places = places or range(32 // bits)
    numbers = torch.empty(*words.shape, len(places), dtype=torch.uint8)
    for number, place in enumerate(places):
        numbers[..., number] = (words >> (bits * place)) & (2**bits - 1)
    return numbers.flatten(-2)


def convert(where: str, stored: Stored, scheme: Scheme) -> dict[str, Tensor]:
    """Convert to quantize.py's `values`, `scales`, `zeros` and `order`. UserError for tensors that do not fit."""
    levels, scales, zeros, group_of = stored
    out, width = levels.shape
    format = format_of(scheme, width, where)
    wanted = [out, 1 if scheme.group is None else width // scheme.group]
    for name, tensor in (("scales", scales), ("zeros", zeros)):
        if tensor is not None and list(tensor.shape) != wanted:
            raise UserError(
                f"{where}: the {name} are {list(tensor.shape)}, and {wanted} belong to {out} x {width} levels"
            )
    if not bool((torch.isfinite(scales) & ((scales >= 0) | format.signed)).all()):  # AutoRound writes negative ones
        wrong = "not finite" if format.signed else "not finite, or below 0"
        raise UserError(f"{where}: scales are {wrong}; copy or download the model again")
    if zeros is not None and not format.has_zeros and not bool((zeros == 2 ** (scheme.bits - 1)).all()):
        raise UserError(f"{where}: zeros differ, and quantization_config of config.json says that they are symmetric")
    if format.name == "int8":
        return {"values": levels, "scales": scales}
    size, order = width // wanted[1], torch.arange(width)
    if group_of is not None:
        order = group_of.long().argsort(stable=True)
        if not torch.equal(group_of[order], (torch.arange(width) // size).to(group_of)):
            raise UserError(f"{where}.g_idx does not divide {width} input features into groups of {size}")
        levels = levels[:, order]
    times = size // format.group
    parts = {"values": pack(levels.reshape(out, -1, format.group)), "scales": scales.repeat_interleave(times, 1)}
    parts["order"] = order
    if format.has_zeros:
        if zeros is None:
            raise UserError(
                f"{where}: zeros are missing, and quantization_config of config.json says that there are some"
            )
        parts["zeros"] = zeros.half().repeat_interleave(times, 1)
    return parts


def set_order(linear: QuantLinear, orders: list[Tensor], where: str) -> None:
    """Set a matrix's order of input features, which must be equal for all its parts; otherwise UserError."""
    first, *others = orders
    if not all(torch.equal(first, other) for other in others):
        raise UserError(
            f"{where}: the groups of its input features (g_idx) differ between matrices that the engine computes at "
            "once: take a checkpoint with desc_act false"
        )
    if not torch.equal(first, torch.arange(len(first))):
        linear.order = first.to(linear.values.device)
