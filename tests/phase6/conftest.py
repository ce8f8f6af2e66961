"""LLMs of phases 5 and 6 with the same small models."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import cache
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
def pair(small_folder: Path) -> Callable[..., Pair]:
    """`pair("cpp", "model")`: LLMs of both phases, made once."""
    return pairs_of(small_folder)


@pytest.fixture(scope="session")
def window_pair(make_checkpoint: Callable[..., Path]) -> Callable[..., Pair]:
    """`window_pair("cpp", "model", "ring")`: the same, with window attention in every layer."""
    return pairs_of(make_checkpoint("mistral", max_position_embeddings=CONTEXT, sliding_window=20))


def pairs_of(folder: Path) -> Callable[..., Pair]:
    @cache
    def get(kernels: str, *how: str) -> Pair:
        if kernels == "cpp" and WHY_NOT_CPP is not None:
            pytest.skip(f"no C++ backend here: {WHY_NOT_CPP}")
        return Pair(folder, kernels, *how)

    return get
