"""LLMs of phases 5 and 6 with the same small models."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.served import CONTEXT, WHY_NOT_CPP, Pair


@pytest.fixture(scope="session", autouse=True)
def _one_thread_by_default(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run C++ with one thread in quick tests, which run side by side; see tests/phase5/conftest.py."""
    with pytest.MonkeyPatch.context() as patch:
        if "not slow" in request.config.getoption("markexpr"):
            # By its full name, because the package exports a function `library`.
            library = importlib.import_module("phase6.kernels.cpp.library")
            patch.setattr(library, "default_threads", lambda: 1)
        yield


@pytest.fixture(scope="session")
def small_folder(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("llama", max_position_embeddings=CONTEXT)


@pytest.fixture(scope="session")
def pair(small_folder: Path) -> Callable[[str, str], Pair]:
    """`pair("cpp", "model")`: LLMs of both phases, made once."""
    made: dict[tuple[str, str], Pair] = {}

    def get(kernels: str, how: str) -> Pair:
        if kernels == "cpp" and WHY_NOT_CPP is not None:
            pytest.skip(f"no C++ backend here: {WHY_NOT_CPP}")
        if (kernels, how) not in made:
            made[kernels, how] = Pair(small_folder, kernels, how)
        return made[kernels, how]

    return get
