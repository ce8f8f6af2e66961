"""The bench's GPU peers, run on a CPU: their tokens equal the engine's."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

import phase5
from common.errors import UserError

CPU = torch.device("cpu")
Part = Callable[[int, str], ModuleType]
SMALL: dict[str, dict[str, Any]] = {
    "gpt2-xl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 4096},
    "Llama-3.1-8B": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    },
}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_the_compiled_loop_decodes_as_the_engine_does(
    family: str, compiled: bool, make_checkpoint: Any, bench_part: Part
) -> None:
    folder = str(make_checkpoint(family))
    llm = phase5.LLM(
        phase5.Options(model=folder, dtype="float32", device="cpu", draft="none", kernels="torch", max_tokens=12)
    )
    wanted = llm.generate(["import os"])[0].tokens
    prompt = llm.loaded.tokenizer.encode("import os")
    loop = bench_part(5, "gpu_peers").CompiledLoop(llm.loaded.model, len(prompt) + 12, compiled=compiled)
    assert loop.generate(prompt, 12)[: len(wanted)] == wanted
    with pytest.raises(ValueError, match="there is room for"):
        loop.generate(prompt, 13)


@pytest.mark.parametrize("shape", SMALL)
def test_a_shape_with_random_weights_loads_in_both(shape: str, bench_part: Part) -> None:
    with bench_part(5, "gpu_shapes").shape_folder(shape, CPU, torch.float32, **SMALL[shape]) as folder:
        options = phase5.Options(
            model=str(folder), dtype="float32", device="cpu", draft="none", kernels="torch", max_tokens=8
        )
        llm = phase5.LLM(options)
        wanted = llm.generate(["import os"])[0].tokens
        found = (
            bench_part(5, "gpu_peers")
            .StaticPeer(folder, torch.float32, CPU)
            .decode(llm.loaded.tokenizer.encode("import os"), 8)
        )
    assert len(found) == 8
    assert found[: len(wanted)] == wanted


def test_a_shape_that_is_none_is_named(bench_part: Part) -> None:
    with (
        pytest.raises(UserError, match=r"no shape .gpt5.; the shapes are gpt2-xl"),
        bench_part(5, "gpu_shapes").shape_folder("gpt5", CPU),
    ):
        pass
