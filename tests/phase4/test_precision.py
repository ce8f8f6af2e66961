"""Number formats: the choice of `auto`, computations in float32, `--amp`, and refused dtypes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import phase4
from common.errors import UserError
from common.options import run_main
from phase4 import cli, precision
from phase4.model import Attention, make_norm
from phase4.precision import Precision, resolve_precision

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


def shape(**changes: object) -> phase4.ModelConfig:
    """Make a small Llama's config."""
    values: dict[str, object] = dict(
        family="llama", vocab_size=64, layers=2, width=64, heads=4, kv_heads=2, head_dim=16
    )
    values |= dict(
        ffn_width=96, context=256, norm="rms", norm_eps=1e-5, positions="rope", activation="silu", gated=True
    )
    return phase4.ModelConfig(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make every measurement report bfloat16 as twice as fast, and record the calls."""
    calls: list[str] = []

    def measure(config: phase4.ModelConfig) -> dict[str, float]:
        calls.append(f"{config.width}")
        return {"float32": 2.0, "bfloat16": 1.0}

    monkeypatch.setattr(precision, "_measure", measure)
    return calls


# --- the choice of auto


@pytest.mark.parametrize(
    ("device", "bf16", "expected"), [(CUDA, True, "bfloat16"), (CUDA, False, "float16"), (MPS, True, "float16")]
)
def test_auto_on_a_card(device: torch.device, bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    found = resolve_precision("auto", False, device, shape)
    assert found.dtype == getattr(torch, expected)
    assert "auto" in str(found)
    amp = resolve_precision("auto", True, device, shape)
    assert (amp.dtype, amp.autocast) == (torch.float32, getattr(torch, expected))


@pytest.mark.parametrize(
    ("bfloat16_ms", "expected"),
    [(1.0, torch.bfloat16), (1.95, torch.float32), (9.0, torch.float32), (64.0, torch.float32)],
)
def test_auto_on_a_processor_takes_what_was_measured_to_be_faster(
    bfloat16_ms: float, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_measure", lambda config: {"float32": 2.0, "bfloat16": bfloat16_ms})
    found = resolve_precision("auto", False, CPU, shape)
    assert found.dtype == expected
    said = {1.0: "2.0", 1.95: "1.0", 9.0: "0.22", 64.0: "0.031"}[bfloat16_ms]
    assert f"a layer is {said} times as fast in bfloat16" in str(found)


def test_a_measurement_is_kept_per_machine_threads_and_layer(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "measured now" in str(resolve_precision("auto", False, CPU, shape))
    assert "measured before" in str(resolve_precision("auto", False, CPU, shape))
    assert measured == ["64"]
    resolve_precision("auto", False, CPU, lambda: shape(width=32))
    assert measured == ["64", "32"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    resolve_precision("auto", False, CPU, shape)
    assert measured == ["64", "32", "64"]
    monkeypatch.setattr(precision, "cpu_name", lambda: "another processor")
    resolve_precision("auto", False, CPU, shape)
    assert len(measured) == 4


def test_a_measurement_is_made_with_as_many_threads_as_will_compute(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, threads = torch.get_num_threads(), list[int]()

    def measure(config: phase4.ModelConfig) -> dict[str, float]:
        threads.append(torch.get_num_threads())
        return {"float32": 2.0, "bfloat16": 1.0}

    monkeypatch.setattr(precision, "_measure", measure)
    phase4.LLM(phase4.Options(model=str(make_checkpoint("llama")), draft="none", device="cpu", threads=before + 2))
    assert (threads, torch.get_num_threads()) == ([before + 2], before)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}', '{"x": {"float32": "?"}}'])
def test_a_damaged_file_is_measured_anew(content: str, measured: list[str], tmp_path: Path) -> None:
    file = tmp_path / "cache/llm-inference-lab/precision.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    resolve_precision("auto", False, CPU, shape)
    resolve_precision("auto", False, CPU, shape)
    assert len(measured) == 1
    assert len(json.loads(file.read_text())) == 1


def test_without_a_cache_folder_every_run_measures(
    measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert resolve_precision("auto", False, CPU, shape).dtype == torch.bfloat16
    assert len(measured) == 2


def test_the_real_measurement_is_of_a_layer_of_bounded_size() -> None:
    large = shape(width=4096, heads=32, kv_heads=8, head_dim=128, ffn_width=14336, vocab_size=128256, layers=32)
    odd = shape(width=1600, heads=25, kv_heads=25, head_dim=64, ffn_width=6400, gated=False, positions="learned")
    for config in (large, odd, shape()):
        small = precision.small_layer(config)
        assert sum(p.numel() for p in phase4.model.Transformer(small).parameters()) < 1.1 * precision.LARGEST
    assert precision.small_layer(shape()).width == 64
    times = precision._measure(precision.small_layer(shape()))
    assert set(times) == {"float32", "bfloat16"}
    assert min(times.values()) > 0


# --- computations in float32


class InHalf(nn.Module):
    """The two norms and the softmax with every intermediate result rounded."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        return x / (x * x).mean(-1, keepdim=True).sqrt()


def norm_error(norm: nn.Module, kind: str, dtype: torch.dtype) -> float:
    """Measure the largest error against float64; squares exceed float16's range, and a mean needs more than 8 bits."""
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    x = (x * 300 if dtype == torch.float16 else x + 100).to(dtype)
    exact = x.double()
    if kind == "layer":
        exact = exact - exact.mean(-1, keepdim=True)
    exact = exact / exact.pow(2).mean(-1, keepdim=True).sqrt()
    with torch.inference_mode():
        got = norm(x).double()
    return float((got - exact).abs().max().nan_to_num(9))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("rms", torch.float16), ("layer", torch.float16), ("layer", torch.bfloat16)]
)
def test_norm_statistics_are_float32(kind: str, dtype: torch.dtype) -> None:
    norm = make_norm(shape(width=512, norm=kind, norm_eps=1e-12)).to(dtype)
    nn.init.ones_(norm.weight)  # type: ignore[arg-type]
    assert norm_error(norm, kind, dtype) < 0.02
    assert norm_error(InHalf(kind), kind, dtype) > 0.05  # the test can tell


