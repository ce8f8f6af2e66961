"""Which numbers of a checkpoint each rank of a split model has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from phase6 import ModelConfig
from phase6.kernels.cpp import CppModel
from phase6.kernels.cpp.weights import Weights
from phase6.load import load
from phase6.parallel.shard import Mode, Shard, sizes_that_fit
from phase6.parallel.split_model import LayersModel, TensorModel
from phase6.weights import split
from tests.support.quantised import CASES, quantise
from tests.support.ranks import groups
from tests.support.served import WHY_NOT_CPP

CPU = torch.device("cpu")
MODES: tuple[Mode, ...] = ("gather", "reduce", "layers")


def config(**more: int) -> ModelConfig:
    shape: dict[str, Any] = {
        "layers": 4,
        "width": 48,
        "heads": 12,
        "kv_heads": 4,
        "head_dim": 4,
        "ffn_width": 96,
        "vocab_size": 100,
    }
    return ModelConfig(
        family="llama", context=64, norm="rms", norm_eps=1e-5, positions="rope", activation="silu", gated=True,
        **(shape | more),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "more", "fitting"),
    [
        (
            "gather",
            {},
            [2, 4, 12],
        ),  # 12 ranks: three share a key-value head; 3 and 6 neither divide 4 nor are multiples
        ("gather", {"kv_heads": 1}, [2, 3, 4, 6, 12]),
        ("gather", {"kv_heads": 1, "width": 50}, [2]),
        ("reduce", {"ffn_width": 94}, [2]),
        ("layers", {}, [2, 4]),
        ("layers", {"layers": 7}, [7]),
        ("gather", {"kv_heads": 1, "vocab_size": 5}, [2, 3]),  # a share of 2 words: 4 ranks would leave one without
    ],
)
@pytest.mark.about("engine/parallel/shard.py, sizes_that_fit")
def test_sizes_that_fit(mode: Mode, more: dict[str, int], fitting: list[int]) -> None:
    assert sizes_that_fit(mode, config(**more)) == fitting


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_number_is_somewhere(mode: Mode, ranks: int) -> None:
    """Matrices are divided without gap or overlap, norms are everywhere, and biases are added once."""
    whole = config(kv_heads=2)
    shards = [Shard.of(mode, rank, ranks, whole) for rank in range(ranks)]
    d = whole.head_dim
    shapes = {
        "embedding.weight": (100, 48), "head.weight": (100, 48), "norm.weight": (48,),
        "layers.3.attention.query.weight": (12 * d, 48), "layers.3.attention.output.weight": (48, 12 * d),
        "layers.3.attention.key.weight": (2 * d, 48), "layers.3.attention_norm.weight": (48,),
        "layers.3.ffn.gate.weight": (96, 48), "layers.3.ffn.down.weight": (48, 96), "layers.3.ffn.down.bias": (48,),
    }  # fmt: skip
    for name, shape in shapes.items():
        numbers = torch.arange(1, 1 + torch.Size(shape).numel()).view(shape)
        seen = Counter[int]()
        for shard in shards:
            found = shard.part(name, numbers)
            if found is not None:
                part: Tensor = found[1][:, shard.columns(name)] if numbers.ndim == 2 else found[1]
                seen.update(part.flatten().tolist())
        seen.pop(0, None)
        copies = ranks if name.endswith("norm.weight") and not (mode == "layers" and "layers" in name) else 1
        if mode != "layers" and "key" in name:
            copies = ranks // 2
        assert seen == Counter(dict.fromkeys(numbers.flatten().tolist(), copies)), name


@pytest.mark.about("engine/parallel/shard.py, Shard.part")
def test_layers_get_their_windows_and_numbers() -> None:
    import dataclasses

    whole = dataclasses.replace(config(), windows=(None, 8), tied=True)
    first, last = (Shard.of("layers", rank, 4, whole) for rank in (0, 3))
    assert [last.local.window_of(layer) for layer in range(1)] == [8]
    word = torch.ones(1)
    assert last.part("layers.3.ffn.up.weight", word) == ("layers.0.ffn.up.weight", word)
    assert last.part("layers.2.ffn.up.weight", word) is None
    assert last.part("embedding.weight", word) == ("head.weight", word)  # tied
    assert first.part("head.weight", word) is None
    first, last = (Shard.of("layers", rank, 4, config()) for rank in (0, 3))
    for name in ("head.weight", "head.values"):  # of a quantised output matrix
        assert first.part(name, word) is None
        assert last.part(name, word) == (name, word)


def test_factors_of_activations_are_never_cut() -> None:
    """A fused matrix may have fewer outputs than inputs."""
    whole, factor = config(heads=2, kv_heads=2), torch.arange(48)
    name = "layers.1.attention.qkv.factor"
    for mode in ("gather", "layers"):
        part = Shard.of(mode, 0, 2, whole).part_of_fused(name, factor)
        assert part is not None
        assert part[0] == name
        assert torch.equal(part[1], factor)


@pytest.mark.skipif(WHY_NOT_CPP is not None, reason=str(WHY_NOT_CPP))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_holds_about_half_of_the_weights(mode: Mode, dtype: torch.dtype) -> None:
    """Packed matrices, and what torch still has: at most 0.6 of one process's on each of two ranks."""
    model = load("stdlib-10m", dtype, CPU, as_stored=True).model
    whole = model.config
    weights: Weights = "float32" if dtype == torch.float32 else "bfloat16"
    one = CppModel(model, weights, 1, release=True).weight_bytes + left(model)
    for group in groups(mode, 2):
        part = load("stdlib-10m", dtype, CPU, as_stored=True, part=group.shard).model
        kind = LayersModel if mode == "layers" else TensorModel
        packed = kind(group, group.shard(whole), part, weights, 1, release=True)
        assert packed.weight_bytes + left(part) <= 0.6 * one


def left(model: torch.nn.Module) -> int:
    return sum(parameter.untyped_storage().nbytes() for parameter in set(model.parameters()))


@pytest.mark.parametrize("mode", MODES)
def test_the_parts_make_the_whole(mode: Mode, llama_folder: Path) -> None:
    """Loaded part by part, the matrices are those of the whole checkpoint."""
    whole = split(dict(load(str(llama_folder), torch.float32, CPU).model.named_parameters()), config_of(llama_folder))
    for group in groups(mode, 2):
        shard = group.shard(config_of(llama_folder))
        model = load(str(llama_folder), torch.float32, CPU, part=group.shard).model
        expected = dict(mine for name, tensor in whole.items() if (mine := shard.part(name, tensor)) is not None)
        for name, tensor in split(dict(model.named_parameters()), model.config).items():
            if tensor.numel():
                original = name if mode != "layers" else name.replace("layers.0", f"layers.{group.rank}")
                want = expected[name][:, shard.columns(original)] if tensor.ndim == 2 else expected[name]
                assert torch.equal(tensor, want), name


def config_of(folder: Path) -> ModelConfig:
    return load(str(folder), torch.float32, CPU).config


def test_groups_of_weights_are_not_cut(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    meant = make_checkpoint("llama", hidden_size=64, intermediate_size=128, num_attention_heads=4)
    quantise(CASES["gptq"], meant, tmp_path / "quantised")
    group = next(iter(groups("reduce", 2)))
    with pytest.raises(UserError, match="its groups of weights are not split: use --tensor-mode gather"):
        load(str(tmp_path / "quantised"), torch.float32, CPU, as_stored=True, part=group.shard)
