"""Whether a kernel is right: every op of any backend against its torch reference, over shapes made to find mistakes.

Sizes that fit no tile, rows that differ in length, memory with gaps, nothing but poison (NaN) around what may be read,
ties. And what no reference shows: that a token's bits are the same however many tokens are computed beside it.

    python -c "from checks.check import *; print(check('rope', TORCH.rope, CPU))"
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from common.device import dtype_name
from engine.kernels import TORCH

from . import attention, layers, tokens
from .cases import CPU, DTYPES, Case, Function, poisoned

# How far a result may be from the reference, as a share of the largest number in it: both round, in different orders.
WITHIN = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


class WrongKernel(Exception):
    """A kernel did not give what the reference gives, or not the same bits twice."""


def check(
    op: str,
    function: Function,
    device: torch.device,
    full: bool = True,
    invariance: bool = True,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> list[str]:
    """The names of the checks that a function passed; WrongKernel at the first that it did not.

    `full` adds sizes that are slow in an interpreter. Without `invariance` the bits may depend on the number of tokens.
    """
    passed = []
    for case in cases(op, device, full, dtypes):
        if case.invariance and not invariance:
            continue
        found = case.run(function)
        if case.invariance:
            for number, (one, other) in enumerate(zip(found[::2], found[1::2], strict=True)):
                same_bits(f"{op}, {case.name}, pair {number}", one, other)
        else:
            wanted = case.run(getattr(TORCH, op))
            if len(found) != len(wanted):
                raise WrongKernel(f"{op}, {case.name}: {len(found)} results, expected {len(wanted)}")
            for mine, other in zip(found, wanted, strict=True):
                near(f"{op}, {case.name}", mine, other, case.slack * WITHIN[case.dtype])
        passed.append(case.name)
    return passed


def near(where: str, found: Tensor, wanted: Tensor, within: float) -> None:
    """WrongKernel where they differ by more than a share of the largest number. NaN where there is none is wrong."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        raise WrongKernel(
            f"{where}: {list(found.shape)} {dtype_name(found.dtype)}, expected {list(wanted.shape)} "
            f"{dtype_name(wanted.dtype)}"
        )
    if not wanted.numel():
        return
    if not wanted.is_floating_point():
        wrong = (found != wanted).nonzero()
        if len(wrong):
            at = tuple(wrong[0].tolist())
            raise WrongKernel(f"{where}: {found[at].item()} at {list(at)}, expected {wanted[at].item()}")
        return
    mine, other = found.double(), wanted.double()
    poison = other.isnan()  # what a cache holds where nothing was written
    if not torch.equal(mine.isnan(), poison):
        raise WrongKernel(f"{where}: NaN at other places than in the reference")
    mine, other = mine.masked_fill(poison, 0), other.masked_fill(poison, 0)
    worst = float((mine - other).abs().max())
    allowed = within * max(float(other.abs().max()), 1e-3)
    if not worst <= allowed:
        raise WrongKernel(f"{where}: off by {worst:.3g}, and {allowed:.3g} is rounding")


def same_bits(where: str, one: Tensor, other: Tensor) -> None:
    if not torch.equal(one, other):
        worst = float((one.double() - other.double()).abs().max())
        raise WrongKernel(f"{where}: the bits depend on what is computed beside it (off by {worst:.3g})")


def cases(op: str, device: torch.device, full: bool, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Iterator[Case]:
    """All cases of an op."""
    for module in (layers, attention, tokens):
        if op in module.OPS:
            yield from module.OPS[op](device, full, dtypes)
            return
    raise ValueError(f"there are no checks of {op!r}")


__all__ = [
    "CPU",
    "DTYPES",
    "TORCH",
    "WITHIN",
    "Case",
    "Function",
    "WrongKernel",
    "cases",
    "check",
    "near",
    "poisoned",
    "same_bits",
]
