"""Storage of keys or values in a number format: float32, bfloat16, float16, or int8 with a scale per token and head.

Int8 rounds to nearest: scale = max |x| / 127 over a head's features. Reads return level * scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def reserve(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate uninitialised memory. Tests fill it with NaN, so that a read before the first write is noticed."""
    return torch.empty(shape, dtype=dtype, device=device)


class Storage:
    """A tensor [..., head_dim] that is stored in one dtype, and read in another."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, computed: torch.dtype, device: torch.device) -> None:
        """`dtype` is the stored dtype; `computed` is the dtype that `read` returns."""
        self.values = reserve(shape, dtype, device)
        self.scales = reserve((*shape[:-1], 1), torch.bfloat16, device) if dtype == torch.int8 else None
        self.computed = computed

    def write(self, place: Any, x: Tensor) -> None:
        """Write x to an index `place`; values[place] has the shape of x."""
        if self.scales is None:
            self.values[place] = x if x.dtype == self.values.dtype else x.to(self.values.dtype)
            return
        scales = (x.abs().amax(-1, keepdim=True).float() / 127).clamp(min=1e-30).bfloat16()
        self.scales[place] = scales
        self.values[place] = (x.float() / scales.float()).round_().clamp_(-127, 127).to(torch.int8)

    def read(self, place: Any) -> Tensor:
        """Return values[place] in the dtype `computed`."""
        values = self.values[place]
        if self.scales is None:
            return values if values.dtype == self.computed else values.to(self.computed)
        return (values.float() * self.scales[place].float()).to(self.computed)

    def first(self, count: int) -> Storage:
        """Return a view of the first `count` entries along the token dimension (the one before the last)."""
        return self._with(lambda tensor: tensor[..., :count, :])

    def chosen(self, entries: list[int]) -> Storage:
        """Return a copy of some entries along the token dimension."""
        index = torch.tensor(entries, dtype=torch.long, device=self.values.device)
        return self._with(lambda tensor: tensor.index_select(-2, index))

    def joined(self, other: Storage) -> Storage:
        """Return a copy of both, concatenated along the token dimension."""
        joined = self._with(lambda tensor: tensor)
        joined.values = torch.cat((self.values, other.values), -2)
        if self.scales is not None and other.scales is not None:
            joined.scales = torch.cat((self.scales, other.scales), -2)
        return joined

    def _with(self, change: Callable[[Tensor], Tensor]) -> Storage:
        changed = Storage.__new__(Storage)  # without memory of its own
        changed.computed = self.computed
        changed.values = change(self.values)
        changed.scales = None if self.scales is None else change(self.scales)
        return changed

    def move(self, source: Any, target: Any) -> None:
        """Copy the stored entries at one index to another index."""
        for tensor in (self.values, self.scales):
            if tensor is not None:
                tensor[target] = tensor[source].clone()

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)
