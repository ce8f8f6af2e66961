"""Past the model's context: which part of a long sequence the model still sees.

The window's start depends on the sequence's length alone. The start is 0 while everything fits. When a sequence would
outgrow the context, the start jumps ahead by a quarter of the context. Because the start jumps instead of sliding by
one per step, the remaining tokens keep their positions for a quarter of a context, and a cache stays valid in between.
(A model trained with a sliding window uses its mask instead, and is bounded only by its positions.)
"""

from __future__ import annotations


def window_start(length: int, context: int) -> int:
    """Return the first position that a forward over a sequence of `length` tokens sees."""
    if length <= context:
        return 0
    jump = max(1, context // 4)
    return -(-(length - context) // jump) * jump  # rounded up to a whole number of jumps


def visible(tokens: list[int], context: int) -> list[int]:
    """Return the part of a sequence that a forward sees."""
    return tokens[window_start(len(tokens), context) :]
