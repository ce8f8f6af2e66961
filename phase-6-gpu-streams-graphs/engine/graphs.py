"""CUDA graphs: a step's launches, captured once and then replayed by one call.

A device captures steps. `CudaDevice` is a GPU; `RecordedDevice` (recorded.py) records the launches of the CUDA
emulator, so that all of this is tested without a GPU. A graph holds addresses and numbers: whatever changes from step
to step must be in device memory.

    python generate.py --device cuda --cuda-graph on --prompt "from pathlib import"
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from common.errors import UserError

from .determinism import torch_ops
from .kernels import Kernels
from .policies import LOSSLESS

if TYPE_CHECKING:
    from .kv_cache import KVCache
    from .model import Transformer
    from .options import Options

Mode = Literal["auto", "on", "off"]
WARM_UP = 2  # runs of a step before its capture: kernels are compiled, tables and libraries are loaded


class Graph(Protocol):
    def replay(self) -> Tensor:
        """Repeat the captured work; return the step's result, which the next replay overwrites."""
        ...


class Device(Protocol):
    """Captures steps. A step takes nothing, and returns a tensor."""

    reads: int  # copies to the host so far

    def empty(self, nbytes: int) -> Tensor:
        """Allocate memory whose address never changes: uint8 [nbytes]."""
        ...

    def adopt(self, models: list[Transformer], caches: list[KVCache]) -> None:
        """Make weights and caches part of the state that steps may use."""
        ...

    def copy_in(self, to: Tensor, host: Tensor) -> None: ...

    def copy_out(self, tensor: Tensor) -> Callable[[], list[int]]:
        """Begin a copy to the host; the function returned waits for its numbers."""
        ...

    def capture(self, step: Callable[[], Tensor]) -> Graph: ...


class CudaGraph:
    """torch.cuda.CUDAGraph, with the result of its step."""

    def __init__(self, graph: torch.cuda.CUDAGraph, out: Tensor) -> None:
        self.graph, self.out = graph, out

    def replay(self) -> Tensor:
        self.graph.replay()
        return self.out


class CudaDevice:
    """A GPU. Its graphs share one pool of memory, since one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()
        self.side = torch.cuda.Stream(device)  # of captures; they cannot run on the default stream
        self.reads = 0

    def empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def adopt(self, models: list[Transformer], caches: list[KVCache]) -> None:
        """Do nothing: the arrays are on the GPU."""

    def copy_in(self, to: Tensor, host: Tensor) -> None:
        to.copy_(host.pin_memory(), non_blocking=True)  # torch reuses pinned memory only after the copy

    def copy_out(self, tensor: Tensor) -> Callable[[], list[int]]:
        self.reads += 1
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def numbers() -> list[int]:
            copied.synchronize()
            found: list[int] = host.flatten().tolist()
            return found

        return numbers

    @torch.inference_mode()
    def capture(self, step: Callable[[], Tensor]) -> CudaGraph:
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            for _ in range(WARM_UP):
                step()
        torch.cuda.current_stream(self.device).wait_stream(self.side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.side):
            out = step()
        return CudaGraph(graph, out)


@dataclass
class GraphStats:
    """What became of the steps of a run."""

    captures: int = 0
    replays: int = 0
    host_reads: int = 0  # copies to the host in calls that replay, as the device counts them
    uploads: int = 0  # copies to the device: one a call, of several steps
    eager_steps: Counter[str] = field(default_factory=Counter)  # by the reason

    def as_json(self) -> dict[str, object]:
        per_step = self.host_reads / self.replays if self.replays else None
        return {**asdict(self), "eager_steps": dict(self.eager_steps), "host_reads_per_step": per_step}


def why_not_device(device: torch.device, kernels: Kernels) -> str | None:
    """Return why no step of these kernels can be captured on a device; None if it can."""
    from .kernels.cuda.library import emulator

    if device.type != "cuda" and (device.type != "cpu" or emulator() is None):
        return f"graphs need an NVIDIA GPU, and this is {device.type}"
    slow = torch_ops(kernels)
    return f"torch computes {slow}, and a graph holds kernels of --kernels cuda or triton" if slow else None


def why_not_options(options: Options) -> str | None:
    """Return what in these options makes the host look into every step; None if nothing does."""
    needs = {
        f"--kv {options.kv} moves its memory; --kv static or paged does not": options.kv not in ("static", "paged"),
        "--beams computes whole texts": options.beams > 1,
        "--amp casts in torch": options.amp,
        "--compile has graphs of its own": options.compile,
        "--profile tells the parts of a step apart": options.profile is not None,
        "--explain tells the parts of a step apart": options.explain,
        "--record keeps the logits of every step": options.record is not None,
        "penalties count tokens on the host": options.sampling_params().penalised,
    }
    if options.draft != "none":
        needs |= {
            f"--tree {options.tree} builds trees on the host": options.tree != "off",
            f"--drafter {options.drafter} drafts on the host": options.drafter != "model",
            f"--controller {options.controller} decides on the host": options.controller != "fixed",
            f"--policy {options.policy} asks the host": options.policy not in ("auto", *LOSSLESS),
        }
    return next((why for why, holds in needs.items() if holds), None)


def make_device(options: Options, device: torch.device, kernels: Kernels) -> tuple[Device | None, str]:
    """Return the device of a run's graphs, or None and the reason. UserError if `--cuda-graph on` cannot be.

    `auto`: graphs on a GPU, and none on the emulator.
    """
    mode, why_not = options.cuda_graph, why_not_device(device, kernels) or why_not_options(options)
    if mode == "on" and why_not is not None:
        raise UserError(f"--cuda-graph on cannot be: {why_not}; --cuda-graph auto runs such steps one by one")
    if mode == "off" or why_not is not None:
        return None, why_not or "--cuda-graph off"
    if device.type == "cuda":
        return CudaDevice(device), ""
    if mode == "auto":
        return None, "the emulator of CUDA replays graphs with --cuda-graph on alone"
    from .kernels.cuda.library import library
    from .recorded import recorded_device

    return recorded_device(library(device)), ""