def attention_error(dtype: torch.dtype, length: int, last: bool) -> float:
    """Measure the error of attention whose query and key are its input, with scores near 60; value: minus 4."""
    attention = Attention(shape(width=16, heads=1, kv_heads=1, qkv_bias=True)).to(dtype)
    attention.qkv.weight = nn.Parameter(torch.eye(16).repeat(3, 1).to(dtype))
    attention.qkv.bias = nn.Parameter(torch.tensor([0.0] * 32 + [-4.0] * 16).to(dtype))
    attention.output.weight = nn.Parameter(torch.eye(16).to(dtype))
    x = 4 + torch.randn(1, length, 16, generator=torch.Generator().manual_seed(1)) / 4
    x = x.to(dtype)
    mask = torch.full((length, length), float("-inf")).triu(1)
    wanted = (torch.tensor([[0]]), torch.tensor([[length - 1]])) if last else None
    rows = mask[-1:] if last else mask
    with torch.inference_mode():
        got = attention(x, None, rows[None, None].to(dtype), wanted)[0].double()
    scores = x[0].double() @ x[0].double().T / 4 + mask.double()
    return float((got - (scores.softmax(-1) @ (x[0].double() - 4))[-len(got) :]).abs().max())


@pytest.mark.parametrize(("dtype", "enough"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
@pytest.mark.parametrize("length", [7, 64, 250])
@pytest.mark.parametrize("last", [False, True])
def test_softmax_is_float32(
    dtype: torch.dtype, enough: float, length: int, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert attention_error(dtype, length, last) < enough

    def rounded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, enable_gqa: bool) -> Tensor:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        mixed: Tensor = (scores + mask).softmax(-1) @ value
        return mixed

    monkeypatch.setattr(F, "scaled_dot_product_attention", rounded)
    assert attention_error(dtype, length, last) > enough  # the test can tell


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"dtype": "float16"}, {"amp": True}])
def test_acceptance_sees_float32(options: dict[str, object]) -> None:
    llm = phase4.LLM(phase4.Options(temperature=1.0, max_tokens=6, k=2, **options))  # type: ignore[arg-type]
    sequences = llm.sequences(["import os"])
    seen = 0
    for step in llm.run(sequences):
        assert step is not None
        if step.draft.probs is None:
            continue
        for probs in (step.target_probs(0), step.draft.probs):
            assert probs.dtype == torch.float32
            torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:-1]), rtol=0, atol=1e-5)
        seen += 1
    assert seen


