"""The distribution that is sampled is transformers', and the samples follow it."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
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
from common.checkpoint import MODELS
from common.errors import UserError

pytestmark = pytest.mark.modules("sampling.py")
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
        got = engine.probabilities(logits, [params] * 8)
        assert torch.equal(got > 0, expected > 0), (temperature, top_k, top_p, min_p)
        torch.testing.assert_close(got, expected)


def test_repetition_penalty_equals_transformers(engine: ModuleType) -> None:
    logits, prompt, output = random_logits(2), [3, 7, 7], [9, 3]
    params = engine.SamplingParams(temperature=0.8, top_k=20, repetition_penalty=1.4)
    history = torch.tensor([prompt + output] * 2)
    expected = reference_probabilities(logits, history, 0.8, 20, 1.0, 0.0, repetition=1.4)
    torch.testing.assert_close(engine.probabilities(logits, [params] * 2, [prompt] * 2, [output] * 2), expected)


def test_presence_and_frequency_count_the_output_alone(engine: ModuleType) -> None:
    logits, prompt, output = random_logits(1), [1, 1, 2], [2, 3, 3, 3]
    params = engine.SamplingParams(temperature=1.0, presence_penalty=0.5, frequency_penalty=0.25)
    expected = logits.clone()
    expected[0, 2] -= 0.5 + 0.25
    expected[0, 3] -= 0.5 + 3 * 0.25
    got = engine.probabilities(logits, [params], [prompt], [output])
    torch.testing.assert_close(got.log(), expected.log_softmax(-1))  # logarithms: unlikely tokens count as much


def test_penalties_come_in_the_stated_order(engine: ModuleType) -> None:
    """Repetition first (it multiplies), then presence and frequency, then temperature."""
    logits = random_logits(1)
    params = engine.SamplingParams(temperature=0.5, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=2.0)
    expected = logits.clone()
    value = expected[0, 4]
    expected[0, 4] = (value / 2 if value > 0 else value * 2) - 1.0 - 0.5
    got = engine.probabilities(logits, [params], [[]], [[4]])
    torch.testing.assert_close(got.log(), (expected / 0.5).log_softmax(-1))


def test_penalties_do_not_change_the_logits_they_are_given(engine: ModuleType) -> None:
    logits = random_logits(1)
    before = logits.clone()
    engine.probabilities(logits, [engine.SamplingParams(temperature=1.0, presence_penalty=1.0)], [[1]], [[2]])
    assert torch.equal(logits, before)


def test_greedy_is_one_hot(engine: ModuleType) -> None:
    logits = random_logits(3)
    probs = engine.probabilities(logits, [engine.SamplingParams()] * 3)
    assert torch.equal(probs.argmax(-1), logits.argmax(-1))
    assert torch.equal(probs.sum(-1), torch.ones(3))
    assert torch.equal(probs.amax(-1), torch.ones(3))


@pytest.mark.parametrize("knobs", [{}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.1, "temperature": 1.5}])
def test_sampled_frequencies_follow_the_probabilities(engine: ModuleType, knobs: dict[str, Any]) -> None:
    draws = 20_000
    params = engine.SamplingParams(**{"temperature": 1.0, **knobs})
    probs = engine.probabilities(random_logits(1) / 3, [params])
    sampler = engine.KeyedSampler()
    keys, positions = torch.tensor([[11, 0]]).expand(draws, 2), torch.arange(draws)
    tokens = sampler.draw(probs.expand(draws, -1), keys, positions, philox.Purpose.SAMPLE)
    counts = np.bincount(tokens.numpy(), minlength=VOCABULARY)
    expected = probs[0].double().numpy() * draws
    assert counts[expected == 0].sum() == 0
    frequent = expected >= 5
    counts = np.append(counts[frequent], counts[~frequent].sum())
    expected = np.append(expected[frequent], expected[~frequent].sum())
    kept = expected > 0
    assert chisquare(counts[kept], expected[kept] * counts.sum() / expected[kept].sum()).pvalue > 1e-3


def test_a_row_is_drawn_alike_alone_and_in_a_batch(engine: ModuleType) -> None:
    """Of every row by the noise of its own seed, sample and position."""
    probs = engine.probabilities(random_logits(6), [engine.SamplingParams(temperature=1.0)] * 6)
    seeds, samples = torch.tensor([2, 2, 2, -7, 2, 2**62]), torch.tensor([0, 0, 1, 1, 2, 5])
    keys, positions = torch.stack((seeds, samples), 1), torch.tensor([3, 4, 3, 9, 0, 7])
    sampler = engine.KeyedSampler()
    together = sampler.draw(probs, keys, positions, philox.Purpose.SAMPLE)
    noise = [
        philox.gumbel(int(seeds[r]), samples[r : r + 1], positions[r : r + 1], philox.Purpose.SAMPLE, VOCABULARY)[0]
        for r in range(6)
    ]
    assert together.tolist() == (probs.log() + torch.stack(noise)).argmax(-1).tolist()
    for row in range(6):
        one = slice(row, row + 1)
        alone = sampler.draw(probs[one], keys[one], positions[one], philox.Purpose.SAMPLE)
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
    params = phase1.SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    probs = phase1.probabilities(logits, [params] * 2)
    torch.testing.assert_close(probs.sum(-1), torch.ones(2))
    assert (probs.gather(-1, logits.argmax(-1, keepdim=True)) > 0).all()  # the most likely token is always kept


def kept_by_hand(logits: list[float], top_k: int, top_p: float, min_p: float) -> tuple[set[int], bool]:
    """Return the ids that the filters keep, by sorting, and whether rounding could decide otherwise at top-p's edge."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    order = order[:top_k] if top_k else order
    weights = [math.exp(logits[token] - logits[order[0]]) for token in order]
    dropped, near = 0.0, False
    while len(order) > 1 and top_p < 1:
        dropped += weights[len(order) - 1] / sum(weights)
        near = near or abs(dropped - (1 - top_p)) < 1e-5
        if dropped > 1 - top_p:
            break
        order.pop()
    shares = weights[: len(order)]
    return {token for token, share in zip(order, shares, strict=True) if share >= min_p * shares[0]}, near


