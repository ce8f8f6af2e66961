"""The ops as kernels in CUDA C++, built by nvcc on the first call (library.py).

SPECDEC_CUDA_EMULATOR=checks/emulator.h runs them on the CPU, every CUDA thread as a fiber: slow, for tests only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .library import why_not

_SHARED = (
    *("kernels.py", "library.py", "device.cuh", "ops.h", "bindings.cpp", "../arguments.py", "../launches.py"),
    *("../key_ranges.py", "../matrix.py", "../metadata.py", "../../transfers.py"),
)
_MODEL = ("../gpu.py", *_SHARED)
_LINEAR = (
    "linear.cuh",
    "linear_16.cu",
    "linear_8.cu",
    "linear_4.cu",
    "linear_rows.cu",
    "weights.cuh",
    "mma.cuh",
    *_MODEL,
)
_ROPE = ("rope.cu", "cache.cuh", *_MODEL)
_ATTEND = ("attend.cuh", "attention.cu", "attention_rows.cu", "mma.cuh", "cache.cuh", *_MODEL)
_TOKENS = ("../gpu_tokens.py", "../tokens.py", "choice.cuh", *_SHARED)
_INPUTS = ("../gpu_tokens.py", "../tokens.py", "inputs.cu", *_SHARED)
SOURCES = {  # op -> the source files of its kernel, which the ledger hashes
    "linear": _LINEAR,
    "gated_linear": _LINEAR,
    "rms_norm": ("norm.cu", *_MODEL),
    "add_rms_norm": ("norm.cu", *_MODEL),
    "rope": _ROPE,
    "kv_append": _ROPE,
    "rope_append": _ROPE,
    "decode_attention": _ATTEND,
    "flash_prefill": ("prefill.cu", *_ATTEND),
    "verify_prefix": ("prefix.cu", *_TOKENS),
    "verify_greedy": ("prefix.cu", *_TOKENS),
    "verify_sample": ("verify.cu", "philox.cuh", *_TOKENS),
    "sample": ("sample.cu", "prefix.cu", "philox.cuh", *_TOKENS),
    "probabilities": ("sample.cu", "philox.cuh", *_TOKENS),
    "draw": ("verify.cu", "philox.cuh", *_TOKENS),
    "embed": _INPUTS,
    "advance": _INPUTS,
}
MOST_TOKENS = 64  # of a sequence, more than any step or tree has; torch multiplies longer ones


def prepare(device: torch.device) -> None:
    """Compile the kernels if they are not cached, and load them. BuildError if that fails."""
    from . import library

    library.library(device)


def ops() -> dict[str, Callable[..., Any]]:
    """Import the kernels' modules, and return the ops."""
    from ..gpu import GpuOps
    from .kernels import LAUNCHES

    return GpuOps("cuda", LAUNCHES, MOST_TOKENS).ops()


__all__ = ["MOST_TOKENS", "SOURCES", "ops", "prepare", "why_not"]
