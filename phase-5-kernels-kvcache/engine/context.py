"""Past the model's context: which part of a long sequence the model still sees.

The window's start depends on the sequence's length alone. It stays at 0 while everything fits; when a sequence would
outgrow the context, the start jumps ahead by a quarter of it. Jumping, rather than sliding by one each step, leaves the
positions of all remaining tokens as they are for a quarter of a context, so that a cache stays valid in between.
(A model that was trained with a sliding window uses its mask instead and is only bounded by its positions.)
"""

from __future__ import annotations


def window_start(length: int, context: int) -> int:
    """The first position that a forward over a sequence of `length` tokens sees."""
    if length <= context:
        return 0
    jump = max(1, context // 4)
    return -(-(length - context) // jump) * jump  # rounded up to a whole number of jumps


def visible(tokens: list[int], context: int) -> list[int]:
    """The part of a sequence that a forward sees."""
    return tokens[window_start(len(tokens), context) :]
