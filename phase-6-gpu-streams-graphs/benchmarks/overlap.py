"""Drafting the next block while this one is verified: measured against the formula of engine/overlap.py.

Four ways with the same tokens, all of them step by step: one model after the other on all threads (the baseline), one
after the other with the threads divided, and both at once, with either --sync-mode. The times of the first two predict
the others.
"""

from __future__ import annotations

import time
from typing import Any

import engine
from common.benchmark import Outcome
from common.harness import Variant
from common.prompts import Prompt
from engine.overlap import SyncMode

from .runs import Format, Lab, forget

OVERLAP = {
    "overlap": "`k` draft tokens; `draft_ms` is the time of one, `guessed` the share of blocks whose next token was "
    "guessed; `predicted` is the speed-up that the formula gives",
}
WIDTHS = (1, 2, 4)
ALL, DIVIDED = "all threads", "divided threads"
PARALLEL: dict[str, SyncMode] = {"parallel, event": "event", "parallel, barrier": "barrier"}


def measure_overlap(lab: Lab) -> None:
    for name in lab.options.formats:
        for k in WIDTHS[1:2] if lab.options.quick else WIDTHS:
            cell: dict[str, Any] = {"model": lab.options.model, "format": name, "instruction_set": lab.instruction_set}
            seen = dict[str, dict[str, float]]()
            runs = {how: decoded(lab, name, k, how, seen) for how in (ALL, DIVIDED, *PARALLEL)}
            lab.compare("overlap", {**cell, "k": k}, runs, prompts=lab.prompts(4), exact=(DIVIDED, *PARALLEL))


def decoded(lab: Lab, name: Format, k: int, how: str, seen: dict[str, dict[str, float]]) -> Variant:
    def run(prompt: Prompt | None, round_: int) -> Outcome:
        assert prompt is not None
        sync = PARALLEL.get(how)
        wanted: dict[str, Any] = {"parallel_streams": how != ALL, "sync_mode": sync or "event"}
        llm = lab.llm(name, k=k, max_tokens=lab.options.max_tokens, kernels="cpp", **wanted)
        llm.overlap = engine.OverlapStats() if sync else None
        forget(llm)
        (sequence,) = llm.sequences([prompt.text])
        sequence.eos_ids = ()
        began = time.perf_counter()
        for _ in llm.run([sequence], multi_step=False):
            pass
        seconds = time.perf_counter() - began
        steps = [step for step in sequence.steps if step.proposed == k][1:]  # the first prefills the draft's cache
        each = {
            "draft_ms": sum(step.draft_ms for step in steps) / k,
            "verify_ms": sum(step.verify_ms for step in steps),
        }
        each["accept_ms"] = sum(step.accept_ms + step.kv_ms for step in steps)
        figures = {name: total / max(1, len(steps)) for name, total in each.items()}
        if llm.overlap is not None and sync is not None:
            figures["guessed"] = llm.overlap.used / max(1, llm.overlap.drafted)
            figures["predicted"] = predicted(k, seen[ALL], seen[DIVIDED], figures["guessed"], sync)
        seen[how] = figures
        return Outcome(len(sequence.tokens), figures, output=sequence.tokens, seconds=seconds)

    return run


def predicted(k: int, whole: dict[str, float], divided: dict[str, float], guessed: float, sync: SyncMode) -> float:
    """Return the speed-up of a step: the times with all threads / those with divided ones, both models at once."""
    before = k * whole["draft_ms"] + whole["verify_ms"] + whole["accept_ms"]
    drafting, verifying, accepting = (k + 1) * divided["draft_ms"], divided["verify_ms"], divided["accept_ms"]
    both = max(drafting, verifying + accepting) if sync == "event" else max(drafting, verifying) + accepting
    return before / (both + (1 - guessed) * k * divided["draft_ms"])
