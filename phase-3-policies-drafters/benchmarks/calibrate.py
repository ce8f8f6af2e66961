"""Acceptance by depth and rank of every drafter that can branch, for the best shape of its trees.

Samples at temperature 1 from prompts of the `calibrate` half, with a tree much wider than one would use: its main line
tries every rank at every level. The table goes beside the model, where the engine's llm looks for it.
"""

from __future__ import annotations

import json
from typing import cast

import engine
from common.benchmark import print_table, progress
from engine.drafters import StaticTreeDrafter
from engine.drafting import Brancher
from engine.options import BRANCHING

from .drafters import drafter_of
from .runs import Lab

LEVELS, RANKS, NODES = 6, 8, 160
# Flat enough that the 160 likeliest nodes hold every rank along the way of firsts, and one detour anywhere.
EXPLORATORY = [[0.75] + [0.1] * (RANKS - 1)] * LEVELS
LEAN, LEAST = 20, 0.001
FILE = "tree_acceptance.json"


def smoothed(table: list[list[float]], walks: list[int]) -> list[list[float]]:
    """Every depth leans on the mean over depths with the weight of LEAN walks; walks[d] came to depth d.

    No entry is 0: the far ends of the tree were tried a few times, which makes none of them hopeless.
    """
    mean = [sum(n * row[rank] for n, row in zip(walks, table, strict=True)) / sum(walks) for rank in range(RANKS)]
    return [
        [round(max((n * value + LEAN * prior) / (n + LEAN), LEAST), 4) for value, prior in zip(row, mean, strict=True)]
        for n, row in zip(walks, table, strict=True)
    ]


def acceptance_table(lab: Lab, drafter: str) -> list[list[float]]:
    """At most LEVELS x RANKS; a drafter that cannot look so far has fewer levels."""
    llm = lab.llm(drafter=drafter, temperature=1.0, k=LEVELS)
    params, policy, made = llm.params, llm.policy, cast(Brancher, drafter_of(llm))
    source, levels = engine.KeyedSource(params.seed), min(LEVELS, made.deepest)
    shape = engine.best_shape(EXPLORATORY, NODES)
    tree_drafter = StaticTreeDrafter(made, params, shape, source, policy.draft_noise, policy.draws_children)
    texts = [prompt.text for prompt in lab.prompts(half="calibrate")]
    seen: list[tuple[engine.Tree, list[int]]] = []
    with progress(f"calibrating {drafter}", len(texts)) as show:
        for number, text in enumerate(texts):
            loop = engine.speculative_decode(
                llm.loaded.model,
                tree_drafter,
                llm.sequences([text]),
                params,
                policy,
                lambda: engine.FixedController(LEVELS),
                source,
            )
            seen += [(step.trees[0], step.paths[0].nodes) for step in loop]
            show(str(number))
    walks = [sum(len(nodes) >= depth for _, nodes in seen) for depth in range(levels)]
    return smoothed(engine.acceptance_by_rank(seen, levels, RANKS), walks)


def calibrate(lab: Lab) -> None:
    """Write the table of every drafter that can branch; those that are not here keep what the file had."""
    file = lab.target.checkpoint.folder / FILE
    tables = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for drafter in (name for name in lab.drafters if name in BRANCHING):
        tables[drafter] = acceptance_table(lab, drafter)
        ranks = [f"rank {rank}" for rank in range(1, RANKS + 1)]
        rows = [[depth, *row] for depth, row in enumerate(tables[drafter], start=1)]
        print_table(f"{drafter}: chance that the walk goes on to this child", ["depth", *ranks], rows)
    lines = (
        f'"{name}": [\n  ' + ",\n  ".join(json.dumps(row) for row in table) + "\n]" for name, table in tables.items()
    )
    file.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8", newline="\n")
    print(f"wrote {file}")
