"""Operations by name: the model and the loops call ops, and a backend implements them.

Every op has a reference in plain torch, which defines the right result: ops of the model in reference.py and fused.py,
ops of tokens in tokens.py, the acceptance rule in ../verify.py. registry.py chooses a backend for each op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..verify import Verdict, verify
from . import fused, reference, tokens


class Kernels(NamedTuple):
    """One function for every op, with the shapes and the meaning of its reference."""

    linear: Callable[..., Tensor] = reference.linear
    gated_linear: Callable[..., Tensor] = fused.gated_linear
    rms_norm: Callable[..., Tensor] = reference.rms_norm
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]] = fused.add_rms_norm
    rope: Callable[..., Tensor] = reference.rope
    kv_append: Callable[..., None] = reference.kv_append
    rope_append: Callable[..., Tensor] = fused.rope_append
    decode_attention: Callable[..., Tensor] = reference.decode_attention
    flash_prefill: Callable[..., Tensor] = reference.decode_attention  # the same function, for many queries
    verify_prefix: Callable[..., Tensor] = reference.verify_prefix
    verify_greedy: Callable[..., tuple[Tensor, Tensor]] = fused.verify_greedy
    verify_sample: Callable[..., Verdict] = verify
    sample: Callable[..., Tensor] = tokens.sample
    probabilities: Callable[..., Tensor] = tokens.probabilities
    draw: Callable[..., Tensor] = tokens.draw
    embed: Callable[..., Tensor] = tokens.embed
    advance: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = tokens.advance


TORCH = Kernels()

__all__ = ["TORCH", "Kernels"]
