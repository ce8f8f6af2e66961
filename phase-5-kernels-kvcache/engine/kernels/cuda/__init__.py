"""The ops as kernels in CUDA C++, built by nvcc on the first call (library.py).

SPECDEC_CUDA_EMULATOR=checks/emulator.h runs them on the CPU, every CUDA thread as a fiber: slow, for tests only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_SHARED = ("device.cuh", "ops.h", "bindings.cpp", "support.py", "library.py")
_CACHE = ("cache.cuh", "rope.py", "../metadata.py", *_SHARED)
_LINEAR = (
    "linear.py",
    "linear.cuh",
    "linear_16.cu",
    "linear_8.cu",
    "linear_4.cu",
    "linear_rows.cu",
    "weights.cuh",
    "mma.cuh",
)
_ATTEND = ("attention.py", "../key_ranges.py", "attend.cuh", "attention.cu", "attention_rows.cu", "mma.cuh")
SOURCES = {  # op -> the source files of its kernel, which the ledger hashes
    "linear": (*_LINEAR, *_SHARED),
    "gated_linear": (*_LINEAR, *_SHARED),
    "rms_norm": ("norm.py", "norm.cu", *_SHARED),
    "add_rms_norm": ("norm.py", "norm.cu", *_SHARED),
    "rope": ("rope.cu", *_CACHE),
    "kv_append": ("rope.cu", *_CACHE),
    "rope_append": ("rope.cu", *_CACHE),
    "decode_attention": (*_ATTEND, *_CACHE),
    "flash_prefill": ("prefill.cu", *_ATTEND, *_CACHE),
    "verify_prefix": ("tokens.py", "prefix.cu", "choice.cuh", *_SHARED),
    "verify_greedy": ("tokens.py", "prefix.cu", "choice.cuh", *_SHARED),
    "verify_sample": ("tokens.py", "verify.cu", "choice.cuh", "philox.cuh", *_SHARED),
    "sample": ("tokens.py", "sample.cu", "prefix.cu", "choice.cuh", "philox.cuh", *_SHARED),
}


def why_not(device: torch.device) -> str | None:
    """Return why the kernels cannot run on a device; None if they can. Builds nothing."""
    from . import library

    return library.why_not(device)


def prepare(device: torch.device) -> None:
    """Compile the kernels if they are not cached, and load them. BuildError if that fails."""
    from . import library

    library.library(device)


def ops() -> dict[str, Callable[..., Any]]:
    """Import the kernels' modules, and return their functions by op."""
    from . import attention, linear, norm, rope, tokens

    return {
        "linear": linear.linear,
        "gated_linear": linear.gated_linear,
        "rms_norm": norm.rms_norm,
        "add_rms_norm": norm.add_rms_norm,
        "rope": rope.rope,
        "kv_append": rope.kv_append,
        "rope_append": rope.rope_append,
        "decode_attention": attention.decode_attention,
        "flash_prefill": attention.flash_prefill,
        "verify_prefix": tokens.verify_prefix,
        "verify_greedy": tokens.verify_greedy,
        "verify_sample": tokens.verify_sample,
        "sample": tokens.sample,
    }
