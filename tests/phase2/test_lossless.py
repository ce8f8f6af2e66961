"""Speculative decoding is lossless: its output follows the target's distribution exactly.

Every random number is replaced by a branch, and every branch is taken (conftest.Walker), so the laws are exact.
"""

from __future__ import annotations

import itertools
import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import phase2

NO_END = phase2.Ending()
EXACT, FLOAT32 = 1e-12, 1e-5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("one_hot", [False, True])
def test_one_step_law(proof: SimpleNamespace, seed: int, one_hot: bool) -> None:
    """Vocabulary 5, K = 3: whatever three tokens are drafted, the first output token follows the target.

    Given the first, so does the second: the law of verify() alone, with distributions that depend on the position only.
    """
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(1, 4, 5, generator=generator, dtype=torch.float64).softmax(-1)
    draft = torch.randn(1, 3, 5, generator=generator, dtype=torch.float64).softmax(-1)
    if one_hot:
        draft = torch.zeros_like(draft).scatter(-1, draft.argmax(-1, keepdim=True), 1.0)
    key, start = torch.zeros(1, 2, dtype=torch.long), torch.tensor([7])

    def run(walker: Any) -> tuple[int, ...]:
        tokens = torch.stack([walker.draw(draft[:, j], key, start + j, 1) for j in range(3)], dim=1)
        verdict = phase2.verify(tokens, None if one_hot else draft, target, torch.tensor([3]), key, start, walker)
        return (*tokens[0, : int(verdict.accepted)].tolist(), int(verdict.next_tokens))

    # A block that ends early is continued by the target, so its probability spreads over all continuations.
    law: dict[tuple[int, ...], float] = {}
    for block, weight in proof.Walker().law(run).items():
        for rest in itertools.product(range(5), repeat=4 - len(block)):
            share = math.prod(float(target[0, len(block) + i, token]) for i, token in enumerate(rest))
            law[block + rest] = law.get(block + rest, 0.0) + weight * share
    expected = {
        tokens: math.prod(float(target[0, i, token]) for i, token in enumerate(tokens))
        for tokens in itertools.product(range(5), repeat=4)
    }
    assert proof.total_variation(law, expected) < EXACT


def test_no_more_tokens_stand_than_count() -> None:
    """Of rows of one width: the padding of a narrower one would stand here, for the target is certain of it."""
    tokens, target, widths = torch.arange(3).expand(4, 3), torch.eye(4).expand(4, 4, 4), torch.arange(4)
    keys = torch.stack((torch.ones_like(widths), widths), 1)
    for probs in (None, target[:, :3]):
        verdict = phase2.verify(tokens, probs, target, widths, keys, 7 + widths, phase2.KeyedSource())
        assert verdict.accepted.tolist() == verdict.next_tokens.tolist() == [0, 1, 2, 3]


def test_at_temperature_0_a_token_stands_where_it_is_the_targets_favourite() -> None:
    target = torch.eye(7)[torch.tensor([[1, 2, 3, 4], [1, 5, 3, 4]])]
    tokens, keys = torch.tensor([[1, 2, 3], [1, 2, 3]]), torch.zeros(2, 2, dtype=torch.long)
    verdict = phase2.verify(tokens, None, target, torch.tensor([3, 3]), keys, keys[:, 0], phase2.GreedySource())
    assert verdict.accepted.tolist() == [3, 1]
    assert verdict.next_tokens.tolist() == [4, 5]


SETTINGS: dict[str, dict[str, Any]] = {
    "temperature 1": {},
    "temperature 0.6": {"temperature": 0.6},
    "temperature 2": {"temperature": 2.0},
    "top-k": {"top_k": 2},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.3},
    "penalties": {"presence_penalty": 0.8, "frequency_penalty": 0.5, "repetition_penalty": 1.5},
    "all at once": {"temperature": 0.8, "top_k": 2, "min_p": 0.05, "frequency_penalty": 1.0},
}


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_the_whole_loop(proof: SimpleNamespace, name: str, k: int) -> None:
    target, draft = proof.tables(3, seed=5)
    params = phase2.SamplingParams(**{"temperature": 1.0, "max_new_tokens": 3, **SETTINGS[name]})
    expected = proof.plain_law(target, params, NO_END, [1])
    got = proof.speculative_law(target, draft, params, NO_END, [1], k)
    assert abs(sum(got.values()) - 1) < EXACT
    assert proof.total_variation(got, expected) < EXACT


