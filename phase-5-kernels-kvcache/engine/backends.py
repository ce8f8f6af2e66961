"""Chooses the backend of each op, and decides whether whole steps run in C++.

No fallback is silent: `stats["kernels"]` says which backend runs and why others do not. A backend that is asked for by
name and cannot run is an error.

    python generate.py --kernels torch --prompt "from pathlib import" --json
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from common.errors import UserError

from .device_runner import DeviceRunner
from .drafters import EagleHead, MedusaHeads
from .fake import FakeModel
from .kernels import TORCH, Kernels, registry
from .kv_cache import KVOptions
from .kv_cache.manager import CacheManager
from .model import Transformer
from .runner import CachedRunner, make_manager
from .speculative import MultiStep
from .transfers import Upload
from .weights import lay_out

if TYPE_CHECKING:
    from .kernels.cpp import CppEagle, CppMedusa, CppModel
    from .kernels.cpp.weights import Weights
    from .options import Options

FORMATS: dict[torch.dtype, Weights] = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Backends:
    """The kernels that `--kernels` selects for a device, and the models whose steps run in C++."""

    def __init__(self, options: Options, device: torch.device, dtype: torch.dtype) -> None:
        """Select the kernels. UserError for a backend that was asked for by name and cannot run."""
        self.options = options
        selection = registry.chosen(options.kernels, device, dtype)
        self.kernels: Kernels = selection.kernels
        self.report: dict[str, Any] = dict(selection.report)
        self.fast: dict[nn.Module, CppModel] = {}
        self.heads: CppEagle | CppMedusa | None = None
        self.upload = Upload(device)  # of every step, target and draft
        reason = self._why_no_whole_steps(device)
        self.whole_steps = reason is None
        if reason is not None and options.kernels == "cpp":
            raise UserError(f"--kernels cpp cannot run here: {reason}")
        self.report["step"] = "cpp" if reason is None else "torch"
        if reason is not None:
            self.report["why_no_cpp_step"] = reason

    @property
    def multi_step(self) -> MultiStep | None:
        """Return what makes several steps in one call; None if the target's steps do not run in C++."""
        if not self.fast:
            return None
        from .multi_step import multi_step

        return multi_step

    @property
    def multiplies_in_torch(self) -> bool:
        """Return True if torch computes the op `linear`."""
        return self.kernels.linear is TORCH.linear

    def _why_no_whole_steps(self, device: torch.device) -> str | None:
        options = self.options
        if options.kernels not in ("auto", "cpp"):
            return f"--kernels {options.kernels}"
        if (reason := registry.why_not("cpp", device)) is not None:
            return reason
        if isinstance(reason := self.report["why_not"].get("cpp"), str):  # one reason for all ops: the build failed
            return reason
        for name in ("compile", "amp"):
            if getattr(options, name):
                return f"--{name} applies to torch's operations"
        if options.beams > 1:
            return "beam search computes whole sequences"
        if options.kv in ("off", "dynamic"):
            return f"the C++ step writes into a static, ring or paged cache, and --kv is {options.kv}"
        return None

    def take(self, models: Iterable[nn.Module], others: Iterable[object]) -> None:
        """Give these models the chosen kernels, and pack those that can run in C++; `others` call ops as well.

        The first model is the target; its draft heads may be among the others.
        """
        models, others = list(models), list(others)
        for each in (*models, *others):
            registry.use(each, self.kernels)
        if self.whole_steps:
            for model in models:
                if model not in self.fast:
                    self._pack(model)
        for each in others:
            self._pack_heads(each, models[0])

    def _pack(self, model: nn.Module) -> None:
        """Pack a model for C++, or report why not. UserError if C++ was asked for by name."""
        from .kernels.cpp import CppModel
        from .kernels.cpp.weights import why_not_model

        reason = why_not_model(model)
        if reason is not None:
            if self.options.kernels == "cpp":
                raise UserError(f"--kernels cpp cannot run here: {reason}")
            self.report.setdefault("why_no_cpp_step", reason)
            if isinstance(model, Transformer) and not isinstance(model, FakeModel):
                lay_out(model.layers)  # it was loaded as stored
            return
        assert isinstance(model, Transformer)
        weights = FORMATS[model.embedding.weight.dtype]
        self.fast[model] = CppModel(model, weights, self.options.threads or None, release=True)
        self.report["isa"], self.report["threads"] = self.fast[model].isa, self.fast[model].threads

    def _pack_heads(self, heads: object, target: nn.Module) -> None:
        """Pack EAGLE's layer or Medusa's heads if the target runs in C++."""
        if not isinstance(heads, EagleHead | MedusaHeads):
            return
        self.report["draft_step"] = "cpp" if target in self.fast else "torch"
        format = self.options.weight_format(self.options.draft_quant)
        if target not in self.fast:
            if format is not None:
                raise UserError(
                    f"--draft-quant {format.name} quantises the heads for the C++ step, and steps do not run in C++ "
                    f"here ({self.report['why_no_cpp_step']}): leave it out"
                )
            return
        from .kernels.cpp import CppEagle, CppMedusa

        assert isinstance(target, Transformer)
        if isinstance(heads, EagleHead):
            self.heads = CppEagle(heads, target, self.fast[target], format)
        else:
            self.heads = CppMedusa(heads, target, self.fast[target], format)

    def in_cpp(self, module: nn.Module) -> bool:
        """Return True if this model, or these heads, run entirely in C++."""
        return module in self.fast or (isinstance(module, EagleHead | MedusaHeads) and self.heads is not None)

    def manager(self, model: Transformer, options: KVOptions, rows: int, tokens: int) -> CacheManager:
        """Make a cache for `rows` sequences of at most `tokens` tokens, as the model's kernels read it."""
        return make_manager(model, options, rows, tokens, torch.float32 if model in self.fast else None)

    def runner(self, model: Transformer, manager: CacheManager) -> CachedRunner:
        if model in self.fast:
            from .cpp_runner import CppRunner

            return CppRunner(model, self.fast[model], manager)
        if model.kernels.draw is TORCH.draw:
            return CachedRunner(model, manager, self.upload)
        return DeviceRunner(model, manager, self.upload)
