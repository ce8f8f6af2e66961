"""Fused matrices, padded lengths and compiled layers: the same numbers as phase 3's, or an error with the reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import phase3
import phase3.drafters.heads as before
import phase4
import phase4.drafters.heads as after
from common.errors import UserError
from common.philox import Purpose
from phase4.compile import Compiler
from phase4.packing import PackedLinear, can_pack
from phase4.shapes import padded_length
from phase4.target import target_forward
from phase4.weights import fused_matrices, lay_out, places, reserve, split
from tests.support import forked
from tests.support.beside import beside

CPU = torch.device("cpu")
FAMILIES = ["llama", "gpt2", "opt", "qwen3", "mistral"]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path]) -> tuple[Any, Any]:
    """Load one checkpoint in both engines, float32."""
    folder = str(make_checkpoint(request.param))
    return phase3.load(folder, torch.float32, CPU), phase4.load(folder, torch.float32, CPU)


@pytest.mark.about("engine/weights.py, fused_matrices")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_which_matrices_are_fused(make_checkpoint: Callable[..., Path], family: str) -> None:
    """Query, key and value are fused, which read the same input; gate and up too, if there is a gate."""
    config = phase4.ModelConfig.from_hf(json.loads((make_checkpoint(family) / "config.json").read_text()))
    fused = fused_matrices(config)
    qkv = {"query": config.heads, "key": config.kv_heads, "value": config.kv_heads}
    expected = {f"attention.{name}": heads * config.head_dim for name, heads in qkv.items()}
    assert list(fused["attention.qkv"].items()) == list(expected.items())  # the order is that in the fused matrix
    assert ("ffn.gate_up" in fused) == (family == "llama")
    if family == "llama":
        assert list(fused["ffn.gate_up"].items()) == [("ffn.gate", config.ffn_width), ("ffn.up", config.ffn_width)]


def test_states_are_those_of_phase_3(pair: tuple[Any, Any]) -> None:
    """States of all positions, of some, and of trees; tapped layers too."""
    tokens = torch.randint(1, 300, (2, 23), generator=torch.Generator().manual_seed(0))
    wanted = torch.tensor([[22, 3], [7, 8]])
    for options in ({}, {"wanted": wanted}, {"wanted": wanted, "taps": (0, 1)}):
        both = [loaded.model.states(tokens, **options) for loaded in pair]
        torch.testing.assert_close(both[0], both[1], atol=2e-5, rtol=1e-4)
    texts, trees = [[5, 6, 7, 8], [9, 10]], ([11, 12, 13, 14], [-1, -1, 0, 2])
    logits = [
        phase.target_forward(loaded.model, texts, [phase.Tree(*trees), phase.Tree([], [])]).logits
        for phase, loaded in zip((phase3, phase4), pair, strict=True)
    ]
    torch.testing.assert_close(logits[0][0], logits[1][0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(logits[0][1, 0], logits[1][1, 0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_are_laid_out_once(dtype: torch.dtype) -> None:
    """The layout keeps the numbers; a matrix that has it already stays where it is."""
    layers = [torch.nn.Linear(6, 4, dtype=dtype), torch.nn.Linear(4, 6, dtype=dtype)]
    before, module = [layer.weight.detach().clone() for layer in layers], torch.nn.Sequential(*layers)
    lay_out(module)
    for layer, weight in zip(layers, before, strict=True):
        assert torch.equal(layer.weight, weight)
        assert layer.weight.stride() == reserve(tuple(weight.shape), dtype, CPU).stride()
    places = [layer.weight.data_ptr() for layer in layers]
    lay_out(module)
    assert [layer.weight.data_ptr() for layer in layers] == places


def test_single_matrices_are_found_in_the_fused_ones(pair: tuple[Any, Any]) -> None:
    """Names and contents equal those of phase 3, whose modules keep every matrix separate."""
    old, new = (loaded.model for loaded in pair)
    single = split(dict(new.named_parameters()), new.config)
    expected = dict(old.named_parameters())
    assert single.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(single[name], tensor), name
    assert len(places(dict(new.named_parameters()), new.config)) > len(list(new.parameters()))


def test_part_is_a_slice_of_the_product(pair: tuple[Any, Any]) -> None:
    linear = pair[1].model.layers[0].attention.qkv
    x = torch.randn(3, linear.in_features)
    torch.testing.assert_close(linear(x, 5, 17), linear(x)[:, 5:17])


def test_norms_are_those_of_torch() -> None:
    """In float32 to the last bits; in bfloat16 with statistics of float32."""
    x = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(1)) * 40
    for dtype, within in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        mine, theirs = phase4.model.RMSNorm(48, 1e-5).to(dtype), torch.nn.RMSNorm(48, eps=1e-5)
        mine.weight.data = theirs.weight.data = torch.linspace(-2, 2, 48).to(dtype)
        theirs.float()
        with torch.no_grad():
            torch.testing.assert_close(mine(x.to(dtype)).float(), theirs(x.to(dtype).float()), atol=0, rtol=within)


def test_a_forward_leaves_what_it_was_given(pair: tuple[Any, Any]) -> None:
    """In-place operations do not overwrite inputs or tapped outputs."""
    model, tokens = pair[1].model, torch.randint(1, 300, (1, 9))
    with torch.inference_mode():
        _, tapped = model.states(tokens, taps=(0,))
        x = model.embedding(tokens)
        x = x + model.positions(torch.arange(9) + model.config.position_offset) if hasattr(model, "positions") else x
        rotation = None if hasattr(model, "positions") else model.rotation(9, x)
        before = x.clone()
        first = model.layers[0](x, rotation, model.mask(9, x, model.config.window_of(0))[None, None])
    assert torch.equal(x, before)
    torch.testing.assert_close(tapped, first)


@pytest.mark.parametrize("bias", [False, True])
def test_blocks_of_a_matrix_multiply_as_the_matrix(bias: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    linear = torch.nn.Linear(48, 80, bias).to(torch.bfloat16)
    if not can_pack(linear.weight):
        pytest.skip("this torch has no blocked products of bfloat16 here")
    packed = PackedLinear(linear)
    for rows in (1, 5, 64, 130):
        x = torch.randn(2, rows, 48, generator=generator).to(torch.bfloat16)
        with torch.inference_mode():
            torch.testing.assert_close(packed(x), linear(x), atol=2**-7, rtol=2**-7)
            torch.testing.assert_close(packed(x, 16, 48), linear(x)[..., 16:48], atol=2**-7, rtol=2**-7)


def test_only_plain_matrices_of_bfloat16_are_packed(make_checkpoint: Callable[..., Path]) -> None:
    folder = str(make_checkpoint("llama"))
    packed = {}
    for options in ({"dtype": "bfloat16"}, {"dtype": "float32"}, {"amp": True}, {"quant": "int8", "dtype": "bfloat16"}):
        llm = phase4.LLM(phase4.Options(model=folder, draft="none", max_tokens=3, device="cpu", **options))
        modules = list(llm.loaded.model.modules())
        packed[str(options)] = sum(isinstance(module, PackedLinear) for module in modules)
        assert len(llm.generate(["import "])[0].tokens) == 3
    layers = llm.loaded.config.layers
    expected = 4 * layers if can_pack(torch.empty(0, dtype=torch.bfloat16)) else 0
    assert list(packed.values()) == [expected, 0, 0, 0]


@pytest.mark.parametrize("shape", [(1024, 48), (2048, 384), (640, 384), (384,)])
def test_reserved_memory_runs_along_the_outputs_and_avoids_pages(shape: tuple[int, ...]) -> None:
    assert reserve(shape, torch.bfloat16, CPU).is_contiguous()
    tensor = reserve(shape, torch.float32, CPU)
    assert tensor.shape == shape
    if len(shape) == 2:
        assert tensor.stride(0) == 1
        assert tensor.stride(1) * 4 % 4096 != 0


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
def test_heads_go_from_phase_to_phase(make_checkpoint: Callable[..., Path], tmp_path: Path, kind: Any) -> None:
    """Heads saved by phase 3 compute the same here, and are saved here byte for byte as there."""
    folder = str(make_checkpoint("llama"))
    old, new = phase3.load(folder, torch.float32, CPU), phase4.load(folder, torch.float32, CPU)
    torch.manual_seed(0)
    shape = {"heads": 2, "blocks": 1} if kind == "medusa" else {"ffn_width": 40, "reach": 16}
    heads = before.build_heads(kind, shape, old.config)
    beside(3, "training.features").initialise(heads, old.model, "random")
    before.save_heads(tmp_path / "old", heads, old)
    loaded: list[Any] = [before.load_heads(tmp_path / "old", old, kind), after.load_heads(tmp_path / "old", new, kind)]
    after.save_heads(tmp_path / "new", loaded[1], new)
    one, other = (load_file(tmp_path / name / "heads.safetensors") for name in ("old", "new"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    tokens = torch.randint(1, 300, (1, 12))
    guesses = []
    both: list[tuple[Any, Any, Any, Any]] = [(phase3, before, old, loaded[0]), (phase4, after, new, loaded[1])]
    for engine, module, target, found in both:
        params, source = engine.SamplingParams(), engine.GreedySource()
        options = SimpleNamespace(drafter=kind)
        drafter = engine.drafters.make_drafter(options, target.model, None, source, Purpose.DRAFT, found)
        sequence = engine.Sequence(tokens[0].tolist(), params, engine.Ending())
        states = module.target_states(target, tokens[:, :-1], ())[0]
        drafter.observe(engine.Outcome([sequence], [0], [states]))
        tree = engine.Tree([5, 6], [-1, -1])
        levels = [engine.drafting.Frontier(sequence, tree, nodes) for nodes in ([-1], [0, 1])]
        guesses.append([drafter.expand([level])[0] for level in levels])
    torch.testing.assert_close(*guesses, atol=1e-5, rtol=1e-4)


@pytest.mark.about("engine/shapes.py, padded_length")
def test_only_narrow_forwards_are_padded(make_checkpoint: Callable[..., Path]) -> None:
    folder = str(make_checkpoint("gpt2"))  # position embeddings end at the context of 128
    full, half = (phase4.load(folder, dtype, CPU).model for dtype in (torch.float32, torch.bfloat16))
    assert [padded_length(length, full) for length in (5, 16, 121)] == [5, 16, 121]
    assert [padded_length(length, half) for length in (5, 16, 17, 121, 128)] == [16, 16, 32, 128, 128]
    assert padded_length(131, half) == 131  # trees may pass it
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert padded_length(5, full) == 16


def test_padding_changes_no_logit(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of any length, chains and trees, also at the end of the context."""
    model = pair[1].model
    edge = list(range(20, 20 + 125))
    texts, trees = [[5, 6, 7], edge], [phase4.Tree([8, 9, 10], [-1, -1, 1]), phase4.Tree([11, 12], [-1, 0])]
    chains = [phase4.Tree([8, 9], [-1, 0]), phase4.Tree([11], [-1])]
    plain = [target_forward(model, texts, shape).logits for shape in (trees, chains)]
    monkeypatch.setattr("phase4.target.padded_length", lambda length, _: length + 13 if length <= 115 else length)
    short = [target_forward(model, texts[:1], shape[:1]).logits for shape in (trees, chains)]
    for whole, alone in zip(plain, short, strict=True):
        torch.testing.assert_close(whole[0, : alone.shape[1]], alone[0], atol=2e-5, rtol=1e-4)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    folder = Path(phase4.__file__).resolve().parents[1]
    command: list[Any] = [sys.executable, folder / "generate.py", "--prompt", "import ", *arguments]
    return forked.run(command, env={**os.environ, **environment})


