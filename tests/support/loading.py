"""Load an embedded model once per process, not for every LLM of every test.

Each LLM gets modules of its own, which it may change and replace; they share their weights, and C++ matrices that were
packed from these weights. Weights that a test has written to are loaded again. Other models, as most tests of loading
have, are not shared.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor, nn

from common import tokenizer
from common.checkpoint import MODELS
from common.phases import phases

KEPT = 8  # models; each takes up to 80 MB with its packed matrices


class Kept:
    """A model as it was loaded, and what is packed from it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
        self.versions = self._versions()
        self.packed: dict[Any, Any] = {}

    def _versions(self) -> list[int]:
        """Return what every write changes."""
        return [tensor._version for tensor in self.tensors]

    def unchanged(self) -> bool:
        return self._versions() == self.versions

    def own(self) -> nn.Module:
        """Return a copy of the modules, without a copy of the weights."""
        return copy.deepcopy(self.model, {id(tensor): tensor for tensor in self.tensors})


class Shelf:
    """The models that were loaded last."""

    def __init__(self) -> None:
        self.kept: OrderedDict[Any, Kept] = OrderedDict()
        self.tokenizers: dict[Any, Any] = {}

    def loading(self, module: Any) -> Callable[..., Any]:
        """Return the function that loads a Transformer, which looks here first."""
        load = module.load_transformer

        def load_once(checkpoint: Any, *arguments: Any) -> Any:
            if checkpoint.folder.parent != MODELS or any(type(each).__name__ == "Group" for each in arguments):
                return load(checkpoint, *arguments)
            key = module.__name__, checkpoint.folder, repr(arguments), getattr(module, "reserve", None)
            kept = self.kept.pop(key, None)
            if kept is None or not kept.unchanged():
                model = load(checkpoint, *arguments)
                if any(tensor.is_inference() for tensor in model.parameters()):  # their writes are not counted
                    return model
                kept = Kept(model)
            self.kept[key] = kept
            if len(self.kept) > KEPT:
                self.kept.popitem(last=False)
            return kept.own()

        return load_once

    def packing(self, pack: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function that packs a matrix for C++, which looks here first."""

        def pack_once(plan: Any, arena: Any, exact: bool | None, threads: int) -> Any:
            weight = plan.module.values if hasattr(plan.module, "values") else plan.module.weight
            for kept in self.kept.values():
                if any(weight is tensor for tensor in kept.tensors) and kept.unchanged():
                    key = pack, id(weight), plan.format, plan.pair, exact, plan.module.bias is None
                    if key not in kept.packed:
                        kept.packed[key] = pack(plan, arena, exact, threads)
                    return kept.packed[key]
            return pack(plan, arena, exact, threads)

        return pack_once

    def parsing(self, parse: Callable[..., Any]) -> Callable[..., Any]:
        def parse_once(folder: Any, tokenizer_config: Any) -> Any:
            if folder.parent != MODELS:
                return parse(folder, tokenizer_config)
            if folder not in self.tokenizers:
                self.tokenizers[folder] = parse(folder, tokenizer_config)
            return self.tokenizers[folder]

        return parse_once


@contextmanager
def loaded_once() -> Iterator[None]:
    """Let all phases that are imported share the embedded models."""
    shelf = Shelf()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "_load_backend", shelf.parsing(tokenizer._load_backend))
        for phase in phases():
            if phase.package in sys.modules:
                load = importlib.import_module(f"{phase.package}.load")
                patch.setattr(load, "load_transformer", shelf.loading(load))
                if cpp := sys.modules.get(f"{phase.package}.kernels.cpp.packed"):
                    patch.setattr(cpp, "pack", shelf.packing(cpp.pack))
        yield
