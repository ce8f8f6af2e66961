"""`lab pull`: download a model from the Hugging Face hub into the cache (once), and check all its tensors.

A model that pull accepts can later be loaded without the network.

    lab pull HuggingFaceTB/SmolLM2-135M
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch

from common.checkpoint import open_checkpoint
from common.device import dtype_name
from common.errors import UserError
from common.lab.arguments import Parser

# Tensors of old checkpoints that are not parameters: causal masks, rotary frequencies, position numbers.
BUFFER = re.compile(r"(^|\.)(attn\.masked_bias|rotary_emb\.inv_freq|position_ids)$")
MASK = re.compile(r"(^|\.)attn\.bias$")  # GPT-2's [1, 1, T, T] mask; with one axis it would be a true bias


def _is_parameter(name: str, tensor: torch.Tensor, config: dict[str, Any]) -> bool:
    """Return whether the tensor counts as parameters. Buffers do not, nor the second copy of tied embeddings."""
    if name.endswith("lm_head.weight") and config.get("tie_word_embeddings", True):
        return False
    return not BUFFER.search(name) and not (MASK.search(name) and tensor.ndim == 4)


def _wrong_values(tensor: torch.Tensor) -> int:
    """Count the values that are NaN or infinite."""
    if not tensor.is_floating_point():
        return 0
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # fp8 has no isfinite
    return int((~values.isfinite()).sum())


def run(arguments: list[str]) -> int:
    """Print one line per finding. Raises UserError if the model is unavailable or damaged."""
    parser = Parser(prog="lab pull", description="Download a model from the Hugging Face hub and check it.")
    parser.add_argument("name", metavar="NAME", help="a hub id (owner/name), a folder, or an embedded model")
    name = parser.parse_args(arguments).name

    checkpoint = open_checkpoint(name)
    named = checkpoint.config.get("architectures") or ["not named in config.json"]
    print(f"folder        {checkpoint.folder}")
    architectures = ", ".join(map(str, named if isinstance(named, list) else [named]))
    print(f"architecture  {architectures} (model type {checkpoint.config.get('model_type', 'not named')})")

    values_by_dtype: Counter[str] = Counter()
    tensors = parameters = stored_bytes = 0
    for tensor_name, tensor in checkpoint.tensors():
        wrong = _wrong_values(tensor)
        if wrong:
            raise UserError(f"{name}: tensor {tensor_name} holds {wrong} values that are NaN or infinite")
        tensors += 1
        stored_bytes += tensor.nbytes
        values_by_dtype[dtype_name(tensor.dtype)] += tensor.numel()
        if _is_parameter(tensor_name, tensor, checkpoint.config):
            parameters += tensor.numel()
    if not tensors:
        raise UserError(f"{name}: the weight files hold no tensors")

    print(f"parameters    {parameters:,} ({parameters / 1e6:.1f}M)")
    print(f"stored as     {', '.join(values_by_dtype)}, {stored_bytes / 2**20:.1f} MiB")
    print(f"tensors       {tensors}, all readable and finite")
    print(f"content hash  {checkpoint.content_hash()}")
    return 0
