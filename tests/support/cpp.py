"""A C++ runner with a cache of its own, for tests that make one without an LLM."""

from __future__ import annotations

import torch

from phase5.cpp_runner import CppRunner
from phase5.kernels.cpp import CppModel
from phase5.kv_cache import KVOptions
from phase5.model import Transformer
from phase5.runner import make_manager


def make_cpp_runner(model: Transformer, fast: CppModel, options: KVOptions, rows: int, tokens: int) -> CppRunner:
    return CppRunner(model, fast, make_manager(model, options, rows, tokens, torch.float32))
