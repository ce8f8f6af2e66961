"""The ops as kernels in CUDA C++: a file each, built by nvcc when they are first called (library.py).

SPECDEC_CUDA_EMULATOR=checks/emulator.h runs them on the CPU, every CUDA thread as a fiber: slow, and meant for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_SHARED = ("device.cuh", "ops.h", "bindings.cpp", "support.py", "library.py")
_CACHE = ("cache.cuh", "rope.py", "../places.py", *_SHARED)
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
_ATTEND = ("attention.py", "../sight.py", "attend.cuh", "attention.cu", "attention_rows.cu", "mma.cuh")
SOURCES = {  # of every op, the files that make its kernel: what the ledger hashes
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
    """Why the kernels cannot run on a device; None if they can. Builds nothing."""
    from . import library

    return library.why_not(device)


def prepare(device: torch.device) -> None:
    """Compile the kernels, where they are not there yet, and load them. BuildError where that fails."""
    from . import library

    library.library(device)


def ops() -> dict[str, Callable[..., Any]]:
    """op -> function; what it imports is not imported before somebody asks."""
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
