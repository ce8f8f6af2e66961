"""End to end: every kind of cache against phase 4 and against transformers, and speculation against plain decoding.

Greedy variants must write phase 4's tokens, and are not timed if they do not.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

from common.benchmark import median, refuse_if_different
from common.checkpoint import open_checkpoint
from common.peers import TransformersPeer

from .runs import Lab, Variant

SPEED = {
    "variant": "a kind of cache with plain decoding; phase 4 without one; transformers' generate with its cache; or a "
    "way to draft, with the static cache",
    "over_4": "phase 4's wall time per token, plain, over this one's, taking turns; median of the paired rounds with "
    "its bootstrap 95% interval",
    "over_plain": "plain decoding with the static cache, likewise",
    "over_transformers": "transformers' generate with its cache, likewise",
    "tokens_per_s": "new tokens / wall time, median of the rounds",
    "tokens_per_forward": "new tokens / target forwards",
    "ttft_ms": "to the first token, median over the prompts of the last round",
    "tpot_ms": "(end to end - TTFT) / (tokens - 1), likewise",
}
KINDS = ("static", "dynamic", "paged")
DRAFTING: dict[str, dict[str, Any]] = {
    "model, cost": {"controller": "cost"},
    "ngram, cost": {"drafter": "ngram", "controller": "cost"},
    "medusa, cost": {"drafter": "medusa", "controller": "cost", "max_k": 4},
    "eagle, cost": {"drafter": "eagle", "controller": "cost"},
    "eagle, static 16": {"drafter": "eagle", "k": 5, "tree": "static", "tree_nodes": 16},
}


class Peer(Variant):
    """transformers' own loop."""

    def __init__(self, lab: Lab, texts: list[str], same_as: Variant) -> None:
        super().__init__("transformers", None, texts, same_as)
        if not lab.options.dry_run:
            folder = open_checkpoint(lab.options.model).folder
            self.peer = TransformersPeer(folder, torch.float32, lab.device)
            encode = lab.load().tokenizer.encode
            self.prompts, self.length = [encode(text) for text in texts], lab.options.max_tokens

    def __call__(self) -> None:
        self.tokens = [self.peer.generate([prompt], self.length, use_cache=True)[0] for prompt in self.prompts]
        assert self.same_as is not None
        for number, (mine, other) in enumerate(zip(self.tokens, self.same_as.tokens, strict=True)):
            refuse_if_different(f"transformers, prompt {number}", other, mine)


def measure_speed(lab: Lab) -> None:
    temperatures = (0.0,) if lab.options.quick else (0.0, 1.0)
    for temperature in temperatures:
        if not lab.done(kind="speed", temperature=temperature, variant="phase 4"):
            at_temperature(lab, temperature)


def at_temperature(lab: Lab, temperature: float) -> None:
    texts, runs = lab.texts(), dict[str, Variant]()
    plain: dict[str, Any] = {"draft": "none", "temperature": temperature}
    try:
        runs["phase 4"] = lab.variant("phase 4", texts, importlib.import_module("phase4"), **plain)
    except ModuleNotFoundError as error:
        print(f"note: the section `speed` is left out: {error}; `make install` installs the phases", file=sys.stderr)
        return
    first = runs["phase 4"]
    for kind in KINDS:
        runs[kind] = lab.variant(kind, texts, same_as=first, kv=kind, **plain)
    if not temperature:
        runs["transformers"] = Peer(lab, texts, first)
    for name, options in DRAFTING.items():
        if not lab.options.quick or name == "eagle, cost":
            same = None if temperature else first
            runs[name] = lab.variant(name, texts, same_as=same, temperature=temperature, **options)
    if not lab.options.dry_run:
        for run in runs.values():  # each is right before any is timed
            run()
    times = lab.times(f"temperature {temperature:g}", runs, lab.options.repeats)
    rates = {name: [t / (run.count or 1) for t in times[name]] for name, run in runs.items()}
    for name in reversed(runs):
        run, peer = runs[name], rates.get("transformers")
        stats = [each for each in run.stats if len(run.tokens)]
        lab.add(
            kind="speed",
            temperature=temperature,
            variant=name,
            tokens_per_s=1 / median(rates[name]),
            tokens_per_forward=run.tokens_per_forward,
            **lab.ratio("over_4", rates["phase 4"], rates[name]),
            **lab.ratio("over_plain", rates["static"], rates[name]),
            **(lab.ratio("over_transformers", peer, rates[name]) if peer else {}),
            **(
                {column: median([getattr(each, column) for each in stats]) for column in ("ttft_ms", "tpot_ms")}
                if stats and hasattr(stats[0], "tpot_ms")
                else {}
            ),
        )
