"""The floor of a model: exactly the matrix products of the runs, over all their positions."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import phase1
from common.matrix_products import linear_calls, matrix_products


def test_calls_are_seen_in_order_with_their_positions_and_no_hook_stays() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    calls = linear_calls(model, lambda: model(torch.zeros(4, 6, 3)))
    assert calls == [(model[0], 24), (model[2], 24)]
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(RuntimeError):
        linear_calls(model, lambda: model(torch.zeros(4)))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_floor_of_ragged_rows_has_all_positions_and_no_padding(dtype: torch.dtype) -> None:
    loaded = phase1.load("stdlib-1m", dtype, torch.device("cpu"))
    params = phase1.SamplingParams(max_new_tokens=2, ignore_eos=True)
    runs = [partial(phase1.generate, loaded.model, [list(range(1, 1 + n))], params) for n in (3, 7)]
    each = [linear_calls(loaded.model, run) for run in runs]
    floor = linear_calls(loaded.model, matrix_products(loaded.model, runs))
    assert [layer for layer, _ in floor] == [layer for layer, _ in each[0]]
    assert [count for _, count in floor] == [a + b for (_, a), (_, b) in zip(*each, strict=True)]
    assert {count for _, count in floor} == {3 + 7, 4 + 8, 2}  # two steps, and what only the last positions need


def test_runs_that_cannot_share_their_forwards_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    x = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="same order"):
        matrix_products(model, [lambda: model(x), lambda: model[0](x)])
