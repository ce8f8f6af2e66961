"""Launches the kernels: passes checked tensors to the functions of the library (ops.h), as addresses and numbers."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ...kv_cache.paged import PAGE
from ..arguments import address, of_dtype, require
from ..key_ranges import KeyRanges
from ..launches import PART, Launches, Rotation, results_of_parts
from ..matrix import Matrix
from ..metadata import AttentionMetadata, Layer
from ..tokens import SamplingMetadata
from .library import emulator, library

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}  # device.cuh
BITS = {"plain": 16, "int8": 8, "int4": 4}
SHIFT = PAGE.bit_length() - 1
BUSY = 264  # blocks of 16 outputs that fill a large GPU: two for each of 132 multiprocessors
MOST_PARTS = 8  # blocks that share the inputs of an output
WIDEST = 256  # features of a head
ON_CORES = 128  # features of a head, at most, for tensor cores


def needs(device: torch.device) -> str | None:
    """Return the device that the kernels need instead of this one; None if they run on it."""
    if device.type == "cuda":
        current = torch.cuda.current_device()
        return None if device.index in (None, current) else f"the current device, cuda:{current}"
    return None if device.type == "cpu" and emulator() is not None else "a CUDA device"


def library_of(tensor: Tensor) -> ModuleType:
    """Return the library for the tensor's device."""
    return library(tensor.device)


