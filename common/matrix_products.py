"""A lower bound of a model's cost: its matrix products alone, at the sizes of real runs.

The rows of a batch, which could share their forwards, are run one by one and their calls recorded. Then call i of all
rows becomes one product over all their positions. Attention, norms, operation starts and padding are left out. So the
result's time is that of a batch that costs nothing but arithmetic on weights.

    floor = matrix_products(model, [partial(decode_alone, prompt) for prompt in prompts])
    interleave({"one by one": one_by_one, "floor": floor}, repeats=5)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def linear_calls(model: nn.Module, run: Callable[[], object]) -> list[tuple[nn.Linear, int]]:
    """List every call of a Linear layer while `run` runs, in order: the layer, and its number of positions."""
    calls: list[tuple[nn.Linear, int]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], _: Any) -> None:
        assert isinstance(module, nn.Linear)
        calls.append((module, inputs[0].numel() // module.in_features))

    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, nn.Linear)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def matrix_products(model: nn.Module, runs: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """Return a function that does the matrix products of all runs, each call over the positions of all.

    Every run must call the same layers in the same order (decode the same number of tokens); ValueError otherwise.
    """
    each = [linear_calls(model, run) for run in runs]
    if len({tuple(id(layer) for layer, _ in calls) for calls in each}) != 1:
        raise ValueError("the runs do not call the same layers in the same order, so they cannot share forwards")
    shared = [(calls[0][0], sum(positions for _, positions in calls)) for calls in zip(*each, strict=True)]
    inputs: dict[int, Tensor] = {}
    for layer, positions in sorted(shared, key=lambda call: -call[1]):  # one input per width, the longest
        if layer.in_features not in inputs:
            inputs[layer.in_features] = torch.ones_like(layer.weight[:1]).repeat(positions, 1)

    @torch.inference_mode()
    def floor() -> None:
        for layer, positions in shared:
            layer(inputs[layer.in_features][:positions])

    return floor
