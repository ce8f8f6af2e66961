"""Checkpoints from folders: every weight format, little memory, no code, and one clear line for every fault."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import common.checkpoint
from common.checkpoint import Checkpoint, embedded_models, open_checkpoint
from common.errors import UserError

ROOT = Path(common.checkpoint.__file__).parents[1]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=7,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def saved(llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write one safetensors file with transformers. Tests that damage it copy it first."""
    folder = tmp_path_factory.mktemp("saved")
    llama.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def save_bin(tensors: Tensors, path: Path) -> None:
    torch.save(tensors, path)


def save_old_bin(tensors: Tensors, path: Path) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def save_sharded_bin(tensors: Tensors, path: Path) -> None:
    names = sorted(tensors)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for shard, inside in shards.items():
        torch.save({name: tensors[name] for name in inside}, path.with_name(shard))
    weight_map = {name: shard for shard, inside in shards.items() for name in inside}
    path.with_name("pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def assert_holds(checkpoint: Checkpoint, model: LlamaForCausalLM) -> None:
    found = list(checkpoint.tensors())
    expected = model.state_dict()
    assert sorted(name for name, _ in found) == sorted(expected)
    for name, tensor in found:
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_one_file_of_safetensors_with_its_configs(saved: Path, llama: LlamaForCausalLM) -> None:
    checkpoint = open_checkpoint(str(saved))
    assert (checkpoint.name, checkpoint.folder) == (str(saved), saved)
    assert checkpoint.config["num_key_value_heads"] == 2
    assert checkpoint.generation_config["eos_token_id"] == 7
    assert_holds(checkpoint, llama)


def test_sharded_safetensors(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_holds(open_checkpoint(str(tmp_path)), llama)


@pytest.mark.parametrize("save", [save_bin, save_old_bin, save_sharded_bin])
def test_pytorch_bin(folder: Path, llama: LlamaForCausalLM, save: Callable[[Tensors, Path], None]) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "generation_config.json").unlink()
    save(dict(llama.state_dict()), folder / "pytorch_model.bin")
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.generation_config == {}
    assert_holds(checkpoint, llama)


def test_safetensors_win_over_bin(folder: Path, llama: LlamaForCausalLM) -> None:
    torch.save({name: tensor + 1 for name, tensor in llama.state_dict().items()}, folder / "pytorch_model.bin")
    assert_holds(open_checkpoint(str(folder)), llama)


def test_writing_to_a_tensor_leaves_the_file_alone(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    before = checkpoint.content_hash()
    for _, tensor in checkpoint.tensors():
        tensor.zero_()
    assert checkpoint.content_hash() == before


class Touch:
    """A hostile .bin: unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, int]]:
        return os.open, (str(self.path), os.O_CREAT)


@pytest.mark.parametrize("save", [save_bin, save_old_bin])
def test_code_in_a_bin_never_runs(folder: Path, tmp_path: Path, save: Callable[[Any, Path], None]) -> None:
    (folder / "model.safetensors").unlink()
    evil = {"lm_head.weight": Touch(tmp_path / "ran")}
    pickle.loads(pickle.dumps(evil))
    (tmp_path / "ran").unlink()  # so the code does run if allowed
    save(evil, folder / "pytorch_model.bin")
    assert "pytorch_model.bin: holds more than plain tensors" in error_of(folder)
    assert not (tmp_path / "ran").exists()


def error_of(name: str | Path) -> str:
    """Return the error line of opening and reading a checkpoint."""
    with pytest.raises(UserError) as caught:
        list(open_checkpoint(str(name)).tensors())
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 0.999])
def test_a_truncated_safetensors_file_is_named(folder: Path, share: float) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert f"{path}: damaged or incomplete" in error_of(folder)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 and then nothing", b"version https://git-lfs.github.com/spec/v1"]
)
def test_a_damaged_bin_is_named(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    assert error_of(folder).startswith(f"{folder / 'pytorch_model.bin'}: ")


def test_a_bin_that_is_no_dictionary_of_tensors(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model": {"weight": torch.zeros(2)}, "step": 3}, folder / "pytorch_model.bin")
    assert "expected a dictionary of tensors" in error_of(folder)


def test_missing_shard_is_named_before_anything_is_loaded(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path, max_shard_size="10KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: the file is missing"):
        open_checkpoint(str(tmp_path))


INDICES = [
    "{",
    "[]",
    "{}",
    '{"weight_map": {}}',
    '{"weight_map": {"a": 5}}',
    '{"weight_map": {"a": ["b"]}}',
    '{"weight_map": {"a": "../model.safetensors"}}',
    '{"weight_map": {"a": ""}}',
    '{"weight_map": {"a": "b\\u0000"}}',
    json.dumps({"weight_map": {"a": "b" * 300}}),
    json.dumps({"weight_map": {"a": "é" * 200}}),
]


@pytest.mark.parametrize("index", INDICES)
def test_a_wrong_index(folder: Path, index: str) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    assert error_of(folder).startswith(f"{folder / 'model.safetensors.index.json'}: ")


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert f"{folder}: no weights; expected one of model.safetensors, " in error_of(folder)


def test_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert f"{folder}: the folder holds no config.json" in error_of(folder)


@pytest.mark.parametrize("content", [b'{"model_type": ', b"\xff\xfe", b"[1]"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_config_that_is_no_json(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    assert error_of(folder).startswith(f"{folder / name}: ")


def test_a_file_in_place_of_its_folder(saved: Path) -> None:
    assert "expected the folder that holds it" in error_of(saved / "model.safetensors")


@pytest.fixture
def embedded(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a replacement for common/models with one model, `tiny`, and one folder that is not a model."""
    models = tmp_path / "models"
    shutil.copytree(saved, models / "tiny")
    (models / "notes").mkdir()
    monkeypatch.setattr(common.checkpoint, "MODELS", models)
    return models


@pytest.mark.parametrize("name", ["", "./nope", "a/b/c", "~nobody-of-that-name/x", "with space", "a\0b", "a" * 5000])
def test_an_unknown_name_says_which_names_there_are(embedded: Path, name: str) -> None:
    message = error_of(name)
    assert message.startswith(f"unknown model {name!r}: ")
    assert "the embedded models are tiny; give a local folder by its path, a hub model as owner/name" in message


def test_an_embedded_name_means_the_embedded_model(
    embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert embedded_models() == ["tiny"]
    assert open_checkpoint("tiny").folder == embedded / "tiny"


def test_the_hash_names_the_content_and_not_the_place(saved: Path, folder: Path) -> None:
    expected = open_checkpoint(str(saved)).content_hash()
    assert open_checkpoint(str(folder)).content_hash() == expected
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    other_weights = open_checkpoint(str(folder)).content_hash()
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert len({expected, other_weights, open_checkpoint(str(folder)).content_hash()}) == 3


def run_python(code: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_a_local_checkpoint_opens_without_slow_imports(saved: Path) -> None:
    code = (
        "import sys; from common.checkpoint import open_checkpoint; import common.tokenizer\n"
        "open_checkpoint(sys.argv[1]).content_hash()\n"
        "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    assert run_python(code, str(saved)).strip() == "[]"


# All resident memory counts, including the mapped pages of the file.
COPY_AND_WATCH = """
import sys, psutil, torch
from common.checkpoint import open_checkpoint
shapes = dict(embedding=(16384, 512), **{f"layer.{i}": (512, 2048) for i in range(16)})
parameters = {name: torch.empty(shape) for name, shape in shapes.items()}
process = psutil.Process()
before = peak = process.memory_info().rss
for name, tensor in open_checkpoint(sys.argv[1]).tensors():
    parameters[name].copy_(tensor)
    peak = max(peak, process.memory_info().rss)
print((peak - before) / sum(p.nbytes for p in parameters.values()))
"""


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_copying_tensor_by_tensor_takes_little_more_memory_than_the_weights(file: str, tmp_path: Path) -> None:
    # The embedding is a third of the weights, as it is in GPT-2, and comes last in the file, the worst position.
    tensors = {f"layer.{i}": torch.ones(512, 2048) for i in range(16)} | {"embedding": torch.ones(16384, 512)}
    if file.endswith(".bin"):
        torch.save(tensors, tmp_path / file)
    else:
        save_file(tensors, tmp_path / file)
    (tmp_path / "config.json").write_text("{}")
    share = float(run_python(COPY_AND_WATCH, str(tmp_path)))
    assert 0.95 < share < 1.2