def test_the_whole_loop_in_float32(proof: SimpleNamespace) -> None:
    target, draft = proof.tables(3, seed=6, dtype=torch.float32)
    params = phase2.SamplingParams(temperature=1.0, max_new_tokens=3)
    expected = proof.plain_law(target, params, NO_END, [1])
    assert proof.total_variation(proof.speculative_law(target, draft, params, NO_END, [1], 2), expected) < FLOAT32


@pytest.mark.parametrize("k", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_end_of_text_inside_a_block(proof: SimpleNamespace, k: int) -> None:
    target, draft = proof.tables(3, seed=7)
    params = phase2.SamplingParams(temperature=1.0, max_new_tokens=4)
    ending = phase2.Ending(eos_ids=(2,))
    expected = proof.plain_law(target, params, ending, [0])
    assert len({len(tokens) for tokens in expected}) == 4
    assert proof.total_variation(proof.speculative_law(target, draft, params, ending, [0], k), expected) < EXACT


def test_stop_strings_inside_a_block(proof: SimpleNamespace) -> None:
    """Tokens 1 to 3 of the embedded tokenizer are printable characters; a stop string of two of them cuts the block."""
    loaded = phase2.load("stdlib-10m", torch.float32, torch.device("cpu"))
    one, two, three = (loaded.tokenizer.token_text(token) for token in range(1, 4))
    target, draft = proof.tables(4, seed=8)
    params = phase2.SamplingParams(
        temperature=1.0, top_k=2, max_new_tokens=3, stop=(one + two, two + two, three + one, two + three)
    )
    ending = phase2.Ending(tokenizer=loaded.tokenizer)
    expected = proof.plain_law(target, params, ending, [3])
    got = proof.speculative_law(target, draft, params, ending, [3], 2)
    assert {len(tokens) for tokens in expected} == {2, 3}
    assert proof.total_variation(got, expected) < EXACT


def test_past_a_jump_of_the_window(proof: SimpleNamespace) -> None:
    """A context of 4: blocks are cut before the window jumps, and the law is still that of plain decoding."""
    target, draft = proof.tables(3, seed=9, context=4)
    params = phase2.SamplingParams(temperature=1.0, max_new_tokens=3)
    expected = proof.plain_law(target, params, NO_END, [1, 0, 2])
    assert proof.total_variation(proof.speculative_law(target, draft, params, NO_END, [1, 0, 2], 2), expected) < EXACT


def test_a_window_per_layer(proof: SimpleNamespace) -> None:
    """The target's first layer sees two tokens and its second all of them; in the draft it is the other way round."""
    target, draft = proof.layered((2, None), seed=1), proof.layered((None, 2), seed=2)
    params = phase2.SamplingParams(temperature=1.0, top_k=2, max_new_tokens=3)
    expected = proof.plain_law(target, params, NO_END, [1, 0, 2])
    got = proof.speculative_law(target, draft, params, NO_END, [1, 0, 2], 2)
    assert proof.total_variation(got, expected) < FLOAT32
    for windows in ((2, 2), (None, None), (None, 2)):
        other = proof.plain_law(proof.layered(windows, seed=1), params, NO_END, [1, 0, 2])
        assert proof.total_variation(other, expected) > 1e-3  # the layer with the window matters


def test_longer_texts_by_merging_states(proof: SimpleNamespace) -> None:
    """Five tokens, K = 3, step by step: equal sequences are one state, however they were reached."""
    target, draft = proof.tables(3, seed=10)
    params = phase2.SamplingParams(temperature=1.0, max_new_tokens=5)
    states: dict[tuple[int, ...], float] = {(): 1.0}
    finished: dict[tuple[int, ...], float] = {}
    while states:
        following: dict[tuple[int, ...], float] = {}
        for tokens, weight in states.items():

            def run(walker: Any, tokens: tuple[int, ...] = tokens) -> tuple[int, ...]:
                sequence = phase2.Sequence([1], params, NO_END)
                for token in tokens:
                    sequence.append(token)
                drafter = phase2.ModelDrafter(draft, walker)
                next(iter(phase2.speculative_decode(target, drafter, [sequence], 3, walker)))
                return tuple(sequence.tokens)

            for result, share in proof.Walker().law(run).items():
                into = finished if len(result) == 5 else following
                into[result] = into.get(result, 0.0) + weight * share
        states = following
    assert proof.total_variation(finished, proof.plain_law(target, params, NO_END, [1])) < EXACT


def module(name: str) -> ModuleType:
    return sys.modules[f"phase2.{name}"]


LOOP = "draft = drafter.propose(sequences, K)"
MUTANTS: dict[str, tuple[str, tuple[str, str]]] = {
    "residual not normalised": ("verify", ("residual / mass", "residual")),
    "residual not clipped": ("verify", (".clamp(min=0)", ".abs()")),
    "sampled from the target, not the residual": (
        "verify",
        ("torch.where(mass > 0, residual / mass, following[cut])", "following[cut]"),
    ),
    "acceptance ratio upside down": (
        "verify",
        (
            "(target_of / draft_probs.gather(-1, draft_tokens[..., None])[..., 0])",
            "(draft_probs.gather(-1, draft_tokens[..., None])[..., 0] / target_of)",
        ),
    ),
    "one uniform for the whole block": (
        "verify",
        ("positions[:, None] + columns)", "positions[:, None] + 0 * columns)"),
    ),
    "bonus from the distribution before": (
        "verify",
        ("source.draw(following[full]", "source.draw(target_probs[full, (accepted[full] - 1).clamp(min=0)]"),
    ),
    "unfiltered draft_probs": ("drafting", ("used.append(probs)", "used.append(logits.softmax(-1))")),
    "argmax draft with soft draft_probs": (
        "drafting",
        (
            "tokens = self.sampler.draw(",
            "tokens = probs.argmax(-1)\n            _ = lambda: self.sampler.draw(",
        ),
    ),
    "penalties blind to the draft": (
        "speculative",
        ("outputs = [s.tokens + new[:j]", "outputs = [s.tokens + new[:0]"),
    ),
}  # fmt: skip


@pytest.mark.no_exercise
@pytest.mark.parametrize("name", list(MUTANTS))
def test_the_proof_catches_this_mutant(proof: SimpleNamespace, name: str) -> None:
    where, change = MUTANTS[name]
    mutant = proof.mutated(module(where), change)
    parts = SimpleNamespace(ModelDrafter=phase2.ModelDrafter, speculative_decode=phase2.speculative_decode)
    if where == "drafting":
        parts.ModelDrafter = mutant.ModelDrafter
    else:
        loop = mutant if where == "speculative" else proof.mutated(module("speculative"), (LOOP, LOOP))
        if where == "verify":
            loop.verify = mutant.verify
        parts.speculative_decode = loop.speculative_decode
    target, draft = proof.tables(3, seed=11)
    params = phase2.SamplingParams(temperature=1.0, top_k=2, frequency_penalty=1.0, max_new_tokens=3)
    expected = proof.plain_law(target, params, NO_END, [1])
    sound = proof.speculative_law(target, draft, params, NO_END, [1], 2)
    broken = proof.speculative_law(target, draft, params, NO_END, [1], 2, parts)
    assert proof.total_variation(sound, expected) < EXACT
    assert proof.total_variation(broken, expected) > 1e-3
