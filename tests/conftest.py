"""Fixtures shared by all tests: the phases, and small checkpoints made with transformers."""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import settings
from jsonschema import Draft202012Validator

from common.models.train_tokenizer import save_tokenizer, train_tokenizer
from common.phases import Phase, phases
from common.recording import SCHEMA, Recording, contradictions, read_recording
from tests.support.beside import BESIDE, forget
from tests.support.covering import mark_slow
from tests.support.loading import loaded_once

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "Llama",
        {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 6, "num_key_value_heads": 2},
    ),
    "mistral": (
        "Mistral",
        {
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "sliding_window": 8,
        },
    ),
    "qwen2": (
        "Qwen2",
        {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 6, "num_key_value_heads": 2},
    ),
    "qwen3": (
        "Qwen3",
        {
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
    ),
    "gpt2": ("GPT2", {"n_embd": 48, "n_head": 4, "n_positions": 128}),
    "opt": (
        "OPT",
        {"hidden_size": 48, "ffn_dim": 64, "num_attention_heads": 4, "word_embed_proj_dim": 48, "dropout": 0.0},
    ),
}
VOCABULARY = 320

# Triton decides at its first import whether kernels are interpreted, and torch.compile imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("lab", deadline=None)  # a slow machine is not a failure
settings.load_profile("lab")


def reference_model(family: str, **overrides: Any) -> Any:
    """Make a small transformers model with weights large enough that every part of it changes the logits."""
    import transformers

    prefix, shape = SMALL[family]
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2}
    layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
    positions = {} if family == "gpt2" else {"max_position_embeddings": 128}
    config = getattr(transformers, f"{prefix}Config")(**{**common, layers: 2, **positions, **shape, **overrides})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # biases and norms start as zeros and ones, which would hide errors
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "position" in name or "wpe" in name:
                parameter.mul_(0.5)
    return model


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Let the garbage collector leave alone what collection makes: it lives to the end, and took 5 seconds of 25."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)  # before `-m "not slow"` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow part of large grids; skip tests for a GPU, with the reason, if there is none."""
    mark_slow(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and this machine has none"))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Isolate the cache of machine properties, such as the faster dtype, which the tests measure anew.

    Compiled kernels, which take a minute, are shared with the user: their names are hashes of their contents.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    with pytest.MonkeyPatch.context() as patch:
        if "SPECDEC_BUILD_DIR" not in os.environ:
            patch.setenv("SPECDEC_BUILD_DIR", str(cache / "llm-inference-lab" / "kernels"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _embedded_models_loaded_once() -> Iterator[None]:
    with loaded_once():
        yield


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_checkpoint("llama", **config overrides)`: make a folder as on the hub, with a tokenizer."""
    text = [(Path(__file__).parent / "support/tokenizer_text.txt").read_text(encoding="utf-8")] * 4
    trained = train_tokenizer(text, VOCABULARY)

    def make(family: str, **overrides: Any) -> Path:
        folder = tmp_path_factory.mktemp(family)
        reference_model(family, **overrides).save_pretrained(folder)
        save_tokenizer(trained, folder, context=128)
        return folder

    return make


@pytest.fixture(scope="session")
def llama_folder(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("llama")


@pytest.fixture(params=phases(), ids=lambda phase: f"phase{phase.number}")
def phase(request: pytest.FixtureRequest) -> Phase:
    """Return every phase of the repository in turn."""
    found: Phase = request.param
    return found


@pytest.fixture
def engine(phase: Phase) -> ModuleType:
    """Return the engine package of the current phase."""
    return importlib.import_module(phase.package)


@pytest.fixture(scope="session")
def check_recording() -> Callable[[Path], Recording]:
    """Return a reader of `--record` files that checks schema and consistency."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    validators = {kind["properties"]["type"]["const"]: Draft202012Validator(kind) for kind in schema["oneOf"]}

    def check(path: Path) -> Recording:
        recording = read_recording(path)
        for line in [recording.header, *recording.steps, *([recording.footer] if recording.footer else [])]:
            validators[line["type"]].validate(line)
        assert list(contradictions(recording)) == []
        return recording

    return check


@pytest.fixture
def bench_part(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, str], ModuleType]]:
    """`bench_part(3, "distance")`: import that file of phase 3's benchmarks/ as its bench.py does.

    Module names there are the same in every phase, so all of them are removed before the next test.
    """

    def load(number: int, name: str) -> ModuleType:
        monkeypatch.syspath_prepend(next(phase.folder for phase in phases() if phase.number == number))
        return importlib.import_module(f"benchmarks.{name}")

    before = forget(["engine", *BESIDE])
    yield load
    forget(["engine", *BESIDE])
    sys.modules.update(before)
