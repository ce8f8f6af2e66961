"""Rows of a batch have sampling parameters and random numbers of their own: each is computed as if it were alone."""

from __future__ import annotations

import importlib
import itertools
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from common.phases import Phase
from common.philox import Purpose

pytestmark = pytest.mark.newest

VOCABULARY = 50
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.5, "top_k": 3, "seed": -7},
    {"temperature": 1.3, "top_p": 0.6, "seed": 2**64 - 1},
    {"temperature": 1.0, "min_p": 0.1, "seed": 2**63},
    {"temperature": 0.7, "top_k": 60},
    {"repetition_penalty": 1.5},
    {"temperature": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.4, "seed": 8},
    {"temperature": 1.0, "top_k": 9, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 0.8, "seed": 9},
    {"temperature": 1e-38, "top_k": 2, "seed": 3},  # so cold that it is greedy
]
ROWS = range(len(SETTINGS))
BATCHES = [list(ROWS), list(ROWS)[::-1], [4, 0, 0, 4], *map(list, itertools.combinations((8, 6, 4, 3, 2, 0), 2))]


def tied_logits(seed: int, dtype: torch.dtype) -> Tensor:
    """Return logits with several equal ones in every row, also among the likeliest."""
    drawn = torch.randn(len(SETTINGS), VOCABULARY, generator=torch.Generator().manual_seed(seed))
    return (drawn * 2).round().clamp(max=3).to(dtype) / 2


class Batch:
    """Rows of logits, each with parameters, a prompt and an output, as sequences have them."""

    def __init__(self, engine: ModuleType, logits: Tensor, rows: list[int]) -> None:
        self.logits = logits[rows]
        self.sequences = []
        for row in rows:
            params = engine.SamplingParams(**SETTINGS[row], max_new_tokens=99)
            sequence = engine.Sequence([row, 7, 7 + row], params, engine.Ending(), sample=row % 3)
            for token in [5, 5, *range(row)]:
                sequence.append(token)
            self.sequences.append(sequence)

    @property
    def params(self) -> list[Any]:
        return [sequence.params for sequence in self.sequences]

    @property
    def texts(self) -> tuple[list[list[int]], list[list[int]]]:
        return [sequence.prompt for sequence in self.sequences], [sequence.tokens for sequence in self.sequences]

    @property
    def keys(self) -> list[tuple[int, int]]:
        return [sequence.key for sequence in self.sequences]

    @property
    def positions(self) -> list[int]:
        return [sequence.length for sequence in self.sequences]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_row_has_its_own_distribution_in_every_batch(engine: ModuleType, dtype: torch.dtype) -> None:
    logits = tied_logits(1, dtype)
    alone = []
    for row in ROWS:
        batch = Batch(engine, logits, [row])
        alone.append(engine.probabilities(batch.logits, batch.params, *batch.texts)[0])
    assert len({tuple(probs.tolist()) for probs in alone}) == len(alone)
    for rows in BATCHES:
        batch = Batch(engine, logits, rows)
        together = engine.probabilities(batch.logits, batch.params, *batch.texts)
        assert torch.equal(together, torch.stack([alone[row] for row in rows])), rows


def test_a_row_gets_its_own_token_in_every_batch(engine: ModuleType) -> None:
    """Also from the source that decides about drafts."""
    samplers = [engine.KeyedSampler(), *([engine.KeyedSource()] if hasattr(engine, "KeyedSource") else [])]
    for sampler, seed in zip(samplers, (3, 4), strict=False):
        logits = tied_logits(seed, torch.float32)

        def chosen(rows: list[int], sampler: Any = sampler, logits: Tensor = logits) -> list[int]:
            batch = Batch(engine, logits, rows)
            found: list[int] = engine.choose(
                batch.logits, batch.params, sampler, batch.keys, batch.positions, *batch.texts
            )
            return found

        alone = [chosen([row])[0] for row in ROWS]
        for rows in BATCHES[:9]:
            assert chosen(rows) == [alone[row] for row in rows]


def test_greedy_rows_beside_sampled_ones_have_the_likeliest_token(engine: ModuleType) -> None:
    """Of equally likely ones the first; with a penalty, the likeliest after it."""
    logits = tied_logits(2, torch.float32)
    batch = Batch(engine, logits, list(ROWS))
    tokens = engine.choose(batch.logits, batch.params, engine.KeyedSampler(), batch.keys, batch.positions, *batch.texts)
    penalised = engine.sampling.penalise(batch.logits, batch.params, *batch.texts)
    greedy = [row for row in ROWS if batch.params[row].greedy]
    assert len(greedy) == 3
    assert [tokens[row] for row in greedy] == penalised.argmax(-1)[greedy].tolist()
    untouched = [row for row in ROWS if not batch.params[row].penalised]
    assert torch.equal(penalised[untouched], logits[untouched])
    assert not torch.equal(penalised, logits)


def test_a_key_is_the_seed_and_the_sample(engine: ModuleType) -> None:
    """Seeds are words of 64 bits, and int64 holds them; equal bits are the same seed."""

    def key(seed: int, sample: int) -> tuple[int, int]:
        found: tuple[int, int] = engine.Sequence([1], engine.SamplingParams(seed=seed), engine.Ending(), sample).key
        return found

    assert key(5, 2) == (5, 2)
    assert key(-5, 0) == key(2**64 - 5, 0) == (-5, 0)
    assert key(2**63, 1) == (-(2**63), 1)
    assert key(2**63 - 1, 1) == (2**63 - 1, 1)


@pytest.fixture
def source(phase: Phase) -> Any:
    if phase.number == 1:
        pytest.skip("nothing but plain sampling")
    return importlib.import_module(phase.package).KeyedSource()


KEYS = torch.tensor([[3, 0], [3, 1], [-4, 0], [2**62, 0], [-(2**63), 5], [3, 0]])
POSITIONS = torch.tensor([9, 9, 9, 0, 70, 10])


@pytest.mark.parametrize("size", [4, 300])
def test_every_decision_of_a_row_is_by_its_own_key(source: Any, size: int) -> None:
    probs = torch.rand(len(KEYS), size, generator=torch.Generator().manual_seed(size)).softmax(-1)
    for purpose in Purpose:
        together = source.draw(probs, KEYS, POSITIONS, purpose)
        alone = [
            source.draw(probs[r : r + 1], KEYS[r : r + 1], POSITIONS[r : r + 1], purpose) for r in range(len(KEYS))
        ]
        assert together.tolist() == torch.cat(alone).tolist()
        if hasattr(source, "draw_several"):
            pairs = source.draw_several(probs, 2, KEYS, POSITIONS, purpose)
            for r in range(len(KEYS)):
                one = slice(r, r + 1)
                assert (
                    pairs[one].tolist()
                    == source.draw_several(probs[one], 2, KEYS[one], POSITIONS[one], purpose).tolist()
                )
    chances = torch.full((len(KEYS), size), 0.5)
    positions = POSITIONS[:, None] + torch.arange(size)
    decided = source.decide(chances, KEYS, positions)
    for r in range(len(KEYS)):
        one = slice(r, r + 1)
        assert torch.equal(source.decide(chances[one], KEYS[one], positions[one]), decided[one])
    assert size < 300 or len({tuple(row) for row in decided.tolist()}) == len(KEYS)
