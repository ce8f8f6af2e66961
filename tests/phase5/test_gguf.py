"""The GGUF files that the bench writes for llama.cpp: llama-server reads the vocabulary from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from common.checkpoint import open_checkpoint
from common.tokenizer import Tokenizer
from phase5.config import ModelConfig

gguf: Any = pytest.importorskip("gguf", reason="gguf is not installed: it comes with the extra `peers`")


@pytest.fixture
def fields(bench_part: Callable[[int, str], ModuleType], tmp_path: Path) -> Callable[[Path], dict[str, Any]]:
    """Return what writes a checkpoint of stdlib-1m's shape as GGUF, and reads its fields."""

    def written(folder: Path) -> dict[str, Any]:
        config = ModelConfig.from_hf(open_checkpoint("stdlib-1m").config)
        bench_part(5, "llama_cpp").write_gguf(folder, config, tmp_path / "a.gguf", "f16")
        return {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "a.gguf").fields.items()}

    return written


def test_the_vocabulary_is_in_the_file(fields: Callable[[Path], dict[str, Any]]) -> None:
    checkpoint = open_checkpoint("stdlib-1m")
    found, tokenizer = fields(checkpoint.folder), Tokenizer.load(checkpoint.folder, checkpoint.config, {})
    texts = found["tokenizer.ggml.tokens"]
    assert len(texts) == 4096
    wanted = tokenizer.encode("def read(path):\n    return 1", True)
    stored = json.loads((checkpoint.folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    assert [texts[token] for token in wanted] == [
        text for token in wanted for text, at in stored.items() if at == token
    ]
    assert found["tokenizer.ggml.merges"][0] == "Ġ Ġ"
    assert found["tokenizer.ggml.token_type"][:2] == [gguf.TokenType.CONTROL, gguf.TokenType.NORMAL]
    assert found["tokenizer.ggml.eos_token_id"] == 0


def test_a_checkpoint_without_such_a_tokenizer_has_ids_alone(
    fields: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in open_checkpoint("stdlib-1m").folder.iterdir():
        if file.name != "tokenizer.json":
            (folder / file.name).symlink_to(file)
    assert fields(folder)["tokenizer.ggml.model"] == "no_vocab"
