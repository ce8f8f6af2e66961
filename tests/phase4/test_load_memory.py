"""Memory of loading: a new process grows by the size of the stored weights, and its peak by little more."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from common.checkpoint import MODELS
from common.phases import phases

FOLDER = next(phase.folder for phase in phases() if phase.number == 4)
LAYERS, WIDTH, FFN = 8, 640, 1920
LINEAR = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * FFN)  # 43 million weights
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.5 + 2 / 64}  # per weight, with the scales of int4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a Llama with random weights in float32, large against a process's own memory."""
    folder, embedded = tmp_path_factory.mktemp("random"), MODELS / "stdlib-10m"
    config = json.loads((embedded / "config.json").read_text())
    heads = WIDTH // config["head_dim"]
    config |= {"num_hidden_layers": LAYERS, "hidden_size": WIDTH, "intermediate_size": FFN}
    config |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded / name, folder)
    tensors = {"model.embed_tokens": (config["vocab_size"], WIDTH), "model.norm": (WIDTH,)}
    for layer in range(LAYERS):
        here = f"model.layers.{layer}"
        tensors |= {f"{here}.{name}_layernorm": (WIDTH,) for name in ("input", "post_attention")}
        tensors |= {f"{here}.self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
        tensors |= {f"{here}.mlp.{name}_proj": (FFN, WIDTH) for name in ("gate", "up")}
        tensors[f"{here}.mlp.down_proj"] = (WIDTH, FFN)
    filled = {f"{name}.weight": torch.empty(shape).uniform_(-1, 1) for name, shape in tensors.items()}
    save_file(filled, folder / "model.safetensors")
    return folder


@pytest.fixture
def bench(bench_part: Callable[[int, str], ModuleType]) -> ModuleType:
    """Import benchmarks/memory.py of the phase."""
    return bench_part(4, "memory")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep freed memory resident as they please")
@pytest.mark.parametrize("variant", [v if v == "int4" else pytest.param(v, marks=pytest.mark.slow) for v in BYTES])
def test_growth_is_what_the_weights_take(variant: str, checkpoint: Path, bench: ModuleType) -> None:
    found = bench.in_a_fresh_process(checkpoint, bench.VARIANTS[variant]).figures
    expected = LINEAR * BYTES[variant] / 2**20
    assert found["stored_mib"] == pytest.approx(expected, rel=0.01)
    assert found["linear_mib"] == pytest.approx(expected, rel=0.15)
    assert found["peak_mib"] < found["growth_mib"] + 150  # all matrices in float32, or all of the file: 163 more
