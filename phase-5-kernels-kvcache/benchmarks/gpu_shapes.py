"""Checkpoints with the shapes of large models and random weights, for measuring speed only.

with shape_folder("gpt2-xl", torch.device("cuda")) as folder: ...
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from common.checkpoint import open_checkpoint
from common.errors import UserError

_GPT2_XL = {"n_embd": 1600, "n_layer": 48, "n_head": 25, "n_positions": 1024, "vocab_size": 50257}
_LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-xl": ("GPT2Config", _GPT2_XL),
    "Llama-3.1-8B": ("LlamaConfig", _LLAMA),
}


@contextmanager
def shape_folder(
    shape: str, device: torch.device, dtype: torch.dtype = torch.bfloat16, **changed: Any
) -> Iterator[Path]:
    """Write a checkpoint with random weights and the embedded tokenizer to a temporary folder.

    `changed` replaces numbers of the configuration. UserError for an unknown shape.
    """
    if shape not in SHAPES:
        raise UserError(f"no shape {shape!r}; the shapes are {', '.join(SHAPES)}")
    import transformers

    name, values = SHAPES[shape]
    config = getattr(transformers, name)(**{**values, **changed})
    config.bos_token_id = config.eos_token_id = config.vocab_size - 1
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / f"random-{shape}"
        model.save_pretrained(folder)
        del model
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(open_checkpoint("stdlib-10m").folder / file, folder / file)
        yield folder
