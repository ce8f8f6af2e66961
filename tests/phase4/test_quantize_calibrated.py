"""AWQ and GPTQ: the statistics of a matrix's inputs are right, and the outputs' error is smaller."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import phase4
from common.errors import UserError
from common.models.corpus import read_files
from phase4 import quantize_calibrated
from phase4.quantize import Format, QuantLinear, linear_names, rtn
from phase4.quantize_calibrated import METHODS, Inputs, Method, best_clip, calibration_windows, gptq, output_error
from phase4.quantize_calibrated import quantize_calibrated as quantize

CPU = torch.device("cpu")
FORMATS = [Format("int4", 64), Format("int4", 32, True)]
both_formats = pytest.mark.parametrize("format", FORMATS, ids=repr)


@pytest.fixture
def target(make_checkpoint: Callable[..., Path]) -> phase4.LoadedModel:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return phase4.load(str(make_checkpoint("llama", **shape)), torch.float32, CPU)


def correlated(width: int = 128, rank: int = 16, spread: float = 0.0) -> tuple[Tensor, Inputs]:
    """Make inputs [4096, width] that vary mostly in a few directions; `spread` makes features differ in size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, rank, generator=generator) @ torch.randn(rank, width, generator=generator) / rank**0.5
    x += 0.1 * torch.randn(4096, width, generator=generator)
    x *= torch.exp(spread * torch.randn(width, generator=generator))
    return x, Inputs(x.T @ x / len(x), x.abs().mean(0))


def error_of(method: Method, weight: Tensor, format: Format, x: Tensor, inputs: Inputs) -> float:
    """Compute the mean squared change of the outputs."""
    linear = QuantLinear.of(METHODS[method](weight, format, inputs), format, None)
    return float((linear(x) - x @ weight.T).square().mean())


@both_formats
def test_on_correlated_inputs_calibrated_rounding_is_better(format: Format) -> None:
    x, inputs = correlated(spread=1.0)
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(1))
    plain, scaled, corrected = (error_of(method, weight, format, x, inputs) for method in ("rtn", "awq", "gptq"))
    assert scaled < 0.8 * plain
    assert corrected < 0.3 * plain


@both_formats
def test_awq_keeps_the_weights_of_an_input_far_larger_than_the_others(format: Format) -> None:
    x, _ = correlated()
    x[:, 5] *= 300
    inputs = Inputs(x.T @ x / len(x), x.abs().mean(0))
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(1))
    size = float((x @ weight.T).square().mean())
    assert error_of("rtn", weight, format, x, inputs) > 5e-3 * size
    assert error_of("awq", weight, format, x, inputs) < 1e-4 * size


def test_both_ends_of_a_symmetric_group_are_kept_if_both_matter() -> None:
    """With one of them at level -8 the other would be clipped to 7 / 8 of its size."""
    weight, format = torch.zeros(1, 32), Format("int4", 32)
    weight[0, :3] = torch.tensor([7.0, -7.0, 0.4])
    moments = torch.diag(torch.tensor([100.0, 100.0, *[1e-3] * 30]))
    grid = best_clip(format.grouped(weight), Inputs(moments, torch.ones(32)), format)
    assert grid.values(grid.levels(format.grouped(weight), format))[0, 0, :3].tolist() == [7, -7, 0]
    assert rtn(weight, format).grid.scale.item() == -0.875


def test_the_moments_tell_the_error_of_the_outputs() -> None:
    x, inputs = correlated()
    error = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(output_error(error, inputs.moments), (x @ error.T).square().mean(0), rtol=1e-3, atol=0)
    blocks = inputs.by_group(32)
    assert blocks.shape == (4, 32, 32)
    assert torch.equal(blocks[2], inputs.moments[64:96, 64:96])


@both_formats
def test_without_correlation_gptq_rounds_to_nearest(format: Format) -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    inputs = Inputs(torch.eye(128), torch.ones(128))
    weights = format.grouped(weight)
    expected = best_clip(weights, inputs, format).levels(weights, format)
    assert torch.equal(gptq(weight, format, inputs).levels, expected)


