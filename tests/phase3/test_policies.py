"""Acceptance policies: accepted tokens, by hand; the distance of lossy policies, by enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import phase3
from common.errors import UserError
from common.philox import Purpose

EXACT = 1e-12


class Recording(phase3.GreedySource):
    """Draws the likeliest token, and records the distributions."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[float], int, Purpose]] = []

    def draw(self, probs: Any, keys: Any, positions: Any, purpose: Purpose) -> Any:
        for row, position in zip(probs.tolist(), positions.tolist(), strict=True):
            self.asked.append((row, position, purpose))
        return super().draw(probs, keys, positions, purpose)


@pytest.mark.about("engine/policies.py, Rejection.verify")
def test_rejection_is_the_rule_of_verify() -> None:
    probs = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)
    draft = phase3.Draft(torch.tensor([[0, 1], [2, 3]]), probs.flip(-1)[:, :2], [2, 1])
    widths, keys, positions = torch.tensor([2, 1]), torch.tensor([[3, 0], [3, 1]]), torch.tensor([7, 9])
    rows = phase3.DraftRows(widths, keys, positions, phase3.KeyedSource())
    found = phase3.Rejection().verify(draft, phase3.TargetProbs(probs, probs), rows)
    expected = phase3.verify(draft.tokens, draft.probs, probs, *rows)
    for name in ("accepted", "next_tokens", "ratios"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist()


OPINION = [0.5, 0.3, 0.2]  # entropy 1.0297, so exp(-entropy) is 0.3571


THRESHOLD = pytest.mark.about("engine/policies.py, ConfThreshold.good")
AGREE = pytest.mark.about("engine/policies.py, TopkAgree.good")
TYPICAL = pytest.mark.about("engine/policies.py, Typical.good")


@pytest.mark.parametrize(
    ("policy", "good"),
    [
        pytest.param(phase3.ConfThreshold(0.2), [0, 1, 2], marks=THRESHOLD),
        pytest.param(phase3.ConfThreshold(0.25), [0, 1], marks=THRESHOLD),
        pytest.param(phase3.ConfThreshold(0.5), [0], marks=THRESHOLD),
        pytest.param(phase3.ConfThreshold(0.51), [], marks=THRESHOLD),
        pytest.param(phase3.TopkAgree(1), [0], marks=AGREE),
        pytest.param(phase3.TopkAgree(2), [0, 1], marks=AGREE),
        pytest.param(phase3.TopkAgree(7), [0, 1, 2], marks=AGREE),
        pytest.param(phase3.Typical(0.19, 1.0), [0, 1, 2], marks=TYPICAL),  # epsilon is the upper bound
        pytest.param(phase3.Typical(1.0, 0.55), [0, 1, 2], marks=TYPICAL),  # from 0.1964 on
        pytest.param(phase3.Typical(1.0, 0.6), [0, 1], marks=TYPICAL),  # from 0.2143 on
        pytest.param(phase3.Typical(1.0, 0.9), [0], marks=TYPICAL),  # from 0.3214 on
        pytest.param(phase3.Typical(0.25, 0.9), [0, 1], marks=TYPICAL),
    ],
)
def test_which_tokens_are_good_enough(policy: Any, good: list[int]) -> None:
    opinion = torch.tensor(OPINION, dtype=torch.float64)
    assert policy.good(opinion).nonzero()[:, 0].tolist() == good
    assert not policy.lossless
    # In a block the tokens before the first that is not good are accepted.
    for tokens in ([0, 1, 2], [1, 0, 2], [2, 1, 0]):
        probs = torch.eye(3, dtype=torch.float64)[[1, 2, 0, 1]][None]  # the distributions of the next tokens
        source = Recording()
        draft = phase3.Draft(torch.tensor([tokens]), None, [3])
        rows = phase3.DraftRows(torch.tensor([3]), torch.zeros(1, 2, dtype=torch.long), torch.tensor([7]), source)
        verdict = policy.verify(draft, phase3.TargetProbs(probs, opinion.expand(1, 4, 3)), rows)
        accepted = next((i for i, token in enumerate(tokens) if token not in good), 3)
        assert int(verdict.accepted) == accepted
        assert int(verdict.next_tokens) == [1, 2, 0, 1][accepted]
        assert source.asked == [(probs[0, accepted].tolist(), 7 + accepted, Purpose.SAMPLE)]


def test_a_lossy_policy_goes_on_to_the_first_child_that_is_good_enough() -> None:
    """In the order of the siblings, on every level."""
    tree = phase3.Tree([2, 1, 0, 1, 0], [-1, -1, -1, 1, 1])
    probs, source = torch.eye(3)[[0, 0, 0, 0, 2, 0]][None], Recording()
    opinion = torch.tensor(OPINION).expand(1, 6, 3)
    row = phase3.DraftRows(torch.tensor([0]), torch.zeros(1, 2, dtype=torch.long), torch.tensor([7]), source)
    path = phase3.ConfThreshold(0.25).accept_tree(tree, phase3.TargetProbs(probs, opinion), row)
    assert (path.nodes, path.next_token) == ([1, 3], 2)
    assert source.asked == [([0, 0, 1], 9, Purpose.SAMPLE)]


def test_of_equal_opinions_the_lower_ids_are_the_likeliest() -> None:
    assert phase3.TopkAgree(2).good(torch.tensor([0.2, 0.3, 0.2, 0.3, 0.2])).nonzero()[:, 0].tolist() == [1, 3]
    assert phase3.TopkAgree(3).good(torch.tensor([0.2, 0.3, 0.2, 0.3, 0.2])).nonzero()[:, 0].tolist() == [0, 1, 3]
    at = torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, dtype=torch.long), Purpose.DRAFT
    assert phase3.GreedySource().draw_several(torch.full((1, 50), 0.02), 3, *at).tolist() == [[0, 1, 2]]


