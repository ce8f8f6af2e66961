"""The number format of a run: cast the weights once (`--dtype`), or cast for every product (`--amp`).

Casting once halves the bytes that a forward reads. Autocast keeps float32 weights, reads all of them and writes a copy
of each in every forward; it is slower, and only pays for a model that suffers from rounded weights. `--dtype auto` is
bfloat16 on a CUDA device that has it, and float16 on other devices. On a CPU it is the faster of float32 and bfloat16
for one layer of this model: CPUs without bfloat16 instructions emulate them, and small matrices gain nothing.

Three computations are in float32 in every format, because each adds up many numbers:

- the statistics of a norm: torch's kernels accumulate them in float32, and round the result;
- the softmax of attention: scaled_dot_product_attention keeps scores and their sum in float32;
- probabilities for sampling and acceptance (sampling.py, `probabilities`): the ratio of two rounded probabilities
  would accept or reject wrongly, and rounded probabilities do not add up to 1.

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
from collections.abc import Callable
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
from .quantize import replace
from .weights import reserve

T = TypeVar("T")
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
ROWS = 128  # of the timed forward: a prompt and part of its output
LARGEST = 2**23  # weights in a timed layer; a larger layer is scaled down, so that timing stays short
SECONDS = 0.2  # of timing


@dataclass(frozen=True)
class Precision:
    """The dtype of the weights, that of the products under autocast, and the reason if `auto` chose it."""

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
    """Choose the precision for `--dtype` and `--amp` on a device. `config` is called only if a layer must be timed.

    UserError for a dtype that the device lacks, and for `--amp` with weights in half precision.
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
    faster = "bfloat16" if ratio > 1.1 else "float32"  # rounding must gain something
    times_as_fast = f"{ratio:.1f}" if ratio >= 1 else f"{ratio:.2g}"  # about 0.03 without bfloat16 instructions
    return Precision(
        DTYPES[faster], why=f"auto: a layer is {times_as_fast} times as fast in bfloat16 as in float32, {origin}"
    )


def check_device_has(dtype: torch.dtype, device: torch.device) -> None:
    """Raise UserError if the device cannot compute in the dtype, or only emulates it."""
    name = dtype_name(dtype)
    if dtype == torch.bfloat16 and device.type == "cuda" and not _has_bfloat16():
        gpu = torch.cuda.get_device_name(device)
        raise UserError(f"--dtype {name}: {gpu} has none in hardware, emulation is slower than float32; use float16")
    try:
        square = torch.ones(8, 8, dtype=dtype, device=device)
        torch.nn.functional.layer_norm(square @ square, (8,)).softmax(-1)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--dtype {name}: {device.type} cannot compute in it here ({reason}); use float32") from None


def _has_bfloat16() -> bool:
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def autocast_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that `--amp` casts to: bfloat16, or float16 on a device without bfloat16 hardware."""
    if device.type == "mps" or (device.type == "cuda" and not _has_bfloat16()):
        return torch.float16
    return torch.bfloat16


def computing(amp: bool, device: torch.device) -> AbstractContextManager[object]:
    """Return the context of a forward: torch.autocast with `--amp`, else an empty one."""
    return torch.autocast(device.type, autocast_dtype(device)) if amp else contextlib.nullcontext()


def layer_times(config: ModelConfig) -> tuple[dict[str, float], str]:
    """Return the milliseconds of one layer in float32 and in bfloat16 on this CPU, and their origin.

    They are measured once per machine and layer, and kept in the user's cache folder if that can be written.
    """
    config = small_layer(config)
    shape = [getattr(config, name) for name in ("width", "heads", "kv_heads", "head_dim", "ffn_width", "gated")]
    key = f"{cpu_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads, layer {shape}"
    file = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "llm-inference-lab/precision.json"
    earlier = _earlier(file)
    if key in earlier:
        return earlier[key], "measured before"
    times = _measure(config)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(earlier | {key: times}, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, file)
    return times, "measured now"


def _earlier(file: Path) -> dict[str, dict[str, float]]:
    """Read the times of earlier runs; empty if the file is missing or malformed."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {key: {name: float(times[name]) for name in ("float32", "bfloat16")} for key, times in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def small_layer(config: ModelConfig) -> ModelConfig:
    """Reduce a config to one layer and a tiny vocabulary. All widths of a large layer are divided by one factor."""
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
    """Measure the median milliseconds of each dtype; runs of the two alternate."""
    cpu = torch.device("cpu")
    models = {}
    for name in ("float32", "bfloat16"):
        model = models[name] = Transformer(config)
        for path, parameter in list(model.named_parameters()):
            filled = reserve(tuple(parameter.shape), DTYPES[name], cpu).fill_(0.01)
            replace(model, path, torch.nn.Parameter(filled, requires_grad=False))
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
