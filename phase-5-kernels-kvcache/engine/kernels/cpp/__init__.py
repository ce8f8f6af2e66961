"""The C++ backend for CPUs: whole steps of a model in one call, at the speed at which memory gives the weights.

    from engine.kernels.cpp import CppModel
    fast = CppModel(loaded.model, "bfloat16")
    fast.step(cache, [tokens]).logits

What runs on which processor is chosen when the library is loaded: SPECDEC_CPU_ISA=avx512|avx2|portable forces one.
"""

from __future__ import annotations

from .eagle import CppEagle
from .library import chosen_isa, default_threads, library, why_not
from .model import CppModel, Stepped
from .ops import sample, verify_sample
from .transformer import CppTransformer

__all__ = [
    "CppEagle",
    "CppModel",
    "CppTransformer",
    "Stepped",
    "chosen_isa",
    "default_threads",
    "library",
    "sample",
    "verify_sample",
    "why_not",
]
