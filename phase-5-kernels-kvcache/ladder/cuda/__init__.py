"""Two ladders: `linear` and `decode_attention` from the first idea to one that keeps the bus busy, a file each.

Each is checked against plain torch before it is timed (bench.py --ladder, on a card). Everything is bfloat16, one row.

| rung | linear | attention |
|---|---|---|
| 1 | a thread per output | a thread per score; scores through global memory |
| 2 | neighbours read neighbours | neighbours read neighbours |
| 3 | x in shared memory, shuffles | one kernel, scores in shared memory, shuffles |
| 4 | 16 bytes per access, four ahead | 16 bytes per access, online softmax |
| 5 | the inputs split over warps | split over the sequence, query heads share keys |
| engine | linear.cuh: tensor cores, 1 to 16 rows with the same bits | attention.cu, likewise |

The last line is in engine/kernels/cuda.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from engine.kernels.arguments import address, of_dtype, require, same_shape
from engine.kernels.cuda.kernels import stream_of
from engine.kernels.cuda.library import build_library, emulator

RUNGS = {1: "naive", 2: "coalesced", 3: "shared memory, shuffles", 4: "vectorised", 5: "fused and split"}
FOLDER = Path(__file__).resolve().parent
SOURCES = (
    FOLDER / "bindings.cpp",
    *(FOLDER / f"{op}_{rung}.cu" for op in ("linear", "attention") for rung in RUNGS),
)
PART = 256  # positions of a block of the last rung


def _check(op: str, rung: int, **tensors: Tensor) -> None:
    require(op, rung in RUNGS, f"rung {rung}", f"one of {', '.join(map(str, RUNGS))}")
    of_dtype(op, torch.bfloat16, **tensors)
    for name, tensor in tensors.items():
        able = tensor.is_cuda or (tensor.device.type == "cpu" and emulator() is not None)
        require(op, able, f"{name} is on {tensor.device}", "a CUDA device")
        require(op, tensor.is_contiguous(), f"{name} has gaps in memory", "a tensor without")
        require(op, address(tensor) % 16 == 0, f"{name} begins at an odd address", "a multiple of 16 bytes")


def linear(rung: int, weight: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    """weight [N, K] times x [K] plus bias [N], bfloat16; K a multiple of 8."""
    op = f"ladder linear_{rung}"
    _check(op, rung, weight=weight, x=x, bias=bias)
    N, K = weight.shape
    same_shape(op, "x", x, K)
    same_shape(op, "bias", bias, N)
    require(op, K % 8 == 0, f"{K} inputs", "a multiple of 8")
    out = torch.empty_like(bias)
    module = build_library("cuda_ladder", SOURCES, x.device)
    module.linear(rung, address(x), address(weight), address(bias), address(out), N, K, stream_of(x))
    return out


def attention(rung: int, query: Tensor, keys: Tensor, values: Tensor, n: int) -> Tensor:
    """query [H, D] over the first n tokens of keys and values [HK, slots, D] -> [H, D]; D 64 or 128, bfloat16."""
    op = f"ladder attention_{rung}"
    _check(op, rung, query=query, keys=keys, values=values)
    (H, D), (HK, slots, _) = query.shape, keys.shape
    same_shape(op, "keys", keys, HK, slots, D)
    same_shape(op, "values", values, HK, slots, D)
    require(op, D in (64, 128), f"heads of {D} features", "64 or 128")
    require(op, H % HK == 0 and H // HK <= 8, f"{H} query heads over {HK} of keys", "1 to 8 times as many")
    require(op, 0 < n <= slots, f"{n} tokens of {slots}", "at least 1, and no more than there are")
    out = torch.empty_like(query)
    scratch = torch.empty(max(H * n, H * -(-n // PART) * (D + 2)), dtype=torch.float32, device=query.device)
    module = build_library("cuda_ladder", SOURCES, query.device)
    module.attention(
        rung, address(query), address(keys), address(values), address(out), address(scratch), H, HK, D, n, slots,
        stream_of(query),
    )  # fmt: skip
    return out
