"""Which part of a model a rank holds, and how a checkpoint's tensors are cut to it.

The tensors are views of memory-mapped files, so a rank copies its part and nothing else.

    Shard.of("gather", 0, 2, config).part("layers.0.ffn.gate.weight", stored)
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from common.errors import UserError

from ..config import ModelConfig
from ..model import Block, Embedding, Linear, Transformer
from ..weights import split

Mode = Literal["gather", "reduce", "layers"]
WHOLE = slice(None)
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


def sizes_that_fit(mode: Mode, config: ModelConfig, most: int = 64) -> list[int]:
    """List the numbers of ranks, from 2 on, that a model can be split over."""
    return [ranks for ranks in range(2, most + 1) if why_not(mode, ranks, config) is None]


def why_not(mode: Mode, ranks: int, config: ModelConfig) -> str | None:
    """Return why a model cannot be split over so many ranks, or None."""
    if mode == "layers":
        return f"{ranks} does not divide its {config.layers} layers" if config.layers % ranks else None
    sizes = {"heads": config.heads, "inner features": config.ffn_width, "features": config.width}
    for what, size in sizes.items():
        if size % ranks:
            return f"{ranks} does not divide its {size} {what}"
    if config.kv_heads % ranks and ranks % config.kv_heads:
        return f"{ranks} is neither a divisor nor a multiple of its {config.kv_heads} key-value heads"
    return "its vocabulary is too small" if config.vocab_size <= -(-config.vocab_size // ranks) * (ranks - 1) else None


def check_fits(mode: Mode, ranks: int, config: ModelConfig, name: str) -> None:
    """Raise UserError, with the sizes that fit, for a model that cannot be split over so many ranks."""
    if (reason := why_not(mode, ranks, config)) is None:
        return
    option = "--pipeline-parallel" if mode == "layers" else "--tensor-parallel"
    fitting = ", ".join(map(str, sizes_that_fit(mode, config)))
    raise UserError(
        f"{name} cannot be split over {ranks} processes: {reason}; "
        f"{option} can be {fitting if fitting else 'no number but 1 for this model'}"
    )


@dataclass(frozen=True)
class Shard:
    """The part of rank `rank` of `ranks`. `whole` is the configuration of the model, `local` that of the part.

    gather: every matrix is split by outputs. reduce: `output` and `down` are split by inputs (Shoeybi et al. 2019).
    Heads, inner features and the vocabulary are split in both; key-value heads that are fewer than the ranks are
    replicated. layers: neighbouring layers, whole.
    """

    mode: Mode
    rank: int
    ranks: int
    whole: ModelConfig
    local: ModelConfig

    @staticmethod
    def of(mode: Mode, rank: int, ranks: int, whole: ModelConfig) -> Shard:
        if mode == "layers":
            count = whole.layers // ranks
            windows = tuple(whole.window_of(rank * count + layer) for layer in range(count))
            local = dataclasses.replace(whole, layers=count, windows=windows, tied=False)
        else:
            local = dataclasses.replace(
                whole,
                heads=whole.heads // ranks,
                kv_heads=max(1, whole.kv_heads // ranks),
                ffn_width=whole.ffn_width // ranks,
            )
        return Shard(mode, rank, ranks, whole, local)

    @staticmethod
    def ends(whole: ModelConfig) -> Shard:
        """Return what lies before and after the layers: the embedding, the last norm, the output matrix."""
        return Shard("layers", 0, 1, whole, dataclasses.replace(whole, layers=0))

    @property
    def last(self) -> bool:
        return self.rank == self.ranks - 1

    @property
    def vocab(self) -> int:
        """Return the rows of the embedding and of the output matrix in each rank; the last one may have fewer."""
        return -(-self.whole.vocab_size // self.ranks)

    def _range(self, size: int) -> slice:
        """Return this rank's part of so many rows or columns."""
        share = size // self.ranks
        return slice(self.rank * share, (self.rank + 1) * share)

    def _vocabulary(self) -> slice:
        return slice(self.rank * self.vocab, min((self.rank + 1) * self.vocab, self.whole.vocab_size))

    def cut(self, model: Transformer) -> Transformer:
        """Give a Transformer of the local configuration, on the device meta, the shapes of this part; return it."""
        config, whole = self.local, self.whole
        if self.mode == "layers":
            if self.rank:
                model.embedding = Embedding(0, config.width)
            if not self.last:
                model.head = cast("Linear", None)  # another rank has it
            return model
        rows = self._vocabulary()
        model.embedding = Embedding(rows.stop - rows.start, config.width)
        model.head = Linear(config.width, rows.stop - rows.start, bias=False)
        if self.mode == "gather":
            columns = config.width // self.ranks
            for layer in model.layers:
                assert isinstance(layer, Block)
                mixed = whole.heads * whole.head_dim
                layer.attention.output = Linear(mixed, columns, bias=whole.output_bias)
                layer.ffn.down = Linear(whole.ffn_width, columns, bias=whole.mlp_bias)
        return model

    def part(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        """Return the local name and this rank's rows of one of our tensors, or None if it has no part of it."""
        if self.mode == "layers":
            return self._of_layers(name, tensor)
        if name.endswith((".order", ".factor")):  # of the input features of a quantised matrix
            return name, tensor
        if name == "embedding.weight" or name.startswith("head."):
            return name, tensor[self._vocabulary()]
        if (found := _LAYER.match(name)) is None:
            return name, tensor
        return name, self._rows(found[2], tensor)

    def part_of_fused(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        """As `part`, for one of our tensors that may hold several matrices, such as query, key and value."""
        if self.mode == "layers" or name.endswith(".factor"):
            return self.part(name, tensor)
        parts = [self.part(*single) for single in split({name: tensor}, self.whole).items()]
        return name, torch.cat([part[1] for part in parts if part is not None])

    def _rows(self, name: str, tensor: Tensor) -> Tensor:
        module, _, kind = name.rpartition(".")
        if module in ("attention.query", "ffn.gate", "ffn.up"):
            return tensor[self._range(len(tensor))]
        if module in ("attention.key", "attention.value"):
            d, count = self.whole.head_dim, self.local.kv_heads
            first = self.rank * self.whole.kv_heads // self.ranks  # ranks that share a head, if there are fewer heads
            return tensor[first * d : (first + count) * d]
        if module in ("attention.output", "ffn.down"):
            if self.mode == "gather":
                return tensor[self._range(len(tensor))]
            if kind == "bias" and self.rank:
                return torch.zeros_like(tensor)  # partial sums are added up: one rank adds the bias
        return tensor

    def columns(self, name: str) -> slice:
        """Return this rank's columns of a matrix: all, unless it is split by inputs."""
        found = _LAYER.match(name)
        if self.mode != "reduce" or found is None:
            return WHOLE
        if found[2] == "attention.output.weight":
            return self._range(self.whole.heads * self.whole.head_dim)
        return self._range(self.whole.ffn_width) if found[2] == "ffn.down.weight" else WHOLE

    def _of_layers(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        if found := _LAYER.match(name):
            number = int(found[1]) - self.rank * self.local.layers
            return (f"layers.{number}.{found[2]}", tensor) if 0 <= number < self.local.layers else None
        if name == "embedding.weight" and self.rank:
            return ("head.weight", tensor) if self.last and self.whole.tied else None
        if name.startswith("head."):
            return (name, tensor) if self.last and not self.whole.tied else None
        return name, tensor

    def complete(self, model: Transformer, expected: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        """Give an embedding that another rank has this model's dtype and device, which others read from it."""
        if not len(model.embedding.weight):
            weight = torch.empty(0, self.local.width, dtype=dtype, device=device)
            model.embedding.weight = nn.Parameter(weight, requires_grad=False)
            expected.pop("embedding.weight", None)
