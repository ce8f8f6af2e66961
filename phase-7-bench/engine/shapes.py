"""Padded lengths of forwards, so that few different shapes occur.

In bfloat16 on a CPU, oneDNN generates a kernel for every shape, which takes about as long as a forward. Without a cache
every step has another length. The causal mask hides padding on the right, so lengths can be rounded up. In float32 the
kernels work for any shape, and padding would only cost time.
"""

from __future__ import annotations

import torch

from .model import Transformer

STEP = 16


def padded_length(length: int, model: Transformer) -> int:
    """Return the forward's length for rows of at most `length` tokens, which are within the context."""
    weight = model.embedding.weight
    narrow = weight.dtype != torch.float32 or torch.is_autocast_enabled(weight.device.type)
    if weight.device.type != "cpu" or not narrow:
        return length
    return max(length, min(-(-length // STEP) * STEP, model.config.context))
