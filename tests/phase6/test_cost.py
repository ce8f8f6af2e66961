"""The predicted time of a step on several cards."""

from __future__ import annotations

import dataclasses

import pytest

from phase6.config import ModelConfig
from phase6.cost import (
    ETHERNET,
    NVLINK,
    PCIE,
    Wire,
    all_reduce_ms,
    bubble,
    pipeline_parallel_ms,
    tensor_parallel_ms,
)

LLAMA = ModelConfig(
    family="llama", vocab_size=32000, layers=32, width=4096, heads=32, kv_heads=32, head_dim=128, ffn_width=11008,
    context=2048, norm="rms", norm_eps=1e-5, positions="rope", activation="silu", gated=True,
)  # fmt: skip
# Llama-2-7B in bfloat16 on A100 cards with NVLink, as the README of gpt-fast (commit 0f925b5) has it: 104.9 tokens/s on
# one card at 1397 GB/s of weights, of about 1700 GB/s that its authors measured as the card's peak.
PUBLISHED = {1: 104.9, 2: 168.84, 4: 254.02, 8: 328.43}
SINGLE = 1e3 / PUBLISHED[1]
READ = SINGLE * 1397 / 1700


@pytest.mark.parametrize("ranks", PUBLISHED)
def test_published_scaling_is_predicted_within_a_tenth(ranks: int) -> None:
    predicted = 1e3 / tensor_parallel_ms(LLAMA, SINGLE, READ, ranks, NVLINK)
    assert predicted == pytest.approx(PUBLISHED[ranks], rel=0.1)


def test_one_card_is_as_measured() -> None:
    for wire in (NVLINK, PCIE, ETHERNET):
        assert tensor_parallel_ms(LLAMA, 9.0, 7.0, 1, wire) == 9.0
        assert pipeline_parallel_ms(LLAMA, 9.0, 1, wire) == 9.0


def test_a_free_wire_leaves_what_the_cards_do_not_share() -> None:
    free = Wire(0.0, float("inf"))
    assert tensor_parallel_ms(LLAMA, 9.0, 7.0, 4, free) == pytest.approx(2.0 + 7.0 / 4)
    assert pipeline_parallel_ms(LLAMA, 9.0, 4, free) == 9.0


def test_messages_and_bytes_are_counted() -> None:
    """Two all-reduces in each layer, of which a ring of 4 sends 3 / 2 of the bytes; a pipeline of 4 has 3 hops."""
    latency, speed = Wire(1.0, float("inf")), Wire(0.0, 4096 * 2 * 5)
    assert tensor_parallel_ms(LLAMA, 9.0, 0.0, 4, latency) == 9.0 + 64
    assert tensor_parallel_ms(LLAMA, 9.0, 0.0, 4, speed, rows=5) == pytest.approx(9.0 + 64 * 1.5)
    assert pipeline_parallel_ms(LLAMA, 9.0, 4, latency) == 9.0 + 3
    assert pipeline_parallel_ms(LLAMA, 9.0, 4, speed, rows=5) == pytest.approx(9.0 + 3)
    assert all_reduce_ms(dataclasses.replace(speed, latency_ms=2.0), 4096 * 10, 2) == pytest.approx(2.0 + 1.0)


def test_the_bubble_shrinks_with_micro_batches() -> None:
    assert bubble(1, 3) == 0.0
    assert bubble(2, 1) == 0.5
    assert bubble(4, 5) == 3 / 8
