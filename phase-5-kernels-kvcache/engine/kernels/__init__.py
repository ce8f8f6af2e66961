"""Operations by name: the model and the loops say what is to be done, a backend says how.

Every op has a reference in plain torch, which says what is right: those of the model in reference.py and fused.py, the
rule of acceptance in ../verify.py, the next token in ../sampling.py. Which backend does what is chosen in registry.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..sampling import choose
from ..verify import Verdict, verify
from . import fused, reference


class Kernels(NamedTuple):
    """One function for every op; shapes and meaning are those of its reference."""

    linear: Callable[..., Tensor] = reference.linear
    gated_linear: Callable[..., Tensor] = fused.gated_linear
    rms_norm: Callable[..., Tensor] = reference.rms_norm
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]] = fused.add_rms_norm
    rope: Callable[..., Tensor] = reference.rope
    kv_append: Callable[..., None] = reference.kv_append
    rope_append: Callable[..., Tensor] = fused.rope_append
    decode_attention: Callable[..., Tensor] = reference.decode_attention
    flash_prefill: Callable[..., Tensor] = reference.decode_attention  # the same, for many queries at once
    verify_prefix: Callable[..., Tensor] = reference.verify_prefix
    verify_greedy: Callable[..., tuple[Tensor, Tensor]] = fused.verify_greedy
    verify_sample: Callable[..., Verdict] = verify
    sample: Callable[..., list[int]] = choose


TORCH = Kernels()

__all__ = ["TORCH", "Kernels"]
