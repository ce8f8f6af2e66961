"""Measures acceptance by depth and rank of every drafter that can branch, for the best shape of its trees.

Samples at temperature 1 from prompts of the `calibrate` half, with a tree much wider than usual: its branch of first
children has every rank at every level. The table is written into the model's folder, where the engine looks for it.
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
# Flat enough that the 160 likeliest nodes include every rank along the branch of first children.
EXPLORATORY = [[0.75] + [0.1] * (RANKS - 1)] * LEVELS
LEAN, LEAST = 20, 0.001
FILE = "tree_acceptance.json"


def acceptance_by_rank(steps: list[tuple[engine.Tree, list[int]]], levels: int, ranks: int) -> list[list[float]]:
    """Compute a[d][r] from trees and their accepted paths (node numbers); 0 where nothing was tried."""
    tried = [[0] * ranks for _ in range(levels)]
    accepted = [[0] * ranks for _ in range(levels)]
    for tree, nodes in steps:
        for depth, (above, node) in enumerate(zip([-1, *nodes], [*nodes, None], strict=True)):
            if depth < levels:
                for rank, child in enumerate(tree.children(above)[:ranks]):
                    tried[depth][rank] += 1
                    accepted[depth][rank] += child == node
    return [[a / t if t else 0.0 for a, t in zip(*row, strict=True)] for row in zip(accepted, tried, strict=True)]


def smoothed(table: list[list[float]], walks: list[int]) -> list[list[float]]:
    """Smooth every depth towards the mean over depths, with the weight of LEAN walks; walks[d] reached depth d.

    No entry is below LEAST: nodes at the ends of the tree were tried too rarely for an estimate of 0.
    """
    mean = [sum(n * row[rank] for n, row in zip(walks, table, strict=True)) / sum(walks) for rank in range(RANKS)]
    return [
        [round(max((n * value + LEAN * prior) / (n + LEAN), LEAST), 4) for value, prior in zip(row, mean, strict=True)]
        for n, row in zip(walks, table, strict=True)
    ]


def acceptance_table(lab: Lab, drafter: str) -> list[list[float]]:
    """Measure a table of at most LEVELS x RANKS; a drafter with a smaller depth has fewer levels."""
    llm = lab.llm(drafter=drafter, temperature=1.0, k=LEVELS)
    policy, made = llm.policy, cast(Brancher, drafter_of(llm))
    source, levels = engine.KeyedSource(), min(LEVELS, made.deepest)
    shape = engine.best_shape(EXPLORATORY, NODES)
    tree_drafter = StaticTreeDrafter(made, shape, source, policy.draft_noise, policy.draws_children)
    texts = [prompt.text for prompt in lab.prompts(half="calibrate")]
    seen: list[tuple[engine.Tree, list[int]]] = []
    with progress(f"calibrating {drafter}", len(texts)) as show:
        for number, text in enumerate(texts):
            loop = engine.decode(
                llm.loaded.model,
                tree_drafter,
                llm.sequences([text]),
                policy,
                lambda: engine.FixedController(LEVELS),
                source,
            )
            seen += [(step.trees[0], step.paths[0].nodes) for step in loop]
            show(str(number))
    walks = [sum(len(nodes) >= depth for _, nodes in seen) for depth in range(levels)]
    return smoothed(acceptance_by_rank(seen, levels, RANKS), walks)


def calibrate(lab: Lab) -> None:
    """Write the table of every drafter that can branch; the file's tables of other drafters are kept."""
    file = lab.target.checkpoint.folder / FILE
    tables = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for drafter in (name for name in lab.drafters if name in BRANCHING):
        tables[drafter] = acceptance_table(lab, drafter)
        ranks = [f"rank {rank}" for rank in range(1, RANKS + 1)]
        rows = [[depth, *row] for depth, row in enumerate(tables[drafter], start=1)]
        print_table(f"{drafter}: acceptance of a child, once its parent was accepted", ["depth", *ranks], rows)
    lines = (
        f'"{name}": [\n  ' + ",\n  ".join(json.dumps(row) for row in table) + "\n]" for name, table in tables.items()
    )
    file.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8", newline="\n")
    print(f"wrote {file}")
