"""Lengths that forwards are padded to, so that few different shapes occur.

In bfloat16 a CPU's products run on kernels that oneDNN generates for the very shape, which takes about as long as a
forward; without a cache every step has a length of its own. Under a causal mask nothing sees what is appended on the
right, so a length can be rounded up. In float32 the products take any shape as it comes, and more rows only cost.
"""

from __future__ import annotations

import torch

from .model import Transformer

STEP = 16


def padded_length(length: int, model: Transformer) -> int:
    """The length of the forward for rows of at most `length` tokens; no row may pass the context."""
    weight = model.embedding.weight
    narrow = weight.dtype != torch.float32 or torch.is_autocast_enabled(weight.device.type)
    if weight.device.type != "cpu" or not narrow:
        return length
    return max(length, min(-(-length // STEP) * STEP, model.config.context))
