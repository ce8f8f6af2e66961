"""The CUDA ladders: `linear` and `decode_attention`, rung by rung, in GB/s and as a share of a copy.

Every rung is checked against torch before it is timed. Needs a GPU; `--dry-run` walks the grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.benchmark import WrongResult
from common.errors import UserError
from common.figures import GREY, figure, look
from common.harness import Variant
from common.tables import AGAIN
from engine.kernels import registry
from engine.kernels.metadata import attention_metadata
from engine.kv_cache import CacheShape, StaticCache
from engine.model import Linear
from engine.transfers import Upload
from ladder import cuda as ladder
from ladder.cuda import RUNGS

from .gpu_timing import Replay, copies_for, measure_copy, on_card, record, replay
from .runs import Lab

GPU_LADDER = {
    "gpu_ladder": "1 to 5: a file of ladder/cuda; free: the engine's op, whose bits may depend on "
    "the batch size; engine: the op whose bits do not. The first rung is the baseline",
}
LINEAR = {"Llama-3.1-8B gate and up": (28672, 4096), "Llama-3.1-8B down": (4096, 14336), "gpt2-xl up": (6400, 1600)}
# Query heads, key heads, features of a head, tokens.
ATTENTION = {"Llama-3.1-8B": (32, 8, 128, 8192), "gpt2-xl": (25, 25, 64, 1024)}
ENGINE = ("free", "engine")
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
    """Measure all rungs. UserError without a GPU, except in a dry run."""
    if not lab.options.dry_run:
        reason = f"this is {lab.device.type}" if lab.device.type != "cuda" else registry.why_not("cuda", lab.device)
        if reason is not None:
            raise UserError(f"the CUDA ladders cannot run here: {reason}; --dry-run walks their grid")
    bandwidth = measure_copy(lab)
    for case in cases():
        cell = {"op": case.op, "shape": case.shape}
        if not lab.finished("gpu_ladder", cell):
            lab.short().compare("gpu_ladder", cell, variants(case, lab.device, bandwidth))


def variants(case: Case, device: torch.device, bandwidth: float) -> dict[str, Variant]:
    """Return a variant per rung, which calls it on every copy of the shared inputs. WrongResult if a check fails."""
    copies = copies_for(case.nbytes)

    @cache
    @torch.inference_mode()
    def made() -> tuple[Calls, Tensor]:
        return (linear_calls if case.op == "linear" else attention_calls)(case, device, copies)

    @torch.inference_mode()
    def prepare(name: str) -> Replay:
        calls, wanted = made()
        refuse_if_off(f"{case.op} at {case.shape}, rung {name}", calls[name][0](), wanted)
        return replay(record(calls[name]))

    names = [*map(str, RUNGS), *ENGINE]
    return {name: on_card(cache(partial(prepare, name)), copies, case.nbytes, bandwidth) for name in names}


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
    calls["free"] = [partial(engine, layer, x[None], invariant=False) for layer in layers]
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
    each = [attention_metadata(cache, [0], [1], Upload(device)) for cache in caches]
    for name, function in (("free", partial(engine, part=None)), ("engine", engine)):
        calls[name] = [partial(function, query[None, None], metadata, 0, metadata.ranges[None]) for metadata in each]
    first_keys, first_values = (part.float()[None] for part in pairs[0])
    wanted = F.scaled_dot_product_attention(query.float()[None, :, None], first_keys, first_values, enable_gqa=H > HK)
    return calls, wanted


def draw_gpu_ladder(lab: Lab, file: Path) -> None:
    """Draw the share of a copy's bandwidth, one line per shape."""
    lines = [line for line in lab.table("gpu_ladder") if not line["variant"].endswith(AGAIN)]
    if not lines:
        return
    with figure(file, 1, 2, (6.2, 4.2), f"CUDA ladders{lab.mark}") as panels:
        for axes, op in zip(panels, ("linear", "attention"), strict=True):
            for place, shape in enumerate(dict.fromkeys(x["shape"] for x in lines if x["op"] == op)):
                mine = [line for line in lines if line["op"] == op and line["shape"] == shape]
                shares = [line.get("of_bandwidth", 1.0) for line in mine]
                axes.plot([line["variant"] for line in mine], shares, label=shape, **look(place))
            axes.axhline(1, color=GREY, linewidth=0.8)
            axes.set_title("linear, 1 row" if op == "linear" else "decode_attention, 1 query")
            axes.set_xlabel("rung")
            axes.set_ylabel("share of a copy's bandwidth")
            axes.set_ylim(bottom=0)
            axes.legend(fontsize="small")
