"""References of the ops that do at once what the model otherwise asks for one by one: fewer launches, fewer trips.

Each is composed of the references it replaces, so a backend that has only the parts gives the same result. PARTS: where
torch's is chosen, the model asks for the parts, from whatever backend has them. On a CPU that is the faster way (both
queries and keys turn in one go, and the halves of a gate are products of their own), elsewhere as fast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kv_cache.protocol import KVCache
from . import reference

PARTS = {"gated_linear": ("linear",), "rope_append": ("rope", "kv_append")}


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + residual [..., D], rounded as it is stored, and its norm: (normed, sum).

    Where no gradient is asked for the sum takes x's memory: see reference.py.
    """
    total = x + residual if torch.is_grad_enabled() else x.add_(residual)
    return reference.rms_norm(total, weight, eps), total


def rope_append(
    cache: KVCache,
    layer: int,
    rows: list[int],
    counts: list[int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """Turn query [R, T, H, head_dim] and key, append key and value [R, T, kv_heads, head_dim]; gives the turned query.

    Shapes of the tables as for `rope`, of the rest as for `kv_append`.
    """
    reference.kv_append(cache, layer, rows, counts, reference.rope(key, cos, sin), value)
    return reference.rope(query, cos, sin)


def gated_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """SiLU of the first half of the outputs times the second half: x [..., in] -> [..., out / 2] (Shazeer 2020)."""
    gate, up = reference.linear(layer, x).chunk(2, -1)
    return F.silu(gate) * up


def verify_greedy(draft_tokens: Tensor, scores: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    """How many of draft_tokens [R, K] are the choices of scores [R, K+1, V], and the choice that follows them.

    A choice is the highest score, of equal ones the first. widths int64 [R]: how many of a row's K tokens count. Both
    results are int64 [R].
    """
    choices = scores.argmax(-1)
    accepted = reference.verify_prefix(draft_tokens, choices, widths)
    return accepted, choices.gather(1, accepted[:, None])[:, 0]
