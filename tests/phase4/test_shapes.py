"""The large shapes of `make gpu`: they match the models of these names, and every variant computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from common.benchmark import BenchOptions, Results
from common.harness import Bench
from common.results import Row

CPU = torch.device("cpu")


@pytest.fixture
def shapes(bench_part: Callable[[int, str], ModuleType]) -> ModuleType:
    """Import benchmarks/shapes.py of the phase."""
    return bench_part(4, "shapes")


def lab(device: torch.device = CPU, **options: Any) -> Bench:
    return Bench(BenchOptions.model_validate({"rounds": 1, **options}), Results(None, {}, {}), device)


def run(shapes: ModuleType, bench: Bench) -> list[Row]:
    shapes.measure_shapes(bench)
    return bench.results.rows


def cut_down(config: Any, width: int, layers: int = 2) -> Any:
    """Reduce a config to a narrow model with a small vocabulary, in the same proportions."""
    heads = width // config.head_dim
    kv_heads, ffn_width = heads * config.kv_heads // config.heads, width * config.ffn_width // config.width
    sizes: dict[str, Any] = {"width": width, "heads": heads, "kv_heads": kv_heads, "ffn_width": ffn_width}
    return dataclasses.replace(config, layers=layers, vocab_size=width, **sizes)


@pytest.mark.parametrize(("shape", "parameters"), [("gpt2-xl", 1_557_611_200), ("llama-3.1-8b", 8_030_261_248)])
def test_the_shapes_have_as_many_parameters_as_the_models(shapes: ModuleType, shape: str, parameters: int) -> None:
    config = shapes.CONFIGS[shape]
    with torch.device("meta"):
        model = shapes.Transformer(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count - (config.width * config.vocab_size if config.tied else 0) == parameters


def test_every_variant_computes_nearly_the_same(shapes: ModuleType) -> None:
    for config in shapes.CONFIGS.values():
        small = cut_down(config, 512)
        assert small.heads // small.kv_heads == config.heads // config.kv_heads
        tokens = torch.arange(20)[None]
        found = {v: shapes.variant_of(v, small, CPU) for v in (shapes.BASE, *shapes.VARIANTS)}
        assert found["amp"].embedding.weight.dtype == torch.float32
        steps = {v: shapes.step(model, tokens, v == "amp").float() for v, model in found.items()}
        for variant, got in steps.items():
            assert got.shape == (1, 512)
            assert got.std() > 0
            # Random weights depend on the dtype in which they are drawn.
            same_weights = "float32" if variant == "amp" else shapes.BASE if variant in ("int8", "int4") else variant
            difference = (got - steps[same_weights]).pow(2).mean().sqrt() / got.std()
            assert difference < {"amp": 0.03, "int8": 0.05, "int4": 0.5}.get(variant, 1e-6), variant


def test_a_processor_walks_the_grid_only_dry(shapes: ModuleType) -> None:
    rows = run(shapes, lab(dry_run=True))
    assert {row.cell["shape"] for row in rows} == set(shapes.CONFIGS)
    forwards = [row for row in rows if row.section == "shapes" and row.kind == "run"]
    assert {row.variant for row in forwards} == {shapes.BASE, f"{shapes.BASE}, again", *shapes.VARIANTS}
    assert {row.cell["length"] for row in forwards} == set(shapes.LENGTHS)
    assert {row.variant for row in rows if row.section == "attention" and row.kind == "run"} >= {"written out", "sdpa"}
    assert all(row.synthetic for row in rows)
    refused = run(shapes, lab())
    assert [row.status for row in refused] == ["refused"] * len(shapes.CONFIGS)
    assert all("need a GPU" in str(row.reason) for row in refused)


def test_forwards_are_rows_with_their_work(shapes: ModuleType) -> None:
    config, bench = cut_down(shapes.CONFIGS["llama-3.1-8b"], 512, layers=1), lab()
    shapes.measure_shape(bench, "small", config, (8,))
    rows = [row for row in bench.results.rows if row.kind == "run"]
    assert all(row.status == "ok" for row in rows)
    forwards = [row for row in rows if row.section == "shapes"]
    assert {row.cell["beside"] for row in forwards} == set(shapes.VARIANTS)
    read = {row.variant: row.figures["gb"] for row in forwards}
    assert read["int4"] < read["int8"] < read["bfloat16"] < read["float32"]
    assert len({row.figures["gflop"] for row in forwards}) == 1
    assert {row.variant for row in rows if row.section == "attention"} >= {"written out", "sdpa"}


def test_a_card_takes_them_whole_and_skips_what_does_not_fit(
    shapes: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "available_memory", lambda device: 40 * 2**30)
    fits = {v: shapes.cannot_run(lab(), shapes.CONFIGS["llama-3.1-8b"], v) for v in shapes.VARIANTS}
    assert fits["float16"] is None
    assert "needs 46 GiB, 40 are free" in str(fits["float32"])
