"""Triton decides when it is imported whether kernels are interpreted, and other tests may import it first.

So that is asked for before any test of this folder is collected, where there is no card. Where there is one the same
checks run on it (tests marked gpu), and nothing is interpreted.
"""

from __future__ import annotations

import os

import pytest
import torch

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
