"""The n-gram drafter: what a guess that costs nothing is worth, and that it costs nothing however long the text is."""

from __future__ import annotations

import time
from typing import Any

from engine.drafters import NgramIndex

from .drafters import forced, survival_of
from .runs import Lab

LOOKUP = {
    "ngram": "tokens per target forward on forced held-out text, and share of step time spent drafting when decoding "
    "freely, where the same steps are timed as in `drafter`",
    "index": "of the n-gram index, in a text of so many tokens: microseconds to add a token, and to look up 4",
}


def measure_ngram(lab: Lab) -> None:
    for temperature in lab.grid.temperatures:
        for k in (2, 4, 8):
            lookup(lab, temperature, k)
    for length in (1_000, 10_000, 100_000):
        index_cost(lab, length)


def lookup(lab: Lab, temperature: float, k: int) -> None:
    key = {"kind": "ngram", "temperature": temperature, "k": k}
    if lab.done(**key):
        return
    stood, share, decoded = [k], 0.0, 1.0
    if not lab.options.dry_run:
        wanted: dict[str, Any] = {"drafter": "ngram", "temperature": temperature, "k": k}
        title = f"n-gram lookup, K = {k}, temperature {temperature:g}"
        stood = forced(lab, lab.session(**wanted), title, 2 * lab.grid.spread)
        run = lab.variant(lab.texts(), **wanted)
        for _ in range(2):  # the first is slower than the others
            run()
        decoded, share = run.figures()["tokens_per_forward"], run.figures()["draft_share"]
    row = {"tokens_per_forward": 1 + sum(survival_of(stood, k)), "steps": len(stood)}
    lab.add(**key, **row, decoded_tokens_per_forward=decoded, draft_share=share)


def index_cost(lab: Lab, length: int) -> None:
    if lab.done(kind="index", length=length):
        return
    added = looked = 1.0
    if not lab.options.dry_run:
        text = [token for prompt in lab.texts(25) for token in lab.target.tokenizer.encode(prompt)]
        text = (text * (1 + length // len(text)))[:length]
        index = NgramIndex(1, 3)
        began = time.perf_counter()
        index.extend(text)
        filled = time.perf_counter()
        for _ in range(1000):
            index.continuation(4)
        added, looked = (filled - began) / length * 1e6, (time.perf_counter() - filled) / 1000 * 1e6
    lab.add(kind="index", length=length, us_per_token=added, us_per_lookup=looked)
