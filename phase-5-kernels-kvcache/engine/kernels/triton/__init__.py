"""The ops as Triton kernels: Python that Triton compiles for the GPU on the first call.

TRITON_INTERPRET=1, set before Triton is imported, runs them on the CPU in numpy: slow, for tests only.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

_SHARED = ("support.py",)
_CACHE = ("slots.py", "../metadata.py", *_SHARED)
SOURCES = {  # op -> the source files of its kernel, which the ledger hashes
    "linear": ("linear.py", *_SHARED),
    "gated_linear": ("linear.py", *_SHARED),
    "rms_norm": ("norm.py", *_SHARED),
    "add_rms_norm": ("norm.py", *_SHARED),
    "rope": ("rope.py", "append.py", *_CACHE),
    "kv_append": ("append.py", *_CACHE),
    "rope_append": ("rope.py", "append.py", *_CACHE),
    "decode_attention": ("attention.py", "append.py", "../key_ranges.py", *_CACHE),
    "flash_prefill": ("prefill.py", "attention.py", "append.py", "../key_ranges.py", *_CACHE),
    "verify_prefix": ("prefix.py", *_SHARED),
    "verify_greedy": ("prefix.py", *_SHARED),
    "verify_sample": ("verify.py", "noise.py", *_SHARED),
    "sample": ("sample.py", "verify.py", "noise.py", "prefix.py", *_SHARED),
}


def why_not(device: torch.device) -> str | None:
    """Return why the kernels cannot run on a device; None if they can. Does not import Triton."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"triton needs a CUDA device, and this is {device.type} (TRITON_INTERPRET=1 runs it slowly in numpy)"


def ops() -> dict[str, Callable[..., Any]]:
    """Import the kernels' modules, and return their functions by op."""
    from . import append, attention, linear, norm, prefill, prefix, rope, sample, verify

    return {
        "linear": linear.linear,
        "gated_linear": linear.gated_linear,
        "rms_norm": norm.rms_norm,
        "add_rms_norm": norm.add_rms_norm,
        "rope": rope.rope,
        "kv_append": append.kv_append,
        "rope_append": rope.rope_append,
        "decode_attention": attention.decode_attention,
        "flash_prefill": prefill.flash_prefill,
        "verify_prefix": prefix.verify_prefix,
        "verify_greedy": prefix.verify_greedy,
        "verify_sample": verify.verify_sample,
        "sample": sample.sample,
    }
