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
from .graph_steps import GraphSteps
from .graphs import make_device
from .kernels import TORCH, Kernels, registry
from .kernels.cuda import MOST_TOKENS
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
    from .parallel.group import Group

FORMATS: dict[torch.dtype, Weights] = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Backends:
    """The kernels that `--kernels` selects for a device, and the models whose steps run in C++."""

    def __init__(self, options: Options, device: torch.device, dtype: torch.dtype, group: Group | None = None) -> None:
        """Select the kernels. UserError for a backend that was asked for by name and cannot run.

        group: of the processes that share the models.
        """
        self.options, self.group = options, group
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
        graphed, why_not = make_device(options, device, self.kernels)
        self.graphs = GraphSteps(graphed) if graphed is not None else None
        self.why_no_graph = why_not

    def graph_stats(self) -> dict[str, object]:
        """Say how many steps were replayed, or why none was."""
        return self.graphs.stats.as_json() if self.graphs is not None else {"why_not": self.why_no_graph}

    @property
    def multi_step(self) -> MultiStep | None:
        """Return what makes several steps in one call: C++, or graphs. None if steps are made one by one."""
        if self.graphs is not None:
            return self.graphs
        if not self.fast or self.group is not None:  # the ranks of a group are told of every step
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

    def take(self, models: Iterable[nn.Module], others: Iterable[object], beside: Transformer | None = None) -> None:
        """Give these models the chosen kernels, and pack those that can run in C++; `others` call ops as well.

        The first model is the target; its draft heads may be among the others. beside: the model whose embedding and
        output matrix the heads read, by default the target.
        """
        models, others = list(models), list(others)
        if beside is not None and beside is not models[0]:
            models.append(beside)
        for each in (*models, *others):
            registry.use(each, self.kernels)
        if self.whole_steps:
            for model in models:
                if model not in self.fast:
                    self._pack(model)
        for each in others:
            self._pack_heads(each, beside or models[0])

    def _pack(self, model: nn.Module) -> None:
        """Pack a model for C++, or report why not. UserError if C++ was asked for by name."""
        from .kernels.cpp import CppModel
        from .kernels.cpp.library import checked_threads, default_threads
        from .kernels.cpp.weights import why_not_model
        from .parallel.split_model import Ends, split_model

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
        threads = self.options.threads or None
        if self.options.parallel_streams:  # the draft model, packed after the target, gets one
            threads = 1 if self.fast else max(1, checked_threads(threads) - 1)
        if self.group is not None and threads is None:
            threads = max(1, default_threads() // self.group.local)
        if self.group is not None and self.splits(model):
            self.fast[model] = split_model(self.group, self.group.shards[model], self.options, model, weights, threads)
        elif len(model.layers):
            self.fast[model] = CppModel(model, weights, threads, release=True)
        else:
            self.fast[model] = Ends(model, weights, threads)
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

    def computed(self, model: Transformer) -> torch.dtype:
        """Return the dtype in which the model's attention reads its cache."""
        return torch.float32 if model in self.fast else model.embedding.weight.dtype

    def drafts_in_cpp(self, model: nn.Module) -> bool:
        """Return True if C++ draws this draft model's chains. The ranks of a group make single steps."""
        return self.in_cpp(model) and not self.splits(model)

    def splits(self, model: nn.Module) -> bool:
        """Return True if several processes share this model."""
        return self.group is not None and model in self.group.shards

    def manager(self, model: Transformer, options: KVOptions, rows: int, tokens: int) -> CacheManager:
        """Make a cache for `rows` sequences of at most `tokens` tokens, as the model's kernels read it."""
        manager = make_manager(model, options, rows, tokens, self.computed(model))
        if self.group is not None and self.splits(model):
            from .parallel.split_model import SplitModel, share_cache

            split = self.fast[model]
            assert isinstance(split, SplitModel)
            share_cache(self.group, split, list(self.group.shards).index(model), manager, options)
        return manager

    def runner(self, model: Transformer, manager: CacheManager) -> CachedRunner:
        if model in self.fast:
            from .cpp_runner import CppRunner

            return CppRunner(model, self.fast[model], manager)
        if model.kernels.draw is TORCH.draw:
            return CachedRunner(model, manager, self.upload)
        runner = DeviceRunner(model, manager, self.upload)
        if self.options.deterministic:
            runner.chunk = MOST_TOKENS  # torch multiplies longer sequences
        return runner
