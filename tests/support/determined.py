"""Decodes with `--deterministic` in a process of its own, and prints tokens and a hash of the logits as JSON.

    python -m tests.support.determined FOLDER THREADS ROWS '{"temperature": 1.0}' [K ...]

K: by which `--controller cost` goes, step after step, in the place of the clock.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import sys
from typing import Any

import phase6

speculative: Any = importlib.import_module("phase6.speculative")
PROMPTS = ["def read_config(path):", "import os", "class A:"]


def decode(folder: str, threads: int, rows: int, options: dict[str, Any], widths: list[int]) -> dict[str, Any]:
    chosen = {"model": folder, "draft": folder, "device": "cpu", "max_tokens": 24, "deterministic": True, **options}
    llm: Any = phase6.LLM(phase6.Options(**chosen, threads=threads, batch_size=rows))
    if widths:
        given = itertools.cycle(widths)
        speculative.plan = lambda drafter, sequences, context: [
            speculative.block_width(sequence, k, context) for k in [next(given)] for sequence in sequences
        ]
    sequences, logits = llm.sequences(PROMPTS), dict[Any, Any]()
    for step in llm.run(sequences, multi_step=False):
        for row, sequence in enumerate(step.sequences):
            kept = logits.setdefault(sequence, {})
            columns = step.output.logits[row, : len(step.paths[row].nodes) + 1]
            for at, column in enumerate(columns):
                kept[step.starts[row] + at] = hashlib.sha256(column.float().numpy().tobytes()).hexdigest()
    return {"tokens": [s.tokens for s in sequences], "logits": [list(logits[s].values()) for s in sequences]}


if __name__ == "__main__":
    folder, threads, rows, options, *widths = sys.argv[1:]
    print(json.dumps(decode(folder, int(threads), int(rows), json.loads(options), [int(k) for k in widths])))
