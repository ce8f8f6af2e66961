"""`--compile`: each layer as one compiled graph, for any length.

torch.compile (Ansel et al. 2024, PyTorch 2) traces a layer and generates C++ or Triton code that fuses everything
between two matrix products into one loop: norms, RoPE and gates no longer write every intermediate tensor to memory.
All layers share their graphs. There are few graphs: one for layers that compute every position, one for the last layer,
which computes only positions whose logits are read, and both again for trees, whose positions and masks differ by row.

    python generate.py --compile --prompt "from pathlib import"
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch

from common.errors import UserError
from common.files import one_line

from .model import Block


@dataclass
class Compiler:
    """The backend of torch.compile. It counts graphs: more of them after the warm-up show an unexpected shape."""

    graphs: int = 0
    seconds: float = 0.0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx  # this import takes seconds, so it is local

        began = time.perf_counter()
        try:
            return cast(Callable[..., Any], compile_fx(graph, inputs))
        finally:
            self.graphs += 1
            self.seconds += time.perf_counter() - began

    def compile(self, *modules: torch.nn.Module) -> None:
        """Compile every layer in these modules at its first call, as one whole graph."""
        # torch limits graphs per function and process, and the layers of all LLMs are one function.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
        torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 1024)
        for module in modules:
            for layer in module.modules():
                if isinstance(layer, Block):
                    for part in ("before", "after"):
                        compiled = torch.compile(getattr(layer, part), backend=self, dynamic=True, fullgraph=True)
                        setattr(layer, part, compiled)

    def warm_up(self, run: Callable[[], object]) -> None:
        """Run once, so that graphs are compiled before decoding. UserError if there is no compiler."""
        try:
            run()
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise UserError(
                f"--compile: {one_line(error.inner_exception)}; it needs a C++ compiler (of CUDA devices: Triton) that "
                "torch can use: install g++ or name one in CXX, or leave out --compile"
            ) from None

    def as_json(self) -> dict[str, float]:
        return {"graphs": self.graphs, "seconds": round(self.seconds, 3)}
