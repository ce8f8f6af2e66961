"""Every op of the GPU backends at two models' shapes: GB/s, and its share of a copy on the same GPU.

Decoding is limited by memory bandwidth, so each op is compared with the bytes that it must read and write. The cost of
equal bits for 1 and 16 rows is measured against a kernel without this guarantee. A kernel is checked before it is
timed. Needs a GPU; `--dry-run` walks the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from checks import check
from checks.tokens import metadata_of
from common.benchmark import WrongResult
from common.errors import UserError
from common.harness import Variant
from engine.kernels import TORCH, registry
from engine.kernels.metadata import attention_metadata
from engine.kv_cache import CacheShape, PagedCache, StaticCache
from engine.model import Linear
from engine.quantize import Format, QuantLinear
from engine.sampling import SamplingParams
from engine.transfers import Upload
from engine.verify import KeyedSource

from .gpu_timing import Replay, alone, copies_for, measure_copy, on_card, record, replay
from .runs import Lab

GPU_KERNELS = {
    "kernels": "every op at a model's shape, by backend; rows: tokens in the batch; `free`: a kernel that sums in any "
    "order, against one whose bits do not depend on the rows. ms_per_token: of one call; inputs are read "
    "from memory, launches are replayed as a graph",
    "copy": "torch's copy of 1 GiB on the same GPU, read and written",
    "gb_per_s": "bytes that must be read and written, each once / time",
    "of_bandwidth": "time of that copy for as many bytes / measured time",
}
BYTES = {torch.bfloat16: 2, torch.int8: 1}


@dataclass(frozen=True)
class Shape:
    """A layer of a model."""

    name: str
    width: int
    ffn: int
    gated: bool
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tokens: int  # in the cache

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


SHAPES = (
    Shape("gpt2-xl", 1600, 6400, False, 25, 25, 64, 50257, 1000),
    Shape("Llama-3.1-8B", 4096, 14336, True, 32, 8, 128, 128256, 8192),
)
ROWS = (1, 5, 16)


@dataclass(frozen=True)
class Case:
    """An op on a shape. `make(device, copies)` returns the arguments of the function for every copy of the inputs."""

    shape: str
    op: str
    what: str
    rows: int
    nbytes: int
    make: Callable[[torch.device, int], list[tuple[Any, ...]]]
    free: str | None = None  # the op's variant that may sum in any order, if there is one


def cases() -> Iterator[Case]:
    for shape in SHAPES:
        for rows in ROWS:
            yield from products(shape, rows)
            yield from attention(shape, rows)
            yield from small(shape, rows)
        yield from choosing(shape)


def products(shape: Shape, rows: int) -> Iterator[Case]:
    sizes = {"qkv": (shape.qkv, shape.width), "down": (shape.width, shape.ffn), "head": (shape.vocabulary, shape.width)}
    if not shape.gated:
        sizes["up"] = (shape.ffn, shape.width)
    for name, (outputs, inputs) in sizes.items():
        for kind, bits in (("bfloat16", 16.0), ("int8", 8 + 16 / inputs), ("int4", 4 + 16 / 64)):
            if name == "head" and kind != "bfloat16":
                continue
            nbytes = int(outputs * inputs * bits / 8) + 2 * rows * (inputs + outputs)
            make = partial(make_products, outputs, inputs, kind, rows)
            free = "linear" if kind == "bfloat16" and rows == 1 else None
            yield Case(shape.name, "linear", f"{name}, {kind}", rows, nbytes, make, free)
    if shape.gated:
        nbytes = 4 * shape.ffn * shape.width + 2 * rows * (shape.width + shape.ffn)
        make = partial(make_products, 2 * shape.ffn, shape.width, "bfloat16", rows)
        yield Case(shape.name, "gated_linear", "gate and up, bfloat16", rows, nbytes, make)


def make_products(
    outputs: int, inputs: int, kind: str, rows: int, device: torch.device, copies: int
) -> list[tuple[nn.Module, Tensor]]:
    x = torch.randn(rows, inputs, dtype=torch.bfloat16, device=device)
    made: list[tuple[nn.Module, Tensor]] = []
    for _ in range(copies):
        if kind == "bfloat16":
            plain = Linear(inputs, outputs, bias=False, device=device, dtype=torch.bfloat16)
            plain.weight.normal_(std=inputs**-0.5)
            made.append((plain, x))
            continue
        format = Format("int8") if kind == "int8" else Format("int4", 64)
        layer = QuantLinear((outputs, inputs), format, False, False, device)
        layer.values.random_(*((-127, 128) if kind == "int8" else (0, 256)))
        layer.scales.fill_(inputs**-0.5 / (64 if kind == "int8" else 4))
        made.append((layer, x))
    return made


def attention(shape: Shape, rows: int) -> Iterator[Case]:
    for kind, stored in (("static", torch.bfloat16), ("static", torch.int8), ("paged", torch.bfloat16)):
        per_token = 2 * shape.kv_heads * (shape.head_dim * BYTES[stored] + (2 if stored == torch.int8 else 0))
        nbytes = shape.tokens * per_token + 4 * rows * shape.heads * shape.head_dim
        make = partial(make_attention, shape, kind, stored, rows)
        what = f"{kind}, {str(stored).removeprefix('torch.')}, {shape.tokens} tokens"
        free = "decode_attention" if rows == 1 and stored == torch.bfloat16 else None
        yield Case(shape.name, "decode_attention", what, rows, nbytes, make, free)


def make_attention(
    shape: Shape, kind: str, stored: torch.dtype, rows: int, device: torch.device, copies: int
) -> list[tuple[Any, ...]]:
    of, how = CacheShape(1, shape.kv_heads, shape.head_dim), (stored, torch.bfloat16, device)
    query = torch.randn(1, rows, shape.heads, shape.head_dim, dtype=torch.bfloat16, device=device)
    made: list[tuple[Any, ...]] = []
    for _ in range(copies):
        cache: StaticCache | PagedCache
        if kind == "static":
            cache = StaticCache(of, 1, shape.tokens, *how)
        else:
            cache = PagedCache(of, 1, -(-shape.tokens // 16), *how)
        for storage in (cache.keys[0], cache.values[0]):
            if storage.scales is None:
                storage.values.normal_()
            else:
                storage.values.random_(-127, 128)
                storage.scales.fill_(1 / 64)
        cache.make_room(0, shape.tokens)
        cache.lengths[0] = shape.tokens - rows  # the newest were just appended
        metadata = attention_metadata(cache, [0], [rows], Upload(device))
        made.append((query, metadata, 0, metadata.ranges[None]))
    return made


def small(shape: Shape, rows: int) -> Iterator[Case]:
    """Yield the small ops, whose time is mostly the launch."""
    nbytes = 4 * rows * shape.width
    yield Case(shape.name, "rms_norm", "a layer's width", rows, nbytes, partial(make_norm, shape, rows))
    heads = shape.heads + shape.kv_heads
    nbytes = 4 * rows * heads * shape.head_dim
    yield Case(shape.name, "rope", "queries and keys", rows, nbytes, partial(make_rope, shape, rows))


def make_norm(shape: Shape, rows: int, device: torch.device, copies: int) -> list[tuple[Any, ...]]:
    weight = torch.ones(shape.width, dtype=torch.bfloat16, device=device)
    return [
        (torch.randn(1, rows, shape.width, dtype=torch.bfloat16, device=device), weight, 1e-5) for _ in range(copies)
    ]


def make_rope(shape: Shape, rows: int, device: torch.device, copies: int) -> list[tuple[Any, ...]]:
    size = (1, rows, shape.heads + shape.kv_heads, shape.head_dim)
    table = torch.randn(rows, 1, shape.head_dim, dtype=torch.bfloat16, device=device)
    return [(torch.randn(size, dtype=torch.bfloat16, device=device), table, table) for _ in range(copies)]


def choosing(shape: Shape) -> Iterator[Case]:
    """Yield the ops that end a step: acceptance of K draft tokens, and sampling, over the whole vocabulary."""
    K, V = 4, shape.vocabulary
    yield Case(shape.name, "verify_greedy", f"{K} tokens", K + 1, 2 * (K + 1) * V, partial(make_greedy, K, V))
    nbytes = 4 * (2 * K + 1) * V  # every probability once; the exact number depends on the draw
    yield Case(shape.name, "verify_sample", f"{K} tokens", K + 1, nbytes, partial(make_verdict, K, V))
    for name, params in {
        "no filter": SamplingParams(temperature=1.0),
        "top-k 50, top-p 0.9": SamplingParams(temperature=1.0, top_k=50, top_p=0.9),
    }.items():
        yield Case(shape.name, "sample", name, 1, 2 * V, partial(make_sample, params, V))


def make_greedy(K: int, V: int, device: torch.device, copies: int) -> list[tuple[Any, ...]]:
    made = []
    for _ in range(copies):
        scores = torch.randn(1, K + 1, V, dtype=torch.bfloat16, device=device)
        made.append((scores.argmax(-1)[:, :K], scores, torch.tensor([K], device=device)))
    return made


def make_verdict(K: int, V: int, device: torch.device, copies: int) -> list[tuple[Any, ...]]:
    made = []
    for _ in range(copies):
        target, draft = (torch.randn(1, n, V, device=device).softmax(-1) for n in (K + 1, K))
        keys = [torch.tensor([value], device=device) for value in (K, (0, 0), 100)]
        made.append((draft.argmax(-1), draft, target, *keys, KeyedSource()))
    return made


def make_sample(params: SamplingParams, V: int, device: torch.device, copies: int) -> list[tuple[Any, ...]]:
    logits = [torch.randn(1, V, dtype=torch.bfloat16, device=device) for _ in range(copies)]
    return [(each, metadata_of(device, [params], [(0, 0)], [100])) for each in logits]


def measure_gpu_kernels(lab: Lab) -> None:
    """Measure all cases. UserError without a GPU, except in a dry run."""
    dry = lab.options.dry_run
    backends = ["triton", "cuda"] if dry else usable(lab.device)
    bandwidth = measure_copy(lab)
    for case in cases():
        cell: dict[str, Any] = {"shape": case.shape, "op": case.op, "what": case.what, "rows": case.rows}
        if not lab.finished("kernels", cell):
            runs = variants(case, backends, lab.device, bandwidth, dry)
            baselines = {f"{each}, free": each for each in backends}
            lab.short().compare("kernels", cell, runs, baselines=baselines)


def usable(device: torch.device) -> list[str]:
    reasons = {backend: registry.why_not(backend, device) for backend in ("triton", "cuda")}
    if device.type != "cuda" or all(reasons.values()):
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
        raise UserError(f"GPU kernels cannot be timed here ({why}); --dry-run walks the grid")
    return [backend for backend, reason in reasons.items() if reason is None]


def variants(case: Case, backends: list[str], device: torch.device, bandwidth: float, dry: bool) -> dict[str, Variant]:
    """Return a variant per backend, which calls the op on every copy of the inputs. All share the inputs."""
    copies = copies_for(case.nbytes)

    @cache
    @torch.inference_mode()
    def inputs() -> list[tuple[Any, ...]]:
        return case.make(device, copies)

    runs: dict[str, Variant] = {}
    for backend in backends:
        if not dry and backend not in registry.functions(case.op, device):
            continue  # has no such kernel
        for free in (False, True) if case.free else (False,):
            make = cache(partial(prepare, case, backend, free, device, inputs))
            runs[f"{backend}, free" if free else backend] = on_card(make, copies, case.nbytes, bandwidth)
    return runs


@torch.inference_mode()
def prepare(
    case: Case, backend: str, free: bool, device: torch.device, inputs: Callable[[], list[tuple[Any, ...]]]
) -> Replay:
    """Check a kernel, then record it as a graph. WrongResult if the check fails."""
    function: Callable[..., Any] = registry.functions(case.op, device)[backend]
    if free:
        function = without_order(function, backend, case.free)
    refuse_if_off(case, backend, function, inputs()[0])
    calls = [partial(function, *each) for each in inputs()]
    # `sample` copies tokens to the host, which a graph cannot record.
    return alone(calls, device) if case.op == "sample" else replay(record(calls))


def without_order(function: Callable[..., Any], backend: str, op: str | None) -> Callable[..., Any]:
    """Return the variant without equal bits for 1 and 16 rows."""
    if op == "linear":
        return partial(function, invariant=False)
    return partial(function, part=None if backend == "cuda" else 128)  # 128: more parts for one query


def refuse_if_off(case: Case, backend: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    where = f"refuses to time what is wrong: {backend} {case.op} at {case.shape}, {case.what}, {case.rows} rows"
    mine, other = results(function(*fresh(arguments))), results(getattr(TORCH, case.op)(*fresh(arguments)))
    try:
        for one, another in zip(mine, other, strict=True):
            check.near(where, one, another, 2 * check.WITHIN[torch.bfloat16])
    except check.WrongKernel as problem:
        raise WrongResult(str(problem)) from None


def fresh(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copy the arguments: the reference may compute in place."""
    return tuple(each.clone() if isinstance(each, Tensor) else each for each in arguments)


def results(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, list):
        return [torch.tensor(found)]
    if isinstance(found, tuple):
        return list(found)
    return [found.accepted, found.next_tokens, found.ratios]
