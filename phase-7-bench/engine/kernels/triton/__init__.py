"""The ops as Triton kernels: Python that Triton compiles for the GPU on the first call.

TRITON_INTERPRET=1, set before Triton is imported, runs them on the CPU in numpy: slow, for tests only.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

_SHARED = ("../arguments.py", "../launches.py", "support.py")
_MODEL = ("../gpu.py", *_SHARED)
_TOKENS = ("../gpu_tokens.py", "../tokens.py", "../../transfers.py", *_SHARED)
_CACHE = ("../metadata.py", "../../transfers.py", "slots.py", *_MODEL)
_ROPE = ("rope.py", *_CACHE)
_ATTEND = ("../key_ranges.py", "attention.py", *_CACHE)
SOURCES = {  # op -> the source files of its kernel, which the ledger hashes
    "linear": ("../matrix.py", "linear.py", *_MODEL),
    "gated_linear": ("../matrix.py", "linear.py", *_MODEL),
    "rms_norm": ("norm.py", *_MODEL),
    "add_rms_norm": ("norm.py", *_MODEL),
    "rope": _ROPE,
    "kv_append": _ROPE,
    "rope_append": _ROPE,
    "decode_attention": _ATTEND,
    "flash_prefill": _ATTEND,
    "verify_prefix": ("prefix.py", *_TOKENS),
    "verify_greedy": ("prefix.py", *_TOKENS),
    "verify_sample": ("verify.py", "noise.py", *_TOKENS),
    "sample": ("sample.py", "verify.py", "noise.py", "prefix.py", *_TOKENS),
    "probabilities": ("sample.py", "verify.py", "noise.py", *_TOKENS),
    "draw": ("verify.py", "noise.py", *_TOKENS),
    "embed": ("inputs.py", *_TOKENS),
    "advance": ("inputs.py", *_TOKENS),
}


def why_not(device: torch.device) -> str | None:
    """Return why the kernels cannot run on a device; None if they can. Does not import Triton."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"triton needs a CUDA device, and this is {device.type} (TRITON_INTERPRET=1 runs it slowly in numpy)"


def ops() -> dict[str, Callable[..., Any]]:
    """Import the kernels' modules, and return the ops."""
    from ..gpu import GpuOps
    from ..launches import Launches
    from . import attention, inputs, linear, norm, prefix, rope, sample, support, verify

    launches = Launches(
        support.needs, linear.linear, norm.norm, rope.rope, rope.append, attention.decode, attention.prefill,
        prefix.choices, prefix.prefix, verify.verify, sample.sample, sample.probabilities, verify.draw, inputs.embed,
        inputs.advance,
    )  # fmt: skip
    return GpuOps("triton", launches).ops()
