"""GPTQ, AWQ and compressed-tensors: from phase 4 on the engine's matrices are the dequantised values of the file.

The files are written here by the rules of each format, from known levels, zeros and scales.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
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

pytestmark = pytest.mark.newest

CPU = torch.device("cpu")
FIRST = 4  # the first phase that reads them
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # index of the number in each four bits of a word, from the lowest
TOKENS = torch.randint(1, 320, (1, 24), generator=torch.Generator().manual_seed(4))


@dataclass(frozen=True)
class Case:
    about: dict[str, Any]  # quantization_config
    group: int = 32  # 0: the whole width
    zeros: bool = False  # other than the middle
    bits: int = 4
    signed: bool = False  # whether scales have either sign, as AutoRound writes them
    shuffled: bool = False  # whether input features of a group are apart (act-order)


def gptq(**keys: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, **keys}


def awq(**keys: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", **keys}


def compressed(layout: str, activations: Any = None, **weights: Any) -> dict[str, Any]:
    described = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **weights}
    group = {"targets": ["Linear"], "weights": described, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


CHANNEL: dict[str, Any] = {"strategy": "channel", "group_size": None}
INT8: dict[str, Any] = {"num_bits": 8, **CHANNEL}
CASES = {
    "gptq": Case(gptq()),
    "gptq, zeros": Case(gptq(sym=False), zeros=True),
    "gptq_v2, zeros": Case(gptq(sym=False, checkpoint_format="gptq_v2"), zeros=True),
    "gptq, signed": Case(gptq(), signed=True),
    "gptq, one group": Case(gptq(group_size=-1, desc_act=True), group=0),
    "gptq, groups of 64": Case(gptq(group_size=64), group=64),
    "gptq, act-order": Case(gptq(desc_act=True), shuffled=True),
    "gptq, act-order, zeros": Case(gptq(desc_act=True, sym=False), zeros=True, shuffled=True),
    "awq": Case(awq(), zeros=True),
    "compressed-tensors": Case(compressed("pack-quantized")),
    "compressed-tensors, act-order": Case(compressed("pack-quantized", actorder="group"), shuffled=True),
    "compressed-tensors, zeros": Case(compressed("pack-quantized", symmetric=False), zeros=True),
    "compressed-tensors, channels": Case(compressed("pack-quantized", **CHANNEL), group=0),
    "compressed-tensors, packed int8": Case(compressed("pack-quantized", **INT8), group=0, bits=8),
    "compressed-tensors, int8": Case(compressed("int-quantized", **INT8), group=0, bits=8),
}


def words(numbers: Tensor, bits: int = 4, order: tuple[int, ...] | None = None) -> Tensor:
    """Pack [..., n] -> int32 [..., n * bits / 32], number order[i] of each word in the i-th bits from the lowest."""
    each = 32 // bits
    parts = numbers.long().unflatten(-1, (-1, each))[..., list(order or range(each))]
    packed = (parts << torch.arange(each) * bits).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def stored(case: Case, levels: Tensor, zeros: Tensor, scales: Tensor, group_of: Tensor) -> dict[str, Tensor]:
    """Store a matrix [out, in] in the format; levels from 0, zeros and scales [out, groups], group_of [in]."""
    method = case.about["quant_method"]
    if method == "gptq":
        less = 0 if case.about.get("checkpoint_format") == "gptq_v2" else 1
        return {
            "qweight": words(levels).T.contiguous(),
            "qzeros": words((zeros.T - less) % 16),
            "scales": scales.T.contiguous(),
            "g_idx": group_of.int(),
        }
    if method == "awq":
        return {
            "qweight": words(levels.T, 4, AWQ_ORDER),
            "qzeros": words(zeros.T, 4, AWQ_ORDER),
            "scales": scales.T.contiguous(),
        }
    tensors = {"weight_scale": scales.to(torch.bfloat16)}
    if case.about["format"] == "int-quantized":
        return {**tensors, "weight": (levels - 128).to(torch.int8)}
    tensors |= {"weight_packed": words(levels, case.bits), "weight_shape": torch.tensor(levels.shape)}
    if case.zeros:
        tensors["weight_zero_point"] = words(zeros.T).T.contiguous()
    return {**tensors, "weight_g_idx": group_of.int()} if case.shuffled else tensors


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
        case, generator = CASES[name], torch.Generator().manual_seed(5)
        meant = make_checkpoint(family, **widths[family])
        folder = tmp_path_factory.mktemp("quantised") / "model"
        shutil.copytree(meant, folder)
        dense, packed, weights = load_file(meant / "model.safetensors"), dict[str, Tensor](), dict[str, Tensor]()
        for key, tensor in dense.items():
            if ".layers." not in key or tensor.ndim != 2:
                packed[key] = tensor
                continue
            (out, width), top = tensor.shape, 2**case.bits
            size = case.group or width
            levels = torch.randint(0, top, (out, width), generator=generator)
            zeros = torch.full((out, width // size), top // 2)
            if case.zeros:
                zeros = torch.randint(0, top, zeros.shape, generator=generator)
            group_of = torch.arange(width) // size
            if case.shuffled:  # alike for matrices with the same inputs
                group_of = group_of[torch.randperm(width, generator=torch.Generator().manual_seed(width))]
            # float16 represents every bfloat16 of this size.
            scales = ((torch.rand(zeros.shape, generator=generator) + 0.5) / 4 / top).bfloat16().half()
            if case.signed:
                scales *= 1 - 2 * torch.randint(0, 2, scales.shape, generator=generator)
            owner = key.removesuffix(".weight")
            weights[owner] = (levels - zeros[:, group_of]).float() * scales[:, group_of].float()
            dense[key] = weights[owner]
            parts = stored(case, levels, zeros, scales, group_of)
            packed |= {f"{owner}.{kind}": part for kind, part in parts.items()}
        save_file(dense, meant / "model.safetensors", {"format": "pt"})
        save_file(packed, folder / "model.safetensors", {"format": "pt"})
        change(folder, quantization_config=case.about)
        reference = AutoModelForCausalLM.from_pretrained(meant, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            logits = reference.eval()(TOKENS, use_cache=False).logits
        made[name, family] = Written(folder, logits, weights)
        return made[name, family]

    return make


def change(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))


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
