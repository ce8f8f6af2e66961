"""What a forward costs on paper: floating-point operations, and bytes of weights read.

from engine.cost import forward_flops, weight_bytes
"""

from __future__ import annotations

from .config import ModelConfig


def layer_parameters(config: ModelConfig) -> int:
    """Weights in the matrices of one layer (norms and biases are left out: they are thousandths)."""
    attention = config.width * config.head_dim * 2 * (config.heads + config.kv_heads)
    return attention + (3 if config.gated else 2) * config.width * config.ffn_width


def forward_flops(config: ModelConfig, length: int, wanted: int = 1) -> int:
    """Operations of one forward over `length` tokens whose logits are read at `wanted` positions.

    A multiplication and an addition count as two. Each weight of a layer meets every token once: 2 * N per token.
    Attention scores and mixes every pair of positions (the masked half is computed and thrown away):
    4 * heads * head_dim per pair. In the last layer only keys and values are made for positions that are not wanted.
    """
    keys_and_values = 2 * config.width * config.head_dim * config.kv_heads
    pairs = 4 * config.heads * config.head_dim * length
    full = 2 * layer_parameters(config) * length + pairs * length
    last = 2 * keys_and_values * length + 2 * (layer_parameters(config) - keys_and_values) * wanted + pairs * wanted
    return (config.layers - 1) * full + last + 2 * config.width * config.vocab_size * wanted


def forward_bytes(config: ModelConfig, rows: int, length: int, bytes_per_value: float) -> int:
    """Memory that the activations of one forward need at their peak: the widest layer's tensors, alive at once."""
    stream = 4 * config.width + config.heads * config.head_dim
    feed_forward = 3 * config.ffn_width
    scores = 3 * config.heads * length  # scores, weights, and the copy of the mask
    per_token = stream + max(feed_forward, scores)
    return round(rows * (length * per_token + config.vocab_size) * bytes_per_value)


def weight_bytes(config: ModelConfig, bytes_per_weight: float) -> int:
    """Bytes of weights that a forward reads: every layer, and the output matrix."""
    return round((config.layers * layer_parameters(config) + config.width * config.vocab_size) * bytes_per_weight)


def ranking_bytes(config: ModelConfig, beams: int) -> int:
    """Memory in which beam search ranks every token behind every beam: three scores (float32), a count (int64)."""
    return beams * config.vocab_size * (3 * 4 + 8)
