"""The computed cost of a forward: floating-point operations, and bytes of weights read.

from engine.cost import forward_flops, weight_bytes
"""

from __future__ import annotations

from .config import ModelConfig


def layer_parameters(config: ModelConfig) -> int:
    """Count the weights in the matrices of one layer (without norms and biases, which are about a thousandth)."""
    attention = config.width * config.head_dim * 2 * (config.heads + config.kv_heads)
    return attention + (3 if config.gated else 2) * config.width * config.ffn_width


def forward_flops(config: ModelConfig, length: int, wanted: int = 1) -> int:
    """Count the operations of one forward over `length` tokens whose logits are read at `wanted` positions.

    A multiplication and an addition count as two. Each weight of a layer is used once per token: 2 * N per token.
    Attention multiplies twice for every pair of positions (the masked half is computed and discarded):
    4 * heads * head_dim per pair. In the last layer, positions that are not wanted need keys and values only.
    """
    keys_and_values = 2 * config.width * config.head_dim * config.kv_heads
    pairs = 4 * config.heads * config.head_dim * length
    full = 2 * layer_parameters(config) * length + pairs * length
    last = 2 * keys_and_values * length + 2 * (layer_parameters(config) - keys_and_values) * wanted + pairs * wanted
    return (config.layers - 1) * full + last + 2 * config.width * config.vocab_size * wanted


def forward_bytes(config: ModelConfig, rows: int, length: int, bytes_per_value: float) -> int:
    """Return the peak bytes of one forward's activations: the widest layer's tensors, alive at once."""
    stream = 4 * config.width + config.heads * config.head_dim
    feed_forward = 3 * config.ffn_width
    scores = 3 * config.heads * length  # scores, weights, and the copy of the mask
    per_token = stream + max(feed_forward, scores)
    return round(rows * (length * per_token + config.vocab_size) * bytes_per_value)


def weight_bytes(config: ModelConfig, bytes_per_weight: float) -> int:
    """Count the bytes of weights that a forward reads: every layer, and the output matrix."""
    return round((config.layers * layer_parameters(config) + config.width * config.vocab_size) * bytes_per_weight)


def ranking_bytes(config: ModelConfig, beams: int) -> int:
    """Return the bytes for ranking every token of every beam: three scores (float32) and a count (int64) each."""
    return beams * config.vocab_size * (3 * 4 + 8)
