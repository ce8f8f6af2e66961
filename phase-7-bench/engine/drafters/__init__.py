"""The drafters, one file each. All implement the protocol of drafting.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from ..device_runner import DeviceRunner
from ..drafting import Drafter
from ..model import Transformer
from ..runner import ModelRunner
from ..verify import RandomSource
from .eagle import EagleDrafter, EagleHead
from .extrapolate import ExtrapolateDrafter
from .heads import Heads, find_heads, load_heads
from .medusa import MedusaDrafter, MedusaHeads
from .model import ModelDrafter
from .model_device import DeviceModelDrafter
from .ngram import NgramDrafter, NgramIndex
from .trees import DynamicTreeDrafter, StaticTreeDrafter, TreeDrafter

if TYPE_CHECKING:
    from ..kernels.cpp import CppEagle, CppMedusa
    from ..options import Options

__all__ = [
    "DeviceModelDrafter",
    "DynamicTreeDrafter",
    "EagleDrafter",
    "EagleHead",
    "ExtrapolateDrafter",
    "MedusaDrafter",
    "MedusaHeads",
    "ModelDrafter",
    "NgramDrafter",
    "NgramIndex",
    "StaticTreeDrafter",
    "TreeDrafter",
    "find_heads",
    "load_heads",
    "make_drafter",
]


def make_drafter(
    options: Options,
    target: Transformer,
    draft: ModelRunner | None,
    source: RandomSource,
    heads: Heads | None = None,
    fast: CppEagle | CppMedusa | None = None,
    draft_in_cpp: bool = False,
) -> Drafter:
    """Make the drafter that the options name. Only `model` needs `draft`, only `medusa` and `eagle` need `heads`.

    fast: the heads, if they run in C++. draft_in_cpp: the draft model's runner is a CppRunner.
    """
    if options.drafter == "ngram":
        return NgramDrafter(options.ngram_min, options.ngram_max)
    if options.drafter == "extrapolate":
        return ExtrapolateDrafter(target, source, options.alpha)
    if fast is not None and heads is not None:
        return in_cpp(heads, fast, target, source)
    if isinstance(heads, MedusaHeads):
        return MedusaDrafter(target, heads, source)
    if isinstance(heads, EagleHead):
        return EagleDrafter(target, heads, source, cached=options.kv != "off")
    assert draft is not None, "the drafter `model` needs a draft model"
    if draft_in_cpp:
        from .model_fast import FastModelDrafter

        return FastModelDrafter(draft, source)
    if isinstance(draft, DeviceRunner):
        return DeviceModelDrafter(draft, source)
    return ModelDrafter(draft, source)


def in_cpp(heads: Heads, fast: CppEagle | CppMedusa, target: Transformer, source: RandomSource) -> Drafter:
    """Make the drafter of heads that run in C++."""
    from .eagle_fast import FastEagleDrafter
    from .medusa_fast import FastMedusaDrafter

    if isinstance(heads, MedusaHeads):
        return FastMedusaDrafter(cast("CppMedusa", fast), target, heads, source)
    return FastEagleDrafter(cast("CppEagle", fast), target, heads, source)
