"""What a config.json may say: every form gives the logits of transformers, or one line that names the key."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common.errors import UserError

CPU = torch.device("cpu")
Make = Callable[..., Path]
MISSING = object()


def changed(folder: Path, to: Path, **keys: Any) -> Path:
    """A copy of a checkpoint with other values in its config.json; MISSING takes a key out."""
    shutil.copytree(folder, to)
    config = {**json.loads((to / "config.json").read_text()), **keys}
    config = {key: value for key, value in config.items() if value is not MISSING}
    (to / "config.json").write_text(json.dumps(config))
    return to


def check(engine: ModuleType, folder: Path, length: int = 40) -> None:
    """The logits of the engine are those of transformers."""
    tokens = torch.randint(1, 320, (1, length), generator=torch.Generator().manual_seed(4))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = reference(tokens, use_cache=False).logits
        logits = engine.load(str(folder), torch.float32, CPU).model(tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def refused(engine: ModuleType, folder: Path, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        engine.load(str(folder), torch.float32, CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("names", [MISSING, None, [], ["GPT2Model"]])
def test_the_family_by_model_type(engine: ModuleType, make_checkpoint: Make, tmp_path: Path, names: Any) -> None:
    check(engine, changed(make_checkpoint("gpt2"), tmp_path / "changed", architectures=names))


@pytest.mark.parametrize("names", [["GPT2ForSequenceClassification"], ["FooForCausalLM"], ["LlamaModel", "x"]])
def test_other_architectures_are_refused(
    engine: ModuleType, make_checkpoint: Make, tmp_path: Path, names: list[str]
) -> None:
    folder = changed(make_checkpoint("gpt2"), tmp_path / "changed", architectures=names, model_type="foo")
    refused(engine, folder, f"{names[0]}.*supported are GPT2LMHeadModel")


def test_a_null_quantization_config_is_none(engine: ModuleType, make_checkpoint: Make, tmp_path: Path) -> None:
    check(engine, changed(make_checkpoint("llama"), tmp_path / "changed", quantization_config=None))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_stored_head_beats_the_tied_flag(
    engine: ModuleType, make_checkpoint: Make, tmp_path: Path, family: str
) -> None:
    folder = make_checkpoint(family, tie_word_embeddings=False)
    check(engine, changed(folder, tmp_path / "changed", tie_word_embeddings=True))


def test_an_equal_head_stays_tied(engine: ModuleType, make_checkpoint: Make, tmp_path: Path) -> None:
    folder = changed(make_checkpoint("llama", tie_word_embeddings=True), tmp_path / "changed")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = engine.load(str(folder), torch.float32, CPU).model
    assert model.head.weight is model.embedding.weight
    assert model.config.tied
    check(engine, folder)
