"""Quantised weights: exact packing, expected sizes, and lossless decoding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import phase4
from common.errors import UserError
from phase4.model import Linear
from phase4.quantize import (
    Format,
    QuantLinear,
    linear_names,
    pack,
    quantize_linear,
    quantize_model,
    rtn,
    stored_bytes,
    unpack,
)

CPU = torch.device("cpu")
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
FORMATS = [Format("int8"), *(Format("int4", group, zero) for group in (32, 64, 128) for zero in (False, True))]
every_format = pytest.mark.parametrize("format", FORMATS, ids=repr)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path]) -> Path:
    """Make a checkpoint; GPT-2's has a tied head and biases."""
    return make_checkpoint(request.param, **(WIDE if request.param == "llama" else {"n_embd": 64}))


def matrix(seed: int, out: int = 6, width: int = 256) -> Tensor:
    """Make a matrix with rows of very different size, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([1e-3, 0.1, 1.0, 30.0, 0.0, 1.0])[:out, None]
    return torch.randn(out, width, generator=generator) * sizes + 0.2 * sizes


def linear_of(weight: Tensor, format: Format) -> QuantLinear:
    return QuantLinear.of(rtn(weight, format), format, None)


@given(st.lists(st.integers(0, 15), min_size=64, max_size=64))
@pytest.mark.about("engine/quantize.py, pack")
def test_what_is_packed_comes_out_again(levels: list[int]) -> None:
    given_levels = torch.tensor(levels).view(2, 1, 32)
    packed = pack(given_levels)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 1, 16)
    assert torch.equal(unpack(packed).long(), given_levels)


@given(st.integers(0, 2**31), st.sampled_from(FORMATS))
@pytest.mark.about("engine/quantize.py, Grid.values")
def test_every_weight_takes_the_nearest_value_of_its_group(seed: int, format: Format) -> None:
    weight = matrix(seed)
    linear = linear_of(weight, format)
    rows = len(weight)
    scales = linear.scales.double().view(rows, -1, 1)
    low, high = (-127, 127) if format.name == "int8" else (0, 15)
    zeros = torch.zeros_like(scales) if format.name == "int8" else torch.full_like(scales, 8.0)
    if linear.zeros is not None:
        zeros = linear.zeros.double().view(rows, -1, 1)
    grid = (torch.arange(low, high + 1).double() - zeros) * scales  # [out, groups, levels]
    groups = weight.double().view(rows, scales.shape[1], -1)
    distance = (groups[..., None] - grid[:, :, None]).abs()
    chosen = linear.weight.double().view_as(groups)
    # in float32, half-way cases may round either way
    assert bool(((groups - chosen).abs() <= distance.amin(-1) + 1e-5 * scales.abs()).all())
    # every weight is within half a step of its value, or within a step if it is beyond level 7 of symmetric int4
    slack = 1.0 + 0.01 * (127 if format.name == "int8" else 15)  # a bfloat16 scale is up to 0.2% short
    room = torch.where(groups / scales > 7, 1.0, 0.5) if format.signed else 0.5
    assert bool(((groups - chosen).abs() <= room * slack * scales.abs()).all())


@pytest.mark.parametrize("format", [format for format in FORMATS if format.signed], ids=repr)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_weight_of_a_group_is_kept_whatever_its_sign(sign: int, format: Format) -> None:
    """It is level -8, and exact if bfloat16 represents it; otherwise it has the precision of the scale."""
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(2))
    weight[:, :: format.group] = sign * 300 * (1 + weight[:, :: format.group].abs())
    for values, within in ((weight.bfloat16().float(), 0.0), (weight, 2**-8)):
        rounded = rtn(values, format)
        assert bool((rounded.levels[..., 0] == 0).all())  # levels are stored from 0 on
        assert bool((rounded.grid.scale.sign() == -sign).all())
        kept = linear_of(values, format).weight[:, :: format.group] / values[:, :: format.group]
        assert float((kept - 1).abs().max()) <= within


@pytest.mark.parametrize("group", [32, 64, 128])
def test_symmetric_int4_rounds_normal_weights_better_than_a_grid_up_to_level_7(group: int) -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(3))
    groups = weight.view(256, -1, group)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    up_to_7 = ((groups / scale).round() * scale - groups).square().mean()
    error = (linear_of(weight, Format("int4", group)).weight - weight).square().mean()
    assert 0.7 < float(error / up_to_7) < 0.85


@every_format
def test_a_group_of_zeros_has_scale_1(format: Format) -> None:
    for tiny in (0.0, -0.0, 1e-45):  # the last is a float32, but an eighth of it is 0
        linear = linear_of(torch.full((2, 256), tiny), format)
        assert bool((linear.scales == 1).all())
        assert not linear.weight.any()


@every_format
@pytest.mark.parametrize("size", [1e-30, 1e-7, 1e-5, 1.0, 1e6, 1e7, 1e30])
def test_weights_of_any_size_are_near_their_values(size: float, format: Format) -> None:
    """Scales in float16 would be subnormal or infinite. Errors are up to half a step, or a step in symmetric int4."""
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(1)) * size
    groups = format.grouped(weight)
    meant = linear_of(weight, format).weight.view_as(groups)
    reach = (groups.amax(-1) - groups.amin(-1)) if format.has_zeros else 2 * groups.abs().amax(-1)
    step = reach / (254 if format.name == "int8" else 15 if format.has_zeros else 16)
    assert bool(((meant - groups).abs() <= (1.06 if format.signed else 0.53) * step[..., None]).all())


@every_format
@pytest.mark.about("engine/quantize.py, QuantLinear.forward")
def test_the_product_is_that_with_the_matrix_written_out(format: Format) -> None:
    weight, x = matrix(0), torch.randn(3, 5, 256)
    linear = linear_of(weight, format)
    linear.bias = torch.nn.Parameter(torch.randn(6))
    linear.factor = (torch.rand(256) + 0.5).half()
    expected = x @ linear.weight.T + linear.bias
    torch.testing.assert_close(linear(x), expected, atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(linear(x, 2, 5), expected[..., 2:5], atol=2e-3, rtol=1e-4)
    linear.bias = None
    half = linear(x.bfloat16())
    assert half.dtype == torch.bfloat16
    slack = 0.02 * float(expected.detach().abs().max())
    torch.testing.assert_close(half.float(), x @ linear.weight.T, atol=slack, rtol=0)


@every_format
def test_memory_is_what_the_format_says(format: Format) -> None:
    model = phase4.load("stdlib-1m", torch.float32, CPU).model
    before = stored_bytes(model)
    rows = {n: model.get_submodule(n).get_parameter("weight").shape for n in linear_names(model, False)}
    quantize_model(model, format)
    values, scales = stored_bytes(model)
    assert before[1] == 0
    assert values * (4 if format.name == "int8" else 8) == before[0]
    groups = sum(out * (1 if format.name == "int8" else width // format.group) for out, width in rows.values())
    assert scales == 2 * groups * (2 if format.asymmetric else 1)
    held = {id(tensor): tensor.nbytes for tensor in (*model.layers.parameters(), *model.layers.buffers())}
    norms = sum(p.nbytes for p in model.layers.parameters())
    assert sum(held.values()) == values + scales + norms  # no other tensors


def test_rounding_as_it_loads_is_rounding_afterwards(folder: Path) -> None:
    format, tokens = Format("int4", 32), torch.randint(20, 300, (2, 12))
    afterwards = phase4.load(str(folder), torch.float32, CPU).model
    embedding = afterwards.embedding.weight.clone()
    quantize_model(afterwards, format, head=True)
    loaded = phase4.load(str(folder), torch.float32, CPU, format, quant_head=True).model
    assert not any(isinstance(module, Linear) for module in loaded.modules())
    assert torch.equal(loaded(tokens), afterwards(tokens))
    assert torch.equal(loaded.embedding.weight, embedding)
    half = phase4.load(str(folder), torch.bfloat16, CPU, format, quant_head=True).model
    for name, tensor in loaded.layers.named_buffers():  # rounded from the file's float32, not from bfloat16
        assert torch.equal(half.layers.get_buffer(name), tensor)


def test_rounding_more_finely_changes_less(folder: Path) -> None:
    tokens = torch.randint(20, 300, (32, 12), generator=torch.Generator().manual_seed(0))
    exact = phase4.load(str(folder), torch.float32, CPU).model(tokens)
    formats = [Format("int8"), Format("int4", 32, True), Format("int4", 64)]
    errors = [(phase4.load(str(folder), torch.float32, CPU, f).model(tokens) - exact).norm() for f in formats]
    assert errors[0] < 0.05 * exact.norm()
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize(
    ("settings", "temperature"),
    [
        ({"quant": "int8"}, 0.0),
        ({"quant": "int4", "quant_group": 32, "quant_head": True}, 1.0),
        pytest.param({"quant": "int8"}, 1.0, marks=pytest.mark.slow),
        pytest.param({"quant": "int4", "quant_group": 32, "quant_head": True}, 0.0, marks=pytest.mark.slow),
    ],
)
def test_a_quantised_target_is_decoded_losslessly(
    folder: Path, make_checkpoint: Callable[..., Path], settings: dict[str, Any], temperature: float
) -> None:
    """With respect to itself, with any draft: the original model or another one, quantised or not."""
    other = make_checkpoint("llama", **WIDE, num_hidden_layers=1)
    shared: dict[str, Any] = {
        "model": str(folder),
        "device": "cpu",
        "max_tokens": 24,
        "temperature": temperature,
        "policy": "coupled",
    }
    shared |= {"dtype": "float32", **settings}

    def tokens(**drafting: Any) -> list[int]:
        llm = phase4.LLM(phase4.Options(**{**shared, **drafting}))
        assert isinstance(llm.loaded.model.layers[0].get_submodule("attention.output"), QuantLinear)
        return llm.generate(["def function(left"])[0].tokens

    plain = tokens(draft="none")
    assert tokens(draft=str(folder)) == plain
    assert tokens(draft=str(other), draft_quant="int4", quant_group=32) == plain
    assert tokens(draft=str(folder), draft_quant=settings["quant"]) == plain


def test_what_cannot_be_quantised_is_named(folder: Path) -> None:
    loaded = phase4.load(str(folder), torch.float32, CPU)
    first = linear_names(loaded.model, False)[0]
    message = rf"{first} has 64 input features, and groups of 128 do not divide them: groups of 32 or 64, or int8"
    with pytest.raises(UserError, match=message):
        quantize_model(loaded.model, Format("int4", 128))
    with pytest.raises(UserError, match="64 input features, and groups of 128"):
        phase4.LLM(phase4.Options(model=str(folder), draft="none", quant="int4", quant_group=128))
    loaded.model.get_parameter(f"{first}.weight")[3, 5] = torch.inf
    with pytest.raises(UserError, match=f"{first} holds weights that are no finite numbers"):
        quantize_linear(loaded.model, first, Format("int8"))
    again = phase4.load(str(folder), torch.float32, CPU, Format("int8")).model
    with pytest.raises(UserError, match="quantised already, int8"):
        quantize_model(again, Format("int8"))
    with pytest.raises(UserError, match="the fake model has no matrices to quantise"):
        phase4.LLM(phase4.Options(model="fake", draft="none", quant="int8"))


@pytest.mark.parametrize("format", [Format("int8"), Format("int4", 32), Format("int4", 32, True)], ids=repr)
def test_a_quantised_head_is_fitted_to_other_ids(format: Format) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(10, 64, generator=generator), torch.randn(3, 64, generator=generator)
    linear = QuantLinear.of(rtn(weight, format), format, None)
    for rows in (14, 10, 7):
        fitted, kept = linear.resized(rows), min(rows, 10)
        logits = fitted(x)
        assert logits.shape == (3, rows)
        torch.testing.assert_close(logits[:, :kept], linear(x)[:, :kept])
        assert not logits[:, kept:].any()
