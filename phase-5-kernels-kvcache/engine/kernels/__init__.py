"""Operations by name: the model and the loops say what is to be done, a backend says how.

Every op has a reference in plain torch, which says what is right: those of the model in reference.py, the rule of
acceptance in ../verify.py, the next token in ../sampling.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..sampling import choose
from ..verify import Verdict, verify
from . import reference


class Kernels(NamedTuple):
    """One function for every op; shapes and meaning are those of its reference."""

    linear: Callable[..., Tensor] = reference.linear
    rms_norm: Callable[..., Tensor] = reference.rms_norm
    rope: Callable[..., Tensor] = reference.rope
    kv_append: Callable[..., None] = reference.kv_append
    decode_attention: Callable[..., Tensor] = reference.decode_attention
    verify_prefix: Callable[..., Tensor] = reference.verify_prefix
    verify_sample: Callable[..., Verdict] = verify
    sample: Callable[..., list[int]] = choose


TORCH = Kernels()

__all__ = ["TORCH", "Kernels"]
