"""The CUDA ladders: `linear` and `decode_attention`, rung by rung, in GB/s and percent of what a copy reaches.

Every rung is checked against torch before it is timed. It runs on a card alone; `--dry-run` walks the grid.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.benchmark import WrongResult, median
from common.errors import UserError
from common.figures import figure
from engine.kernels import registry
from engine.kernels.cuda import attention, ladder, linear
from engine.kernels.cuda.ladder import RUNGS
from engine.kv_cache import CacheShape, StaticCache
from engine.model import Linear

from .gpu_timing import copies_for, copy_bandwidth, record, seconds_each
from .runs import Lab

GPU_LADDER = {
    "rung": "1 to 5: a file of engine/kernels/cuda/ladder; free: the engine's op without the promise that a token's "
    "bits do not depend on how many are computed; engine: with it",
    "us": "microseconds of one call, median of the rounds; inputs come from memory, launches are replayed as a graph",
    "gb_per_s": "bytes that must be read (the matrix; keys and values, once) / time",
    "percent_of_copy": "of what torch's copy of 1 GiB reaches on the same card in the same run, read and written",
}
LINEAR = {"Llama-3.1-8B gate and up": (28672, 4096), "Llama-3.1-8B down": (4096, 14336), "gpt2-xl up": (6400, 1600)}
# Query heads, key heads, features of a head, tokens.
ATTENTION = {"Llama-3.1-8B": (32, 8, 128, 8192), "gpt2-xl": (25, 25, 64, 1024)}
ENGINE = {"free": "the engine's, bits as they come", "engine": "what the engine runs"}
WITHIN = 2e-2  # of the largest number, in bfloat16
Calls = dict[str, list[Callable[[], Tensor]]]  # by rung, one for each copy of the inputs


@dataclass(frozen=True)
class Case:
    op: str
    shape: str
    nbytes: int  # that one call must read


def cases() -> list[Case]:
    made = [Case("linear", name, 2 * N * K) for name, (N, K) in LINEAR.items()]
    return made + [Case("attention", name, 4 * HK * D * n) for name, (_, HK, D, n) in ATTENTION.items()]


def measure_gpu_ladder(lab: Lab) -> None:
    """UserError where there is no card and nothing was said of a dry run."""
    dry = lab.options.dry_run
    if not dry:
        reason = f"this is {lab.device.type}" if lab.device.type != "cuda" else registry.why_not("cuda", lab.device)
        if reason is not None:
            raise UserError(f"the CUDA ladders cannot run here: {reason}; --dry-run walks their grid")
    bandwidth = 1e12 if dry else copy_bandwidth(lab.device)
    for case in cases():
        if lab.done(kind="gpu_ladder", op=case.op, shape=case.shape, rung="engine"):
            continue
        names = [*map(str, RUNGS), *ENGINE]
        times = {name: [1e-3] for name in names} if dry else timed(case, lab.device)
        for name in names:
            seconds = median(times[name])
            lab.add(
                kind="gpu_ladder",
                op=case.op,
                shape=case.shape,
                rung=name,
                what=RUNGS[int(name)] if name.isdigit() else ENGINE[name],
                us=seconds * 1e6,
                gb_per_s=case.nbytes / seconds / 1e9,
                percent_of_copy=100 * case.nbytes / seconds / bandwidth,
            )


@torch.inference_mode()
def timed(case: Case, device: torch.device) -> dict[str, list[float]]:
    """Seconds of a call by rung. WrongResult where one is wrong."""
    make = linear_calls if case.op == "linear" else attention_calls
    calls, wanted = make(case, device, copies_for(case.nbytes))
    for name, each in calls.items():
        refuse_if_off(f"{case.op} at {case.shape}, rung {name}", each[0](), wanted)
    graphs = {name: record(each) for name, each in calls.items()}
    return seconds_each(graphs, len(next(iter(calls.values()))))


def refuse_if_off(name: str, found: Tensor, wanted: Tensor) -> None:
    worst = float((found.float().flatten() - wanted.float().flatten()).abs().max())
    allowed = WITHIN * float(wanted.abs().max())
    if not worst <= allowed:
        raise WrongResult(f"refuses to time what is wrong: {name} is off by {worst:.3g}; {allowed:.3g} is rounding")


def linear_calls(case: Case, device: torch.device, copies: int) -> tuple[Calls, Tensor]:
    N, K = LINEAR[case.shape]
    options = {"dtype": torch.bfloat16, "device": device}
    x, bias = torch.randn(K, **options), torch.randn(N, **options)  # type: ignore[call-overload]
    layers = []
    for _ in range(copies):
        layer = Linear(K, N, **options)  # type: ignore[arg-type]
        layer.weight.copy_(torch.randn(N, K, **options) * K**-0.5)  # type: ignore[call-overload]
        assert layer.bias is not None
        layer.bias.copy_(bias)
        layers.append(layer)
    calls: Calls = {
        str(rung): [partial(ladder.linear, rung, layer.weight, x, bias) for layer in layers] for rung in RUNGS
    }
    engine = registry.functions("linear", device)["cuda"]
    calls["free"] = [partial(linear.unconstrained, layer, x[None]) for layer in layers]
    calls["engine"] = [partial(engine, layer, x[None]) for layer in layers]
    return calls, F.linear(x.float(), layers[0].weight.float(), bias.float())


def attention_calls(case: Case, device: torch.device, copies: int) -> tuple[Calls, Tensor]:
    H, HK, D, n = ATTENTION[case.shape]
    query = torch.randn(H, D, dtype=torch.bfloat16, device=device)
    caches = []
    for _ in range(copies):
        cache = StaticCache(CacheShape(1, HK, D), 1, n, torch.bfloat16, torch.bfloat16, device)
        for storage in (cache.keys[0], cache.values[0]):
            storage.values.normal_()
        cache.lengths[0] = n - 1  # the newest token was just appended
        caches.append(cache)
    pairs = [(cache.keys[0].values[0], cache.values[0].values[0]) for cache in caches]
    calls: Calls = {
        str(rung): [partial(ladder.attention, rung, query, keys, values, n) for keys, values in pairs] for rung in RUNGS
    }
    engine = registry.functions("decode_attention", device)["cuda"]
    # The op copies to the card where a cache's tokens lie, and keeps that with the cache until another call comes. A
    # graph reads it again: so every call has a cache and lists of its own, over the same keys and values.
    for name, function in (("free", attention.unconstrained), ("engine", engine)):
        calls[name] = [partial(function, query[None, None], copy(cache), 0, [0], [1], [None]) for cache in caches]
    first_keys, first_values = (part.float()[None] for part in pairs[0])
    wanted = F.scaled_dot_product_attention(query.float()[None, :, None], first_keys, first_values, enable_gqa=H > HK)
    return calls, wanted


def draw_gpu_ladder(lab: Lab, file: Path) -> None:
    """Percent of the copy's bandwidth, a line for every shape."""
    rows = lab.rows("gpu_ladder")
    if not rows:
        return
    with figure(file, 1, 2, (6.2, 4.2), f"the CUDA ladders{lab.mark}") as panels:
        for axes, op in zip(panels, ("linear", "attention"), strict=True):
            for shape in dict.fromkeys(row["shape"] for row in rows if row["op"] == op):
                mine = [row for row in rows if row["op"] == op and row["shape"] == shape]
                axes.plot([row["rung"] for row in mine], [row["percent_of_copy"] for row in mine], "o-", label=shape)
            axes.axhline(100, color="tab:gray", linewidth=0.8)
            axes.set_title("linear, 1 row" if op == "linear" else "decode_attention, 1 query")
            axes.set_xlabel("rung")
            axes.set_ylabel("% of the copy's bandwidth")
            axes.set_ylim(bottom=0)
            axes.legend(fontsize="small")
