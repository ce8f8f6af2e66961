"""Sequences far past the context: memory is constant, and tokens equal phase 1's."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

import phase1
import phase5
from common.checkpoint import MODELS
from phase5.kernels import registry
from phase5.kv_cache import KVOptions
from phase5.runner import CachedRunner, UncachedRunner, cache_shape, make_runner

TOKENS = 20_000
WARM = 2_000  # tokens, after which memory is stable
GROWTH = 16  # MiB; keys and values of the tokens after WARM would need 18
LOOKED_AT = (100, 3_000, 10_001, TOKENS)  # lengths at which logits are compared

pytestmark = [pytest.mark.slow, pytest.mark.no_exercise]


def resident() -> float:
    return float(psutil.Process().memory_info().rss) / 2**20


def test_twenty_thousand_tokens_at_constant_memory(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled, because greedy text of random weights repeats; compared with runners that keep every token."""
    folder = make_checkpoint("mistral", max_position_embeddings=32_768, num_hidden_layers=4)
    options: dict[str, Any] = {
        "model": str(folder),
        "kv": "ring",
        "kernels": "torch",
        "draft": "none",
        "temperature": 1.0,
    }
    made = phase5.LLM(phase5.Options(max_tokens=TOKENS, dtype="float32", device="cpu", **options))
    made.params = dataclasses.replace(made.params, ignore_eos=True)
    seen: dict[int, tuple[list[int], Tensor]] = {}
    forward = CachedRunner.forward

    def watched(self: CachedRunner, owners: list[object], texts: list[list[int]], *more: Any) -> phase5.TargetOutput:
        found = forward(self, owners, texts, *more)
        if len(texts[0]) in LOOKED_AT:
            seen[len(texts[0])] = (list(texts[0]), found.logits[:, 0].clone())
        return found

    monkeypatch.setattr(CachedRunner, "forward", watched)
    sequences = made.sequences(["import os\n"])
    sizes, memory = set(), 0.0
    for _ in made.run(sequences):
        assert isinstance(made.runner, CachedRunner)
        sizes.add(made.runner.manager.cache.nbytes())
        if len(sequences[0].tokens) == WARM:
            memory = resident()
    assert resident() - memory < GROWTH
    assert sizes == {(8 + 16) * cache_shape(made.loaded.config).bytes_per_token(4)}
    assert len(sequences[0].tokens) == TOKENS
    assert len(set(sequences[0].tokens)) > 100

    model = made.loaded.model
    whole, static = UncachedRunner(model), make_runner(model, KVOptions("static"), 1, TOKENS + 1)
    for length in LOOKED_AT:
        text, found = seen[length]
        torch.testing.assert_close(found, static.forward(["text"], [text]).logits[:, 0], atol=1e-4, rtol=1e-4)
        if length <= 3_000:  # the mask of a whole sequence grows with its length squared
            torch.testing.assert_close(found, whole.forward(["text"], [text]).logits[:, 0], atol=1e-4, rtol=1e-4)


CONTEXT, PAST = 64, 5_000


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stdlib-10m with a context of 64 tokens: its window jumps every 16. Its draft jumps elsewhere, past 1,024."""
    folder = tmp_path_factory.mktemp("short") / "stdlib-10m"
    shutil.copytree(MODELS / "stdlib-10m", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}))
    return folder


def written(engine: Any, folder: Path, temperature: float, **options: Any) -> list[int]:
    chosen = {"dtype": "float32", "device": "cpu", "max_tokens": CONTEXT + PAST, "temperature": temperature, **options}
    made = engine.LLM(engine.Options(model=str(folder), **chosen))
    made.params = dataclasses.replace(made.params, ignore_eos=True)
    tokens: list[int] = made.generate(["import os\n"])[0].tokens
    return tokens


@pytest.fixture(scope="module")
def phase_1_writes(short: Path) -> Callable[[float], list[int]]:
    """Return the tokens of plain decoding without a cache; cached, because one sequence takes minutes."""
    return cache(lambda temperature: written(phase1, short, temperature))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("kernels", "kind"),
    [("torch", "dynamic"), ("torch", "static"), ("torch", "paged"), ("cpp", "static"), ("cpp", "paged")],
)
def test_the_default_draft_model_five_thousand_tokens_past_the_context(
    kernels: str, kind: str, temperature: float, short: Path, phase_1_writes: Callable[[float], list[int]]
) -> None:
    if kernels == "cpp" and (reason := registry.why_not("cpp", torch.device("cpu"))) is not None:
        pytest.skip(f"no C++ backend here: {reason}")
    options = {
        "kernels": kernels,
        "kv": kind,
        "policy": "coupled",
    }  # at temperature 0 all policies give the same tokens
    found = written(phase5, short, temperature, **options)
    assert len(found) == CONTEXT + PAST
    assert found == phase_1_writes(temperature)
