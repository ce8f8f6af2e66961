"""Fixtures that build, interpret and watch kernels.

Without a GPU, Triton's kernels are interpreted (tests/conftest.py sets this before Triton is imported). With a GPU the
same checks run on it (tests marked gpu), and nothing is interpreted.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import phase5
from phase5.kernels import Kernels, registry
from phase5.kernels.cuda import library
from tests.support.interpreter import quicken


@pytest.fixture(scope="session", autouse=True)
def _cheaper_engines(request: pytest.FixtureRequest) -> Iterator[None]:
    """Save time in `make test`; `make test-all` compiles and runs the C++ engine as it is shipped.

    Instruction sets other than the CPU's best are compiled with -O0, which takes a tenth of the time. Their results
    have the same bits, because no flag lets the compiler change floating-point arithmetic. The default number of
    threads is 1: tests run side by side, and threads would spin for cores that other tests have. Tests of threads name
    their number.
    """
    # By its full name, because the package exports a function `library`.
    cpp_library = importlib.import_module("phase5.kernels.cpp.library")
    make: Callable[..., Path] = cpp_library.make

    def quick(name: str, sources: Sequence[str], cpu_seconds: float = 0) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            if name.startswith("isa_") and name != cpp_library.OBJECTS[cpp_library.best_isa()]:
                patch.setenv("SPECDEC_CXXFLAGS", f"-O0 {os.environ.get('SPECDEC_CXXFLAGS', '')}")
            return make(name, sources, cpu_seconds)

    with pytest.MonkeyPatch.context() as patch:
        if "not slow" in request.config.getoption("markexpr"):
            patch.setattr(cpp_library, "make", quick)
            patch.setattr(cpp_library, "default_threads", lambda: 1)
        yield


@pytest.fixture(scope="session")
def interpreted() -> Iterator[None]:
    """Let kernels be interpreted, or skip with the reason."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the tests marked gpu run the same checks on it")
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if not triton.knobs.runtime.interpret:
        pytest.skip("triton was imported before TRITON_INTERPRET=1 could be set")
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        yield


@pytest.fixture
def guarded(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that kernels access only memory of their tensors; masked accesses do not count.

    Without this check such accesses would go unnoticed on the CPU, or end the process.
    """
    import numpy as np
    from triton.runtime import interpreter

    memory: list[tuple[int, int]] = []
    launch, access = interpreter.GridExecutor.__call__, interpreter._interpreter

    def noting(self: Any, *arguments: Any, **more: Any) -> Any:
        stores = [each.untyped_storage() for each in arguments if isinstance(each, torch.Tensor)]
        memory[:] = [(store.data_ptr(), store.data_ptr() + store.nbytes()) for store in stores]
        return launch(self, *arguments, **more)

    class Guard:
        """Check every address that the interpreter accesses."""

        def __getattr__(self, name: str) -> Any:
            return getattr(access, name)

        def look(self, what: str, addresses: Any, mask: Any) -> None:
            meant = addresses[np.broadcast_to(mask, addresses.shape).astype(bool)].astype(np.uint64)
            inside = np.zeros(meant.shape, bool)
            for begin, end in memory:
                inside |= (meant >= begin) & (meant < end)
            if not inside.all():
                raise IndexError(f"{(~inside).sum()} of {meant.size} {what} are outside of all tensors")

        def load(self, addresses: Any, mask: Any, other: Any, dtype: Any) -> Any:
            self.look("reads", addresses, mask)
            return access.load(addresses, mask, other, dtype)

        def store(self, addresses: Any, values: Any, mask: Any) -> Any:
            self.look("writes", addresses, mask)
            return access.store(addresses, values, mask)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", noting)
    monkeypatch.setattr(interpreter, "_interpreter", Guard())


@pytest.fixture
def llm_on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`llm_on(kernels, **options)` returns an LLM whose models and policy run on these kernels."""

    def make(kernels: Kernels, **options: Any) -> Any:
        monkeypatch.setattr("phase5.llm.pack_matrices", lambda module: None)
        made = phase5.LLM(phase5.Options(**{"max_tokens": 8, "draft": "none", "kernels": "torch", **options}))
        for target in (made.loaded.model, made.policy, *([made.draft.model] if made.draft else [])):
            registry.use(target, kernels)
        return made

    return make


@pytest.fixture(scope="session")
def emulate() -> Callable[[pytest.MonkeyPatch], None]:
    """`emulate(patch)` runs CUDA kernels, built by g++, on the CPU while the patch lasts, or skips."""
    emulator = Path(phase5.__file__).resolve().parents[1] / "checks" / "emulator.h"

    def begin(patch: pytest.MonkeyPatch) -> None:
        if importlib.util.find_spec("pybind11") is None:
            pytest.skip("pybind11 is not installed")
        patch.setenv("SPECDEC_CUDA_EMULATOR", str(emulator))
        reason = library.why_not(library.CPU)
        if reason is not None:
            pytest.skip(reason)
        library.library(library.CPU)

    return begin
