"""Random shapes of models, caches and steps in C++ against plain arithmetic. 300 cases; 10,000 in `make test-all`."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from phase5.attention import CachedAttention
from phase5.config import ModelConfig
from phase5.kernels import cpp
from phase5.kernels.cpp.weights import KINDS
from phase5.kernels.key_ranges import paths_of
from phase5.kernels.metadata import attention_metadata
from phase5.model import Transformer
from phase5.quantize import Format, QuantLinear, rtn
from phase5.transfers import Upload

pytestmark = pytest.mark.skipif(cpp.why_not() is not None, reason=str(cpp.why_not()))
TINY = ModelConfig(
    family="llama", vocab_size=40, layers=1, width=32, heads=1, kv_heads=1, head_dim=32, ffn_width=32, context=64,
    norm="rms", norm_eps=1e-5, positions="rope", activation="silu", gated=True,
)  # fmt: skip


def model_of(config: ModelConfig, seed: int) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.2) + (parameter.ndim == 1))
    return model


def product_case(seed: int, engine: cpp.CppModel) -> None:
    """One matrix of random shape, with a random number of rows, against float64."""
    choose = random.Random(seed)
    kind = choose.choice(["float32", "bfloat16", "float16", "int8", "int4"])
    outputs, inputs, rows = choose.randint(1, 200), choose.randint(1, 700), choose.randint(1, 140)
    group = 0
    if kind == "int4":
        group = choose.choice([32, 64, 128])
        inputs = group * choose.randint(1, 4)
    exact = choose.random() < 0.5
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(outputs, inputs, generator=generator), torch.randn(rows, inputs, generator=generator)
    bias = torch.randn(outputs, generator=generator) if choose.random() < 0.5 else None
    asymmetric = choose.random() < 0.5
    shape = cpp.library().Shape(
        kind=KINDS[kind], outputs=outputs, inputs=inputs, wide=exact, pair=False, scale_group=group,
        zeros=kind == "int4" and asymmetric, factor=False, bias=bias is not None,
    )  # fmt: skip
    packed = cpp.library().Packed(cpp.library().Arena(shape.bytes), shape)
    if kind in ("int8", "int4"):
        format = Format("int8") if kind == "int8" else Format("int4", group, asymmetric)
        quantised = QuantLinear.of(rtn(weight, format), format, None)
        zeros = 0 if quantised.zeros is None else quantised.zeros.data_ptr()
        packed.fill_levels(0, outputs, quantised.values.data_ptr(), quantised.scales.data_ptr(), zeros)
        meant = quantised.matrix(torch.float32)
    else:
        packed.fill(0, outputs, weight.data_ptr(), 0)
        meant = weight.to(getattr(torch, kind)).float()
    if bias is not None:
        packed.set_bias(bias.data_ptr())
    out = torch.full((rows, outputs), float("nan"))
    engine._engine.product(packed, x.data_ptr(), rows, out.data_ptr())
    expected = x.double() @ meant.double().T + (0 if bias is None else bias.double())
    # Rounding errors grow with the length of the sum, not with its result.
    magnitude = x.abs().double() @ meant.abs().double().T
    room = 2e-6 * (magnitude + 1)
    if not exact and kind == "bfloat16":
        room += magnitude / 256  # activations have 8 bits
    elif not exact and kind in ("int8", "int4"):  # at most half a level of their group
        room += x.abs().amax(1, keepdim=True) / 254 * 1.01 * meant.abs().sum(1)
    assert bool(((out.double() - expected).abs() <= room).all()), (seed, kind, outputs, inputs, rows, exact)
    alone = torch.empty(1, outputs)
    engine._engine.product(packed, x[-1:].contiguous().data_ptr(), 1, alone.data_ptr())
    assert torch.equal(alone[0], out[-1]), (seed, kind, outputs, inputs, rows, exact)


def step_case(seed: int) -> None:
    """A model of random shape with random prefill and steps, against the torch model on the same cache."""
    choose = random.Random(seed)
    kv_heads, group, head_dim = choose.randint(1, 4), choose.randint(1, 5), 2 * choose.randint(1, 20)
    layer_norm = choose.random() < 0.3
    config = dataclasses.replace(
        TINY,
        vocab_size=choose.randint(2, 100),
        width=choose.randint(1, 70),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_width=choose.randint(1, 90),
        norm="layer" if layer_norm else "rms",
        positions="learned" if choose.random() < 0.3 else "rope",
        position_offset=choose.randint(0, 2),
        activation=choose.choice(["silu", "gelu_tanh", "gelu", "relu"]),
        gated=choose.random() < 0.6,
        qkv_bias=choose.random() < 0.5,
        output_bias=choose.random() < 0.5,
        mlp_bias=choose.random() < 0.5,
        qk_norm=choose.random() < 0.3,
        layers=2,
        windows=tuple(choose.choice([None, None, choose.randint(1, 20)]) for _ in range(2)),
    )
    model = model_of(config, seed)
    fast = cpp.CppModel(model, "float32", choose.randint(1, 3))
    ours, theirs = fast.new_cache(2, 48), fast.new_cache(2, 48)
    row = choose.randint(0, 1)
    while ours.lengths[row] < 30:
        count, held = choose.randint(1, 18), ours.lengths[row]
        tokens = [choose.randrange(config.vocab_size) for _ in range(count)]
        parents = [choose.randint(-1, at - 1) if choose.random() < 0.4 else at - 1 for at in range(count)]
        positions, paths = torch.tensor(cpp.model.positions_of(held, parents)), [paths_of(held, parents)]
        metadata = attention_metadata(
            theirs, [row], [count], Upload(torch.device("cpu")), windows=set(config.windows), paths=paths
        )
        behind = {window: CachedAttention(metadata, ranges) for window, ranges in metadata.ranges.items()}
        with torch.inference_mode():
            expected = model.logits(model.states(torch.tensor([tokens]), positions[None], cached=behind)[0])[0]
        got = fast.step(ours, [tokens], rows=[row], parents=[parents], wanted=range(count)).logits
        assert got is not None
        scale = float(expected.abs().max()) + 1
        assert float((got - expected).abs().max()) < 2e-4 * scale, (seed, config)
        line, at = [], count - 1
        while at >= 0:
            line.append(at)
            at = parents[at]
        for cache in (ours, theirs):
            cache.keep(row, line[::-1])


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("count", [100, pytest.param(3334, marks=pytest.mark.slow)])
def test_products_of_any_shape(isa: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpp.has_isa(isa):
        pytest.skip(f"this processor lacks {isa}")
    monkeypatch.setenv("SPECDEC_CPU_ISA", isa)
    engine = cpp.CppModel(model_of(TINY, 0), "float32", 2)
    for seed in range(count):
        product_case(seed, engine)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("count", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_steps_of_any_shape(isa: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpp.has_isa(isa):
        pytest.skip(f"this processor lacks {isa}")
    monkeypatch.setenv("SPECDEC_CPU_ISA", isa)
    for seed in range(count):
        step_case(seed)
