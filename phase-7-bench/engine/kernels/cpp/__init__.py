"""The C++ backend for CPUs: whole steps of a model in one call, limited by the read speed of the weights.

    from engine.kernels.cpp import CppModel
    fast = CppModel(loaded.model, "bfloat16")
    fast.step(cache, [tokens]).logits

The best instruction set of the CPU is compiled and used; SPECDEC_CPU_ISA=avx512|avx2|portable forces one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import library as _library
from .eagle import CppEagle
from .library import chosen_isa, default_threads, has_isa, library
from .medusa import CppMedusa
from .model import CppModel
from .ops import sample, sample_rows, verify_sample


def ops() -> dict[str, Callable[..., Any]]:
    """Return the functions of this backend, by op."""
    return {"sample": sample_rows, "verify_sample": verify_sample}


def why_not(device: torch.device | None = None) -> str | None:
    """Return why the C++ backend cannot run on this device, or None. Compiles nothing."""
    if device is not None and device.type != "cpu":
        return f"the C++ kernels run on the CPU, and the device is {device.type}"
    return _library.why_not()


def prepare(device: torch.device) -> None:
    """Compile the library if it is not cached yet."""
    library()


__all__ = [
    "CppEagle",
    "CppMedusa",
    "CppModel",
    "chosen_isa",
    "default_threads",
    "has_isa",
    "library",
    "ops",
    "prepare",
    "sample",
    "verify_sample",
    "why_not",
]
