"""The predicted time of a token on several cards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import phase6

README = Path(phase6.__file__).resolve().parents[1] / "README.md"


@pytest.fixture
def cards(bench_part: Callable[[int, str], ModuleType]) -> ModuleType:
    return bench_part(6, "cards")


def test_published_scaling_is_predicted_within_a_tenth(cards: ModuleType) -> None:
    for count, published in cards.PUBLISHED.items():
        predicted = 1e3 / cards.tensor_parallel_ms(cards.WIRES["NVLink"], count)
        assert predicted == pytest.approx(published, rel=0.1)


def test_one_card_is_as_measured(cards: ModuleType) -> None:
    for wire in cards.WIRES.values():
        assert cards.tensor_parallel_ms(wire, 1) == cards.pipeline_parallel_ms(wire, 1) == cards.SINGLE


def test_a_free_wire_leaves_what_the_cards_do_not_share(cards: ModuleType) -> None:
    free, rest = cards.Wire(0.0, float("inf")), cards.SINGLE - cards.READ
    assert cards.tensor_parallel_ms(free, 4) == pytest.approx(rest + cards.READ / 4)
    assert cards.pipeline_parallel_ms(free, 4) == cards.SINGLE


def test_messages_and_bytes_are_counted(cards: ModuleType) -> None:
    """Each layer has two all-reduces; a ring of 4 sends 3 / 2 of their bytes. A pipeline of 4 has 3 hops."""
    latency, speed = cards.Wire(1.0, float("inf")), cards.Wire(0.0, 4096 * 2)
    computed = cards.SINGLE - cards.READ + cards.READ / 4
    assert cards.tensor_parallel_ms(latency, 4) == pytest.approx(computed + 64)
    assert cards.tensor_parallel_ms(speed, 4) == pytest.approx(computed + 64 * 1.5)
    for wire in (latency, speed):
        assert cards.pipeline_parallel_ms(wire, 4) == pytest.approx(cards.SINGLE + 3)
    assert cards.all_reduce_ms(cards.Wire(2.0, 4096 * 2), 2) == pytest.approx(2.0 + 1.0)


def test_the_bubble_shrinks_with_micro_batches(cards: ModuleType) -> None:
    assert cards.bubble(1, 3) == 0.0
    assert cards.bubble(2, 1) == 0.5
    assert cards.bubble(4, 5) == 3 / 8


def test_the_readme_says_what_is_predicted(cards: ModuleType) -> None:
    text = README.read_text(encoding="utf-8")
    _, found, below = text.partition("| cards | NVLink: ms |")
    assert found
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in below.splitlines()[2:6]]
    assert rows == cards.table()
    fast, slow = (cards.pipeline_parallel_ms(cards.WIRES[name], 2) for name in ("NVLink", "Ethernet"))
    assert f"({fast:.2f} ms on two cards with NVLink, {slow:.2f} with Ethernet)" in text
