"""Compiled kernels are kept between test runs: their names are hashes of all that is in them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

KEPT = os.environ.get("SPECDEC_BUILD_DIR") or str(
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm-inference-lab" / "kernels"
)


@pytest.fixture(scope="session", autouse=True)
def kept_kernels(own_cache: None) -> Iterator[None]:
    """Where they are for the user, too; the rest of the user's cache stays out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECDEC_BUILD_DIR", KEPT)
        yield
