"""A window per layer: with every cache and backend the logits equal transformers', and drafts change no token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import phase1
import phase5
from common.checkpoint import MODELS
from common.errors import UserError
from phase5.kernels import TORCH, cpp, registry
from phase5.kv_cache import KVOptions
from phase5.runner import NO_DRAFT, ModelRunner, make_runner
from tests.support.cpp import make_cpp_runner

CPU = torch.device("cpu")
FULL, SLIDING = "full_attention", "sliding_attention"
FORMS: dict[str, dict[str, Any]] = {
    "mistral": {"layer_types": [FULL, SLIDING]},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "layer_types": [SLIDING, FULL]},
}
TOKENS = torch.randint(1, 320, (30,), generator=torch.Generator().manual_seed(6)).tolist()
TREE = phase5.Tree([11, 12, 13, 14], [-1, -1, 0, 2])
needs_cpp = pytest.mark.skipif(cpp.why_not() is not None, reason=str(cpp.why_not()))


@pytest.fixture(scope="module")
def folders(make_checkpoint: Callable[..., Path]) -> dict[str, str]:
    return {family: str(changed(make_checkpoint(family), **keys)) for family, keys in FORMS.items()}


def changed(folder: Path, **keys: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    return folder


@pytest.fixture(scope="module")
def expected(folders: dict[str, str]) -> Callable[[str, list[list[int]]], Tensor]:
    """Return transformers' logits after each sequence, [sequences, V]."""
    models: dict[str, Any] = {}

    def logits(family: str, texts: list[list[int]]) -> Tensor:
        if family not in models:
            models[family] = AutoModelForCausalLM.from_pretrained(
                folders[family], dtype=torch.float32, attn_implementation="eager"
            ).eval()
        with torch.no_grad():
            return torch.stack([models[family](torch.tensor([t]), use_cache=False).logits[0, -1] for t in texts])

    return logits


def check(runner: ModelRunner, family: str, expected: Callable[[str, list[list[int]]], Tensor]) -> None:
    """A prompt, one more token twice, a chain that is accepted, and a tree."""
    for length, draft in ((20, NO_DRAFT), (21, NO_DRAFT), (22, phase5.Tree.chain(TOKENS[22:26])), (27, TREE)):
        found = runner.forward(["a"], [TOKENS[:length]], [draft]).logits[0]
        lines = [draft.line(node) if node >= 0 else [] for node in range(-1, len(draft.tokens))]
        meant = expected(family, [TOKENS[:length] + line for line in lines])
        torch.testing.assert_close(found, meant, rtol=1e-4, atol=1e-4)
        nodes = list(range(len(draft.tokens))) if draft.is_chain else []
        runner.commit("a", nodes, [draft.tokens[node] for node in nodes])


@pytest.mark.parametrize("kind", ["off", "dynamic", "static", "paged"])
@pytest.mark.parametrize("family", list(FORMS))
def test_every_cache(family: str, kind: Any, folders: dict[str, str], expected: Any) -> None:
    model = phase5.load(folders[family], torch.float32, CPU).model
    check(make_runner(model, KVOptions(kind), 1, 40), family, expected)


@needs_cpp
@pytest.mark.parametrize("kind", ["static", "paged"])
@pytest.mark.parametrize("family", list(FORMS))
def test_cpp(family: str, kind: Any, folders: dict[str, str], expected: Any) -> None:
    model = phase5.load(folders[family], torch.float32, CPU).model
    check(make_cpp_runner(model, cpp.CppModel(model, threads=2), KVOptions(kind), 1, 40), family, expected)


def with_attention_of(backend: str, folder: str) -> phase5.Transformer:
    kernels = registry.choose(backend, CPU).kernels
    model = phase5.load(folder, torch.float32, CPU).model
    decode, prefill = kernels.decode_attention, kernels.flash_prefill
    registry.use(model, TORCH._replace(decode_attention=decode, flash_prefill=prefill))
    return model


@pytest.mark.parametrize("kind", ["static", "paged"])
def test_triton(kind: Any, folders: dict[str, str], expected: Any, interpreted: None) -> None:
    model = with_attention_of("triton", folders["qwen3"])
    check(make_runner(model, KVOptions(kind), 1, 40), "qwen3", expected)


@pytest.mark.parametrize("kind", ["static", "paged"])
def test_cuda(
    kind: Any,
    folders: dict[str, str],
    expected: Any,
    emulate: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    emulate(monkeypatch)
    model = with_attention_of("cuda", folders["qwen3"])
    check(make_runner(model, KVOptions(kind), 1, 40), "qwen3", expected)


def test_a_ring_is_refused(folders: dict[str, str]) -> None:
    """A ring would overwrite tokens that the full layers need."""
    made = phase5.LLM(phase5.Options(model=folders["mistral"], kernels="torch", kv="ring", device="cpu"))
    with pytest.raises(UserError, match=r"--kv ring.*not trained with window attention in every layer; use static"):
        made.generate(["import os"])


REPEATING = " 0 1 2" * 28


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[int]]:
    """Return stdlib-1m with a window of 24 in its second layer and a context of 96, and phase 1's output past it."""
    folder = tmp_path_factory.mktemp("mixed") / "stdlib-1m"
    shutil.copytree(MODELS / "stdlib-1m", folder)
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "layer_types": [FULL, SLIDING]}
    changed(folder, **mistral, sliding_window=24, max_position_embeddings=96)
    options = {"model": str(folder), "max_tokens": 40, "repetition_penalty": 0.01, "device": "cpu", "dtype": "float32"}
    (done,) = phase1.LLM(phase1.Options(**options)).generate([REPEATING])  # type: ignore[arg-type]
    return options, done.tokens


@pytest.mark.parametrize("how", ["plain", "ngram", "tree"])
@pytest.mark.parametrize("kind", ["dynamic", "static", "paged", pytest.param("cpp", marks=needs_cpp)])
def test_a_repeating_text_past_the_context(kind: str, how: str, repeated: tuple[dict[str, Any], list[int]]) -> None:
    """Layers without a window limit the context: its start jumps as without windows."""
    options, expected = repeated
    drafting: dict[str, dict[str, Any]] = {
        "plain": {"draft": "none"},
        "ngram": {"drafter": "ngram"},
        "tree": {"draft": options["model"], "k": 3, "tree": "static", "tree_nodes": 6},
    }
    backend: dict[str, Any] = {"kernels": "cpp"} if kind == "cpp" else {"kernels": "torch", "kv": kind}
    (done,) = phase5.LLM(phase5.Options(**options, **backend, **drafting[how])).generate([REPEATING])
    assert done.tokens == expected
