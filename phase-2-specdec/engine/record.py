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

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        try:
            self.file: TextIO = path.open("w", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--record {path}: cannot be written ({error.strerror or error})") from None
        self._write(header)

    def step(self, step: Step) -> None:
        draft, verdict = step.draft, step.verdict
        for row, (sequence, stats) in enumerate(zip(step.sequences, step.stats, strict=True)):
            tokens = draft.tokens[row, : stats.k]
            at = tokens[:, None].to(step.target_probs.device)
            target = step.target_probs[row, : stats.k].gather(-1, at)[:, 0]
            own = [1.0] * stats.k if draft.probs is None else draft.probs[row, : stats.k].gather(-1, at)[:, 0].tolist()
            uniforms = None
            if not sequence.params.greedy:
                positions = torch.arange(stats.k) + len(sequence.prompt) + step.starts[row]
                samples = torch.full_like(positions, sequence.sample)
                uniforms = philox.uniforms(sequence.params.seed, samples, positions, philox.Purpose.ACCEPT, 1)[:, 0]
            accepted = int(verdict.accepted[row])
            self._write(
                {
                    "sample": sequence.sample,
                    "position": len(sequence.prompt) + step.starts[row],
                    "proposed": tokens.tolist(),
                    "draft_probs": own,
                    "target_probs": target.tolist(),
                    "acceptance_probs": verdict.ratios[row, : stats.k].tolist(),
                    "uniforms": None if uniforms is None else uniforms.tolist(),  # a token stands where it is below
                    "accepted": accepted,
                    "next_from": "bonus" if accepted == stats.k else "residual",
                    "next_token": int(verdict.next_tokens[row]),
                    "stats": dataclasses.asdict(stats),
                }
            )

    def _write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
