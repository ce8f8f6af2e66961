"""Matrices of bfloat16 as a CPU's product wants to read them.

oneDNN computes products of bfloat16 from blocks of the matrix, in the order in which the instructions take them. Given
a plain matrix it makes the blocks anew for every product, which for the few rows of a short text takes about as long as
the product. The weights never change, so the blocks are made once and the plain matrix is dropped. What torch.compile
traces stays plain: it writes its products itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .weights import give_back_freed


def can_pack(weight: Tensor) -> bool:
    """Whether this torch has the blocked product for such a matrix, on this machine."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class PackedLinear(nn.Module):
    """A Linear whose matrix is kept in blocks."""

    def __init__(self, linear: nn.Linear, rows: int = 64) -> None:
        """`rows` is a typical number of rows that will be multiplied; any number may be."""
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.bias = linear.bias
        self.blocks: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), rows)

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """As Linear. All outputs are computed whatever is asked for: a block cannot be cut."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.blocks, self.bias, "none", [], "")
        return product[..., start:stop]

    @property
    def weight_bytes(self) -> tuple[int, int]:
        """Of the matrix, and of what belongs to it in other formats."""
        return self.blocks.nbytes, 0


def pack_matrices(module: nn.Module) -> None:
    """Replace the linear layers in a module, one after the other, where that helps; embeddings and heads tied to them
    stay as they are."""
    owners = [owner for owner in module.modules() if not isinstance(owner, nn.Linear)]
    for owner in owners:
        for name in [name for name, child in owner.named_children() if isinstance(child, nn.Linear) and name != "head"]:
            if can_pack(getattr(owner, name).weight):
                setattr(owner, name, PackedLinear(getattr(owner, name)))
        give_back_freed()
