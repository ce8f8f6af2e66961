"""For the tests of the CUDA kernels: the same sources, built by g++ to run on the CPU, or the reason why not."""

from __future__ import annotations

import importlib.util
import shutil

import pytest

from phase5.kernels.cuda import library


def emulate(patch: pytest.MonkeyPatch) -> None:
    """Let CUDA kernels run on the CPU from now on; skips, with the reason, where that cannot be."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to emulate CUDA with")
    if importlib.util.find_spec("pybind11") is None:
        pytest.skip("pybind11 is not installed")
    patch.setenv("SPECDEC_CUDA_EMULATE", "1")
    library.library(library.CPU)
