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
}


@contextmanager
def random_checkpoint(shape: str) -> Iterator[Path]:
    """Make a temporary folder that loads like any other: config.json, model.safetensors, and the embedded tokenizer."""
    if shape not in SHAPES:
        raise UserError(f"no shape {shape!r}; the shapes are {', '.join(SHAPES)}")
    import torch
    import transformers

    name, values = SHAPES[shape]
    config = getattr(transformers, name)(**values)
    config.bos_token_id = config.eos_token_id = config.vocab_size - 1
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / f"random-{shape}"
        model.save_pretrained(folder)
        del model
        embedded = Path(__file__).parent / "models" / "stdlib-10m"
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(embedded / file, folder / file)
        yield folder
