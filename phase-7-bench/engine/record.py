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
from .policies import Rejection
from .runner import CachedRunner
from .sequence import Sequence
from .steps import Step

TOP = 5  # listed tokens of a distribution


class Recorder:
    """Writes each step as it ends, a whole line in one system call. UserError if the file cannot be written.

    `sequences` are all of the run. The driver of the
    loop calls `step` after every step, and `finish` at the end.
    """

    def __init__(self, path: Path, llm: LLM, sequences: list[Sequence]) -> None:
        self.path, self.llm, self.sequences = path, llm, sequences
        self.numbers = {sequence: number for number, sequence in enumerate(sequences)}
        self.totals = [
            {"new_tokens": 0, "steps": 0, "target_forwards": 0, "proposed": 0, "accepted": 0, "seconds": 0.0}
            for _ in sequences
        ]
        self.steps, self.began, self.ended = 0, 0.0, 0.0  # the step's, in milliseconds on the run's clock
        self.prefilled = 0.0  # milliseconds of the steps so far
        self.cached = [0] * len(sequences)  # tokens of each sequence in the target's cache
        try:
            self.file = path.open("wb", buffering=0)
        except OSError as error:
            raise UserError(f"--record {path}: cannot be written ({error.strerror or error})") from None
        self._write(self._header())

    def step(self, step: Step | None) -> None:
        """Write a line for every sequence of the step; a beam search has no steps."""
        self.ended = self._now()
        for row, sequence in enumerate(step.sequences if step else []):
            assert step is not None
            self._add(sequence, self._described(step, row))
        self.prefilled = self.llm.runner.prefill_ms if self.llm.runner else 0.0
        self.steps, self.began = self.steps + 1, self._now()

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

    def _described(self, step: Step, row: int) -> dict[str, Any]:
        """Return the line of one sequence: its draft, what was accepted of it, and the token after it."""
        stats, path, tree, target = step.stats[row], step.paths[row], step.trees[row], step.target_probs(row)
        comparison, end = self._comparison(step, row), path.nodes[-1] if path.nodes else -1
        origin, rejected = "plain", None
        if comparison is not None and not tree.children(end):
            origin = "bonus"
        elif comparison in ("uniform", "certain"):
            origin, rejected = "residual", self._rejected(step, row, target)
        sequence, start = step.sequences[row], step.starts[row]
        source, rest = target[end + 1], None
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
            **{name: getattr(stats, name) for name in ("draft_ms", "verify_ms", "accept_ms", "kv_ms")},
            "k": stats.k,
            "comparison": comparison,
            "proposed": self._candidates(step, row, comparison, target),
            "path": path.nodes,
            "next": {
                "token": path.next_token,
                "string": self._string(path.next_token),
                "origin": origin,
                "prob": float(source[path.next_token]),
            },
            "emitted": sequence.tokens[start:],
            "counted": {"proposed": stats.proposed, "accepted": stats.accepted},
            "target_top": self._top(target[end + 1]),
            "residual": rest,
            "cache_before": None,
            "cache_after": None,
        }

    def _comparison(self, step: Step, row: int) -> str | None:
        """Name how draft tokens were compared; None without draft tokens."""
        policy, tree = self.llm.policy, step.trees[row]
        if not tree.tokens:
            return None
        if not policy.lossless:
            return "threshold"
        if not isinstance(policy, Rejection) or (step.draft.trees is not None and tree.probs is None):
            return "own_draw"
        return "certain" if step.sequences[row].params.greedy else "uniform"

    def _rejected(self, step: Step, row: int, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the target's and the draft's distributions [V] of the last rejection; target [K+1, V]."""
        if trials := step.paths[row].trials:
            return trials[-1].target, trials[-1].draft
        at = len(step.paths[row].nodes)
        if step.draft.probs is not None:
            return target[at], step.draft.probs[row, at]
        certain = torch.zeros_like(target[at])
        certain[step.trees[row].tokens[at]] = 1.0
        return target[at], certain

    def _candidates(self, step: Step, row: int, comparison: str | None, target: Tensor) -> list[dict[str, Any]]:
        sequence, tree, path = step.sequences[row], step.trees[row], step.paths[row]
        trials = {trial.node: trial for trial in path.trials}
        candidates = list[dict[str, Any]]()
        for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
            siblings, accepted = tree.children(parent), node in path.nodes
            # The target's own draw is compared with all children; otherwise trials end at the accepted child.
            before = [] if comparison == "own_draw" else siblings[: siblings.index(node)]
            tried = parent in (-1, *path.nodes) and not any(sibling in path.nodes for sibling in before)
            target_prob, draft_prob = float(target[parent + 1, token]), self._draft_prob(step, row, node)
            chance = target_prob if comparison == "own_draw" else float(accepted)  # 0 or 1 for a threshold
            if node in trials:
                of_target, of_draft = trials[node].target[token], trials[node].draft[token].to(target.device)
                target_prob, draft_prob = float(of_target), float(of_draft)
                chance = float((of_target / of_draft).clamp(max=1))
            elif comparison == "certain" or (comparison == "uniform" and step.draft.probs is None):
                chance = target_prob
            elif comparison == "uniform" and step.draft.probs is not None:
                of_draft = step.draft.probs[row, node, token].to(target.device)
                chance = float((target[parent + 1, token] / of_draft).clamp(max=1))
            uniform = None
            if tried and comparison == "uniform":
                position = len(sequence.prompt) + step.starts[row] + tree.depths[node] - 1
                uniform = accept_uniform(sequence, position, siblings.index(node))
            candidates.append(
                {
                    "token": token,
                    "string": self._string(token),
                    "parent": parent,
                    "draft_prob": draft_prob,
                    "target_prob": target_prob,
                    "chance": chance if tried else None,
                    "uniform": uniform,
                    "accepted": accepted if tried else None,
                }
            )
        return candidates

    def _draft_prob(self, step: Step, row: int, node: int) -> float:
        """Return the token's probability in the draft distribution; 1 if it has none."""
        tree = step.trees[row]
        token, parent = tree.tokens[node], tree.parents[node]
        if step.draft.probs is not None:
            return float(step.draft.probs[row, node, token])
        if tree.probs is not None:
            return float(tree.probs[parent + 1, token])
        return float(tree.chosen_from[parent][token]) if parent in tree.chosen_from else 1.0

    def _top(self, probs: Tensor) -> list[dict[str, Any]]:
        """List the likeliest tokens of probs [V], ties by lower id, without impossible ones."""
        values, tokens = probs.sort(descending=True, stable=True)
        likeliest = zip(tokens[:TOP].tolist(), values[:TOP].tolist(), strict=True)
        return [{"token": token, "string": self._string(token), "prob": prob} for token, prob in likeliest if prob > 0]

    def _add(self, sequence: Sequence, line: dict[str, Any]) -> None:
        number = line["sequence"]
        if isinstance(runner := self.llm.runner, CachedRunner):
            row = runner.manager.rows.get(sequence)  # none any more, once the text has ended
            before, after = self.cached[number], len(row.held) if row else 0
            line |= dict(cache_before=before, cache_after=after, prefill_ms=runner.prefill_ms - self.prefilled)
            self.cached[number] = after
        self._write(line)
        total = self.totals[number]
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


def accept_uniform(sequence: Sequence, position: int, trial: int) -> float:
    """Return the uniform number of one trial at this position; siblings are tried one by one."""
    keys = torch.tensor([sequence.sample]), torch.tensor([position])
    return float(philox.uniforms(sequence.params.seed, *keys, philox.Purpose.ACCEPT, trial + 1)[0, trial])
