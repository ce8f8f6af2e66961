"""The distribution that is sampled is transformers', and the samples follow it."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from common import philox
from common.errors import UserError

VOCABULARY = 50


def reference_probabilities(
    logits: torch.Tensor, history: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float,
    repetition: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    steps: Any = LogitsProcessorList()
    if repetition != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(repetition))
    steps.append(TemperatureLogitsWarper(temperature))
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        steps.append(TopPLogitsWarper(top_p))
    if min_p:
        steps.append(MinPLogitsWarper(min_p))
    result: torch.Tensor = steps(history, logits.clone()).softmax(-1)
    return result


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


GRID = list(itertools.product((0.3, 1.0, 1.7), (0, 1, 5, 60), (0.1, 0.5, 0.95, 1.0), (0.0, 0.05, 0.5)))


def test_probabilities_equal_transformers(engine: ModuleType) -> None:
    logits = random_logits(8)
    for temperature, top_k, top_p, min_p in GRID:
        params = engine.SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        expected = reference_probabilities(
            logits, torch.zeros(8, 0, dtype=torch.long), temperature, top_k, top_p, min_p
        )
        got = engine.probabilities(logits, params)
        assert torch.equal(got > 0, expected > 0), (temperature, top_k, top_p, min_p)
        torch.testing.assert_close(got, expected)


def test_repetition_penalty_equals_transformers(engine: ModuleType) -> None:
    logits, prompt, output = random_logits(2), [3, 7, 7], [9, 3]
    params = engine.SamplingParams(temperature=0.8, top_k=20, repetition_penalty=1.4)
    history = torch.tensor([prompt + output] * 2)
    expected = reference_probabilities(logits, history, 0.8, 20, 1.0, 0.0, repetition=1.4)
    torch.testing.assert_close(engine.probabilities(logits, params, [prompt] * 2, [output] * 2), expected)


def test_presence_and_frequency_count_the_output_alone(engine: ModuleType) -> None:
    logits, prompt, output = random_logits(1), [1, 1, 2], [2, 3, 3, 3]
    params = engine.SamplingParams(temperature=1.0, presence_penalty=0.5, frequency_penalty=0.25)
    expected = logits.clone()
    expected[0, 2] -= 0.5 + 0.25
    expected[0, 3] -= 0.5 + 3 * 0.25
    got = engine.probabilities(logits, params, [prompt], [output])
    torch.testing.assert_close(got, expected.softmax(-1))


def test_penalties_come_in_the_stated_order(engine: ModuleType) -> None:
    """Repetition first (it multiplies), then presence and frequency, then temperature."""
    logits = random_logits(1)
    params = engine.SamplingParams(temperature=0.5, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=2.0)
    expected = logits.clone()
    value = expected[0, 4]
    expected[0, 4] = (value / 2 if value > 0 else value * 2) - 1.0 - 0.5
    got = engine.probabilities(logits, params, [[]], [[4]])
    torch.testing.assert_close(got, (expected / 0.5).softmax(-1))


def test_penalties_do_not_change_the_logits_they_are_given(engine: ModuleType) -> None:
    logits = random_logits(1)
    before = logits.clone()
    engine.probabilities(logits, engine.SamplingParams(temperature=1.0, presence_penalty=1.0), [[1]], [[2]])
    assert torch.equal(logits, before)


def test_greedy_is_one_hot(engine: ModuleType) -> None:
    logits = random_logits(3)
    probs = engine.probabilities(logits, engine.SamplingParams())
    assert torch.equal(probs.argmax(-1), logits.argmax(-1))
    assert torch.equal(probs.sum(-1), torch.ones(3))
    assert torch.equal(probs.amax(-1), torch.ones(3))


@pytest.mark.parametrize("knobs", [{}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.1, "temperature": 1.5}])
def test_sampled_frequencies_follow_the_probabilities(engine: ModuleType, knobs: dict[str, Any]) -> None:
    draws = 20_000
    params = engine.SamplingParams(**{"temperature": 1.0, **knobs})
    probs = engine.probabilities(random_logits(1) / 3, params)
    randomness = engine.KeyedRandomness(seed=11)
    positions = torch.arange(draws)
    tokens = randomness.draw(probs.expand(draws, -1), torch.zeros_like(positions), positions, philox.Purpose.SAMPLE)
    counts = np.bincount(tokens.numpy(), minlength=VOCABULARY)
    expected = probs[0].double().numpy() * draws
    assert counts[expected == 0].sum() == 0
    frequent = expected >= 5
    counts = np.append(counts[frequent], counts[~frequent].sum())
    expected = np.append(expected[frequent], expected[~frequent].sum())
    kept = expected > 0
    assert chisquare(counts[kept], expected[kept] * counts.sum() / expected[kept].sum()).pvalue > 1e-3


def test_a_row_is_drawn_alike_alone_and_in_a_batch(engine: ModuleType) -> None:
    probs = engine.probabilities(random_logits(6), engine.SamplingParams(temperature=1.0))
    samples, positions = torch.tensor([0, 0, 1, 1, 2, 5]), torch.tensor([3, 4, 3, 9, 0, 7])
    randomness = engine.KeyedRandomness(seed=2)
    together = randomness.draw(probs, samples, positions, philox.Purpose.SAMPLE)
    for row in range(6):
        one = slice(row, row + 1)
        alone = randomness.draw(probs[one], samples[one], positions[one], philox.Purpose.SAMPLE)
        assert alone.item() == together[row].item()


@given(
    temperature=st.floats(0.01, 5),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.001, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_any_valid_setting_gives_a_distribution(
    temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    import phase1

    logits = random_logits(2, seed)
    probs = phase1.probabilities(
        logits, phase1.SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    )
    torch.testing.assert_close(probs.sum(-1), torch.ones(2))
    assert (probs.gather(-1, logits.argmax(-1, keepdim=True)) > 0).all()  # the most likely token is always kept


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"presence_penalty": 2.5},
        {"frequency_penalty": -3.0},
        {"repetition_penalty": 0.0},
        {"max_new_tokens": 0},
        {"stop": ("",)},
    ],
)
def test_values_out_of_range_are_named(engine: ModuleType, wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        engine.SamplingParams(**wrong)
