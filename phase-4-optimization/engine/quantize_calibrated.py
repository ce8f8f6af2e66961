"""Calibrated rounding: AWQ and GPTQ choose four-bit weights that change a layer's outputs least.

Both use the second moments H = X'X / n of activations X on real text: rounding a row w to w + e changes its output by
e'He in the mean square. AWQ (Lin et al. 2023) scales each input feature by a factor, so that features with large inputs
get a finer grid. GPTQ (Frantar et al. 2022) rounds one input feature after the other, and changes the weights that are
not rounded yet to compensate for the error. Layers are quantised in order, each with the activations that come from the
quantised layers before it.

python quantize.py --model stdlib-10m --quant int4 --method gptq --out runs/stdlib-10m-int4
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.models.corpus import read_corpus, read_files

from .load import LoadedModel
from .model import Transformer
from .quantize import Format, Grid, Rounded, linear_names, quantize_linear, rtn, whole_range

Method = Literal["rtn", "awq", "gptq"]
CLIPS = tuple(1 - step / 40 for step in range(21))  # shares of the range that a grid may cover
# Another share for symmetric grids. With the largest weight at level -8 the other side ends at level 7, and a weight of
# nearly that size is clipped there. 8 / 7 covers both sides, which is better if both weights have large inputs.
BOTH_SIDES = 8 / 7
POWERS = tuple(step / 20 for step in range(21))  # AWQ: exponents of a feature's mean size in its factor
DAMPING = 0.01  # GPTQ: share of the mean second moment that is added to the diagonal
BLOCK = 128  # GPTQ: features whose errors are applied to the rest in one product


@dataclass
class Inputs:
    """Statistics of a matrix's inputs."""

    moments: Tensor  # float32 [in, in]: mean of x x'
    size: Tensor  # float32 [in]: mean of |x|

    def by_group(self, size: int) -> Tensor:
        """Cut out the moments within each group, [groups, group, group]."""
        groups = len(self.moments) // size
        return torch.stack([self.moments[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(groups)])


def output_error(error: Tensor, moments: Tensor) -> Tensor:
    """Compute the outputs' mean squared change: weight errors [..., out, in], moments [..., in, in] -> [..., out]."""
    return ((error @ moments) * error).sum(-1)


def best_clip(weights: Tensor, inputs: Inputs, format: Format) -> Grid:
    """Find the grid for every group of weights [out, groups, group] that changes the group's part of the output least.

    A grid that clips the largest weights is finer for all others. A symmetric grid may also be wider: BOTH_SIDES.
    """
    moments = inputs.by_group(weights.shape[-1])
    best, least = whole_range(weights, format), torch.full(weights.shape[:2], torch.inf, device=weights.device)
    for clip in CLIPS if format.has_zeros else (*CLIPS, BOTH_SIDES):
        grid = whole_range(weights, format, clip)
        error = grid.values(grid.levels(weights, format)) - weights
        found = output_error(error.transpose(0, 1), moments).T  # [out, groups]
        better = (found < least)[..., None]
        best = Grid(torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero, best.zero))
        least = torch.minimum(found, least)
    return best


def awq(weight: Tensor, format: Format, inputs: Inputs) -> Rounded:
    """Multiply weights by size ** power and activations by its inverse, with the power of the smallest output error."""
    weight = weight.float()
    best, least = None, torch.inf
    size = inputs.size.clamp(min=1e-4 * float(inputs.size.mean()) + 1e-30)
    for power in POWERS:
        scaled = size**power
        factor = ((scaled.max() * scaled.min()).sqrt() / scaled).half()
        rounded = _with_factor(weight, format, inputs, factor, clipped=False)
        error = rounded.grid.values(rounded.levels).flatten(1) * factor.float() - weight
        found = float(output_error(error, inputs.moments).sum())
        if found < least:
            best, least = factor, found
    assert best is not None, "the inputs' moments are no numbers"
    return _with_factor(weight, format, inputs, best, clipped=True)


def _with_factor(weight: Tensor, format: Format, inputs: Inputs, factor: Tensor, clipped: bool) -> Rounded:
    weights = format.grouped(weight / factor.float())
    if clipped:
        wide = factor.float()
        grid = best_clip(weights, Inputs(inputs.moments * wide * wide[:, None], inputs.size * wide), format)
    else:
        grid = whole_range(weights, format)
    return Rounded(grid, grid.levels(weights, format), factor)


