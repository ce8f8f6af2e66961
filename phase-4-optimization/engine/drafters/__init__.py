"""The drafters, one file each. All implement the protocol of drafting.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.philox import Purpose

from ..drafting import Drafter
from ..model import Transformer
from ..verify import RandomSource
from .eagle import EagleDrafter, EagleHead
from .extrapolate import ExtrapolateDrafter
from .heads import Heads, find_heads, load_heads
from .medusa import MedusaDrafter, MedusaHeads
from .model import ModelDrafter
from .ngram import NgramDrafter, NgramIndex
from .trees import DynamicTreeDrafter, StaticTreeDrafter, TreeDrafter

if TYPE_CHECKING:
    from ..options import Options

__all__ = [
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
    draft: Transformer | None,
    source: RandomSource,
    noise: Purpose,
    heads: Heads | None = None,
) -> Drafter:
    """Make the drafter that the options name. Only `model` needs `draft`, only `medusa` and `eagle` need `heads`."""
    if options.drafter == "ngram":
        return NgramDrafter(options.ngram_min, options.ngram_max)
    if options.drafter == "extrapolate":
        return ExtrapolateDrafter(target, source, noise, options.alpha)
    if isinstance(heads, MedusaHeads):
        return MedusaDrafter(target, heads, source, noise)
    if isinstance(heads, EagleHead):
        return EagleDrafter(target, heads, source, noise)
    assert draft is not None, "the drafter `model` needs a draft model"
    return ModelDrafter(draft, source, noise)
