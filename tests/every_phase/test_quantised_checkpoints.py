"""GPTQ, AWQ and compressed-tensors: from phase 4 on the engine's matrices are the dequantised values of the file.

The files are written by tests/support/quantised.py, by the rules of each format.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from common.errors import UserError
from common.phases import Phase
from tests.support.quantised import CASES, INT8, change, compressed, quantise

pytestmark = pytest.mark.newest

CPU = torch.device("cpu")
FIRST = 4  # the first phase that reads them
TOKENS = torch.randint(1, 320, (1, 24), generator=torch.Generator().manual_seed(4))


@dataclass(frozen=True)
class Written:
    folder: Path  # as written by the tool
    logits: Tensor  # transformers' logits of the dequantised model
    weights: dict[str, Tensor]  # name in the file -> float32 matrix


@pytest.fixture(scope="module")
def write(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Written]:
    made: dict[tuple[str, str], Written] = {}
    widths: dict[str, dict[str, Any]] = {
        "llama": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4},
        "opt": {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64},
    }

    def make(name: str, family: str = "llama") -> Written:
        if (name, family) in made:
            return made[name, family]
        meant = make_checkpoint(family, **widths[family])
        folder = tmp_path_factory.mktemp("quantised") / "model"
        weights = quantise(CASES[name], meant, folder)
        reference = AutoModelForCausalLM.from_pretrained(meant, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            logits = reference.eval()(TOKENS, use_cache=False).logits
        made[name, family] = Written(folder, logits, weights)
        return made[name, family]

    return make


def edited(written: Written, to: Path, **tensors: Callable[[Tensor], Tensor | None]) -> Path:
    """Copy a checkpoint with changed tensors of the first query projection; None removes a tensor."""
    shutil.copytree(written.folder, to)
    stored = load_file(to / "model.safetensors")
    for kind, edit in tensors.items():
        name = f"model.layers.0.self_attn.q_proj.{kind}"
        new = edit(stored.pop(name))
        if new is not None:
            stored[name] = new.contiguous()
    save_file(stored, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.fixture
def reader(phase: Phase) -> ModuleType:
    if phase.number < FIRST:
        pytest.skip("quantisation begins in phase 4")
    return importlib.import_module(phase.package)


@pytest.mark.newest(1)
@pytest.mark.parametrize("name", list(CASES))
def test_every_weight_is_what_the_file_means(reader: ModuleType, write: Callable[..., Written], name: str) -> None:
    written = write(name)
    model = reader.load(str(written.folder), torch.float32, CPU).model
    for number, layer in enumerate(model.layers):
        for module, parts in (
            (layer.attention.qkv, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            (layer.attention.output, ("self_attn.o_proj",)),
            (layer.ffn.gate_up, ("mlp.gate_proj", "mlp.up_proj")),
            (layer.ffn.down, ("mlp.down_proj",)),
        ):
            assert type(module).__name__ == "QuantLinear"
            meant = torch.cat([written.weights[f"model.layers.{number}.{part}"] for part in parts])
            assert torch.equal(module.weight, meant)


@pytest.mark.newest(1)
@pytest.mark.parametrize(("name", "family"), [*((name, "llama") for name in CASES), ("gptq", "opt"), ("awq", "opt")])
def test_the_logits_are_those_of_the_matrices_written_out(
    reader: ModuleType, write: Callable[..., Written], name: str, family: str
) -> None:
    written = write(name, family)
    with torch.no_grad():
        logits = reader.load(str(written.folder), torch.float32, CPU).model(TOKENS)
    torch.testing.assert_close(logits, written.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["gptq, zeros", "gptq, signed", "gptq, act-order", "awq", "compressed-tensors", "compressed-tensors, int8"]
)
def test_in_cpp(phase: Phase, reader: ModuleType, write: Callable[..., Written], name: str) -> None:
    if importlib.util.find_spec(f"{phase.package}.kernels") is None:
        pytest.skip("the C++ kernels begin in phase 5")
    cpp = importlib.import_module(f"{phase.package}.kernels.cpp")
    if (reason := cpp.why_not()) is not None:
        pytest.skip(reason)
    model = reader.load(str(write(name).folder), torch.float32, CPU).model
    with torch.no_grad():
        expected = model(TOKENS)[0]
    fast = cpp.CppModel(model, "float32", 2, exact_activations=True)
    found = fast.step(fast.new_cache(1, 32), [TOKENS[0].tolist()], wanted=range(TOKENS.shape[1])).logits
    assert float((found - expected).abs().max() / expected.abs().max()) < 2e-5


def test_scales_that_bfloat16_does_not_hold_are_rounded_with_a_note(
    reader: ModuleType, write: Callable[..., Written], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = edited(write("gptq"), tmp_path / "model", scales=lambda scales: scales * 1.003)
    exact = load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.scales"].float()
    model = reader.load(str(folder), torch.float32, CPU).model
    kept = model.layers[0].attention.qkv.scales[: exact.shape[1]].float().T
    assert 0 < float(((kept - exact) / exact).abs().max()) <= 2**-8
    assert "scales are kept as bfloat16, which moves weights by up to 0." in capsys.readouterr().err


def test_a_bias_of_zeros_that_the_model_has_not(
    reader: ModuleType, write: Callable[..., Written], tmp_path: Path
) -> None:
    """Early GPTQ tools wrote a zero bias beside every matrix. A nonzero bias is an error."""
    folder = edited(write("gptq"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.bias"] = torch.zeros(128, dtype=torch.float16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    reader.load(str(folder), torch.float32, CPU)
    tensors["model.layers.0.mlp.up_proj.bias"][3] = 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"unknown: model\.layers\.0\.mlp\.up_proj\.bias"):
        reader.load(str(folder), torch.float32, CPU)


def test_activations_that_were_rounded_get_a_note(
    reader: ModuleType, write: Callable[..., Written], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = edited(write("compressed-tensors, int8"), tmp_path / "model")
    by_token = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token", "symmetric": True}
    change(folder, quantization_config=compressed("int-quantized", by_token, **INT8))
    reader.load(str(folder), torch.float32, CPU)
    assert "was made for activations that are rounded to int8; here they are not" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(CASES))
def test_before_phase_4_they_are_refused_by_name(phase: Phase, write: Callable[..., Written], name: str) -> None:
    if phase.number >= FIRST:
        pytest.skip("they are read here")
    engine = importlib.import_module(phase.package)
    with pytest.raises(UserError, match=f"quantised by '{CASES[name].about['quant_method']}'"):
        engine.load(str(write(name).folder), torch.float32, CPU)


SPOILT: dict[str, tuple[str, dict[str, Callable[[Tensor], Tensor | None]], str]] = {
    "another order": ("gptq", {"g_idx": lambda index: index.flip(0)}, r"the groups of its input features \(g_idx\)"),
    "no groups": ("gptq", {"g_idx": lambda index: index * 0}, r"q_proj\.g_idx does not divide 64 input features into"),
    "no scales": ("gptq", {"scales": lambda scales: None}, r"q_proj\.scales is missing"),
    "no levels": ("awq", {"qweight": lambda levels: None}, r"attention\.qkv is not quantised, or only in part"),
    "too few scales": ("awq", {"scales": lambda scales: scales[:1]}, r"the scales are \[64, 1\], and \[64, 2\]"),
    "scales of whole numbers": ("gptq", {"scales": lambda scales: scales.int()}, r"q_proj\.scales is torch\.int32"),
    "infinite scales": ("gptq", {"scales": lambda scales: scales / 0}, r"q_proj: scales are not finite"),
    "negative scales, zeros": ("awq", {"scales": lambda scales: -scales}, r"q_proj: scales are not finite, or below 0"),
    "zeros though symmetric": ("gptq", {"qzeros": lambda zeros: zeros + 1}, r"q_proj: zeros differ, and"),
    "no zeros": ("compressed-tensors, zeros", {"weight_zero_point": lambda zeros: None}, r"q_proj: zeros are missing"),
    "fewer rows": ("gptq", {"qweight": lambda levels: levels[:, :32]}, r"the scales are \[64, 2\], and \[32, 2\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(SPOILT))
def test_a_damaged_matrix_is_named(
    reader: ModuleType, write: Callable[..., Written], tmp_path: Path, name: str
) -> None:
    case, edits, words = SPOILT[name]
    with pytest.raises(UserError, match=words) as error:
        reader.load(str(edited(write(case), tmp_path / "model", **edits)), torch.float32, CPU)
    assert "\n" not in str(error.value)


def test_a_matrix_of_which_a_part_is_quantised(
    reader: ModuleType, write: Callable[..., Written], tmp_path: Path
) -> None:
    """Query, key and value are computed at once."""
    folder = edited(write("awq"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    owner = "model.layers.1.self_attn.k_proj"
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{owner}.")}
    tensors[f"{owner}.weight"] = torch.zeros(32, 64)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.attention\.qkv is not quantised, or only in part"):
        reader.load(str(folder), torch.float32, CPU)


def test_quantising_again_is_refused(reader: ModuleType, write: Callable[..., Written]) -> None:
    format = importlib.import_module(f"{reader.__name__}.quantize").Format("int8")
    with pytest.raises(UserError, match="is quantised already"):
        reader.load(str(write("awq").folder), torch.float32, CPU, format)
