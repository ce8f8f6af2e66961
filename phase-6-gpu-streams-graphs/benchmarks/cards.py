"""Predicts the time of a token on several cards from one that was measured on a single card; prints the README's table.

The example is Llama-2-7B in bfloat16 on A100 cards with NVLink, as the README of gpt-fast (commit 0f925b5) has it.

    PYTHONPATH=.:.. python -m benchmarks.cards
"""

from __future__ import annotations

from dataclasses import dataclass

PUBLISHED = {1: 104.9, 2: 168.84, 4: 254.02, 8: 328.43}  # tokens per second, by cards
LAYERS, WIDTH = 32, 4096
MESSAGE = 2 * WIDTH  # bytes: the residual stream of one token in bfloat16
SINGLE = 1e3 / PUBLISHED[1]  # milliseconds of a token on one card
READ = SINGLE * 1397 / 1700  # of them, the read of the weights: 1397 GB/s achieved, 1700 measured as the card's peak


@dataclass(frozen=True)
class Wire:
    """What connects the cards. A message of n bytes takes latency_ms + n / bytes_per_ms."""

    latency_ms: float  # of an all-reduce of a few kilobytes, everything included
    bytes_per_ms: float  # of one card, in one direction


WIRES = {
    "NVLink": Wire(0.010, 250e6),
    "PCIe": Wire(0.025, 25e6),  # PCIe 4.0 x16
    "Ethernet": Wire(0.060, 3e6),  # 25 Gb/s
}


def all_reduce_ms(wire: Wire, cards: int) -> float:
    """Return the time of an all-reduce of MESSAGE bytes in a ring: each card sends 2 (cards - 1) / cards of them."""
    return 0.0 if cards == 1 else wire.latency_ms + 2 * (cards - 1) / cards * MESSAGE / wire.bytes_per_ms


def tensor_parallel_ms(wire: Wire, cards: int) -> float:
    """Predict the time of a token with each layer split over the cards.

    The cards share the read of the weights. The rest stays: launches, norms, attention of few tokens. Every layer has
    two all-reduces (Shoeybi et al. 2019).
    """
    return SINGLE - READ + READ / cards + 2 * LAYERS * all_reduce_ms(wire, cards)


def pipeline_parallel_ms(wire: Wire, cards: int) -> float:
    """Predict the time of a token with the layers split over the cards, which work one after the other."""
    return SINGLE + (cards - 1) * (wire.latency_ms + MESSAGE / wire.bytes_per_ms)


def bubble(cards: int, micro_batches: int) -> float:
    """Return the share of a step in which a card waits, with equal micro-batches (Huang et al. 2019, GPipe)."""
    return (cards - 1) / (micro_batches + cards - 1)


def table() -> list[list[str]]:
    """Return the README's rows: cards; by wire milliseconds and tokens/s; after NVLink's the published tokens/s."""
    rows = list[list[str]]()
    for cards, published in PUBLISHED.items():
        row = [str(cards)]
        for wire in WIRES.values():
            ms = tensor_parallel_ms(wire, cards)
            row += [f"{ms:.2f}", f"{1e3 / ms:.0f}"]
        rows.append([*row[:3], f"{published:.0f}", *row[3:]])
    return rows


if __name__ == "__main__":
    for row in table():
        print("|", " | ".join(row), "|")
