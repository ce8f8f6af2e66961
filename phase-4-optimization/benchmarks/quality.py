"""What smaller numbers cost: perplexity on held-out text, every way of storing the weights against float32.

All variants read the same tokens, so what is compared is the difference token by token; its interval is far narrower
than that of either perplexity. The calibrated methods see text of the training half alone.

    python bench.py --only quality
    python bench.py --only quality --qat runs/qat/model
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import engine
from common.benchmark import progress
from common.device import MIB
from common.models.corpus import fingerprint, read_corpus
from common.perplexity import summary, token_nll
from engine.quantize import Format, stored_bytes
from engine.quantize_calibrated import Method, calibration_windows, quantize_calibrated

from .runs import Lab

QUALITY = {
    "variant": "how weights are stored; beside quantised matrices the rest is float32",
    "perplexity": "exp of the mean negative log likelihood of held-out text, windows of the model's context that move "
    "on by half of it; bootstrap 95% interval over 200 blocks of the text",
    "loss": "this perplexity / that of float32 on the same tokens, less 1",
    "loss_percent": "100 * loss; bootstrap 95% interval of the paired difference, over the same blocks",
    "linear_mib": "bytes of the linear layers' matrices as stored, with scales, zeros and factors; without the head",
    "values_of_float32": "of these, the values alone / the matrices in float32",
    "stored_of_float32": "all of these / the matrices in float32",
    "tokens": "held-out tokens scored",
    "calibration_tokens": "tokens of the training half that the rounding looked at",
}
INTERVALS = ("perplexity", "perplexity_low", "perplexity_high")
COLUMNS = [name for name in (*INTERVALS, *QUALITY, "loss_percent_low", "loss_percent_high") if name != "variant"]


@dataclass(frozen=True)
class Stored:
    """One way to store the weights."""

    name: str
    format: Format | None = None
    method: Method = "rtn"
    dtype: torch.dtype = torch.float32
    model: str | None = None  # another checkpoint than the bench's


@dataclass(frozen=True)
class Size:
    """How much text."""

    tokens: int = 200_000
    calibration: int = 65_536
    window: int = 512  # of the calibration


def variants(lab: Lab) -> list[Stored]:
    int4, asymmetric = Format("int4"), Format("int4", asymmetric=True)
    short = [
        Stored("float32"),
        Stored("bfloat16", dtype=torch.bfloat16),
        Stored("int8", Format("int8")),
        Stored("int4", int4),
        Stored("int4 gptq", int4, "gptq"),
    ]
    if lab.options.quick:
        return short
    found = [
        *short,
        Stored("int4 awq", int4, "awq"),
        Stored("int4 asymmetric", asymmetric),
        Stored("int4 asymmetric awq", asymmetric, "awq"),
        Stored("int4 asymmetric gptq", asymmetric, "gptq"),
        Stored("int4 groups of 32", Format("int4", 32)),
        Stored("int4 groups of 128", Format("int4", 128)),
    ]
    if lab.options.qat:
        found += [Stored("qat, float32", model=lab.options.qat), Stored("int4 qat", int4, model=lab.options.qat)]
    return found


def measure_quality(lab: Lab) -> None:
    wanted = [stored for stored in variants(lab) if not lab.done(kind="quality", variant=stored.name)]
    if not wanted:
        return
    size = Size(2_000, 2_048, 256) if lab.options.quick else Size()
    plain = Stored("float32")
    base, float32_bytes = None, 1
    with progress("quality", len(wanted)) as show:
        for stored in wanted:
            row: dict[str, Any] = dict.fromkeys(COLUMNS, 1.0)
            if not lab.options.dry_run:
                if base is None:
                    model, _ = prepare(lab, plain, size)
                    base, float32_bytes = heldout_nll(model, size.tokens), sum(stored_bytes(model.model))
                model, calibrated = prepare(lab, stored, size)
                nll = base if stored == plain else heldout_nll(model, size.tokens)
                row = {**figures(nll, base), **bytes_of(model.model, float32_bytes), "tokens": len(nll)}
                row["calibration_tokens"] = calibrated
            lab.add(**{"kind": "quality", "variant": stored.name} | row)
            show(stored.name)


def prepare(lab: Lab, stored: Stored, size: Size) -> tuple[engine.LoadedModel, int]:
    """The model as it is stored, and the number of tokens that it was calibrated on."""
    name = stored.model or lab.options.model
    if stored.format is None or stored.method == "rtn":
        return engine.load(name, stored.dtype, lab.device, stored.format), 0
    loaded = engine.load(name, stored.dtype, lab.device)
    windows = calibration_windows(loaded, [], size.calibration, size.window, lab.options.seed)
    quantize_calibrated(loaded.model, stored.format, stored.method, windows)
    return loaded, windows.numel()


@torch.inference_mode()
def heldout_nll(loaded: engine.LoadedModel, count: int) -> Tensor:
    """Of `count` tokens of held-out files, in an order that does not depend on their names."""
    stream: list[int] = []
    for file in sorted(read_corpus("heldout"), key=lambda file: fingerprint([file])):
        if len(stream) > count:
            break
        stream += [*loaded.tokenizer.eos_ids[:1], *loaded.tokenizer.encode(file.text)]
    context = loaded.config.context
    tokens = torch.tensor(stream[: count + 1], device=loaded.model.embedding.weight.device)
    return token_nll(loaded.model, tokens, context, max(1, context // 2))


def figures(nll: Tensor, base: Tensor) -> dict[str, float]:
    found, ratio = summary(nll), summary(nll - base)  # exp of the mean difference is the ratio of the perplexities
    loss = {f"loss_percent{end}": 100 * (ratio[f"perplexity{end}"] - 1) for end in ("", "_low", "_high")}
    return {**{name: found[name] for name in INTERVALS}, "loss": ratio["perplexity"] - 1, **loss}


def bytes_of(model: engine.Transformer, float32_bytes: int) -> dict[str, float]:
    values, others = stored_bytes(model)
    return {
        "linear_mib": (values + others) / MIB,
        "values_of_float32": values / float32_bytes,
        "stored_of_float32": (values + others) / float32_bytes,
    }