def stream_of(tensor: Tensor) -> int:
    """Return torch's current stream for this tensor."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def parts_of(matrix: Matrix, columns: int) -> int:
    """Return how many blocks share the inputs of an output; it depends on the matrix only, not on the rows."""
    chunk = {"int4": 128, "int8": 64, "plain": 32}[matrix.kind]  # inputs; warps of a block share runs of 32 of them
    parts = 1
    while -(-columns // 16) * parts < BUSY and matrix.inputs >= 2 * parts * 32 * chunk and parts < MOST_PARTS:
        parts *= 2
    return parts


def linear(op: str, rows: Tensor, matrix: Matrix, gated: bool, invariant: bool, out: Tensor) -> None:
    require(op, matrix.values.is_contiguous(), "the matrix is not contiguous", "contiguous rows")
    group = matrix.group if matrix.kind == "int4" else matrix.inputs
    tensors = matrix.values, matrix.scales, matrix.zeros, matrix.factor, matrix.bias
    bias_format = 0 if matrix.bias is None else FORMATS[matrix.bias.dtype]
    members = [BITS[matrix.kind], group, *map(address, tensors), bias_format, matrix.outputs, matrix.inputs]  # ops.h
    call = FORMATS[rows.dtype], address(rows), rows.stride(0), len(rows), members, gated
    if rows.dtype == torch.float32 or not invariant:  # without tensor cores
        library_of(rows).linear_rows(*call, address(out), stream_of(rows))
        return
    columns = out.shape[-1]
    parts = 1 if gated else parts_of(matrix, columns)  # one block needs a gate and its partner
    sums = rows.new_empty(parts, len(rows), columns, dtype=torch.float32) if parts > 1 else None
    library_of(rows).linear(*call, parts, address(sums), address(out), stream_of(rows))


def norm(
    op: str, rows: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, total: Tensor
) -> None:
    of_dtype(op, rows.dtype, weight=weight)
    r_stride, total_address = (0, 0) if residual is None else (residual.stride(0), address(total))
    library_of(rows).rms_norm(
        FORMATS[rows.dtype], address(rows), address(residual), address(weight), address(out), total_address,
        *rows.shape, rows.stride(0), r_stride, eps, stream_of(rows),
    )  # fmt: skip


def strides_of(op: str, values: Tensor) -> list[int]:
    """Return the strides of keys or values [pages, kv_heads, slots, D] in heads: by page, head and slot."""
    D = values.shape[-1]
    good = values.stride(-1) == 1 and all(stride % D == 0 for stride in values.stride()[:3])
    require(op, good, f"the cache has strides {values.stride()}", f"contiguous heads of {D} features")
    return [stride // D for stride in values.stride()[:3]]


def rope(op: str, rotation: Rotation) -> None:
    x, cos, sin, strides, out = rotation
    of_dtype(op, x.dtype, cos=cos, sin=sin)
    library_of(x).rope(
        FORMATS[x.dtype], address(x), address(cos), address(sin), address(out), *x.shape, *x.stride()[:3], *strides,
        stream_of(x),
    )  # fmt: skip


def append(
    op: str, layer: Layer, metadata: AttentionMetadata, key: Tensor, value: Tensor, rotation: Rotation | None
) -> None:
    query, cos, sin, strides, out = rotation or (None, None, None, (0, 0), None)
    of_dtype(op, key.dtype, query=query, cos=cos, sin=sin, values=value)
    (keys, values), (R, T, HK, D) = layer, key.shape
    H, q_strides = (0, (0, 0, 0)) if query is None else (query.shape[2], query.stride()[:3])
    cache = keys.values, values.values, keys.scales, values.scales
    tables = None if metadata.tables is None else metadata.tables.tensor
    where, width = (*metadata.at.tensor, tables), 0 if tables is None else tables.shape[1]
    all_strides = [*q_strides, *key.stride()[:3], *value.stride()[:3], *strides, *strides_of(op, keys.values)]
    library_of(key).rope_append(
        FORMATS[key.dtype], FORMATS[keys.values.dtype],
        *map(address, (query, key, value, cos, sin, out, *cache, *where)), width, SHIFT, metadata.wrap, all_strides,
        R, T, H, HK, D, rotation is not None, stream_of(key),
    )  # fmt: skip


def decode(
    op: str, part: int, layer: Layer, metadata: AttentionMetadata, ranges: KeyRanges, query: Tensor, out: Tensor
) -> None:
    parts = max(1, -(-metadata.most // part))
    between = results_of_parts(query, parts)
    call = call_of(op, layer, metadata, ranges, query, out)
    library_of(query).decode_attention(call, part, parts, *map(address, between), stream_of(query))


def prefill(op: str, layer: Layer, metadata: AttentionMetadata, ranges: KeyRanges, query: Tensor, out: Tensor) -> None:
    """Use tensor cores, which multiply 16-bit numbers; `decode` computes the rest."""
    stored = layer.keys.values.dtype
    if query.dtype == torch.float32 or stored not in (query.dtype, torch.int8) or query.shape[-1] > ON_CORES:
        decode(op, PART, layer, metadata, ranges, query, out)
    else:
        library_of(query).flash_prefill(call_of(op, layer, metadata, ranges, query, out), stream_of(query))


def call_of(
    op: str, layer: Layer, metadata: AttentionMetadata, ranges: KeyRanges, query: Tensor, out: Tensor
) -> list[int]:
    """Return the members of `Attention` in ops.h, in order."""
    keys, values = layer.keys.values, layer.values.values
    (R, W, H, D), HK = query.shape, keys.shape[1]
    require(op, D <= WIDEST, f"a head has {D} features", f"at most {WIDEST}")
    staged = metadata.tables, ranges.lo, ranges.end, ranges.base, ranges.lines
    tables, lo, end, base, lines = (None if each is None else each.tensor for each in staged)
    tensors = (query, keys, values, *layer.scales, metadata.at.tensor, tables, lo, end, base, lines, out)
    width = 0 if tables is None else tables.shape[1]
    line_width = 0 if lines is None else lines.shape[2]
    return [
        FORMATS[query.dtype], FORMATS[keys.dtype], *map(address, tensors), R, W, H, HK, D, width, SHIFT, line_width,
        metadata.wrap, *strides_of(op, keys), *query.stride()[:3],
    ]  # fmt: skip


def choices(scores: Tensor, out: Tensor) -> None:
    (R, V), functions = scores.shape, library_of(scores)
    found = scores.new_empty(R * functions.choice_parts(V), dtype=torch.int64)
    functions.choices(
        FORMATS[scores.dtype], address(scores), scores.stride(0), R, V, address(found), address(out), stream_of(scores)
    )


def prefix(inputs: tuple[Tensor, Tensor, Tensor], outputs: tuple[Tensor, Tensor]) -> None:
    draft_tokens = inputs[0]
    library_of(draft_tokens).prefix(*map(address, (*inputs, *outputs)), *draft_tokens.shape, stream_of(draft_tokens))


def verify(inputs: tuple[Tensor | None, ...], random: bool, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    draft_tokens, target_probs = inputs[0], inputs[2]
    assert draft_tokens is not None
    assert target_probs is not None
    library_of(draft_tokens).verify_sample(
        *map(address, (*inputs, *outputs)), *draft_tokens.shape, target_probs.shape[-1], not random,
        stream_of(draft_tokens),
    )  # fmt: skip


def sample(rows: Tensor, metadata: SamplingMetadata, out: Tensor) -> None:
    keys, positions, filters = metadata.keys.tensor, metadata.positions.tensor, metadata.filters.tensor
    library_of(rows).sample(
        FORMATS[rows.dtype], address(rows), rows.stride(0), address(keys), address(positions), address(out),
        out.stride(0), *rows.shape, address(filters), stream_of(rows),
    )  # fmt: skip


def probabilities(rows: Tensor, metadata: SamplingMetadata, each: int, out: Tensor) -> None:
    library_of(rows).probabilities(
        FORMATS[rows.dtype], address(rows), rows.stride(0), address(out), out.stride(0), *rows.shape,
        address(metadata.filters.tensor), each, stream_of(rows),
    )  # fmt: skip


def draw(probs: Tensor, keys: Tensor, positions: Tensor, each: int, purpose: int, first: int, out: Tensor) -> None:
    library_of(probs).draw(
        address(probs), probs.stride(0), address(keys), address(positions), address(out),
        out.stride(0), *probs.shape, each, first, purpose, stream_of(probs),
    )  # fmt: skip


def embed(tokens: Tensor, draft: Tensor | None, weight: Tensor, out: Tensor) -> None:
    (R, T), K = tokens.shape, 0 if draft is None else draft.shape[1]
    tensors = map(address, (tokens, draft, weight, out))
    library_of(weight).embed(FORMATS[weight.dtype], *tensors, R, T, K, weight.shape[1], stream_of(weight))


def advance(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
    N, R, W = outputs[-1].shape
    library_of(inputs[0]).advance(*map(address, (*inputs, *outputs)), R, W, N, stream_of(inputs[0]))


LAUNCHES = Launches(
    needs, linear, norm, rope, append, decode, prefill, choices, prefix, verify, sample, probabilities, draw, embed,
    advance,
)  # fmt: skip
