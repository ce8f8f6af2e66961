"""The rule and the drafter step by step, on numbers small enough to follow by hand. `lab check 2` begins here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import phase2
from common import philox
from common.philox import Purpose
from phase2.verify import random_source

START = 7  # position of the first draft token
TARGET = [[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.3, 0.2]]
DRAFT = [[0.4, 0.1, 0.1, 0.4], [0.1, 0.2, 0.6, 0.1]]
LOW, HIGH = 0.01, 0.99  # uniforms: a token is accepted if the uniform is below its ratio
SEED = 3


def rounded(values: Tensor) -> Any:
    return [rounded(v) for v in values] if values.ndim else round(float(values), 4)


def keys_of(samples: Tensor) -> Tensor:
    """Return the keys (seed, sample) of rows, int64 [R, 2]."""
    return torch.stack((torch.full_like(samples, SEED), samples), 1)


def samples_of(keys: Tensor) -> list[int]:
    assert keys[:, 0].tolist() == [SEED] * len(keys), f"keys {keys.tolist()}, (seed, sample) each; the seed is {SEED}"
    return keys[:, 1].tolist()


class Scripted:
    """Decides by given uniforms, [sample][draft token]; samples the likeliest token; records every sample."""

    def __init__(self, uniforms: list[list[float]]) -> None:
        self.uniforms = uniforms
        self.draws: list[tuple[int, int, str, list[float]]] = []  # sample, position, purpose, distribution

    def decide(self, probability: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
        decided = torch.zeros(probability.shape, dtype=torch.bool)
        for row, sample in enumerate(samples_of(keys)):
            for column, position in enumerate(positions[row].tolist()):
                own = self.uniforms[sample]
                assert START <= position < START + len(own), f"decided at {position}; the draft begins at {START}"
                decided[row, column] = own[position - START] < float(probability[row, column])
        return decided

    def draw(self, probs: Tensor, keys: Tensor, positions: Tensor, purpose: Purpose) -> Tensor:
        rows = zip(samples_of(keys), positions.tolist(), rounded(probs), strict=True)
        self.draws += [(sample, position, purpose.name, row) for sample, position, row in rows]
        return probs.argmax(-1)


def judge(
    tokens: list[list[int]],
    uniforms: list[list[float]],
    widths: list[int],
    one_hot: bool = False,
    draft: list[list[float]] = DRAFT,
    target: list[list[float]] = TARGET,
) -> tuple[phase2.Verdict, Scripted, str]:
    """Return the verdict on rows with the same distributions, the recorded samples, and the inputs in words."""
    source, rows, k = Scripted(uniforms), len(tokens), len(tokens[0])
    verdict = phase2.verify(
        torch.tensor(tokens, dtype=torch.long).view(rows, k),
        None if one_hot else torch.tensor([draft[:k]] * rows, dtype=torch.float64),
        torch.tensor([target[: k + 1]] * rows, dtype=torch.float64),
        torch.tensor(widths),
        keys_of(torch.arange(rows)),
        torch.full((rows,), START),
        source,
    )
    inputs = {"draft_tokens": tokens, "widths": widths, "draft_probs": None if one_hot else draft[:k]}
    inputs |= {"target_probs": target[: k + 1], "uniforms": uniforms, "positions": [START] * rows}
    return verdict, source, "\n".join(f"{name} {value}" for name, value in inputs.items())


rule = pytest.mark.about("engine/verify.py, verify")


@rule
@pytest.mark.parametrize(
    ("tokens", "one_hot", "ratios"),
    [
        ([0, 2], False, [0.25, 0.3333]),
        ([1, 0], False, [1.0, 1.0]),
        ([3, 1], False, [1.0, 1.0]),
        ([0, 2], True, [0.1, 0.2]),
    ],
)
def test_how_likely_each_token_is_to_stand(tokens: list[int], one_hot: bool, ratios: list[float]) -> None:
    verdict, _, inputs = judge([tokens], [[LOW, LOW]], [2], one_hot)
    assert rounded(verdict.ratios) == [ratios], inputs


@rule
@pytest.mark.parametrize(
    ("uniforms", "accepted"), [([LOW, LOW], 2), ([LOW, HIGH], 1), ([HIGH, LOW], 0), ([HIGH, HIGH], 0), ([0.2, 0.35], 1)]
)
def test_tokens_stand_up_to_the_first_that_falls(uniforms: list[float], accepted: int) -> None:
    verdict, _, inputs = judge([[0, 2]], [uniforms], [2])
    assert verdict.accepted.tolist() == [accepted], inputs


@rule
@pytest.mark.parametrize(
    ("uniforms", "position", "residual", "token"),
    [([HIGH, LOW], 7, [0.0, 0.3333, 0.6667, 0.0], 2), ([LOW, HIGH], 8, [0.75, 0.25, 0.0, 0.0], 0)],
)
def test_the_residual_replaces_what_falls(
    uniforms: list[float], position: int, residual: list[float], token: int
) -> None:
    verdict, source, inputs = judge([[0, 2]], [uniforms], [2])
    assert source.draws == [(0, position, "RESIDUAL", residual)], inputs
    assert verdict.next_tokens.tolist() == [token], inputs


@rule
def test_the_residual_of_a_certain_draft() -> None:
    """One-hot: the target's distribution without the rejected token."""
    _, source, inputs = judge([[0, 2]], [[HIGH, LOW]], [2], one_hot=True)
    assert source.draws == [(0, 7, "RESIDUAL", [0.0, 0.2222, 0.3333, 0.4444])], inputs


