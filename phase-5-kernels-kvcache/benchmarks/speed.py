"""End to end with torch: kinds of cache, drafters, and plain decoding against itself.

Greedy variants must give the baseline's tokens; others are not timed.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch

from common.benchmark import Outcome
from common.checkpoint import open_checkpoint
from common.harness import Variant
from common.peers import TransformersPeer
from common.prompts import Prompt

from .runs import Lab, read_prompt

SPEED = {
    "cache": "greedy plain decoding: phase 4, without a cache (the baseline); kinds of cache; transformers' "
    "generate with its cache",
    "speed": "drafters, with the static cache; the baseline is plain decoding",
    "null": "plain decoding as in generate.py, timed against itself: there is no difference",
}
KINDS = ("static", "dynamic", "paged")
CACHE_PROMPTS = 24
NULL_TOKENS, NULL_SECONDS = 16, 12.0  # of one try of `null`
THIRD = "plain, a third time"


def measure_null(lab: Lab) -> None:
    changed: dict[str, Any] = {"max_tokens": min(lab.options.max_tokens, NULL_TOKENS)}
    if "budget" not in lab.options.model_fields_set:
        changed["budget"] = NULL_SECONDS
    lab = lab.with_options(**changed)
    plain = lab.decoder(draft="none", kernels="auto")
    for number in range(lab.options.tries):
        lab.compare("null", {"try": number}, {"plain": plain, THIRD: plain}, lab.prompts(), exact=[THIRD])


def null_verdicts(lab: Lab) -> list[str]:
    """Return for every try whether an interval excludes 1, and whether a claim is printed."""
    found = []
    for line in lab.table("null"):
        if "speedup" in line:
            low, high = line["speedup_low"], line["speedup_high"]
            excludes = "no interval" if low is None else "includes 1" if low <= 1 <= high else "excludes 1"
            claim = "" if line["claimed"] is None else "; a claim" if line["claimed"] else "; no claim"
            found.append(f"try {line['try']}, {line['variant']}: {excludes}{claim}")
    return found


def measure_cache(lab: Lab) -> None:
    """Measure kinds of cache; phase 4 is slow, so this section has fewer prompts than claims about samples."""
    lab, plain = lab.one_round(), dict[str, Any](draft="none")
    prompts = lab.prompts(min(CACHE_PROMPTS, lab.options.prompts))
    runs: dict[str, Variant] = {}
    try:
        runs["phase 4"] = lab.decoder(importlib.import_module("phase4"), **plain)
    except ModuleNotFoundError as error:
        lab.refuse("cache", {}, "phase 4", f"{error}; `make install` installs the phases")
    runs |= {kind: lab.decoder(kv=kind, **plain) for kind in KINDS}
    runs["transformers"] = transformers(lab)
    # In half precision, sums in different orders round differently, which can change the argmax of a near tie.
    exact = list(runs) if lab.dtype == torch.float32 else []
    lab.compare("cache", {"temperature": 0.0}, runs, prompts, exact=exact)


def transformers(lab: Lab) -> Variant:
    """Return a variant of transformers' greedy generate."""
    peer = cache(lambda: TransformersPeer(open_checkpoint(lab.options.model).folder, lab.dtype, lab.device))

    def run(prompt: Prompt | None, round_: int) -> Outcome:
        assert prompt is not None
        tokens = peer().generate([read_prompt(lab, prompt)], lab.options.max_tokens, use_cache=True)[0]
        return Outcome(len(tokens), output=tokens)

    return run


def measure_speed(lab: Lab) -> None:
    lab = lab.one_round()
    for temperature in lab.options.temperatures:
        runs = {"plain": lab.decoder(draft="none", temperature=temperature)}
        runs |= lab.drafting(temperature=temperature)
        exact = list(runs) if not temperature and lab.dtype == torch.float32 else []
        lab.compare("speed", {"temperature": temperature}, runs, lab.prompts(), exact=exact)
