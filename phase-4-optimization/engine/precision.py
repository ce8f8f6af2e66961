"""Which number format to compute in: cast the weights once (`--dtype`), or cast for every product (`--amp`).

Casting once halves what a forward reads from memory; autocast keeps float32 weights, reads all of them and writes a
copy of each, every time, and is the slower way unless a model suffers from rounded weights. `--dtype auto` is bfloat16
on a CUDA device that has it, float16 on other devices, and on a CPU whichever of float32 and bfloat16 computes one
layer of this model faster: processors without bfloat16 instructions emulate them, and small matrices do not profit.

Whatever the format, three things are computed in float32, because each adds up many numbers and the sum decides:

- the statistics of a norm: torch's kernels accumulate them in float32, and round the result;
- the softmax of attention: scaled_dot_product_attention keeps scores and their sum in float32;
- logits on their way into sampling and acceptance (sampling.py, `probabilities`): a ratio of two rounded
  probabilities would accept and reject wrongly, and a rounded sum is no distribution.

    python generate.py --dtype auto --prompt "from pathlib import"
    python generate.py --amp --prompt "from pathlib import"
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch

from common.device import DTYPES, dtype_name, resolve_dtype
from common.environment import cpu_name
from common.errors import UserError

from .config import ModelConfig
from .model import Transformer
from .packing import pack_matrices
from .weights import reserve

T = TypeVar("T")
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
ROWS = 128  # a prompt with some of its answer
LARGEST = 2**23  # weights in a layer that is timed; a larger one is scaled down, so that the measurement stays short
SECONDS = 0.2


@dataclass(frozen=True)
class Precision:
    """The format of the weights, of the products where that is another, and, where it was not given by name, why."""

    dtype: torch.dtype
    autocast: torch.dtype | None = None
    why: str | None = None

    def __str__(self) -> str:
        cast = f" with products in {dtype_name(self.autocast)}" if self.autocast else ""
        return dtype_name(self.dtype) + cast + (f" ({self.why})" if self.why else "")

    def as_json(self) -> dict[str, str | None]:
        autocast = dtype_name(self.autocast) if self.autocast else None
        return {"dtype": dtype_name(self.dtype), "autocast": autocast, "why": self.why}


def resolve_precision(name: DtypeName, amp: bool, device: torch.device, config: Callable[[], ModelConfig]) -> Precision:
    """What `--dtype` and `--amp` mean on a device, for the model whose config is asked for where it matters.

    UserError for a format that the device lacks, and for `--amp` over weights that are stored in half precision.
    """
    if amp and name not in ("auto", "float32"):
        raise UserError(f"--amp casts float32 weights for every product, and --dtype {name} leaves none: choose one")
    if amp:
        return Precision(torch.float32, autocast_dtype(device))
    if name != "auto":
        check_device_has(DTYPES[name], device)
        return Precision(DTYPES[name])
    if device.type != "cpu":
        return Precision(resolve_dtype(name, device), why=f"auto: half precision that this {device.type} device has")
    times, origin = layer_times(config())
    ratio = times["float32"] / times["bfloat16"]
    faster = "bfloat16" if ratio > 1.1 else "float32"  # a tie is no reason to round
    times_as_fast = f"{ratio:.1f}" if ratio >= 1 else f"{ratio:.2g}"  # without instructions for bfloat16: 0.03
    return Precision(
        DTYPES[faster], why=f"auto: a layer is {times_as_fast} times as fast in bfloat16 as in float32, {origin}"
    )


def check_device_has(dtype: torch.dtype, device: torch.device) -> None:
    """UserError where the device cannot compute in the format, or only pretends to."""
    name = dtype_name(dtype)
    if dtype == torch.bfloat16 and device.type == "cuda" and not _has_bfloat16():
        card = torch.cuda.get_device_name(device)
        raise UserError(f"--dtype {name}: {card} has none in hardware, emulation is slower than float32; use float16")
    try:
        square = torch.ones(8, 8, dtype=dtype, device=device)
        torch.nn.functional.layer_norm(square @ square, (8,)).softmax(-1)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--dtype {name}: {device.type} cannot compute in it here ({reason}); use float32") from None


def _has_bfloat16() -> bool:
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def autocast_dtype(device: torch.device) -> torch.dtype:
    """What `--amp` casts to: bfloat16, and float16 where the device has no bfloat16 of its own."""
    if device.type == "mps" or (device.type == "cuda" and not _has_bfloat16()):
        return torch.float16
    return torch.bfloat16


def computing(amp: bool, device: torch.device) -> AbstractContextManager[object]:
    """Around a forward: torch.autocast with `--amp`, else nothing."""
    return torch.autocast(device.type, autocast_dtype(device)) if amp else contextlib.nullcontext()


def each_within(context: Callable[[], AbstractContextManager[object]], steps: Iterator[T]) -> Iterator[T]:
    """The same steps, each computed within a context of its own: whoever takes them is outside of it."""
    while True:
        with context():
            try:
                step = next(steps)
            except StopIteration:
                return
        yield step


def layer_times(config: ModelConfig) -> tuple[dict[str, float], str]:
    """Milliseconds of one layer in float32 and in bfloat16 on this CPU, and where they come from.

    Measured once per machine and layer; kept in a file in the user's cache folder if that can be written.
    """
    config = small_layer(config)
    shape = [getattr(config, name) for name in ("width", "heads", "kv_heads", "head_dim", "ffn_width", "gated")]
    key = f"{cpu_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads, layer {shape}"
    file = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "llm-inference-lab/precision.json"
    known = _known(file)
    if key in known:
        return known[key], "measured before"
    times = _measure(config)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(known | {key: times}, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, file)
    return times, "measured now"


def _known(file: Path) -> dict[str, dict[str, float]]:
    """What earlier runs measured; nothing where the file is not there or not ours."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {key: {name: float(times[name]) for name in ("float32", "bfloat16")} for key, times in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def small_layer(config: ModelConfig) -> ModelConfig:
    """One layer of the model's shape, with next to no vocabulary; a large one with all its widths divided alike."""
    per_width = 2 * config.head_dim * (config.heads + config.kv_heads) + (3 if config.gated else 2) * config.ffn_width
    by = math.ceil(math.sqrt(config.width * per_width / LARGEST))
    group, kv_heads = config.heads // config.kv_heads, max(1, config.kv_heads // by)
    return dataclasses.replace(
        config,
        layers=1,
        vocab_size=8,
        context=ROWS,
        width=config.width // by,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        ffn_width=config.ffn_width // by,
    )


@torch.inference_mode()
def _measure(config: ModelConfig) -> dict[str, float]:
    """Median milliseconds by dtype, the two taking turns."""
    cpu = torch.device("cpu")
    models = {}
    for name in ("float32", "bfloat16"):
        model = models[name] = Transformer(config)
        for path, parameter in list(model.named_parameters()):
            owner, _, attribute = path.rpartition(".")
            filled = reserve(tuple(parameter.shape), DTYPES[name], cpu).fill_(0.01)
            setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(filled, requires_grad=False))
        pack_matrices(model)
    tokens = torch.zeros(1, ROWS, dtype=torch.long)
    times: dict[str, list[float]] = {name: [] for name in models}
    deadline = time.perf_counter() + SECONDS
    while len(times["bfloat16"]) < 3 or (time.perf_counter() < deadline and len(times["bfloat16"]) < 21):
        for name, model in models.items():
            began = time.perf_counter()
            model.hidden(tokens)
            times[name].append((time.perf_counter() - began) * 1e3)
    return {name: sorted(each[1:])[len(each[1:]) // 2] for name, each in times.items()}  # the first warms up