# --- amp


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_amp_keeps_float32_weights_and_casts_the_products(make_checkpoint: Callable[..., Path], family: str) -> None:
    options = {"model": str(make_checkpoint(family)), "max_tokens": 4, "draft": "none"}
    llm = phase4.LLM(phase4.Options(amp=True, **options))  # type: ignore[arg-type]
    model = llm.loaded.model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    tokens = torch.tensor([llm.loaded.tokenizer.encode("def f(x): return x")])
    with torch.inference_mode():
        exact = model(tokens)
        with llm.computing():
            cast = model(tokens)
    assert cast.dtype == torch.bfloat16
    assert 0 < (cast.float() - exact).abs().max() < 0.05 * exact.abs().max()
    for _ in llm.run(llm.sequences(["x"])):
        assert not torch.is_autocast_enabled("cpu")  # the caller is outside autocast


def test_amp_decodes_with_cast_products(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    real = phase4.model.Transformer.logits

    def logits(self: phase4.model.Transformer, hidden: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return real(self, hidden)

    monkeypatch.setattr(phase4.model.Transformer, "logits", logits)
    for amp in (True, False):
        llm = phase4.LLM(phase4.Options(amp=amp, dtype="float32", max_tokens=2, draft="none"))
        llm.generate(["import os"])
        assert seen == [amp] * 2
        seen.clear()


# --- reports and refusals


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        run_main(cli.main, ["--prompt", "x", "--max-tokens", "2", *arguments])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_the_choice_is_said_once_and_stands_in_the_document(
    measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "--json", "--draft", "none")
    assert status == 0
    assert err.count("auto: a layer is 2.0 times as fast in bfloat16") == 1
    found = json.loads(out)["precision"]["stdlib-10m"]
    assert (found["dtype"], found["autocast"]) == ("bfloat16", None)
    assert "measured now" in found["why"]
    _, out, err = run(capsys, "--json", "--draft", "none", "--amp")
    assert "float32 with products in bfloat16" in err
    assert json.loads(out)["precision"]["stdlib-10m"] == {"dtype": "float32", "autocast": "bfloat16", "why": None}
    _, _, err = run(capsys, "--dtype", "float32")
    assert "(stdlib-10m, float32, cpu)" in err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_amp_over_half_weights_is_one_line(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "--amp", "--dtype", dtype)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert dtype in err


def test_a_dtype_that_the_device_lacks_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    with pytest.raises(UserError, match=r"bfloat16: Old Card .* use float16"):
        resolve_precision("bfloat16", False, CUDA, shape)

    def missing(*arguments: object) -> Tensor:
        raise RuntimeError("\"LayerNormKernelImpl\" not implemented for 'Half'\nmore")

    monkeypatch.setattr(F, "layer_norm", missing)
    with pytest.raises(UserError, match="float16: cpu cannot compute in it") as caught:
        resolve_precision("float16", False, CPU, shape)
    assert "\n" not in str(caught.value)


def test_a_named_dtype_is_neither_measured_nor_explained(measured: list[str]) -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        assert resolve_precision(dtype, False, CPU, shape) == Precision(getattr(torch, dtype))
    assert measured == []
