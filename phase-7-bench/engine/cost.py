"""The computed cost of a forward: floating-point operations, bytes of weights read, and messages between cards.

from engine.cost import NVLINK, forward_flops, tensor_parallel_ms, weight_bytes
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Wire:
    """What connects cards. A message of n bytes takes latency_ms + n / bytes_per_ms."""

    latency_ms: float  # of an all-reduce of a few kilobytes, everything included
    bytes_per_ms: float  # of one card, in one direction


NVLINK = Wire(0.010, 250e6)
PCIE = Wire(0.025, 25e6)  # PCIe 4.0 x16
ETHERNET = Wire(0.060, 3e6)  # 25 Gb/s


def all_reduce_ms(wire: Wire, size: float, ranks: int) -> float:
    """Return the time of an all-reduce of so many bytes in a ring: each card sends 2 (ranks - 1) / ranks of them."""
    return 0.0 if ranks == 1 else wire.latency_ms + 2 * (ranks - 1) / ranks * size / wire.bytes_per_ms


def tensor_parallel_ms(
    config: ModelConfig, single_ms: float, read_ms: float, ranks: int, wire: Wire, rows: int = 1, itemsize: int = 2
) -> float:
    """Predict the time of a step of `rows` tokens with each layer split over so many cards.

    single_ms: measured on one card; read_ms of it is the read of the weights, which the cards share. The rest stays:
    launches, norms, attention of few tokens. Every layer has two all-reduces (Shoeybi et al. 2019).
    """
    messages = 2 * config.layers
    return single_ms - read_ms + read_ms / ranks + messages * all_reduce_ms(wire, rows * config.width * itemsize, ranks)


def pipeline_parallel_ms(
    config: ModelConfig, single_ms: float, ranks: int, wire: Wire, rows: int = 1, itemsize: int = 2
) -> float:
    """Predict the time of a step with the layers split over so many cards: they work one after the other."""
    return single_ms + (ranks - 1) * (wire.latency_ms + rows * config.width * itemsize / wire.bytes_per_ms)


def bubble(ranks: int, micro_batches: int) -> float:
    """Return the share of a step in which a rank waits, with equal micro-batches (Huang et al. 2019, GPipe)."""
    return (ranks - 1) / (micro_batches + ranks - 1)
