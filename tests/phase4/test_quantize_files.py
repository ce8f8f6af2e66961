"""Quantised checkpoints: they load as saved, and a damaged one is refused by the name of its tensor."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import phase4
from common.errors import UserError
from phase4.quantize import Format, QuantLinear, quantize_model, stored_bytes
from phase4.quantize_calibrated import Method, quantize_calibrated
from phase4.quantize_files import save_quantized

CPU = torch.device("cpu")
TOKENS = torch.randint(20, 300, (4, 32), generator=torch.Generator().manual_seed(0))
CASES: list[tuple[str, Format, Method, bool]] = [
    ("llama", Format("int8"), "rtn", False),
    ("llama", Format("int4", 64), "gptq", True),
    ("gpt2", Format("int4", 32, True), "awq", True),
    ("gpt2", Format("int4", 32), "rtn", False),
]
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 64},
}


@pytest.fixture(scope="module")
def source(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("llama", **SHAPES["llama"])


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Import quantize.py of the phase with the installed engine package."""
    spec = importlib.util.spec_from_file_location("quantize", Path(phase4.__file__).parents[1] / "quantize.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    borrowed = {name: sys.modules.get(name) for name in list(sys.modules) if name.partition(".")[0] == "engine"}
    own = {f"engine{name[6:]}": module for name, module in sys.modules.items() if name.partition(".")[0] == "phase4"}
    sys.modules.update(own)
    try:
        spec.loader.exec_module(module)
    finally:
        for name in own:
            del sys.modules[name]
        sys.modules.update({name: module for name, module in borrowed.items() if module is not None})
    return module


@pytest.fixture
def quantized(source: Path, tmp_path: Path) -> Path:
    """Make an int4 checkpoint, for tests to damage."""
    loaded, format, folder = phase4.load(str(source), torch.float32, CPU), Format("int4", 64, True), tmp_path / "int4"
    quantize_model(loaded.model, format)
    save_quantized(folder, loaded.checkpoint, loaded.model, format, torch.float32, {"method": "rtn"})
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> phase4.Transformer:
    return phase4.load(str(folder), dtype, CPU).model


@pytest.mark.parametrize(("family", "format", "method", "head"), CASES, ids=repr)
def test_what_was_saved_is_loaded(
    make_checkpoint: Callable[..., Path], tmp_path: Path, family: str, format: Format, method: Method, head: bool
) -> None:
    source = phase4.load(str(make_checkpoint(family, **SHAPES[family])), torch.float32, CPU)
    (source.checkpoint.folder / "lab.json").write_text('{"draft": "stdlib-1m"}')
    if method == "rtn":
        quantize_model(source.model, format, head)
    else:
        quantize_calibrated(source.model, format, method, TOKENS, head)
    save_quantized(tmp_path / "saved", source.checkpoint, source.model, format, torch.float32, {"method": method})
    loaded = phase4.load(str(tmp_path / "saved"), torch.float32, CPU)
    assert torch.equal(loaded.model(TOKENS), source.model(TOKENS))
    assert stored_bytes(loaded.model, head) == stored_bytes(source.model, head)
    assert isinstance(loaded.model.head, QuantLinear) == head
    for name in ("lab.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (source.checkpoint.folder / name).read_bytes()
    half = load(tmp_path / "saved", torch.bfloat16)
    assert {buffer.dtype for buffer in half.buffers()} == {buffer.dtype for buffer in loaded.model.buffers()}
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def spoil(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


FFN = "layers.1.ffn.down"
SPOILT: list[tuple[str, Callable[[dict[str, Tensor]], object]]] = [
    (rf"2 of tensor {FFN}\.scales are not finite and above 0", lambda t: t[f"{FFN}.scales"][3].fill_(torch.nan)),
    (rf"1 of tensor {FFN}\.scales are not finite and above 0", lambda t: t[f"{FFN}.scales"][3, 1].fill_(-1.0)),
    (rf"2 of tensor {FFN}\.zeros are not finite;", lambda t: t[f"{FFN}.zeros"][3].fill_(torch.inf)),
    (
        rf"tensor {FFN}\.scales has shape \[2, 64\], config\.json asks for \[64, 2\]",
        lambda t: t.update({f"{FFN}.scales": t[f"{FFN}.scales"].T.contiguous()}),
    ),
    (
        rf"tensor {FFN}\.scales holds torch\.float32, config\.json asks for torch\.bfloat16",
        lambda t: t.update({f"{FFN}.scales": t[f"{FFN}.scales"].float()}),
    ),
    (rf"tensor {FFN}\.values holds torch\.int8", lambda t: t.update({f"{FFN}.values": t[f"{FFN}.values"].char()})),
    (rf"tensor {FFN}\.scales is missing", lambda t: t.pop(f"{FFN}.scales")),
    (
        r"tensor embedding\.weight holds torch\.int8; expected one of \(torch\.float32",
        lambda t: t.update({"embedding.weight": t["embedding.weight"].char()}),
    ),
    (
        r"tensor layers\.9\.ffn\.down\.values is not one of a llama model in int4 in groups of 64, asymmetric",
        lambda t: t.update({"layers.9.ffn.down.values": t[f"{FFN}.values"].clone()}),
    ),
]


def test_an_output_matrix_of_its_own_is_kept_although_the_flag_says_tied(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_checkpoint("llama", **SHAPES["llama"], tie_word_embeddings=False)
    config = {**json.loads((folder / "config.json").read_text()), "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = phase4.load(str(folder), torch.float32, CPU, Format("int8"))
    save_quantized(tmp_path / "saved", loaded.checkpoint, loaded.model, Format("int8"), torch.float32, {})
    saved = phase4.load(str(tmp_path / "saved"), torch.float32, CPU).model
    assert torch.equal(saved(TOKENS), loaded.model(TOKENS))


@pytest.mark.parametrize(("message", "change"), SPOILT, ids=range(len(SPOILT)))
def test_a_corrupt_tensor_is_named(
    quantized: Path, message: str, change: Callable[[dict[str, Tensor]], object]
) -> None:
    spoil(quantized, change)
    with pytest.raises(UserError, match=message):
        load(quantized)


@pytest.mark.parametrize(
    ("format", "scale", "wanted"),
    [
        (Format("int4", 64), 0.0, "finite and not 0"),
        (Format("int4", 64), -torch.inf, "finite and not 0"),
        (Format("int8"), -1.0, "finite and above 0"),
    ],
    ids=repr,
)
def test_only_scales_of_symmetric_int4_may_be_negative(
    source: Path, tmp_path: Path, format: Format, scale: float, wanted: str
) -> None:
    loaded = phase4.load(str(source), torch.float32, CPU, format)
    save_quantized(tmp_path / "saved", loaded.checkpoint, loaded.model, format, torch.float32, {})
    scales = load(tmp_path / "saved").get_buffer(f"{FFN}.scales")
    assert bool((scales < 0).any()) == format.signed
    spoil(tmp_path / "saved", lambda tensors: tensors[f"{FFN}.scales"][3].fill_(scale))
    with pytest.raises(UserError, match=rf"tensor {FFN}\.scales are not {wanted};"):
        load(tmp_path / "saved")


def test_files_of_another_model_or_format_are_refused(
    quantized: Path, source: Path, make_checkpoint: Callable[..., Path]
) -> None:
    file = quantized / "config.json"
    config = json.loads(file.read_text())
    about = config["quantization_config"]

    def with_config(**changes: Any) -> None:
        file.write_text(json.dumps({**config, **changes}))

    with_config(quantization_config={**about, "group": 32})
    with pytest.raises(UserError, match=r"has shape \[\d+, 1, 32\], config\.json asks for \[\d+, 2, 16\]"):
        load(quantized)
    with_config(quantization_config={**about, "name": "int8"})
    with pytest.raises(UserError, match=r"tensor layers\.\d\.\S+ (has shape|holds|is not one of)"):
        load(quantized)
    with_config(quantization_config={**about, "name": "int2"})
    with pytest.raises(UserError, match=r"name 'int2', group 64, asymmetric True.*; expected int8 or int4, one of 32"):
        load(quantized)
    with_config(quantization_config={"quant_method": "fp8"})
    with pytest.raises(UserError, match=r"is quantised by 'fp8', which is not read here"):
        load(quantized)
    wider = make_checkpoint("llama", **{**SHAPES["llama"], "intermediate_size": 192})
    shutil.copy(wider / "config.json", file)
    with_config(**json.loads(file.read_text()), quantization_config=about)
    with pytest.raises(UserError, match=r"tensor layers\.\d\.ffn\.\S+ has shape"):
        load(quantized)
    shutil.copy(source / "config.json", file)  # as for an unquantised model
    with pytest.raises(UserError, match=r"tensor layers\.\d\.\S+ holds torch.uint8, which needs scales"):
        load(quantized)


def test_what_is_quantised_is_not_quantised_again(quantized: Path) -> None:
    with pytest.raises(UserError, match="is quantised already; leave out --quant"):
        phase4.LLM(phase4.Options(model=str(quantized), draft="none", quant="int4"))
    options: dict[str, Any] = {"model": str(quantized), "device": "cpu", "dtype": "float32", "max_tokens": 12}
    plain = phase4.LLM(phase4.Options(**options, draft="none")).generate(["import "])
    drafted = phase4.LLM(phase4.Options(**options, draft=str(quantized))).generate(["import "])
    assert drafted[0].tokens == plain[0].tokens


def test_a_quantised_checkpoint_has_no_heads_of_its_own(quantized: Path) -> None:
    with pytest.raises(UserError, match="comes with no medusa heads; heads are trained for models that are not"):
        phase4.LLM(phase4.Options(model=str(quantized), drafter="medusa"))


def test_the_command_line_writes_what_generate_reads(
    script: ModuleType, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.py"
    text.write_text("def function(left, right):\n    return left + right\n" * 200)
    shared = ["--model", str(source), "--corpus", str(text), "--tokens", "512", "--window", "64", "--device", "cpu"]
    written = {}
    for method in ("rtn", "awq", "gptq"):
        out = tmp_path / method
        assert script.main([*shared, "--method", method, "--group", "32", "--out", str(out)]) == 0
        assert "int4 in groups of 32" in capsys.readouterr().out
        about = json.loads((out / "config.json").read_text())["quantization_config"]
        assert (about["method"], about["group"], about["source"]) == (method, 32, str(source))
        written[method] = load(out)(TOKENS)
    exact = load(source)(TOKENS)
    rounded = phase4.load(str(source), torch.float32, CPU, Format("int4", 32)).model(TOKENS)
    torch.testing.assert_close(written["rtn"], rounded)
    assert len({float((logits - exact).norm()) for logits in written.values()}) == 3
    assert about["calibration_tokens"] == 512
    with pytest.raises(UserError, match="there is something already"):
        script.main([*shared, "--out", str(tmp_path / "rtn")])
    with pytest.raises(UserError, match="is quantised already; give the model it came from"):
        script.main(["--model", str(tmp_path / "rtn"), "--out", str(tmp_path / "new")])
    with pytest.raises(UserError, match="--method gptq is for int4"):
        script.main([*shared, "--quant", "int8", "--method", "gptq", "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"group": 64.0}, "group 64.0"),
        ({"group": [64]}, r"group \[64\]"),
        ({"name": ["int4"]}, r"name \['int4'\]"),
        ({"asymmetric": 1}, "asymmetric 1"),
        ({"head": "yes"}, "head 'yes'"),
        ({"factor": None}, "factor None"),
        ({"quant_method": {"a": 1}}, r"quantised by {'a': 1}"),
    ],
)
def test_what_the_description_cannot_say(quantized: Path, keys: dict[str, Any], words: str) -> None:
    file = quantized / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": {**config["quantization_config"], **keys}}))
    with pytest.raises(UserError, match=words):
        load(quantized)


def test_sizes_that_the_tensors_do_not_have_cost_no_memory(quantized: Path) -> None:
    file = quantized / "config.json"
    config = json.loads(file.read_text())
    for key, size in {"vocab_size": 2**24, "intermediate_size": 2**22, "num_hidden_layers": 1024}.items():
        file.write_text(json.dumps({**config, key: size}))
        with pytest.raises(UserError, match=r"has shape|is missing"):
            load(quantized)