@given(
    whole=st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([1.0, 0.97, 0.83, 0.51, 0.29, 1e-9]),
    min_p=st.sampled_from([0.0, 0.03, 0.2]),
)
def test_of_equal_logits_the_lower_ids_stay(whole: list[int], top_k: int, top_p: float, min_p: float) -> None:
    import phase1 as engine

    params = engine.SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    expected, near = kept_by_hand([float(number) for number in whole], top_k, top_p, min_p)
    assume(not near)
    probs = engine.probabilities(torch.tensor([whole]).float(), [params])[0]
    assert set(probs.nonzero()[:, 0].tolist()) == expected


def test_of_equal_logits_the_lowest_id_is_chosen(engine: ModuleType) -> None:
    equal = torch.zeros(1, 17)
    for params in ({}, {"top_p": 1e-9}, {"top_k": 1}):
        mine = engine.SamplingParams(temperature=1.0 if params else 0.0, **params)
        assert engine.probabilities(equal, [mine])[0, 0] == 1
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0]])
    assert engine.sampling.ranked(scores, 4).tolist() == [[1, 3, 2, 4]]
    assert engine.sampling.most_likely(scores, [3]).tolist() == [[False, True, True, True, False, False]]


@pytest.mark.parametrize(("options", "kept"), [({"top_p": 0.5}, 2), ({"top_p": 0.75}, 3), ({"min_p": 1.0}, 4)])
def test_tokens_exactly_at_the_edge_of_a_filter(engine: ModuleType, options: dict[str, Any], kept: int) -> None:
    """Four tokens of probability 1/4: half of the mass is two of them. min_p = 1 keeps all of the likeliest."""
    probs = engine.probabilities(torch.zeros(1, 4), [engine.SamplingParams(temperature=1.0, **options)])
    assert probs[0].tolist() == pytest.approx([1 / kept] * kept + [0] * (4 - kept))


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-30])
def test_the_coldest_temperatures_are_greedy(engine: ModuleType, temperature: float) -> None:
    logits = random_logits(3) * 1e4
    probs = engine.probabilities(logits, [engine.SamplingParams(temperature=temperature)] * 3)
    assert torch.equal(probs, engine.probabilities(logits, [engine.SamplingParams()] * 3))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(engine: ModuleType, temperature: float, broken: float) -> None:
    params = [engine.SamplingParams(temperature=temperature)] * 2
    logits = random_logits(2)
    logits[1] = broken
    keyed = engine.KeyedSampler()
    for dtype, cause in ((torch.float32, "not finite"), (torch.float16, "float16, which ends at 65504")):
        with pytest.raises(UserError, match=cause):
            engine.probabilities(logits.to(dtype), params)
        with pytest.raises(UserError, match=cause):
            engine.choose(logits.to(dtype), params, keyed, [(0, 0)] * 2, [0, 0], [[1], [1]], [[], []])
    logits[1] = random_logits(1)[0]
    logits[:, 0] = -float("inf")  # an impossible token
    assert engine.probabilities(logits, params)[:, 0].tolist() == [0, 0]


@pytest.mark.modules("llm.py", "sampling.py")
@pytest.mark.parametrize("how", ["greedy", "sampled", "beams"])
def test_an_overflow_in_float16_ends_the_run(engine: ModuleType, how: str, tmp_path: Path) -> None:
    """Once it ended the text as an EOS, or continued with meaningless tokens."""
    folder = tmp_path / "stdlib-1m"
    shutil.copytree(MODELS / "stdlib-1m", folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layers.1" in name and "down" in name)
    save_file(
        {**weights, name: torch.full_like(weights[name], 60000.0)}, folder / "model.safetensors", {"format": "pt"}
    )
    options: dict[str, Any] = {"model": str(folder), "dtype": "float16", "device": "cpu", "max_tokens": 8}
    ways: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"temperature": 1.0}, "beams": {"beams": 2}}
    options |= ways[how]
    if "kernels" in engine.Options.model_fields:  # the C++ kernels use float32 activations, which do not overflow
        options["kernels"] = "torch"
    drafts = [{}] if "draft" not in engine.Options.model_fields else [{"draft": "none"}, {"draft": "stdlib-1m"}]
    for draft in drafts if how != "beams" else [{}]:
        with pytest.raises(UserError, match="not finite"):
            engine.LLM(engine.Options(**options, **draft)).generate(["import os"])


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
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 1e40},
        {"max_new_tokens": 0},
        {"stop": ("",)},
    ],
)
def test_values_out_of_range_are_named(engine: ModuleType, wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        engine.SamplingParams(**wrong)
