"""Real sizes in phase 5's bench: logits are checked, and rates count each product once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from common.results import Results

Part = Callable[[int, str], ModuleType]
WIDTH, FFN, VOCABULARY, LAYERS = 32, 64, 256, 2


@pytest.fixture
def sizes(bench_part: Part, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the section with a tiny model in place of each shape, and without llama.cpp."""
    module = bench_part(5, "sizes")
    folder = make_checkpoint(
        "llama", hidden_size=WIDTH, intermediate_size=FFN, vocab_size=VOCABULARY, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip

    @contextmanager
    def tiny(shape: str, dtype: str) -> Iterator[Path]:
        yield folder

    monkeypatch.setattr(module, "random_checkpoint", tiny)
    monkeypatch.setattr(module, "DRAM", 2**16)
    monkeypatch.setattr(module.llama_cpp, "why_not", lambda: "it is left out of this test")
    return module


def lab_of(runs: ModuleType, results: Results) -> Any:
    options = runs.Options(prompts=1, max_tokens=8, rounds=1, device="cpu", quick=True)
    return runs.Lab(options, results, torch.device("cpu"))


def test_real_sizes_are_counted(sizes: ModuleType, bench_part: Part) -> None:
    with Results(None, {}, {}, {}, False) as results:
        sizes.measure_sizes(lab_of(bench_part(5, "runs"), results))
        rows = [row for row in results.rows if row.kind == "run"]
        refused = {row.variant for row in results.rows if row.status == "refused"}
    assert refused == {"llama.cpp f16", "llama.cpp bf16", "llama.cpp q8_0", "llama.cpp q4_0"}
    assert {(row.cell["bits"], row.cell["work"]) for row in rows} == {(b, w) for b in (16, 8, 4) for w in sizes.WORK}
    layer = WIDTH * (WIDTH + 2 * WIDTH // 2) + WIDTH * WIDTH + 3 * WIDTH * FFN
    for row in rows:
        assert row.status == "ok", row.reason
        if row.cell["work"] == "prefill":
            assert row.tokens == 64
            assert row.figures["gflop"] == pytest.approx(2e-9 * (64 * LAYERS * layer + VOCABULARY * WIDTH))
        else:
            assert row.tokens == sizes.STEPS
            assert row.figures["gb"] >= sizes.STEPS * (LAYERS * layer + VOCABULARY * WIDTH) * row.cell["bits"] / 8e9


def test_another_model_is_not_timed(sizes: ModuleType, bench_part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sizes.Size._expected
    monkeypatch.setattr(sizes.Size, "_expected", lambda size: expected(size).roll(1))
    with Results(None, {}, {}, {}, False) as results:
        sizes.measure_sizes(lab_of(bench_part(5, "runs"), results))
        rows = [row for row in results.rows if row.kind == "run"]
    assert rows
    assert all(row.status == "refused" and "not the same model" in (row.reason or "") for row in rows)
