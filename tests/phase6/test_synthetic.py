"""Synthetic acceptance: every draft token is accepted by its own random number alone, in torch and in C++ alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import phase6
from common import philox
from common.errors import UserError
from common.options import parse_options
from common.philox import Purpose
from tests.support.served import WHY_NOT_CPP

SEED, K = 5, 3
PROMPT = "class Stack:"


def make(folder: Path, kernels: Any, acceptance: float | None, **more: Any) -> Any:
    if kernels == "cpp" and WHY_NOT_CPP is not None:
        pytest.skip(f"no C++ backend here: {WHY_NOT_CPP}")
    options = phase6.Options(
        model=str(folder), draft=str(folder), kernels=kernels, k=K, max_tokens=24, seed=SEED, dtype="float32",
        device="cpu", threads=1, synthetic_acceptance=acceptance, **more,
    )  # fmt: skip
    return phase6.LLM(options)


def steps(folder: Path, kernels: Any, acceptance: float | None, **more: Any) -> tuple[list[int], list[Any]]:
    llm = make(folder, kernels, acceptance, **more)
    (sequence,) = llm.sequences([PROMPT])
    for _ in llm.run([sequence]):
        pass
    return sequence.tokens, sequence.steps


def expected(length: int, depth: int, acceptance: float) -> int:
    """Return how many draft tokens at these positions are accepted, by the numbers of Philox."""
    for at in range(depth):
        keys, samples, positions = (torch.tensor([value]) for value in (SEED, 0, length + at))
        if not float(philox.uniforms(keys, samples, positions, Purpose.ACCEPT, 1)[0, 0]) < acceptance:
            return at
    return depth


@pytest.mark.parametrize("kernels", ["torch", "cpp"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("acceptance", [0.0, 0.6, 1.0])
def test_chance_alone_accepts(small_folder: Path, kernels: str, temperature: float, acceptance: float) -> None:
    tokens, made = steps(small_folder, kernels, acceptance, temperature=temperature)
    drafted = [step for step in made[:-1] if step.depth]  # the last one may be cut off
    assert drafted
    assert [step.accepted for step in drafted] == [expected(step.length, step.depth, acceptance) for step in drafted]
    assert len(tokens) == 24


@pytest.mark.parametrize("kernels", ["torch", "cpp"])
def test_chance_accepts_for_requests_with_policies_of_their_own(small_folder: Path, kernels: str) -> None:
    engine = phase6.LLMEngine(make(small_folder, kernels, 0.6, temperature=1.0), rows=3)
    numbers = [engine.add_request(PROMPT, policy=policy) for policy in (None, "coupled", "rejection")]
    sequences = [engine.requests[number][0] for number in numbers]
    while engine.busy:
        engine.step()
    for sequence in sequences:
        drafted = [step for step in sequence.steps[:-1] if step.depth]
        assert [step.accepted for step in drafted] == [expected(step.length, step.depth, 0.6) for step in drafted]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cpp_and_torch_accept_and_write_the_same(small_folder: Path, temperature: float) -> None:
    of_torch, of_cpp = (steps(small_folder, kernels, 0.5, temperature=temperature) for kernels in ("torch", "cpp"))
    assert [step.accepted for step in of_torch[1]] == [step.accepted for step in of_cpp[1]]
    if temperature == 0:
        assert of_torch[0] == of_cpp[0]


def test_a_tree_goes_down_by_chance(small_folder: Path) -> None:
    _, made = steps(small_folder, "torch", 1.0, tree="static", tree_nodes=6)
    assert all(step.accepted == step.depth for step in made[:-1])
    _, made = steps(small_folder, "torch", 0.0, tree="static", tree_nodes=6)
    assert all(step.accepted == 0 for step in made)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--synthetic-acceptance", "1.5"], "less than or equal to 1"),
        (["--synthetic-acceptance", "0.5", "--lossless"], "--lossless refuses --synthetic-acceptance"),
    ],
)
def test_what_it_does_not_go_with(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_options(phase6.Options, words, "generate.py")
    assert message in str(error.value)
