"""The large shapes of `make gpu`: they are the models they are named after, and every variant of them computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from common.benchmark import BenchOptions, Results
from common.harness import Bench

CPU = torch.device("cpu")


@pytest.fixture
def shapes(bench_part: Callable[[int, str], ModuleType]) -> ModuleType:
    """benchmarks/shapes.py of the phase."""
    return bench_part(4, "shapes")


def lab(device: torch.device = CPU, **options: bool) -> Bench:
    return Bench(BenchOptions.model_validate({"repeats": 2, **options}), Results(None, {}, {}), device)


def run(shapes: ModuleType, bench: Bench) -> list[dict[str, Any]]:
    shapes.measure_shapes(bench)
    return bench.results.rows


@pytest.mark.parametrize(("shape", "parameters"), [("gpt2-xl", 1_557_611_200), ("llama-3.1-8b", 8_030_261_248)])
def test_the_shapes_have_as_many_parameters_as_the_models(shapes: ModuleType, shape: str, parameters: int) -> None:
    config = shapes.CONFIGS[shape]
    with torch.device("meta"):
        model = shapes.Transformer(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count - (config.width * config.vocab_size if config.tied else 0) == parameters


def test_every_variant_computes_nearly_the_same(shapes: ModuleType) -> None:
    for config in shapes.CONFIGS.values():
        small = dataclasses.replace(shapes.cut_down(config, 512), layers=2)
        assert small.heads // small.kv_heads == config.heads // config.kv_heads
        tokens = torch.arange(20)[None]
        found = {v: shapes.variant_of(v, small, CPU) for v in (shapes.BASE, *shapes.VARIANTS)}
        assert found["amp"].embedding.weight.dtype == torch.float32
        steps = {v: shapes.step(model, tokens, v == "amp").float() for v, model in found.items()}
        for variant, got in steps.items():
            assert got.shape == (1, 512)
            assert got.std() > 0
            # Random numbers are drawn in the dtype of the weights: other dtypes, other weights.
            same_weights = "float32" if variant == "amp" else shapes.BASE if variant in ("int8", "int4") else variant
            difference = (got - steps[same_weights]).pow(2).mean().sqrt() / got.std()
            assert difference < {"amp": 0.03, "int8": 0.05, "int4": 0.5}.get(variant, 1e-6), variant


def test_a_processor_cuts_the_models_down_and_says_so(shapes: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(shapes, lab(dry_run=True))
    assert {row["shape"] for row in rows} == set(shapes.CONFIGS)
    assert {row["variant"] for row in rows} == {shapes.BASE, *shapes.VARIANTS, "attention"}
    assert all(row["synthetic"] and row["cut"] and row["layers"] == 1 for row in rows)
    assert run(shapes, lab()) == []
    assert "left out" in capsys.readouterr().err


def test_a_card_takes_them_whole_and_skips_what_does_not_fit(
    shapes: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = run(shapes, lab(torch.device("cuda"), dry_run=True))
    assert {row["layers"] for row in rows} == {48, 32}
    assert not any(row["cut"] for row in rows)
    monkeypatch.setattr(shapes, "available_memory", lambda device: 40 * 2**30)
    fits = {v: shapes.cannot_run(lab(), shapes.CONFIGS["llama-3.1-8b"], v) for v in shapes.VARIANTS}
    assert fits["float16"] is None
    assert "needs 46 GiB, 40 are free" in str(fits["float32"])
