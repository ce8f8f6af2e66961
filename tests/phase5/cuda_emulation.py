"""For the tests of the CUDA kernels: the same sources, built by g++ to run on the CPU, or the reason why not."""

from __future__ import annotations

import importlib.util

import pytest

from phase5.kernels.cuda import library


def emulate(patch: pytest.MonkeyPatch) -> None:
    """Let CUDA kernels run on the CPU from now on; skips, with the reason, where that cannot be."""
    if importlib.util.find_spec("pybind11") is None:
        pytest.skip("pybind11 is not installed")
    patch.setenv("SPECDEC_CUDA_EMULATE", "1")
    reason = library.why_not(library.CPU)
    if reason is not None:
        pytest.skip(reason)
    library.library(library.CPU)
