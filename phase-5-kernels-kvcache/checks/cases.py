"""What a check of a kernel is made of: a case, the cases of an op, and numbers in the midst of poison.

The cases of every op are in layers.py, attention.py and tokens.py; check.py runs them.

    python -c "from checks.layers import *; print(next(rope_cases(torch.device('cpu'), False, (torch.float32,))).name)"
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Function = Callable[..., Any]


class Case(NamedTuple):
    """`run` makes the inputs anew, calls the function and gives what is to be compared: the same for any that is right.

    Whole numbers must be equal, others near. Of an invariance `run` gives pairs, which must have the same bits.
    """

    name: str
    run: Callable[[Function], list[Tensor]]
    dtype: torch.dtype = torch.float32
    invariance: bool = False
    slack: float = 1  # how often the reference rounds where another need not


Cases = Callable[[torch.device, bool, tuple[torch.dtype, ...]], Iterator[Case]]
"""The cases of an op on a device: with or without the sizes that are slow in an interpreter, in some dtypes."""


def poisoned(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers, the same for a seed on every device, in the midst of NaN; the last of each row is loud.

    A kernel that leaves out the last of a row, or takes one more, is then far off.
    """
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    if shape and shape[-1]:
        made[..., -1] *= 4
    margin = 256
    around = torch.full((made.numel() + 2 * margin,), float("nan"), dtype=dtype, device=device)
    inside = around[margin : margin + made.numel()].view(shape)
    return inside.copy_(made.to(dtype))
