"""The random number of every decision: the table of KeyedSource as code, and a check of whole runs against it.

`decisions` repeats every decision of a step with the key that the table names. So a number with another key, or one
used in another way, changes a decision and is found, in torch and in C++. `asked_of_philox` lists the numbers that
a torch loop requests, which finds numbers that decide something else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor

from common import philox
from common.philox import Purpose


class Key(NamedTuple):
    """A random number, or with Gumbel noise one for every token id (`word` is then 0)."""

    seed: int
    sample: int
    position: int
    purpose: Purpose
    word: int = 0


class Rule(NamedTuple):
    """A row of the table in the docstring of KeyedSource."""

    decision: str
    purpose: Purpose
    since: int  # the first phase with this rule


RULES = {
    "own": Rule("a token of the target: plain, or after a draft", Purpose.SAMPLE, 2),
    "draft": Rule("a draft token", Purpose.DRAFT, 2),
    "children": Rule("the children of a node, where they are drawn", Purpose.DRAFT, 3),
    "accept": Rule("accept or reject a draft token", Purpose.ACCEPT, 2),
    "residual": Rule("the token in place of a rejected one", Purpose.RESIDUAL, 2),
}


@dataclass(frozen=True)
class Decision:
    owner: object  # the sequence: requests of one seed share their numbers
    rule: str
    key: Key
    found: object
    right: object  # the decision by the key in the table
    counts: bool  # False: a draft token that was never compared, or one that shares the number of the target's own


@dataclass(frozen=True)
class Part:
    """The decisions of one step for one sequence, in the same form for every phase. Node -1 is the sequence."""

    owner: object  # the sequence
    seed: int
    sample: int
    length: int  # before the step: the position of the next token
    tokens: list[int]  # the proposed tokens, parents first
    parents: list[int]
    kind: Literal["chain", "drawn tree", "chosen tree"]
    origins: Tensor | None  # row 1 + i [V]: the distribution of node i's children; None: one-hot
    target: Tensor  # row 1 + i [V]: the target's distribution after node i
    path: list[int]  # accepted nodes
    following: int

    def children(self, node: int) -> list[int]:
        return [child for child, parent in enumerate(self.parents) if parent == node]

    def depth(self, node: int) -> int:
        return 0 if node < 0 else 1 + self.depth(self.parents[node])


def parts_of_plain(engine: Any, sequences: list[Any], logits: Tensor) -> Iterator[Part]:
    """Yield the parts of a step without a draft, as `watch` receives it: the sequences have their new token already."""
    for sequence, row in zip(sequences, logits, strict=True):
        start, token = len(sequence.tokens) - 1, sequence.tokens[-1]
        target = engine.probabilities(row[None], [sequence.params], [sequence.prompt], [sequence.tokens[:start]])
        length = len(sequence.prompt) + start
        yield Part(sequence, *numbered(sequence), length, [], [], "chain", None, target, [], token)


def numbered(sequence: Any) -> tuple[int, int]:
    """Return the seed that was asked for, and the sample."""
    return sequence.params.seed, sequence.sample


def parts(step: Any) -> Iterator[Part]:
    """Yield the parts of a speculative step, of any phase."""
    for row, (sequence, start) in enumerate(zip(step.sequences, step.starts, strict=True)):
        origins = None if step.draft.probs is None else step.draft.probs[row]
        kind: Literal["chain", "drawn tree", "chosen tree"] = "chain"
        if hasattr(step, "paths"):
            if step.output is None:
                continue  # a call that makes several plain steps keeps no logits
            path, following = step.paths[row].nodes, step.paths[row].next_token
            tokens, parents, target = step.trees[row].tokens, step.trees[row].parents, step.target_probs(row)
            if step.draft.trees is not None:
                origins = step.trees[row].probs
                kind = "chosen tree" if origins is None else "drawn tree"
        else:  # phase 2
            tokens = step.draft.tokens[row, : step.stats[row].k].tolist()
            parents, target = list(range(-1, len(tokens) - 1)), step.target_probs[row]
            path, following = list(range(int(step.verdict.accepted[row]))), int(step.verdict.next_tokens[row])
        length = len(sequence.prompt) + start
        yield Part(sequence, *numbered(sequence), length, tokens, parents, kind, origins, target, path, following)


def decisions(part: Part, policy: str, noise: Purpose) -> Iterator[Decision]:
    """Yield all decisions of a step. policy: `rejection`, `own choice` or `lossy`; noise: the purpose of drafts."""
    yield from _drafted(part, noise)
    if policy == "rejection" and part.kind != "chosen tree":
        yield from _by_rejection(part)
        return
    for depth, found in enumerate([*(part.tokens[node] for node in part.path), part.following]):
        if policy != "lossy" or depth == len(part.path):
            key = Key(part.seed, part.sample, part.length + depth, RULES["own"].purpose)
            probs = part.target[part.path[depth - 1] + 1 if depth else 0]
            yield Decision(part.owner, "own", key, found, largest(probs, key, 1)[0], True)


def _drafted(part: Part, noise: Purpose) -> Iterator[Decision]:
    """Yield the decisions on the draft. `coupled` drafts with the target's noise, so its drafts have no own number."""
    if part.origins is None:
        return
    for node in range(-1, len(part.tokens)):
        if not (children := part.children(node)):
            continue
        key = Key(part.seed, part.sample, part.length + part.depth(node), noise)
        found, origin = [part.tokens[child] for child in children], part.origins[node + 1]
        gumbel = part.kind == "drawn tree" or noise == Purpose.SAMPLE
        right = largest(origin, key, len(children)) if gumbel else [inverse(origin, key)]
        counts = noise != Purpose.SAMPLE and node in (-1, *part.path)
        yield Decision(part.owner, "children" if part.kind == "drawn tree" else "draft", key, found, right, counts)


