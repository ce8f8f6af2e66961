"""The timeline of blocks: which request held which block of the cache in every step, with preemptions.

python bench.py --output results --only requests
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from common.figures import COLOURS, figure
from engine import LLM, LLMEngine, PagedCache, Sequence

from .runs import Lab

PAGES, ROWS, REQUESTS = 40, 6, 10


def draw_timeline(lab: Lab, file: Path) -> None:
    """Serve a few requests over too few blocks, and draw a line for every block."""
    if lab.options.dry_run or not lab.rows("requests"):
        return
    held, marks = timeline(lab.llm(lab.options.formats[0], draft="none", kv_pages=PAGES), lab.texts(REQUESTS))
    with figure(file, 1, 1, (9.0, 5.4), "which request held which block (x: preempted)") as (axes,):
        colours = [COLOURS[number % len(COLOURS)] for number in range(REQUESTS)]
        for step, owners in enumerate(held):
            for block, owner in owners.items():
                axes.barh(block, 1, left=step, height=0.9, color=colours[owner], linewidth=0)
        for step, owner, block in marks:
            axes.plot(step, block, "x", color="black", markersize=7)
            axes.annotate(str(owner), (step, block), fontsize="small", xytext=(3, 3), textcoords="offset points")
        for number, colour in enumerate(colours):
            axes.barh(-5, 0, color=colour, label=f"request {number}")
        axes.set_ylim(-1, PAGES)
        axes.set_xlabel("call of step()")
        axes.set_ylabel("block")
        axes.legend(fontsize="x-small", ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def timeline(llm: LLM, texts: list[str]) -> tuple[list[dict[int, int]], list[tuple[int, int, int]]]:
    """Return, for every step, the owner of each block in use, and the preemptions: step, request, its first block."""
    llm.caches.clear()
    engine = LLMEngine(llm, rows=ROWS, tokens=len(texts[0]) + 256, budget=64)
    params = dataclasses.replace(llm.params, max_new_tokens=120, ignore_eos=True)
    cache = engine.target.manager.cache  # type: ignore[attr-defined]
    assert isinstance(cache, PagedCache)
    held, marks, owners = list[dict[int, int]](), list[tuple[int, int, int]](), dict[int, int]()
    sequences = list[Sequence]()
    for text in texts:
        number = engine.add_request(llm.encoder.encode([text])[0][:200], params)
        sequences += engine.requests[number]
    preemptions = [0] * len(sequences)
    while engine.busy:
        engine.step()
        before, owners = owners, {}
        for sequence in engine.scheduler.running:
            table = cache.tables[engine.target.manager.rows[sequence].number]  # type: ignore[attr-defined]
            owners |= {block: sequences.index(sequence) for block in table}
        for at, sequence in enumerate(sequences):
            if sequence.progress.preemptions > preemptions[at]:
                preemptions[at] = sequence.progress.preemptions
                marks.append((len(held), at, min((block for block, owner in before.items() if owner == at), default=0)))
        held.append(owners)
    engine.close()
    llm.caches.clear()
    return held, marks
