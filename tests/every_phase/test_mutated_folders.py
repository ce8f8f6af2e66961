"""Damaged or malicious folders: each loads, or ends in one error line, and nothing else happens.

A seeded generator changes one thing in one file of a small checkpoint: a value in its JSON, a key, or bytes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import torch

from common.errors import UserError
from common.phases import Phase

pytestmark = pytest.mark.newest

CPU = torch.device("cpu")
VALUES: list[Any] = [
    0, 1, 2, 3, 64, -1, 2**31, 10**9, 10**30, 0.5, 1.5, -0.0, 1e-300, math.nan, math.inf, True, False, None, "", "12",
    "a" * 300, "\n\x1b[31m", "\u2028", "../..", "/etc", "\ud800", [], [1], [[]], [None, "x"], {}, {"a": 1},
    {"a": {"b": []}},
]  # fmt: skip
NESTED = b'{"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"


@pytest.fixture(scope="module")
def folder(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a Llama in one shard, with a draft inside, and all the small files that a checkpoint can have."""
    made = Path(shutil.copytree(make_checkpoint("llama", rope_theta=1e4), tmp_path_factory.mktemp("mutated") / "it"))
    shutil.copytree(make_checkpoint("llama", num_hidden_layers=1), made / "small")
    (made / "model.safetensors").rename(made / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (made / "model.safetensors.index.json").write_text(json.dumps(index))
    (made / "lab.json").write_text(json.dumps({"draft": "small"}))
    (made / "tree_acceptance.json").write_text(json.dumps({"model": [[0.6, 0.2], [0.5, 0.1]]}))
    return made


@pytest.fixture(scope="module")
def quantised(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the same in int4, as phase 4 writes it."""
    import phase4
    from phase4.quantize import Format, quantize_model
    from phase4.quantize_files import save_quantized

    to, format = tmp_path_factory.mktemp("mutated") / "int8", Format("int8")
    loaded = phase4.load(str(folder), torch.float32, CPU)
    quantize_model(loaded.model, format)
    save_quantized(to, loaded.checkpoint, loaded.model, format, torch.float32, {"method": "rtn"})
    shutil.copytree(folder / "small", to / "small")
    return to


def change_json(document: Any, random: Random) -> Any:
    """Change one value of a JSON document."""
    if isinstance(document, dict | list) and document and random.random() < 0.75:
        key = random.choice(list(document) if isinstance(document, dict) else range(len(document)))
        deeper = change_json(document[key], random)
        if random.random() < 0.15:
            del document[key]
        elif isinstance(document, dict) and random.random() < 0.05:
            document[str(random.choice(VALUES))[:50]] = document.pop(key)
        else:
            document[key] = deeper
        return document
    if isinstance(document, int | float) and random.random() < 0.3:
        return document * random.choice([-1, 0, 2, 1000, 0.5])
    return random.choice(VALUES)


def change_bytes(content: bytes, random: Random) -> bytes:
    """Return the content cut, emptied, nested too deep, or with other bytes."""
    at = random.randrange(len(content))
    spoilt = bytearray(content)
    for _ in range(random.choice([1, 8])):
        spoilt[random.randrange(min(len(content), 4096))] = random.randrange(256)
    return random.choice([content[:at], b"", NESTED, bytes(spoilt), content[at:]])


def mutate(folder: Path, random: Random) -> tuple[Path, bytes]:
    """Choose a file of the folder, and its new content."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    likelier = [path for path in files if path.name == "config.json"] * 4
    file = random.choice(files + likelier)
    content = file.read_bytes()
    if file.suffix == ".safetensors" or random.random() < 0.15:
        return file, change_bytes(content, random)
    return file, json.dumps(change_json(json.loads(content), random)).encode()


def put(file: Path, content: bytes) -> None:
    """Replace the file by a new one, because the old one may still be mapped."""
    new = file.with_name("new")
    new.write_bytes(content)
    os.replace(new, file)


def use(engine: ModuleType, phase: int, folder: Path) -> None:
    """Read everything that a run reads of a folder: load it and its draft, and write two tokens."""
    options: dict[str, Any] = {"model": str(folder), "device": "cpu", "dtype": "float32", "max_tokens": 2}
    if phase >= 3:
        options |= {"tree": "static", "k": 2}
    if phase >= 5:
        options |= {"kernels": "torch"}
    engine.LLM(engine.Options(**options)).generate(["import os"])


def run(engine: ModuleType, phase: int, folder: Path, seeds: range) -> Counter[str]:
    """Count the mutants that load, and those that are refused in a line."""
    found = Counter[str]()
    for seed in seeds:
        file, content = mutate(folder, Random(seed))
        before = file.read_bytes()
        put(file, content)
        began, line = time.process_time(), ""  # what other processes take does not count
        try:
            use(engine, phase, folder)
            found["loads"] += 1
        except UserError as error:
            found["refused"] += 1
            line = str(error)
        except BaseException as error:
            raise AssertionError(f"seed {seed}, {file.name}: {error!r}\n{content[:2000]!r}") from error
        finally:
            put(file, before)
        assert not line or (line.isprintable() and len(line) < 1500), f"seed {seed}, {file.name}: {line}"
        assert time.process_time() - began < 20, f"seed {seed}, {file.name}"  # far more than is needed
    return found


def test_a_mutated_folder_loads_or_is_refused(engine: ModuleType, phase: Phase, folder: Path) -> None:
    use(engine, phase.number, folder)
    found = run(engine, phase.number, folder, range(60))
    assert min(found["loads"], found["refused"]) > 8, found


def test_a_mutated_quantised_folder_loads_or_is_refused(engine: ModuleType, phase: Phase, quantised: Path) -> None:
    if phase.number < 4:
        with pytest.raises(UserError, match=r"quantised by|needs scales"):
            use(engine, phase.number, quantised)
        return
    use(engine, phase.number, quantised)
    found = run(engine, phase.number, quantised, range(20))
    assert min(found["loads"], found["refused"]) > 2, found


@pytest.mark.slow
def test_many_mutated_folders(engine: ModuleType, phase: Phase, folder: Path, quantised: Path) -> None:
    run(engine, phase.number, folder, range(1000, 1800))
    if phase.number >= 4:
        run(engine, phase.number, quantised, range(2000, 2400))


@pytest.mark.newest(1)
@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers should be less than or equal to 1024, got 1000000000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers should be greater than or equal to 1, got 0"),
        ({"num_hidden_layers": 200}, "missing: model.layers"),
        ({"vocab_size": 2**24}, "shape"),
        ({"vocab_size": 10**30}, "vocab_size should be "),
        ({"hidden_size": -48}, "hidden_size should be greater"),
        ({"hidden_size": 48.0}, "hidden_size should be a valid integer, got 48.0"),
        ({"hidden_size": True}, "hidden_size should be a valid integer, got True"),
        ({"intermediate_size": "64"}, "intermediate_size should be a valid integer, got '64'"),
        ({"num_attention_heads": [6]}, r"num_attention_heads should be a valid integer, got \[6\]"),
        ({"num_attention_heads": 5}, "multiple of num_key_value_heads"),
        ({"head_dim": 7}, "heads of 7 features; their number should be even"),
        ({"max_position_embeddings": 0}, "max_position_embeddings should be greater"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps should be a finite number, got nan"),
        ({"rms_norm_eps": 0}, "rms_norm_eps should be greater than 0"),
        ({"hidden_act": ["silu"]}, "hidden_act should be a valid string"),
        ({"rope_parameters": "linear"}, "rope_parameters should be a JSON object, got 'linear'"),
        ({"rope_parameters": {"rope_type": {"a": 1}}}, "one set of values for all layers"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "rope_parameters.factor should be greater"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings should be a valid boolean, got 'no'"),
        ({"architectures": {"a": 1}}, "architectures should be a list of names, got {'a': 1}"),
        ({"architectures": [["LlamaForCausalLM"]]}, "unsupported architecture"),
        ({"quantization_config": [1]}, r"quantised by \[1\]"),
    ],
)
def test_what_config_json_cannot_say(
    engine: ModuleType, folder: Path, tmp_path: Path, keys: dict[str, Any], words: str
) -> None:
    """One line names the model, the file and the key; at once, and without allocating the requested sizes."""
    wrong = Path(shutil.copytree(folder, tmp_path / "wrong"))
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**config, **keys}))
    with pytest.raises(UserError, match=words) as error:
        engine.load(str(wrong), torch.float32, CPU)
    assert str(wrong) in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("family", ["gpt2", "opt", "mistral", "qwen2", "qwen3"])
def test_every_family_is_checked(
    engine: ModuleType, make_checkpoint: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    wrong = Path(shutil.copytree(make_checkpoint(family), tmp_path / "wrong"))
    config = json.loads((wrong / "config.json").read_text())
    for key in ("n_layer", "n_embd", "n_head") if family == "gpt2" else ("num_hidden_layers", "hidden_size"):
        (wrong / "config.json").write_text(json.dumps({**config, key: 10**9}))
        with pytest.raises(UserError, match=f"config.json: {key} should be less than or equal to"):
            engine.load(str(wrong), torch.float32, CPU)