def gptq(weight: Tensor, format: Format, inputs: Inputs) -> Rounded:
    """Round column by column, those of large inputs first; the columns after it compensate for the error.

    Every group's grid is chosen beforehand, so the order does not change the stored layout.
    """
    weights = format.grouped(weight)
    grid = best_clip(weights, inputs, format)
    out, groups, size = weights.shape
    importance = inputs.moments.diagonal()
    order = importance.argsort(descending=True)
    moments = inputs.moments[order][:, order]
    moments = (moments.cpu() if moments.device.type == "mps" else moments).double()  # MPS has no float64
    moments.diagonal().add_(DAMPING * float(importance.mean()) + 1e-30)
    # Row j of this factor: the change of each later column per unit of error in column j.
    spread = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True).to(weights)

    left = weights.flatten(1)[:, order]  # the columns with their compensation so far
    levels, group_of = torch.empty_like(left), (order // size).tolist()
    for start in range(0, len(order), BLOCK):
        stop = min(start + BLOCK, len(order))
        errors = torch.empty(out, stop - start, device=left.device)
        for column in range(start, stop):
            mine = Grid(*(part[:, group_of[column], 0] for part in grid))
            levels[:, column] = mine.levels(left[:, column], format)
            errors[:, column - start] = (left[:, column] - mine.values(levels[:, column])) / spread[column, column]
            left[:, column:stop] -= errors[:, column - start, None] * spread[column, column:stop]
        left[:, stop:] -= errors @ spread[start:stop, stop:]
    return Rounded(grid, levels[:, order.argsort()].view(out, groups, size))


METHODS: dict[Method, Callable[[Tensor, Format, Inputs], Rounded]] = {
    "rtn": lambda weight, format, inputs: rtn(weight, format),
    "awq": awq,
    "gptq": gptq,
}


@torch.no_grad()
def quantize_calibrated(
    model: Transformer, format: Format, method: Method, tokens: Tensor, head: bool = False, rows: int = 8
) -> None:
    """Quantise the matrices in the order in which they run, calibrated on `tokens` (int64 [N, T])."""
    names = linear_names(model, head)
    batches = tokens.split(rows)
    states, rest = layer_inputs(model, batches)
    for number, layer in enumerate(model.layers):
        arguments, named = rest[number]
        run = partial(_run, layer, arguments, named)
        inside = [name for name in names if name.startswith(f"layers.{number}.")]
        for name in calling_order(model, inside, partial(run, states[0])):
            _quantize(model, name, format, method, run, states)
        states = [run(state) for state in states]
    if head:
        _quantize(model, "head", format, method, lambda state: model.logits(model.norm(state)), states)


def _run(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], state: Tensor) -> Tensor:
    output: Tensor = layer(state, *arguments, **named)
    return output


def _quantize(
    model: Transformer, name: str, format: Format, method: Method, run: Callable[[Tensor], Tensor], states: list[Tensor]
) -> None:
    inputs = observe(model.get_submodule(name), run, states)
    quantize_linear(model, name, format, lambda weight, format: METHODS[method](weight, format, inputs))


def calibration_windows(loaded: LoadedModel, corpus: list[Path], count: int, window: int, seed: int) -> Tensor:
    """Choose windows at random, int64 [N, window], of about `count` tokens in all, from the files or the standard
    library's training half.

    UserError if the text is shorter than a window, or the window longer than the model's context.
    """
    if window > loaded.config.context:
        raise UserError(f"--window {window}: the model sees {loaded.config.context} tokens; give at most as many")
    files = read_files(corpus) if corpus else read_corpus("train")
    generator = torch.Generator().manual_seed(seed)
    stream: list[int] = []
    for number in torch.randperm(len(files), generator=generator).tolist():
        if len(stream) >= 4 * count:  # enough to choose from; encoding the whole standard library would take long
            break
        stream += [*loaded.tokenizer.eos_ids[:1], *loaded.tokenizer.encode(files[number].text)]
    if len(stream) < window:
        raise UserError(f"the calibration text has {len(stream)} tokens; at least a --window of {window} is needed")
    windows = torch.tensor(stream[: len(stream) // window * window]).view(-1, window)
    chosen = torch.randperm(len(windows), generator=generator)[: max(1, count // window)]
    return windows[chosen].to(loaded.model.embedding.weight.device)


class _Seen(Exception):
    """Ends a forward early, once the inputs were seen."""


def layer_inputs(model: Transformer, batches: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Any]]:
    """Capture the first layer's input for each batch, and every layer's other arguments (equal for all batches)."""
    rest: list[Any] = [None] * len(model.layers)
    states: list[Tensor] = []

    def note(number: int, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        rest[number] = (arguments[1:], named)
        if number == 0:
            states.append(arguments[0])
            if len(states) > 1:
                raise _Seen

    hooks = [
        layer.register_forward_pre_hook(
            lambda _, arguments, named, number=number: note(number, arguments, named), with_kwargs=True
        )
        for number, layer in enumerate(model.layers)
    ]
    with _removed(hooks):
        for batch in batches:
            with suppress(_Seen):
                model.hidden(batch)
    return states, rest


@contextmanager
def _removed(hooks: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def calling_order(model: nn.Module, names: list[str], run: Callable[[], object]) -> list[str]:
    """List the matrices in the order in which a forward first uses them."""
    called: dict[str, None] = {}
    hooks = [
        model.get_submodule(n).register_forward_pre_hook(lambda *_, name=n: called.setdefault(name)) for n in names
    ]
    with _removed(hooks):
        run()
    return list(called)


def observe(linear: nn.Module, run: Callable[[Tensor], Tensor], states: list[Tensor]) -> Inputs:
    """Measure the inputs of a matrix in runs from these states."""
    width, device = int(linear.in_features), states[0].device  # type: ignore[arg-type]
    moments, size, count = torch.zeros(width, width, device=device), torch.zeros(width, device=device), 0

    def add(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        x = arguments[0].flatten(0, -2).float()
        moments.addmm_(x.T, x)
        size.add_(x.abs().sum(0))
        count += len(x)
        raise _Seen

    with _removed([linear.register_forward_pre_hook(add)]):
        for state in states:
            with suppress(_Seen):
                run(state)
    return Inputs(moments / count, size / count)