@rule
def test_a_bonus_token_follows_a_draft_that_stands_whole() -> None:
    verdict, source, inputs = judge([[0, 2]], [[LOW, LOW]], [2])
    assert source.draws == [(0, 9, "SAMPLE", TARGET[2])], inputs
    assert verdict.next_tokens.tolist() == [2], inputs


@rule
@pytest.mark.parametrize("width", [0, 1])
def test_tokens_past_a_rows_width_do_not_count(width: int) -> None:
    """They are neither accepted nor rejected: after the last that counts, the target's own token follows."""
    verdict, source, inputs = judge([[0, 2]], [[LOW, LOW]], [width])
    assert verdict.accepted.tolist() == [width], inputs
    assert source.draws == [(0, START + width, "SAMPLE", TARGET[width])], inputs


@rule
def test_rows_are_judged_each_on_its_own() -> None:
    uniforms = [[LOW, LOW], [HIGH, LOW], [LOW, HIGH], [LOW, LOW]]
    verdict, source, inputs = judge([[0, 2], [0, 2], [0, 2], [1, 0]], uniforms, [2, 2, 2, 1])
    assert verdict.accepted.tolist() == [2, 0, 1, 1], inputs
    assert verdict.next_tokens.tolist() == [2, 2, 0, 0], inputs
    assert sorted(draw[:3] for draw in source.draws) == [
        (0, 9, "SAMPLE"), (1, 7, "RESIDUAL"), (2, 8, "RESIDUAL"), (3, 8, "SAMPLE"),
    ], inputs  # fmt: skip


@rule
def test_an_empty_residual_is_no_division_by_zero() -> None:
    """Rounding can reject a token of two equal distributions; then the target's own distribution is used."""
    _, source, inputs = judge([[1, 0]], [[1.0, LOW]], [2], draft=TARGET)
    assert source.draws == [(0, 7, "RESIDUAL", TARGET[0])], inputs


@rule
def test_no_draft_is_a_plain_step() -> None:
    verdict, source, inputs = judge([[]], [[]], [0], one_hot=True)
    assert verdict.accepted.tolist() == [0], inputs
    assert source.draws == [(0, START, "SAMPLE", TARGET[0])], inputs


MANY = 60
PROBS = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])


