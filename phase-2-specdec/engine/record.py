"""`--record FILE`: a run step by step as JSON lines, complete enough to replay its arithmetic without the model.

The file has a header, a line per step and sequence, and a footer. `common/recording.schema.json` describes every field.
All figures are read after each step from what the loop has decided already: recording changes no token.

    python generate.py --prompt "from pathlib import" --temperature 1 --record run.jsonl
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import philox
from common.errors import UserError
from common.phases import phase_of
from common.recording import SCHEMA_VERSION

from .context import window_start
from .llm import LLM
from .sampling import probabilities
from .sequence import Sequence
from .speculative import Step

TOP = 5  # listed tokens of a distribution


class Recorder:
    """Writes each step as it ends, a whole line in one system call. UserError if the file cannot be written.

    `sequences` are all of the run. The loop calls
    `watch` in a step of plain decoding. The driver of the loop calls `step` after every step, and `finish` at the end.
    """

    def __init__(self, path: Path, llm: LLM, sequences: list[Sequence]) -> None:
        self.path, self.llm, self.sequences = path, llm, sequences
        self.numbers = {sequence: number for number, sequence in enumerate(sequences)}
        self.totals = [
            {"new_tokens": 0, "steps": 0, "target_forwards": 0, "proposed": 0, "accepted": 0, "seconds": 0.0}
            for _ in sequences
        ]
        self.steps, self.began, self.ended = 0, 0.0, 0.0  # the step's, in milliseconds on the run's clock
        self.seen: tuple[list[Sequence], Tensor, float] | None = None  # the last step without a draft
        try:
            self.file = path.open("wb", buffering=0)
        except OSError as error:
            raise UserError(f"--record {path}: cannot be written ({error.strerror or error})") from None
        self._write(self._header())

    def watch(self, sequences: list[Sequence], logits: Tensor) -> None:
        """Keep logits [R, V] of a step without a draft, from which the sequences' last tokens were chosen."""
        self.seen = list(sequences), logits, self._now()

    def step(self, step: Step | None) -> None:
        """Write a line for every sequence of `step`, or, without one, of the step that was watched last."""
        self.ended = self._now()
        if step is not None:
            for row in range(len(step.sequences)):
                self._add(step.sequences[row], self._drafted(step, row))
        elif self.seen is not None:
            sequences, logits, done = self.seen
            for row, sequence in enumerate(sequences):
                start = len(sequence.tokens) - 1
                times = {"draft_ms": 0.0, "verify_ms": done - self.began, "accept_ms": 0.0, "kv_ms": 0.0}
                self._add(sequence, {**self._plain(sequence, start, logits[row]), **times})
        self.steps, self.seen, self.began = self.steps + 1, None, self._now()

    def finish(self) -> None:
        """Write the footer, unless writing has failed before. A sequence without a finish reason was interrupted."""
        if self.file.closed:
            return
        ends = [
            {"sequence": number, "finish_reason": each.finish_reason or "interrupted", "text": each.text}
            for number, each in enumerate(self.sequences)
        ]
        self._write(
            {
                "type": "footer",
                "finished": all(each.finish_reason is not None for each in self.sequences),
                "sequences": [{**end, **total} for end, total in zip(ends, self.totals, strict=True)],
            }
        )
        self.file.close()

    def _header(self) -> dict[str, Any]:
        prompts = [each.prompt for each in self.sequences[:: self.llm.options.n]]
        return {
            "type": "header",
            "schema_version": SCHEMA_VERSION,
            "phase": phase_of(__file__),
            **self.llm.header(),
            "context": self.llm.loaded.config.context,
            "prompts": [{"tokens": prompt, "strings": self._strings(prompt)} for prompt in prompts],
            "sequences": [
                {"sequence": number, "prompt": number // self.llm.options.n, "sample": each.sample}
                for number, each in enumerate(self.sequences)
            ],
        }

    def _drafted(self, step: Step, row: int) -> dict[str, Any]:
        """Return the outcome of one sequence's draft, and the token after it."""
        sequence, start, stats = step.sequences[row], step.starts[row], step.stats[row]
        target = step.target_probs[row]
        if not stats.k:
            line = self._line(sequence, start, target[0], int(step.verdict.next_tokens[row]), "plain")
        else:
            accepted = int(step.verdict.accepted[row])
            draft = self._draft_probs(step, row)
            rejected = None if accepted == stats.k else (target[accepted], draft[accepted])
            origin = "bonus" if rejected is None else "residual"
            line = self._line(sequence, start, target[accepted], int(step.verdict.next_tokens[row]), origin, rejected)
            line["comparison"] = "certain" if sequence.params.greedy else "uniform"
            line["proposed"] = self._candidates(step, row, draft, accepted)
            line["path"] = list(range(accepted))
        times = {name: getattr(stats, name) for name in ("draft_ms", "verify_ms", "accept_ms", "kv_ms")}
        return {**line, **times, "k": stats.k, "counted": {"proposed": stats.proposed, "accepted": stats.accepted}}

    def _draft_probs(self, step: Step, row: int) -> Tensor:
        """Return the distributions of the draft tokens, [k, V]: one-hot if the drafter gave none."""
        k = step.stats[row].k
        if step.draft.probs is not None:
            return step.draft.probs[row, :k]
        target = step.target_probs[row, :k]
        return torch.zeros_like(target).scatter_(-1, step.draft.tokens[row, :k, None].to(target.device), 1.0)

    def _candidates(self, step: Step, row: int, draft: Tensor, accepted: int) -> list[dict[str, Any]]:
        sequence, candidates = step.sequences[row], list[dict[str, Any]]()
        for at, token in enumerate(step.draft.tokens[row, : step.stats[row].k].tolist()):
            tried = at <= accepted
            position = len(sequence.prompt) + step.starts[row] + at
            candidates.append(
                {
                    "token": token,
                    "string": self._string(token),
                    "parent": at - 1,
                    "draft_prob": float(draft[at, token]),
                    "target_prob": float(step.target_probs[row, at, token]),
                    "chance": float(step.verdict.ratios[row, at]) if tried else None,
                    "uniform": accept_uniform(sequence, position) if tried else None,
                    "accepted": at < accepted if tried else None,
                }
            )
        return candidates

    def _plain(self, sequence: Sequence, start: int, logits: Tensor) -> dict[str, Any]:
        """Return the line of a step without a draft, from the logits [V] after the sequence."""
        outputs = [sequence.tokens[:start]]
        probs = probabilities(logits[None], [sequence.params], [sequence.prompt], outputs)[0]
        return self._line(sequence, start, probs, sequence.tokens[start], "plain")

    def _line(
        self,
        sequence: Sequence,
        start: int,
        target: Tensor,
        token: int,
        origin: str,
        rejected: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Any]:
        """Return the fields of every step. start: output length before the step; target [V]: after the accepted tokens.

        rejected: the target's and the draft's distributions [V] whose residual gave `token`, if any.
        """
        source, rest = target, None
        if rejected is not None:
            source, mass = residual(*rejected)
            top = self._top(source)
            for each in top:
                each["target_prob"], each["draft_prob"] = (float(probs[each["token"]]) for probs in rejected)
            rest = {"mass": mass, "top": top}
        return {
            "type": "step",
            "step": self.steps,
            "sequence": self.numbers[sequence],
            "position": len(sequence.prompt) + start,
            "window_start": window_start(len(sequence.prompt) + start, self.llm.loaded.config.context),
            "start_ms": self.began,
            "end_ms": self.ended,
            "prefill_ms": None,
            "k": 0,
            "comparison": None,
            "proposed": [],
            "path": [],
            "next": {
                "token": token,
                "string": self._string(token),
                "origin": origin,
                "prob": float(source[token]),
            },
            "emitted": sequence.tokens[start:],
            "counted": {"proposed": 0, "accepted": 0},
            "target_top": self._top(target),
            "residual": rest,
            "cache_before": None,
            "cache_after": None,
        }

    def _top(self, probs: Tensor) -> list[dict[str, Any]]:
        """List the likeliest tokens of probs [V], ties by lower id, without impossible ones."""
        values, tokens = probs.sort(descending=True, stable=True)
        likeliest = zip(tokens[:TOP].tolist(), values[:TOP].tolist(), strict=True)
        return [{"token": token, "string": self._string(token), "prob": prob} for token, prob in likeliest if prob > 0]

    def _add(self, sequence: Sequence, line: dict[str, Any]) -> None:
        self._write(line)
        total = self.totals[line["sequence"]]
        total["new_tokens"] += len(line["emitted"])
        total["steps"] += 1
        total["target_forwards"] += 1
        for name, count in line["counted"].items():
            total[name] += count
        total["seconds"] = self._now() / 1e3

    def _strings(self, tokens: list[int]) -> list[str]:
        return [self._string(token) for token in tokens]

    def _string(self, token: int) -> str:
        return self.llm.loaded.tokenizer.token_text(token)

    def _now(self) -> float:
        return (time.perf_counter() - self.sequences[0].progress.began) * 1e3

    def _write(self, line: dict[str, Any]) -> None:
        """Write one line unbuffered, so that an interrupt comes before or after the line. A failure closes the file."""
        content = json.dumps(line, allow_nan=False).encode() + b"\n"
        try:
            written = self.file.write(content)
            if written < len(content):
                self.file.truncate(self.file.tell() - written)  # only whole lines stay
                raise OSError("the line is incomplete; is the disk full?")
        except OSError as error:
            self.file.close()
            raise UserError(f"--record {self.path}: cannot be written ({error.strerror or error})") from None


def residual(target: Tensor, draft: Tensor) -> tuple[Tensor, float]:
    """Return verify()'s residual of the target's and the draft's distributions [V] after a rejection, and its mass."""
    left = (target - draft.to(target.device)).clamp(min=0)
    mass = float(left.sum())
    return (left / mass if mass > 0 else target), mass


def accept_uniform(sequence: Sequence, position: int) -> float | None:
    """Return the uniform number that decided on the draft token at this position; None at temperature 0."""
    if sequence.params.greedy:
        return None
    keys = torch.tensor([sequence.sample]), torch.tensor([position])
    return float(philox.uniforms(sequence.params.seed, *keys, philox.Purpose.ACCEPT, 1))
