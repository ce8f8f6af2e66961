"""The model computes what transformers computes, for every supported family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.modules("config.py", "load.py", "model.py", "rope.py")
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt2", "opt"]


def check_logits(engine: ModuleType, folder: Path, positions: torch.Tensor | None = None) -> None:
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    loaded = engine.load(str(folder), torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(loaded.config.vocab_size, (2, 33), generator=generator)
    with torch.no_grad():
        extra = {} if positions is None else {"position_ids": positions[None]}
        expected = reference(tokens, use_cache=False, **extra).logits
    got = loaded.model(tokens, positions)
    assert expected.std() > 0.3  # a flat model would agree with anything
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(engine: ModuleType, make_checkpoint: Callable[..., Path], family: str) -> None:
    check_logits(engine, make_checkpoint(family))


@pytest.mark.newest(1)
@pytest.mark.parametrize("family", FAMILIES)
def test_tied_and_untied_heads(engine: ModuleType, make_checkpoint: Callable[..., Path], family: str) -> None:
    for tied in (True, False):
        check_logits(engine, make_checkpoint(family, tie_word_embeddings=tied))


def test_embedded_model_logits(engine: ModuleType) -> None:
    """stdlib-10m in float32, on a real prompt."""
    loaded = engine.load("stdlib-10m", torch.float32, torch.device("cpu"))
    reference = AutoModelForCausalLM.from_pretrained(loaded.checkpoint.folder, dtype=torch.float32).eval()
    tokens = torch.tensor([loaded.tokenizer.encode("class Shape:\n    def area(self):\n        return self.")])
    with torch.no_grad():
        expected = reference(tokens, use_cache=False).logits
    torch.testing.assert_close(loaded.model(tokens), expected, rtol=1e-4, atol=1e-4)
