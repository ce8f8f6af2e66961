"""A checkpoint of a real model's shape with random weights, to measure speed when the weights are not available.

Speed does not depend on the weights' values. Acceptance, quality and text do, so only speed may be measured on such a
checkpoint, and the report must say so.

    with random_checkpoint("gpt2") as folder: ...
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import UserError

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {}),  # transformers' defaults are GPT-2 small: 124M parameters
    "100m": ("LlamaConfig", {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_key_value_heads": 12, "vocab_size": 32_000, "max_position_embeddings": 1024, "tie_word_embeddings": True,
    }),
    "tinyllama-1.1b": ("LlamaConfig", {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32_000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    }),
    "qwen3-0.6b": ("Qwen3Config", {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 40_960,
        "rope_theta": 1_000_000.0, "tie_word_embeddings": True,
    }),
}  # fmt: skip


@contextmanager
def random_checkpoint(shape: str, dtype: str = "float32") -> Iterator[Path]:
    """Make a temporary folder that loads like any other: config.json, model.safetensors, and the embedded tokenizer.

    The weights are the same at every call. Their files have the number format `dtype`.
    """
    if shape not in SHAPES:
        raise UserError(f"no shape {shape!r}; the shapes are {', '.join(SHAPES)}")
    import torch
    import transformers

    name, values = SHAPES[shape]
    config = getattr(transformers, name)(**values)
    config.bos_token_id = config.eos_token_id = config.vocab_size - 1
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / f"random-{shape}"
        model.save_pretrained(folder)
        del model
        embedded = Path(__file__).parent / "models" / "stdlib-10m"
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(embedded / file, folder / file)
        yield folder
