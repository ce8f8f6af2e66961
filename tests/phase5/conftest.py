"""What kernels need of a test run: where compiled ones are kept, and Triton's interpreter where there is no card."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Triton decides when it is imported whether kernels are interpreted, and other tests may import it first. Where there
# is a card the same checks run on it (tests marked gpu), and nothing is interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

KEPT = os.environ.get("SPECDEC_BUILD_DIR") or str(
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm-inference-lab" / "kernels"
)


@pytest.fixture(scope="session", autouse=True)
def kept_kernels(own_cache: None) -> Iterator[None]:
    """Compiled kernels stay between runs, where they are for the user too: their names are hashes of all in them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECDEC_BUILD_DIR", KEPT)
        yield


@pytest.fixture(scope="session")
def interpreted() -> None:
    """Skips, with the reason, where kernels cannot be interpreted."""
    if torch.cuda.is_available():
        pytest.skip("there is a card: the tests marked gpu run the same checks on it")
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if not triton.knobs.runtime.interpret:
        pytest.skip("triton was imported before TRITON_INTERPRET=1 could be set")
