"""References of the fused ops, which save kernel launches and memory traffic.

Each reference is composed of the ops that it replaces, so a backend without the fused op gives the same result. PARTS:
where torch's is chosen, the model calls these unfused ops instead, from any backend. On a CPU that is faster (queries
and keys are rotated in one call, and the halves of a gate are separate products), elsewhere as fast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import reference
from .metadata import AttentionMetadata

PARTS = {"gated_linear": ("linear",), "rope_append": ("rope", "kv_append")}


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add x and residual [..., D] in their dtype, and normalise the sum: return (normed, sum).

    The sum is computed in place, in x, if no gradient is needed: see `times` in reference.py.
    """
    total = x + residual if torch.is_grad_enabled() else x.add_(residual)
    return reference.rms_norm(total, weight, eps), total


def rope_append(
    metadata: AttentionMetadata, layer: int, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """Rotate query [R, T, H, head_dim] and key, append key and value [R, T, kv_heads, head_dim]; return the query.

    Shapes of the tables as for `rope`, of the rest as for `kv_append`.
    """
    reference.kv_append(metadata, layer, reference.rope(key, cos, sin), value)
    return reference.rope(query, cos, sin)


def gated_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Return SiLU(first half of the outputs) * second half: x [..., in] -> [..., out / 2] (Shazeer 2020)."""
    gate, up = reference.linear(layer, x).chunk(2, -1)
    return F.silu(gate) * up


def verify_greedy(draft_tokens: Tensor, scores: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many leading draft_tokens [R, K] are the argmax of scores [R, K+1, V], and the next token.

    Ties: the lower token id wins. widths int64 [R]: draft tokens per row. Both results are int64 [R].
    """
    choices = scores.argmax(-1)
    accepted = reference.verify_prefix(draft_tokens, choices, widths)
    return accepted, choices.gather(1, accepted[:, None])[:, 0]
