"""Triton decides when it is imported whether kernels are interpreted, and other tests may import it first.

So that is asked for before any test of this folder is collected, where there is no card. Where there is one the same
checks run on it (tests marked gpu), and nothing is interpreted.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

import phase5
from phase5 import attending
from phase5.kernels import Kernels, registry
from phase5.kernels.cuda import library

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def interpreted() -> None:
    """Skips, with the reason, where kernels cannot be interpreted."""
    if torch.cuda.is_available():
        pytest.skip("there is a card: the tests marked gpu run the same checks on it")
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if not triton.knobs.runtime.interpret:
        pytest.skip("triton was imported before TRITON_INTERPRET=1 could be set")


@pytest.fixture
def session_on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`session_on(kernels, **options)`: a session whose target and policy run on these kernels.

    What drafts stays on torch but for its attention; that changes no token.
    """

    def make(kernels: Kernels, **options: Any) -> Any:
        def behind(*arguments: Any, **more: Any) -> Any:
            return dataclasses.replace(attending.Behind(*arguments, **more), kernels=kernels)

        monkeypatch.setattr("phase5.runner.Behind", behind)
        monkeypatch.setattr("phase5.session.pack_matrices", lambda module: None)
        made = phase5.Session(phase5.Options(**{"max_tokens": 8, "draft": "none", **options}))
        registry.use(made.loaded.model, kernels)
        registry.use(made.policy, kernels)
        return made

    return make


@pytest.fixture(scope="session")
def emulate() -> Callable[[pytest.MonkeyPatch], None]:
    """`emulate(patch)`: CUDA kernels built by g++ run on the CPU while the patch lasts. Or skips, and says why."""

    def begin(patch: pytest.MonkeyPatch) -> None:
        if importlib.util.find_spec("pybind11") is None:
            pytest.skip("pybind11 is not installed")
        patch.setenv("SPECDEC_CUDA_EMULATE", "1")
        reason = library.why_not(library.CPU)
        if reason is not None:
            pytest.skip(reason)
        library.library(library.CPU)

    return begin