def _by_rejection(part: Part) -> Iterator[Decision]:
    """Yield the decisions of recursive rejection (Sequoia, Algorithm 2); for chains, with one child per node."""
    for depth, node in enumerate([-1, *part.path]):
        position, children = part.length + depth, part.children(node)
        target = part.target[node + 1]
        for number, child in enumerate(children):
            token = part.tokens[child]
            if number == 0:
                draft = torch.eye(len(target))[token] if part.origins is None else part.origins[node + 1]
            key = Key(part.seed, part.sample, position, RULES["accept"].purpose, number)
            accepted = child in part.path
            ratio = min(1.0, float(target[token] / draft[token]))
            yield Decision(part.owner, "accept", key, accepted, uniform(key) < ratio, True)
            if accepted:
                break
            residual = (target - draft).clamp(min=0)
            target = residual / residual.sum() if residual.sum() > 0 else target
            draft = draft.index_fill(0, torch.tensor(token), 0.0)
            draft = draft / draft.sum() if draft.sum() > 0 else draft
    rule = "residual" if children else "own"
    key = Key(part.seed, part.sample, position, RULES[rule].purpose)
    right = inverse(target, key) if children else largest(target, key, 1)[0]
    yield Decision(part.owner, rule, key, part.following, right, True)


def uniform(key: Key) -> float:
    numbers = philox.uniforms(key.seed, *_row(key), key.purpose, key.word + 1)
    return float(numbers[0, key.word])


def inverse(probs: Tensor, key: Key) -> int:
    """Return the first token of probs [V] at which the running sum exceeds the number's share of the total."""
    sums = probs.double().cumsum(0)
    return int((sums <= uniform(key) * sums[-1]).sum())


def largest(probs: Tensor, key: Key, count: int) -> list[int]:
    """Return the tokens of largest log p + Gumbel noise, in order: samples without replacement (Kool et al. 2019)."""
    scores = probs.log() + philox.gumbel(key.seed, *_row(key), key.purpose, len(probs))[0]
    return scores.argsort(descending=True, stable=True)[:count].tolist()


def _row(key: Key) -> tuple[Tensor, Tensor]:
    return torch.tensor([key.sample]), torch.tensor([key.position])


def check(found: list[Decision]) -> Counter[str]:
    """Check every decision against the table, and that no number decided two things; count the decisions by rule."""
    assert [each for each in found if each.found != each.right] == []
    uses = Counter((each.owner, each.key) for each in found if each.counts)
    assert [key for key, count in uses.items() if count > 1] == []
    return Counter(each.rule for each in found)


@contextmanager
def asked_of_philox(patch: pytest.MonkeyPatch) -> Iterator[set[Key]]:
    """Collect the keys of all numbers requested in torch, except those of the fake model's logits."""
    asked: set[Key] = set()
    uniforms = philox.uniforms

    def noting(seed: int | Tensor, sample: Tensor, position: Tensor, purpose: int, count: int) -> Tensor:
        if purpose in tuple(Purpose):
            word = count - 1 if purpose == Purpose.ACCEPT else 0
            seeds = seed.tolist() if isinstance(seed, Tensor) else [seed] * len(position)
            rows = zip(seeds, sample.tolist(), position.tolist(), strict=True)
            asked.update(Key(*row, Purpose(purpose), word) for row in rows)
        return uniforms(seed, sample, position, purpose, count)

    with patch.context() as within:
        within.setattr(philox, "uniforms", noting)
        yield asked