def test_a_compiler_that_fails_is_one_line() -> None:
    def run() -> None:
        raise torch._dynamo.exc.BackendCompilerFailed(lambda: None, OSError("no\nworking compiler"), None)

    with pytest.raises(UserError, match="--compile: OSError: no working compiler; it needs a C\\+\\+ compiler"):
        Compiler().warm_up(run)


@pytest.mark.slow
def test_nothing_to_compile_with_is_an_error(tmp_path: Path, llama_folder: Path) -> None:
    cache = str(tmp_path)  # an earlier run may have compiled all graphs
    done = run(
        "--compile",
        "--model",
        str(llama_folder),
        "--draft",
        "none",
        "--max-tokens",
        "4",
        CXX="/nowhere/g++",
        TORCHINDUCTOR_CACHE_DIR=cache,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr[-500:]
    assert done.stderr.count("\n") == 1
    assert "--compile" in done.stderr
    assert "C++ compiler" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", [["--draft", "none"], [], ["--tree", "static", "--temperature", "1"]])
def test_compiled_layers_write_the_same_and_compile_once(how: list[str]) -> None:
    """At most 3 graphs are compiled after the warm-up, for all lengths."""
    options = {name.removeprefix("--"): value for name, value in zip(how[::2], how[1::2], strict=True)}
    llms = [
        phase4.LLM(phase4.Options(max_tokens=24, dtype="float32", compile=compiled, **options))  # type: ignore[arg-type]
        for compiled in (False, True)
    ]
    warm = llms[1].compiled_graphs
    assert warm >= 2
    for text in ("import ", "def read_config(path):\n    with open(path) as file:\n        return ", "x"):
        tokens = [llm.generate([text])[0].tokens for llm in llms]
        assert tokens[0] == tokens[1]
    assert llms[1].compiled_graphs - warm <= 3