@pytest.mark.about("engine/verify.py, KeyedSource.draw")
@pytest.mark.parametrize("purpose", [Purpose.DRAFT, Purpose.RESIDUAL, Purpose.SAMPLE])
def test_keyed_draws(purpose: Purpose) -> None:
    """SAMPLE samples as in plain decoding; else the first token whose cumulative probability exceeds the uniform."""
    seeds, samples, positions = SEED + torch.arange(MANY) % 2, torch.arange(MANY) % 3, torch.arange(MANY)
    keys, probs = torch.stack((seeds, samples), 1), PROBS.expand(MANY, -1)
    got = phase2.KeyedSource().draw(probs, keys, positions, purpose)
    if purpose == Purpose.SAMPLE:
        expected = phase2.KeyedSampler().draw(probs, keys, positions, purpose).tolist()
    else:
        uniforms = philox.uniforms(seeds, samples, positions, purpose, 1)[:, 0].tolist()
        expected = [1 if u < 0.5 else 3 if u < 0.7 else 4 for u in uniforms]
    assert got.tolist() == expected, (
        f"probs {rounded(PROBS)} for each of {MANY} positions, seeds {SEED} and {SEED + 1}, {purpose.name}"
    )


@pytest.mark.about("engine/verify.py, KeyedSource.decide")
def test_keyed_decisions() -> None:
    """Accept if the ACCEPT uniform of key and position is below the probability; the same alone and in a batch."""
    keys, positions = torch.tensor([[SEED, 0], [SEED + 1, 5]]), torch.tensor([[7, 8, 9], [3, 4, 5]])
    seeds, samples = keys.repeat_interleave(3, 0).unbind(1)
    chance = torch.tensor([[0.5, 0.2, 1.0], [0.9, 0.0, 0.5]])
    uniforms = philox.uniforms(seeds, samples, positions.flatten(), Purpose.ACCEPT, 1).view(2, 3)
    source, inputs = phase2.KeyedSource(), f"probability {rounded(chance)}, uniforms {rounded(uniforms)}"
    assert source.decide(chance, keys, positions).tolist() == (uniforms < chance).tolist(), inputs
    alone = source.decide(chance[1:], keys[1:], positions[1:])
    assert alone.tolist() == (uniforms < chance)[1:].tolist(), f"the second row alone: {inputs}"


@pytest.mark.about("engine/verify.py, GreedySource.draw")
def test_certain_draws() -> None:
    one_hot, zeros = torch.eye(4)[[2, 0, 3]], torch.zeros(3, dtype=torch.long)
    got = phase2.GreedySource().draw(one_hot, keys_of(zeros), zeros, Purpose.SAMPLE)
    assert got.tolist() == [2, 0, 3], rounded(one_hot)


@pytest.mark.about("engine/verify.py, GreedySource.decide")
def test_certain_decisions() -> None:
    chance = torch.tensor([[1.0, 0.0, 1.0]])
    got = phase2.GreedySource().decide(chance, keys_of(torch.zeros(1, dtype=torch.long)), torch.tensor([[7, 8, 9]]))
    assert got.tolist() == [[True, False, True]], f"probability {rounded(chance)}"


@pytest.mark.about("engine/verify.py, random_source")
def test_certain_only_if_every_sequence_is_greedy() -> None:
    greedy, warm = phase2.SamplingParams(), phase2.SamplingParams(temperature=0.5)
    for params, kind in (([greedy] * 2, phase2.GreedySource), ([warm], phase2.KeyedSource)):
        assert isinstance(random_source(params), kind), params
    for params in ([greedy, warm], [warm, greedy]):
        assert isinstance(random_source(iter(params)), phase2.KeyedSource), "a greedy sequence beside a sampled one"


