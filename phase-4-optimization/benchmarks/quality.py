"""Measures quality: perplexity on held-out text of every storage format, against float32.

All variants read the same documents, and differences are compared document by document: their interval is far narrower
than that of either perplexity. The calibrated methods use only text of the training half.

    python bench.py --only quality
    python bench.py --only quality --qat runs/qat/model
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch

import engine
from common.benchmark import Outcome, progress
from common.device import MIB
from common.models.corpus import fingerprint, read_corpus
from common.perplexity import token_nll
from engine.quantize import Format, stored_bytes
from engine.quantize_calibrated import Method, calibration_windows, quantize_calibrated

from .runs import Lab

QUALITY = {
    "quality": "variant: how weights are stored; beside quantised matrices the rest is float32. perplexity: exp of the "
    "mean negative log likelihood of held-out documents (with --prompt-file or --prompts-from: of those prompts and "
    "their continuations), each cut to the same number of tokens; perplexity_percent: by how much it is above that of "
    "float32, document by document, with its 95% interval on documents like these; linear_mib: bytes of the linear "
    "layers' matrices as stored, with scales, zeros and factors, without the head; calibration_tokens: tokens of the "
    "training half that the rounding looked at",
}


@dataclass(frozen=True)
class Stored:
    """A storage format of the weights."""

    format: Format | None = None
    method: Method = "rtn"
    dtype: torch.dtype = torch.float32
    model: str | None = None  # another checkpoint than the bench's


@dataclass(frozen=True)
class Size:
    """The amount of text."""

    documents: int = 48
    tokens: int = 512  # of each document
    calibration: int = 16_384
    window: int = 512  # of the calibration


def variants(lab: Lab) -> dict[str, Stored]:
    int4, asymmetric = Format("int4"), Format("int4", asymmetric=True)
    found = {
        "float32": Stored(),
        "int8": Stored(Format("int8")),
        "int4": Stored(int4),
    }
    if not lab.options.quick:
        found |= {
            "bfloat16": Stored(dtype=torch.bfloat16),
            "int4 gptq": Stored(int4, "gptq"),
            "int4 awq": Stored(int4, "awq"),
            "int4 asymmetric": Stored(asymmetric),
            "int4 asymmetric gptq": Stored(asymmetric, "gptq"),
            "int4 groups of 32": Stored(Format("int4", 32)),
            "int4 groups of 128": Stored(Format("int4", 128)),
        }
    if qat := lab.options.qat:
        found |= {"qat float32": Stored(model=qat), "int4 qat": Stored(int4, model=qat)}
    return found


def measure_quality(lab: Lab) -> None:
    size = Size(4, 256, 2_048, 256) if lab.options.quick else Size()
    texts = documents(lab, size)
    wanted = variants(lab)
    with progress("quality", len(wanted)) as show:
        for name, stored in wanted.items():
            if stored.dtype == torch.bfloat16 and lab.no_bfloat16:
                lab.refuse("quality", {}, name, lab.no_bfloat16)
            else:
                prepared = cache(partial(prepare, lab, stored, size))  # called for the first missing row
                for document, text in texts.items():
                    lab.count("quality", {}, name, document, partial(score, prepared, text, size.tokens))
            show(name)


def documents(lab: Lab, size: Size) -> Mapping[str, str]:
    """Return the user's own prompts with their continuations, or held-out files in the order of their hashes."""
    if lab.options.own_prompts:
        return {prompt.id: prompt.text + prompt.continuation for prompt in lab.prompts()}
    files = sorted(read_corpus("heldout"), key=lambda file: fingerprint([file]))
    long = [file for file in files if len(file.text) > 8 * size.tokens]  # long enough for size.tokens
    return {file.path: file.text for file in long[: size.documents]}


def prepare(lab: Lab, stored: Stored, size: Size) -> tuple[engine.LoadedModel, dict[str, float]]:
    """Load the model in its storage format, and measure its size."""
    name, calibrated = stored.model or lab.options.model, 0
    if stored.format is None or stored.method == "rtn":
        loaded = engine.load(name, stored.dtype, lab.device, stored.format)
    else:
        loaded = engine.load(name, stored.dtype, lab.device)
        windows = calibration_windows(loaded, [], size.calibration, size.window, lab.options.seed)
        quantize_calibrated(loaded.model, stored.format, stored.method, windows)
        calibrated = windows.numel()
    return loaded, {"linear_mib": sum(stored_bytes(loaded.model)) / MIB, "calibration_tokens": calibrated}


@torch.inference_mode()
def score(prepared: Callable[[], tuple[engine.LoadedModel, Mapping[str, float]]], text: str, limit: int) -> Outcome:
    """Compute the negative log likelihood of a document's first `limit` tokens."""
    loaded, about = prepared()
    ids = [*loaded.tokenizer.eos_ids[:1], *loaded.tokenizer.encode(text)][: limit + 1]
    tokens = torch.tensor(ids, device=loaded.model.embedding.weight.device)
    context = loaded.config.context
    nll = token_nll(loaded.model, tokens, context, max(1, context // 2))
    return Outcome(len(nll), {"nll_sum": nll.double().sum().item(), **about})
