"""On a GPU: half precision, autocast, quantised and compiled models are close to float32."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import phase4
from common.device import memory
from common.prompts import load_prompts
from phase4.quantize import stored_bytes

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
TEXT = load_prompts("code", "test")[0].text


def llm(**options: Any) -> phase4.LLM:
    return phase4.LLM(phase4.Options(**{"device": "cuda", "dtype": "float32", "max_tokens": 24, **options}))


@torch.inference_mode()
def logits(loaded: phase4.LoadedModel) -> Tensor:
    tokens = torch.tensor([loaded.tokenizer.encode(TEXT)], device=CUDA)
    found: Tensor = loaded.model(tokens)
    return found.float()


def assert_close(got: Tensor, exact: Tensor, enough: float) -> None:
    """Check the RMS difference relative to the spread of the logits. It must not be 0, which would mean: not cast."""
    share = float((got - exact).pow(2).mean().sqrt() / exact.std())
    assert 0 < share < enough


@pytest.mark.parametrize(("dtype", "enough"), [("bfloat16", 0.03), ("float16", 0.005)])
def test_half_precision_logits_are_close(dtype: str, enough: float) -> None:
    if dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bfloat16")
    assert_close(logits(llm(dtype=dtype).loaded), logits(llm().loaded), enough)


def test_auto_is_half_precision_and_says_so() -> None:
    found = llm(dtype="auto", draft="none")
    assert found.loaded.model.embedding.weight.dtype in (torch.bfloat16, torch.float16)
    assert "auto" in str(found.precision["stdlib-10m"])


def test_autocast_casts_the_products_and_decodes() -> None:
    exact, cast = llm(), llm(amp=True)
    with cast.computing():
        got = logits(cast.loaded)
    assert_close(got, logits(exact.loaded), 0.03)
    assert len(cast.generate([TEXT])[0].tokens) == 24
    assert cast.loaded.model.embedding.weight.dtype == torch.float32


@pytest.mark.parametrize(("quant", "enough"), [("int8", 0.05), ("int4", 0.4)])
def test_quantised_logits_are_close(quant: str, enough: float) -> None:
    assert_close(logits(llm(quant=quant).loaded), logits(llm().loaded), enough)


@pytest.mark.parametrize("draft", ["none", "auto"])
def test_compiled_gives_the_same_tokens(draft: str) -> None:
    plain, compiled = llm(draft=draft), llm(draft=draft, compile=True)
    assert compiled.generate([TEXT])[0].tokens == plain.generate([TEXT])[0].tokens


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_the_card_holds_the_weights_once(dtype: str, size: int) -> None:
    gc.collect()
    before = memory(CUDA)["cuda_allocated"]
    loaded = llm(dtype=dtype, draft="none").loaded
    whole = {tensor.data_ptr(): tensor.numel() for tensor in loaded.model.parameters()}
    taken = memory(CUDA)["cuda_allocated"] - before
    assert taken * 2**20 == pytest.approx(sum(whole.values()) * size, rel=0.05)
    assert stored_bytes(loaded.model)[0] < taken * 2**20


@pytest.fixture
def shapes(bench_part: Callable[[int, str], ModuleType]) -> ModuleType:
    """Import benchmarks/shapes.py of the phase."""
    return bench_part(4, "shapes")


@pytest.mark.parametrize("shape", ["gpt2-xl", "llama-3.1-8b"])
def test_every_variant_of_the_large_shapes_runs(shapes: ModuleType, shape: str) -> None:
    """Models with two layers."""
    config = dataclasses.replace(shapes.CONFIGS[shape], layers=2, vocab_size=1024)
    tokens = torch.arange(64, device=CUDA)[None]
    for variant in (shapes.BASE, *shapes.VARIANTS):
        model = shapes.variant_of(variant, config, CUDA)
        found = shapes.step(model, tokens, variant == "amp")
        assert found.shape == (1, 1024)
        assert torch.isfinite(found).all(), variant
        del model
        shapes.release(CUDA)
