"""Embedded models that LLMs share: own modules, the same weights, and none that a test has written to."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from common.checkpoint import MODELS
from tests.support.loading import KEPT, Shelf


class Loads:
    """A module that loads, and counts how often it does."""

    __name__ = "loads"

    def __init__(self) -> None:
        self.count = 0

    def load_transformer(self, checkpoint: Any, *arguments: Any) -> nn.Module:
        self.count += 1
        return nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2)).requires_grad_(False)


def at(folder: Path) -> Any:
    return SimpleNamespace(folder=folder)


@pytest.fixture
def module() -> Loads:
    return Loads()


def test_models_have_their_own_modules_and_the_same_weights(module: Loads) -> None:
    load = Shelf().loading(module)
    one, other = load(at(MODELS / "x"), "float32"), load(at(MODELS / "x"), "float32")
    assert module.count == 1
    assert one[0] is not other[0]
    assert one[0].weight is other[0].weight
    one[0].weight = nn.Parameter(torch.empty(0))
    assert other[0].weight.shape == load(at(MODELS / "x"), "float32")[0].weight.shape == (2, 2)


def test_other_arguments_folders_and_the_oldest_are_loaded(module: Loads, tmp_path: Path) -> None:
    load = Shelf().loading(module)
    for _ in range(2):
        load(at(tmp_path), "float32")
    assert module.count == 2
    for number in range(KEPT + 1):
        load(at(MODELS / "x"), number)
    assert module.count == 2 + KEPT + 1
    load(at(MODELS / "x"), KEPT)
    assert module.count == 2 + KEPT + 1
    load(at(MODELS / "x"), 0)
    assert module.count == 2 + KEPT + 2


def test_weights_that_were_written_to_are_loaded_again(module: Loads) -> None:
    load = Shelf().loading(module)
    load(at(MODELS / "x"))[1].bias[0] = 7.0
    assert float(load(at(MODELS / "x"))[1].bias[0]) != 7.0
    assert module.count == 2


def test_a_matrix_is_packed_once_for_each_format_and_again_when_it_has_changed(module: Loads) -> None:
    shelf, numbers = Shelf(), itertools.count(1)
    load = shelf.loading(module)
    pack = shelf.packing(lambda *arguments: next(numbers))

    def packed(model: Any, format: str = "float32") -> int:
        plan = SimpleNamespace(module=model[0], format=format, pair=False)
        return int(pack(plan, None, None, 1))

    assert packed(load(at(MODELS / "x"))) == packed(load(at(MODELS / "x"))) == 1
    assert packed(load(at(MODELS / "x")), "int8") == 2
    model = load(at(MODELS / "x"))
    model[0].weight[0, 0] = 7.0
    assert packed(model) == 3
    assert packed(load(at(MODELS / "x"))) == 4
    assert packed(nn.Sequential(nn.Linear(2, 2))) == 5
    assert packed(nn.Sequential(nn.Linear(2, 2))) == 6
