"""`--record FILE`: a run step by step, as JSON lines, for replay and for looking at single decisions.

The first line names the model, the draft and the settings. Then one line per step and sequence: the tokens proposed,
both models' probabilities of them, the probability with which each was to stand and the uniform that decided it, how
many did, what followed and from where, the times.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TextIO

import torch

from common import philox
from common.errors import UserError

from .speculative import Step


class Recorder:
    """Writes each step as it ends, so that an interrupted run keeps what it has. UserError if it cannot be written."""

    def __init__(self, path: Path, header: dict[str, Any], rejects: bool = True) -> None:
        self.rejects = rejects  # whether tokens stand by the uniforms of the rejection rule
        try:
            self.file: TextIO = path.open("w", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--record {path}: cannot be written ({error.strerror or error})") from None
        self._write(header)

    def step(self, step: Step) -> None:
        verdict = step.verdict
        for row, (sequence, stats) in enumerate(zip(step.sequences, step.stats, strict=True)):
            tree, path = step.trees[row], step.paths[row]
            position = len(sequence.prompt) + step.starts[row]
            target = torch.empty(0) if step.judged is None else step.judged.probs[row]
            own = tree.probs if step.draft.probs is None else step.draft.probs[row]
            columns = range(len(tree.tokens)) if tree.probs is None else [parent + 1 for parent in tree.parents]
            above = [parent + 1 for parent in tree.parents]
            chances: list[float] | None = [] if verdict is None else verdict.ratios[row, : len(tree.tokens)].tolist()
            uniforms: list[float] | None = None
            if verdict is None and tree.tokens:  # of a tree: it has several at one position
                chances = None
            elif self.rejects and not sequence.params.greedy:
                positions = torch.arange(len(tree.tokens)) + position
                samples = torch.full_like(positions, sequence.sample)
                numbers = philox.uniforms(sequence.params.seed, samples, positions, philox.Purpose.ACCEPT, 1)
                uniforms = numbers[:, 0].tolist()
            whole = not tree.children(path.nodes[-1] if path.nodes else -1)
            self._write(
                {
                    "sample": sequence.sample,
                    "position": position,
                    "proposed": tree.tokens,
                    "parents": None if tree.is_chain else tree.parents,
                    "draft_probs": [1.0] * len(tree.tokens)
                    if own is None
                    else [float(own[at, token]) for at, token in zip(columns, tree.tokens, strict=True)],
                    "target_probs": [float(target[at, token]) for at, token in zip(above, tree.tokens, strict=True)],
                    "acceptance_probs": chances,
                    "uniforms": uniforms,  # a token stands where it is below
                    "accepted": len(path.nodes),
                    "path": None if tree.is_chain else path.nodes,
                    "next_from": "bonus" if whole else "residual" if self.rejects else "target",
                    "next_token": path.next_token,
                    "stats": dataclasses.asdict(stats),
                }
            )

    def _write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