@pytest.mark.about("engine/quantize_calibrated.py, gptq")
def test_gptq_moves_what_is_left_to_the_best_place() -> None:
    """Two columns with equal inputs: after the first is rounded, the second is changed so that their sum is right."""
    format = Format("int4", 32)
    weight = torch.zeros(1, 32)
    weight[0, :3] = torch.tensor([0.26, 0.3, -8.0])  # the last makes the step 1
    moments = torch.diag(torch.full((32,), 1e-3))
    moments[0, 0], moments[1, 1], moments[0, 1], moments[1, 0] = (
        1.0,
        0.9,
        0.9,
        0.9,
    )  # the second input follows the first
    moments[2, 2] = 100.0  # clipping must not pay
    levels = gptq(weight, format, Inputs(moments, torch.ones(32))).levels[0, 0] - 8
    assert rtn(weight, format).levels[0, 0, :2].tolist() == [8, 8]
    assert levels[:2].tolist() == [0, 1]  # 0.26 + 0.3 is nearer to 1 than to 0


def test_a_feature_that_never_comes_does_no_harm() -> None:
    x, inputs = correlated()
    x[:, 7] = 0
    inputs = Inputs(x.T @ x / len(x), x.abs().mean(0))
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    methods: tuple[Method, ...] = ("awq", "gptq")
    for method in methods:
        linear = QuantLinear.of(METHODS[method](weight, FORMATS[0], inputs), FORMATS[0], None)
        assert bool(torch.isfinite(linear.weight).all())
        assert error_of(method, weight, FORMATS[0], x, inputs) < error_of("rtn", weight, FORMATS[0], x, inputs)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_every_matrix_is_calibrated_on_what_it_will_be_given(
    target: phase4.LoadedModel, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations come from the quantised layers before, in the order in which they run."""
    seen: list[tuple[torch.nn.Module, Inputs]] = []
    observe = quantize_calibrated.observe

    def note(linear: torch.nn.Module, *arguments: Any) -> Inputs:
        seen.append((linear, observe(linear, *arguments)))
        return seen[-1][1]

    monkeypatch.setattr(quantize_calibrated, "observe", note)
    model = target.model
    names, before = linear_names(model, head=True), dict(model.named_modules())
    tokens = torch.randint(20, 300, (6, 16), generator=torch.Generator().manual_seed(0))
    quantize(model, FORMATS[1], method, tokens, head=True, rows=4)
    assert [linear for linear, _ in seen] == [before[name] for name in names]  # they run in this order
    for name, (_, inputs) in zip(names, seen, strict=True):
        given: list[Tensor] = []
        linear = model.get_submodule(name)
        assert isinstance(linear, QuantLinear)
        hook = linear.register_forward_pre_hook(lambda _, x, given=given: given.append(x[0].flatten(0, -2)))
        model(tokens)
        hook.remove()
        x = torch.cat(given)
        torch.testing.assert_close(inputs.moments, x.T @ x / len(x), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(inputs.size, x.abs().mean(0), rtol=1e-3, atol=1e-5)


def test_the_model_as_a_whole_is_nearer_to_what_it_was(target: phase4.LoadedModel) -> None:
    tokens = torch.randint(20, 300, (32, 32), generator=torch.Generator().manual_seed(0))
    unseen = torch.randint(20, 300, (8, 32), generator=torch.Generator().manual_seed(1))
    exact = target.model(unseen)
    errors: dict[Method, float] = {}
    for method in ("rtn", "gptq"):
        model = phase4.load(target.checkpoint.name, torch.float32, CPU).model
        quantize(model, FORMATS[0], method, tokens)
        errors[method] = float((model(unseen) - exact).norm())
    assert errors["gptq"] < 0.95 * errors["rtn"]


def test_calibration_text_comes_from_the_training_half_or_the_given_files(
    target: phase4.LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    file = tmp_path / "text.py"
    file.write_text("def function(left, right):\n    return left + right\n" * 40)

    def corpus(half: str) -> list[Any]:
        asked.append(half)
        return read_files([file])

    monkeypatch.setattr(quantize_calibrated, "read_corpus", corpus)
    windows = calibration_windows(target, [], 100, 16, seed=0)
    assert asked == ["train"]
    assert windows.shape == (6, 16)
    assert torch.equal(calibration_windows(target, [file], 100, 16, seed=0), windows)
    assert not torch.equal(calibration_windows(target, [file], 100, 16, seed=1), windows)
    stream = [*target.tokenizer.eos_ids[:1], *target.tokenizer.encode(file.read_text())]
    assert all(row in [stream[i : i + 16] for i in range(0, len(stream), 16)] for row in windows.tolist())
    file.write_text("pass")
    with pytest.raises(UserError, match="at least a --window of 16 is needed"):
        calibration_windows(target, [file], 100, 16, seed=0)
    with pytest.raises(UserError, match="--window 256: the model sees 128 tokens"):
        calibration_windows(target, [file], 100, 256, seed=0)