def test_a_certain_target_lets_only_its_token_stand() -> None:
    certain = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    for policy in (phase3.ConfThreshold(1.0), phase3.TopkAgree(1), phase3.Typical(1.0, 1.0)):
        assert policy.good(certain).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("settings", "tau", "accepted"),
    [
        ({"temperature": 0.0}, 0.25, True),  # by the softmax of raw logits: 0.3
        ({"temperature": 0.0}, 0.35, False),
        ({"temperature": 1.0}, 0.35, False),
        ({"temperature": 1.0, "top_k": 2}, 0.35, True),  # 0.3 / 0.8 after top-k
        ({"temperature": 0.5}, 0.25, False),  # 0.09 / 0.38
        ({"temperature": 2.0}, 0.31, True),  # 0.5477 / 1.702
    ],
)
def test_what_a_lossy_policy_judges_by(proof: Any, settings: dict[str, Any], tau: float, accepted: bool) -> None:
    """The draft token after 0 is 1, with target probability 0.3; the target's likeliest token is 0."""
    target = proof.table_model(torch.tensor([OPINION] * 3, dtype=torch.float64).log())
    params = phase3.SamplingParams(**settings, max_new_tokens=2)
    sequence = phase3.Sequence([0], params, phase3.Ending())
    drafter = proof.favourite(3)(None, None)
    decode = phase3.decode(target, drafter, [sequence], phase3.ConfThreshold(tau), None, Recording())
    step = next(iter(decode))
    assert step.stats[0].accepted == accepted
    assert sequence.tokens == ([1, 0] if accepted else [0])
    expected = phase3.probabilities(target.table[:1], [params])[0].tolist()
    assert step.target_probs(0)[0].tolist() == pytest.approx(expected)


def expected_first_token(p: torch.Tensor, q: torch.Tensor, good: torch.Tensor) -> list[float]:
    """Accept a good draft token, else draw from the target: q(x) good(x) + (1 - q(good)) p(x)."""
    return (q * good + (1 - (q * good).sum()) * p).tolist()


LOSSY: dict[str, tuple[Callable[[float], Any], list[float]]] = {
    "conf_threshold": (phase3.ConfThreshold, [1.0, 0.6, 0.4, 0.2, 0.1, 1e-9]),
    "topk_agree": (lambda k: phase3.TopkAgree(int(k)), [1, 2, 3]),
    "typical by epsilon": (lambda epsilon: phase3.Typical(epsilon, 1.0), [1.0, 0.4, 0.2, 0.1, 1e-9]),
    "typical by delta": (lambda delta: phase3.Typical(1.0, delta), [1.0, 0.7, 0.4, 0.2, 1e-9]),
}


def law_of(proof: Any, policy: Any, target: Any, draft: Any, tokens: int = 3) -> tuple[dict[Any, float], float]:
    """Compute the law with K = 2 at temperature 1, and the expected number of accepted tokens in the first step."""
    params = phase3.SamplingParams(temperature=1.0, max_new_tokens=tokens)
    law: dict[Any, float] = {}
    expected = 0.0
    for (text, _, accepted), weight in proof.histories(
        target, proof.model_drafter(draft), params, [1], policy, lambda: phase3.FixedController(2)
    ).items():
        law[text] = law.get(text, 0.0) + weight
        expected += weight * accepted[0]
    return law, expected


