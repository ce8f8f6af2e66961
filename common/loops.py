"""How much of a text repeats itself. Small models loop under greedy decoding, and loops flatter every drafter."""

from __future__ import annotations

from collections.abc import Sequence


def loop_share(tokens: Sequence[int], n: int = 8) -> float:
    """Return the share of tokens that end an n-gram seen earlier in the same text; 0 for texts shorter than n."""
    seen: set[tuple[int, ...]] = set()
    repeated = 0
    for end in range(n, len(tokens) + 1):
        gram = tuple(tokens[end - n : end])
        repeated += gram in seen
        seen.add(gram)
    return repeated / len(tokens) if tokens else 0.0
