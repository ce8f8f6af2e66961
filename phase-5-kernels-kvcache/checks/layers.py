"""The cases for what works on rows of features: `linear`, `gated_linear`, the norms, `rope`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from engine.model import Linear
from engine.quantize import Format, QuantLinear, rtn

from .cases import Case, Cases, Function, poisoned

FORMATS = [
    Format("int8"),
    Format("int4", 32),
    Format("int4", 64, asymmetric=True),
    Format("int4", 128),
]


def plain(device: torch.device, dtype: torch.dtype, outputs: int, inputs: int, bias: bool) -> Linear:
    layer = Linear(inputs, outputs, bias=bias)
    layer.weight = nn.Parameter(poisoned(device, dtype, outputs, inputs, seed=1, scale=inputs**-0.5), False)
    if bias:
        layer.bias = nn.Parameter(poisoned(device, dtype, outputs, seed=2), False)
    return layer


def quantised(
    device: torch.device, format: Format, outputs: int, inputs: int, bias: bool, factor: bool = False
) -> QuantLinear:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(3)) * inputs**-0.5
    made = QuantLinear.of(rtn(weight, format), format, None)
    if bias:
        made.bias = nn.Parameter(poisoned(torch.device("cpu"), torch.float32, outputs, seed=2), False)
    if factor:  # and an order
        made.factor = torch.linspace(0.5, 2, inputs).half()
        made.order = torch.randperm(inputs, generator=torch.Generator().manual_seed(4))
    return made.to(device)


def gaps(x: Tensor) -> Tensor:
    """The same numbers, rows apart in memory and between them what would be noticed.

    Not NaN: on a CPU torch's own product in bfloat16 multiplies what lies between the rows by zero.
    """
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 7), 1e4, dtype=x.dtype, device=x.device)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def layers(device: torch.device, full: bool, dtype: torch.dtype, even: bool) -> Iterator[tuple[str, nn.Module, int]]:
    """Name, layer and number of inputs."""
    sizes = [(5, 1), (123, 48), (33, 123), (20, 1100), *([(1, 5), (250, 1600), (4096, 4096)] if full else [])]
    for outputs, inputs in sizes:
        outputs += outputs % 2 if even else 0
        bias = outputs % 2 == 0 or outputs == 33  # 1,100 inputs are enough to be split
        name = f"{outputs} x {inputs}{', bias' if bias else ''}"
        yield name, plain(device, dtype, outputs, inputs, bias), inputs
    for number, format in enumerate(FORMATS):
        inputs = 256 if format.group == 128 else 192
        outputs = 34 if even else 33
        name = f"{format}{', factor and order' if number % 2 else ''}"
        yield name, quantised(device, format, outputs, inputs, number > 1, number % 2 == 1), inputs


def linear_cases(device: torch.device, full: bool, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    yield from products(device, full, dtypes, gated=False)


def gated_cases(device: torch.device, full: bool, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    yield from products(device, full, dtypes, gated=True)


def products(device: torch.device, full: bool, dtypes: tuple[torch.dtype, ...], gated: bool) -> Iterator[Case]:
    for dtype in dtypes:
        kind = str(dtype).removeprefix("torch.")
        for name, layer, inputs in layers(device, full, dtype, gated):
            if layer.bias is not None:
                layer.bias.data = layer.bias.data.to(dtype)
            for shape in ([1], [2, 3], *([[0], [16], [17], [2, 40]] if full else [[17]])):

                def run(function: Function, layer=layer, inputs=inputs, shape=shape, dtype=dtype) -> list[Tensor]:  # type: ignore[no-untyped-def]
                    x = poisoned(device, dtype, *shape, inputs)
                    whole = [function(layer, x.clone()), function(layer, gaps(x))]
                    return whole if gated else [*whole, function(layer, x, 1, 4)] if layer.out_features > 4 else whole

                yield Case(f"{kind}, {name}, rows {shape}", run, dtype, slack=3 if gated else 1)

            def beside(function: Function, layer=layer, inputs=inputs, dtype=dtype) -> list[Tensor]:  # type: ignore[no-untyped-def]
                x = poisoned(device, dtype, 16, inputs)
                together, pairs = function(layer, x), list[Tensor]()
                for row in (0, 1, 7, 15):
                    pairs += [function(layer, x[row : row + 1].clone()), together[row : row + 1]]
                pairs += [function(layer, x[3:8].clone()), together[3:8]]
                x[5:] = 100  # what the others are does not matter either
                return [*pairs, function(layer, x)[:5], together[:5]]

            yield Case(f"{kind}, {name}, the same bits for 1, 5 and 16 rows", beside, dtype, invariance=True)


def norm_cases(device: torch.device, full: bool, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    for dtype in dtypes:
        for shape in ([1, 1], [2, 3, 5], [4, 123], [0, 8], [3, 2, 2, 48], *([[16, 4096], [2, 1600]] if full else [])):

            def run(function: Function, shape=shape, dtype=dtype) -> list[Tensor]:  # type: ignore[no-untyped-def]
                x = poisoned(device, dtype, *shape)
                weight = poisoned(device, dtype, shape[-1], seed=1)
                return [function(x.clone(), weight, 1e-5), function(gaps(x), weight, 1e-5)]

            yield Case(f"{dtype}, {shape}", run, dtype)

        def beside(function: Function, dtype=dtype) -> list[Tensor]:  # type: ignore[no-untyped-def]
            x, weight = poisoned(device, dtype, 16, 123), poisoned(device, dtype, 123, seed=1)
            together = function(x.clone(), weight, 1e-5)
            return [t for row in (0, 9) for t in (function(x[row : row + 1].clone(), weight, 1e-5)[0], together[row])]

        yield Case(f"{dtype}, the same bits for 1 and 16 rows", beside, dtype, invariance=True)


def add_norm_cases(device: torch.device, full: bool, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    for dtype in dtypes:
        for shape in ([1, 1], [2, 3, 5], [4, 123], [0, 8], *([[16, 4096]] if full else [])):

            def run(function: Function, shape=shape, dtype=dtype) -> list[Tensor]:  # type: ignore[no-untyped-def]
                x, other = poisoned(device, dtype, *shape), poisoned(device, dtype, *shape, seed=2)
                weight = poisoned(device, dtype, shape[-1], seed=1)
                return [*function(x.clone(), other, weight, 1e-5), *function(gaps(x), gaps(other), weight, 1e-5)]

            yield Case(f"{dtype}, {shape}", run, dtype)


def tables(device: torch.device, dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
    angles = torch.rand(*shape[:-1], shape[-1] // 2, generator=torch.Generator().manual_seed(5)) * 6
    cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
    return cos.to(device, dtype), sin.to(device, dtype)


def rope_cases(device: torch.device, full: bool, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    for dtype in dtypes:
        for B, T, H, D in (
            (1, 1, 1, 2),
            (2, 3, 5, 8),
            (1, 16, 6, 48),
            (0, 1, 2, 4),
            *([(2, 40, 32, 128)] if full else []),
        ):
            for by_row in (False, True):

                def run(function: Function, size=(B, T, H, D), by_row=by_row, dtype=dtype) -> list[Tensor]:  # type: ignore[no-untyped-def]
                    B, T, H, D = size
                    x = poisoned(device, dtype, B, T, H + 2, D)
                    cos, sin = tables(device, dtype, *([B] if by_row else []), T, 1, D)
                    return [function(x[:, :, :H], cos, sin), function(x[:, :, 2:], cos, sin)]

                yield Case(f"{dtype}, {[B, T, H, D]}{', tables by row' if by_row else ''}", run, dtype)


OPS: dict[str, Cases] = {
    "linear": linear_cases,
    "gated_linear": gated_cases,
    "rms_norm": norm_cases,
    "add_rms_norm": add_norm_cases,
    "rope": rope_cases,
}