@pytest.mark.parametrize("name", list(LOSSY))
def test_the_law_of_a_lossy_policy_from_strict_to_loose(proof: Any, name: str) -> None:
    """By enumeration: the first token's law at every setting, and the whole law at the loosest (all accepted).

    Of the four parameters only tau has a lossless end. topk_agree with k = 1 and the strictest typical accept the
    target's likeliest token whenever it is drafted, which is too often: exp(-entropy) is at most the largest p.
    """
    make, grid = LOSSY[name]
    target, draft = proof.tables(3, seed=1)
    p, q = (model.table.softmax(-1) for model in (target, draft))
    plain = proof.plain_law(target, phase3.SamplingParams(temperature=1.0, max_new_tokens=3), [1])
    distances, acceptances = [], []
    for value in grid:
        policy = make(value)
        law, accepted = law_of(proof, policy, target, draft)
        first = [sum(weight for tokens, weight in law.items() if tokens[0] == x) for x in range(3)]
        assert first == pytest.approx(expected_first_token(p[1], q[1], policy.good(p[1])), abs=EXACT)
        distances.append(proof.total_variation(law, plain))
        acceptances.append(accepted)
    loosest = {(a, b, c): float(q[1, a] * q[a, b] * p[b, c]) for a in range(3) for b in range(3) for c in range(3)}
    assert proof.total_variation(law, loosest) < EXACT
    assert all(after > before - EXACT for before, after in itertools.pairwise(acceptances))
    assert acceptances[-1] == pytest.approx(2)
    assert (distances[0] < EXACT) == (name == "conf_threshold")
    assert min(distances[1:]) > 0.03


def test_a_stricter_policy_can_lead_further_away(proof: Any) -> None:
    """If the draft equals the target, a threshold only makes likely tokens likelier."""
    target, _ = proof.tables(3, seed=1)
    plain = proof.plain_law(target, phase3.SamplingParams(temperature=1.0, max_new_tokens=3), [1])
    distances = [
        proof.total_variation(law_of(proof, phase3.ConfThreshold(tau), target, target)[0], plain)
        for tau in (1.0, 0.4, 1e-9)
    ]
    assert distances[0] < EXACT
    assert distances[1] > 0.1
    assert distances[2] < EXACT


def test_the_flag_tells_the_truth(proof: Any) -> None:
    """`lossless` agrees with enumeration, with every policy at its default parameters."""
    target, draft = proof.tables(3, seed=2)
    params = phase3.SamplingParams(temperature=1.0, max_new_tokens=2)
    plain = proof.plain_law(target, params, [1])
    for name in ("rejection", "coupled", "longest_prefix", "conf_threshold", "topk_agree", "typical"):
        policy = phase3.make_policy(name)
        law = proof.law(target, proof.model_drafter(draft), params, [1], policy, lambda: phase3.FixedController(1))
        assert policy.lossless == (proof.total_variation(law, plain) < EXACT), name


@pytest.mark.parametrize("seed", range(3))
def test_acceptance_under_keyed_noise(seed: int) -> None:
    """One draft token at 20,000 positions, against the formulas.

    rejection: sum min(p, q). longest_prefix: sum p q. coupled, the chance that two Gumbel-max choices from the same
    noise agree: the sum over x of 1 / sum over y of max(p(y) / p(x), q(y) / q(x)). No coupling of two draws accepts
    more than rejection does, and any that must not know the other distribution accepts less (Daliri et al. 2025).
    """
    draws, size = 20_000, 6
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, size, generator=generator, dtype=torch.float64).softmax(-1)
    keys, positions = torch.tensor([[seed, 0]]).expand(draws, 2), torch.arange(draws)
    widths = torch.ones(draws, dtype=torch.long)
    target = phase3.TargetProbs(*[p.expand(draws, 2, size)] * 2)
    ratio = torch.maximum(p[None] / p[:, None], q[None] / q[:, None])  # [x, y]
    expected = {
        "rejection": torch.minimum(p, q).sum(),
        "coupled": (1 / ratio.sum(-1)).sum(),
        "longest_prefix": (p * q).sum(),
    }
    source, shares = phase3.KeyedSource(), {}
    for name, share in expected.items():
        policy = phase3.make_policy(name)  # type: ignore[arg-type]
        tokens = source.draw(q.expand(draws, -1), keys, positions, policy.draft_noise)
        draft = phase3.Draft(tokens[:, None], q.expand(draws, 1, size), [1] * draws)
        verdict = policy.verify(draft, target, phase3.DraftRows(widths, keys, positions, source))
        shares[name] = float(verdict.accepted.double().mean())
        assert abs(shares[name] - share) < 4 * math.sqrt(share * (1 - share) / draws)
    assert shares["longest_prefix"] < shares["coupled"] < shares["rejection"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: phase3.ConfThreshold(0.0), "tau"),
        (lambda: phase3.ConfThreshold(1.01), "tau"),
        (lambda: phase3.TopkAgree(0), "agree_k"),
        (lambda: phase3.Typical(0.0, 0.5), "epsilon"),
        (lambda: phase3.Typical(0.5, 1.5), "delta"),
        (lambda: phase3.Typical(float("nan"), 0.5), "epsilon"),
    ],
)
def test_parameters_out_of_range_are_named(wrong: Callable[[], Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        wrong()
