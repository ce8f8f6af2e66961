"""bfloat16 matrices in the blocked layout of a CPU's matrix product.

oneDNN computes bfloat16 products from blocks of the matrix, in the order in which the instructions read them. A plain
matrix is reordered into blocks for every product, which takes about as long as the product itself for the few rows of a
short sequence. The weights never change, so the blocks are made once and the plain matrix is dropped. Layers that
torch.compile traces keep plain matrices, because it generates its own products.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .weights import give_back_freed


def can_pack(weight: Tensor) -> bool:
    """Return True if torch has the blocked product for this matrix on this machine."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class PackedLinear(nn.Module):
    """A Linear whose matrix is kept in blocks."""

    def __init__(self, linear: nn.Linear, rows: int = 64) -> None:
        """Reorder the matrix. `rows` is a typical number of input rows, a hint for the layout."""
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.bias = linear.bias
        self.blocks: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), rows)

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Multiply as Linear does. All outputs are computed before slicing, because blocks cannot be cut."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.blocks, self.bias, "none", [], "")
        return product[..., start:stop]

    @property
    def weight_bytes(self) -> tuple[int, int]:
        """Return the bytes of the matrix, which has no scales."""
        return self.blocks.nbytes, 0


def pack_matrices(module: nn.Module) -> None:
    """Replace the linear layers of a module one after the other, where the blocked product exists. Embeddings, and
    heads tied to them, stay plain."""
    owners = [owner for owner in module.modules() if not isinstance(owner, nn.Linear)]
    for owner in owners:
        for name in [name for name, child in owner.named_children() if isinstance(child, nn.Linear) and name != "head"]:
            if can_pack(getattr(owner, name).weight):
                setattr(owner, name, PackedLinear(getattr(owner, name)))
        give_back_freed()