def propose(proof: SimpleNamespace, k: int, **settings: Any) -> tuple[Any, Scripted, Any, Any]:
    """Return the proposals after two sequences that end in 1 and in 4, the samples, the table, and the parameters."""
    model = proof.tables(5, seed=2)[1]
    source, params = Scripted([]), phase2.SamplingParams(**{"temperature": 1.0, "seed": SEED, **settings})
    sequences = [
        phase2.Sequence([0, 1], params, phase2.Ending(), 0),
        phase2.Sequence([2, 3, 2, 4], params, phase2.Ending(), 1),
    ]
    return phase2.ModelDrafter(model, source).propose(sequences, k), source, model.table, params


drafting = pytest.mark.about("engine/drafting.py, ModelDrafter.propose")


@drafting
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"top_k": 2}, {"frequency_penalty": 2.0}], ids=str)
def test_each_token_is_drawn_after_the_ones_before(proof: SimpleNamespace, settings: dict[str, Any]) -> None:
    """The likeliest token is sampled; `probs` are its distribution, after temperature, filters and penalties."""
    draft, _, table, params = propose(proof, 3, **settings)
    tokens, used = [], []
    for last in (1, 4):
        drafted: list[int] = []
        for _ in range(3):
            row = table[[*[last], *drafted][-1]][None]
            probs = phase2.probabilities(row, [params], [[last]], [drafted])[0]
            used.append(rounded(probs))
            drafted.append(int(probs.argmax()))
        tokens.append(drafted)
    inputs = f"texts that end in 1 and in 4, {params}, the model's logits by last token {rounded(table)}"
    assert draft.tokens.tolist() == tokens, inputs
    assert rounded(draft.probs.flatten(0, 1)) == used, inputs


@drafting
def test_draws_are_keyed_by_sample_position_and_purpose(proof: SimpleNamespace) -> None:
    _, source, _, _ = propose(proof, 2)
    keys = sorted(draw[:3] for draw in source.draws)
    assert keys == [(0, 2, "DRAFT"), (0, 3, "DRAFT"), (1, 4, "DRAFT"), (1, 5, "DRAFT")], (
        "texts of 2 and of 4 tokens, k 2"
    )


@drafting
def test_a_greedy_draft_is_certain(proof: SimpleNamespace) -> None:
    """One-hot distributions are not returned: `probs` is None."""
    draft, _, table, _ = propose(proof, 2, temperature=0.0)
    expected = [[a := int(table[last].argmax()), int(table[a].argmax())] for last in (1, 4)]
    assert draft.tokens.tolist() == expected, f"the model's logits by last token {rounded(table)}"
    assert draft.probs is None


@drafting
def test_a_greedy_text_beside_a_sampled_one_is_drafted_greedily(proof: SimpleNamespace) -> None:
    """Then `probs` are returned for both: the first text's are one-hot."""
    model = proof.tables(5, seed=2)[1]
    params = [phase2.SamplingParams(seed=SEED), phase2.SamplingParams(temperature=0.5, top_k=2, seed=SEED)]
    sequences = [phase2.Sequence([last], mine, phase2.Ending()) for last, mine in zip((1, 4), params, strict=True)]
    draft = phase2.ModelDrafter(model, Scripted([])).propose(sequences, 2)
    assert draft.probs is not None
    for row, (last, mine) in enumerate(zip((1, 4), params, strict=True)):
        before = [last, int(draft.tokens[row, 0])]
        expected = phase2.probabilities(model.table[before], [mine] * 2)
        inputs = f"a text that ends in {last}, {mine}, the model's logits by last token {rounded(model.table)}"
        assert rounded(draft.probs[row]) == rounded(expected), inputs
        assert draft.tokens[row].tolist() == expected.argmax(-1).tolist(), inputs


@drafting
def test_a_draft_of_no_tokens(proof: SimpleNamespace) -> None:
    draft, _, _, _ = propose(proof, 0)
    assert tuple(draft.tokens.shape) == (2, 0), "two texts, k 0"
    assert draft.tokens.dtype == torch.long
    assert draft.probs is None
