"""Lossless policies: the output follows the target's distribution, with every drafter and controller.

Every random number is a branch, and all branches are enumerated (support/walker.py), so probabilities are exact. Not
the full product of policies, controllers and drafters: all controllers with the draft model, all drafters with a fixed
K, and the pairs that interact (a drafter that calls the controller before it draws). A policy sees of a controller and
of sampling parameters only a draft and the target's distributions, so `make test` has each of them with one policy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import phase3
from common.philox import Purpose
from phase3.drafters.chains import ChainBuilder

EXACT, FLOAT32 = 1e-12, 1e-5
LOSSLESS = ["rejection", "longest_prefix", "coupled"]
PROMPT = [0, 1, 1, 0, 1]  # its last tokens occur twice, for the n-gram drafter


def check(
    proof: Any,
    policy: Any,
    drafter: Any,
    controller: Callable[[], Any],
    models: Any = None,
    prompt: list[int] = PROMPT,
    ending: Any = None,
    loop: Any = None,
    bound: float = EXACT,
    **params: Any,
) -> dict[Any, float]:
    """Check that the law is the target's; return it by history, for checks of the case itself."""
    target = (models or proof.tables(3, seed=5))[0]
    settings = phase3.SamplingParams(**{"temperature": 1.0, "max_new_tokens": 3, **params})
    histories: dict[Any, float] = proof.histories(
        target, drafter, settings, prompt, phase3.make_policy(policy), controller, ending, loop
    )
    law: dict[Any, float] = {}
    for (tokens, _, _), weight in histories.items():
        law[tokens] = law.get(tokens, 0.0) + weight
    assert abs(sum(law.values()) - 1) < bound
    assert proof.total_variation(law, proof.plain_law(target, settings, prompt, ending)) < bound
    return histories


def drafted(histories: dict[Any, float]) -> set[int]:
    """Collect the numbers of draft tokens of all steps, over all histories."""
    return {depth for _, depths, _ in histories for depth in depths}


@pytest.fixture
def model_drafter(proof: Any) -> Any:
    return proof.model_drafter(proof.tables(3, seed=5)[1])


CONTROLLERS: dict[str, Callable[[], Any]] = {
    "fixed 1": lambda: phase3.FixedController(1),
    "fixed 2": lambda: phase3.FixedController(2),
    "adaptive": lambda: phase3.AdaptiveController(2, phase3.Bounds(1, 2), 0.5, 2),
    "confidence": lambda: phase3.ConfidenceController(phase3.Bounds(1, 2), 0.6),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("policy", LOSSLESS)
@pytest.mark.parametrize("controller", list(CONTROLLERS))
def test_every_policy_with_every_controller(proof: Any, model_drafter: Any, policy: str, controller: str) -> None:
    depths = drafted(check(proof, policy, model_drafter, CONTROLLERS[controller]))
    assert depths == ({0, 1} if controller == "fixed 1" else {0, 1, 2})


@pytest.mark.parametrize("policy", ["rejection", "coupled", pytest.param("longest_prefix", marks=pytest.mark.slow)])
def test_an_adaptive_controller_that_has_time_to_adapt(proof: Any, model_drafter: Any, policy: str) -> None:
    histories = check(proof, policy, model_drafter, CONTROLLERS["adaptive"], top_k=2, max_new_tokens=5)
    assert {(2, 1, 0), (2, 2)} <= {depths for _, depths, _ in histories}


@pytest.mark.covering(1)
@pytest.mark.parametrize("policy", LOSSLESS)
@pytest.mark.parametrize("ks", [[2, 0, 1], [0, 2], [1, 0, 0, 2]])
def test_any_sequence_of_ks(proof: Any, model_drafter: Any, policy: str, ks: list[int]) -> None:
    """A controller that uses the clock may choose any sequence of Ks, including 0."""
    check(proof, policy, model_drafter, lambda: proof.Replay(ks), top_k=2, max_new_tokens=4)


@pytest.mark.covering(1)
@pytest.mark.parametrize("policy", LOSSLESS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_cost_controller_whatever_the_times(proof: Any, model_drafter: Any, policy: str, seed: int) -> None:
    """Its times are random per test run, and equal in all branches of the enumeration."""
    clock = SimpleNamespace()

    def start() -> Any:
        generator = torch.Generator().manual_seed(seed)
        passed = torch.rand(40, generator=generator, dtype=torch.float64).cumsum(0)
        clock.perf_counter = iter(passed.tolist()).__next__
        return phase3.CostController(phase3.Bounds(1, 2), retry=1)

    loop = proof.mutated("speculative", time=clock)
    check(proof, policy, model_drafter, start, loop=loop, top_k=2, max_new_tokens=5)


@pytest.mark.covering(1)
@pytest.mark.parametrize("policy", LOSSLESS)
@pytest.mark.parametrize("k", [1, 2])
def test_every_policy_with_certain_guesses(proof: Any, policy: str, k: int) -> None:
    """One-hot drafters: n-grams, and one that always drafts the next number."""
    for drafter in (lambda *_: phase3.NgramDrafter(1, 3), proof.favourite(3)):
        histories = check(proof, policy, drafter, lambda: phase3.FixedController(k), max_new_tokens=4)
        assert drafted(histories) == set(range(k + 1))
        assert any(sum(accepted) for _, _, accepted in histories)


@pytest.mark.covering(1)
@pytest.mark.parametrize("policy", LOSSLESS)
@pytest.mark.parametrize(("controller", "top_k"), [("fixed 2", 2), ("confidence", 2), ("fixed 1", 0)])
def test_every_policy_with_extrapolated_states(proof: Any, policy: str, controller: str, top_k: int) -> None:
    """It reads the target's states, which do not exist before the first step."""
    target = proof.tables(3, seed=5)[0]

    def drafter(walker: Any, noise: Purpose) -> Any:
        return phase3.ExtrapolateDrafter(target, walker, noise, alpha=0.5)

    tokens = 4 if top_k else 3  # three kinds of token after one draft token, two after two
    histories = check(proof, policy, drafter, CONTROLLERS[controller], top_k=top_k, max_new_tokens=tokens)
    assert {depths[0] for _, depths, _ in histories} == {0}
    assert drafted(histories) == set(range(tokens - 1))


def test_a_chain_is_penalised_for_what_it_has_drafted() -> None:
    """Lossless without it as well, but the draft would be worse: the logits are the same in every step."""
    params = phase3.SamplingParams(frequency_penalty=2.0)
    sequence = phase3.Sequence([3], params, phase3.Ending())
    builder = ChainBuilder([sequence], [3], phase3.GreedySource(), Purpose.DRAFT, None)
    while builder.open():
        builder.draw(0, torch.tensor([0.0, 1.0, 0.5, -5.0]))
    assert builder.tokens == [[1, 2, 0]]


@pytest.mark.covering(1)
@pytest.mark.parametrize("policy", LOSSLESS)
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6, "top_p": 0.8},
        {"temperature": 2.0, "min_p": 0.3},
        {"presence_penalty": 0.8, "frequency_penalty": 0.5, "repetition_penalty": 1.5},
    ],
)
def test_with_sampling_parameters(proof: Any, model_drafter: Any, policy: str, settings: dict[str, Any]) -> None:
    check(proof, policy, model_drafter, CONTROLLERS["confidence"], **settings)


@pytest.mark.parametrize("policy", LOSSLESS)
def test_ends_and_jumps_inside_a_block(proof: Any, model_drafter: Any, policy: str) -> None:
    ending = phase3.Ending(eos_ids=(2,))
    histories = check(proof, policy, model_drafter, CONTROLLERS["fixed 2"], ending=ending)
    assert {len(tokens) for tokens, _, _ in histories} == {1, 2, 3}
    models = proof.tables(3, seed=9, context=4)
    check(proof, policy, model_drafter, CONTROLLERS["fixed 2"], models, prompt=[1, 0, 2])


@pytest.mark.parametrize("policy", LOSSLESS)
def test_in_float32(proof: Any, policy: str) -> None:
    models = proof.tables(3, seed=6, dtype=torch.float32)
    check(proof, policy, proof.model_drafter(models[1]), CONTROLLERS["fixed 2"], models, bound=FLOAT32)


def test_rows_of_a_batch_do_not_touch_each_other(proof: Any) -> None:
    """One row drafts two tokens and the other one; their joint law is the product of the target's laws."""
    target, draft = proof.tables(3, seed=5)
    params = [phase3.SamplingParams(temperature=1.0, top_k=2, max_new_tokens=count) for count in (3, 2)]
    prompts = [[0], [1]]

    def run(walker: Any) -> tuple[tuple[int, ...], ...]:
        each = enumerate(zip(prompts, params, strict=True))
        sequences = [phase3.Sequence(prompt, mine, phase3.Ending(), i) for i, (prompt, mine) in each]
        controllers = iter([phase3.FixedController(2), phase3.FixedController(1)])
        drafter = phase3.ModelDrafter(draft, walker)
        policy, make = phase3.make_policy("rejection"), lambda: next(controllers)
        for _ in phase3.decode(target, drafter, sequences, policy, make, walker):
            pass
        return tuple(tuple(sequence.tokens) for sequence in sequences)

    alone = [proof.plain_law(target, mine, prompt) for prompt, mine in zip(prompts, params, strict=True)]
    product = {(a, b): p * q for a, p in alone[0].items() for b, q in alone[1].items()}
    assert proof.total_variation(proof.Walker().law(run), product) < EXACT


def test_what_each_rule_accepts(proof: Any) -> None:
    """Acceptance of the first draft token: rejection has the most, coupled noise less, independent noise least.

    The walker couples through the inverse distribution function; Gumbel noise is measured in test_policies.py.
    """
    target, draft = proof.tables(3, seed=5)
    params = phase3.SamplingParams(temperature=1.0, max_new_tokens=2)
    p, q = (model.table[PROMPT[-1]].softmax(-1) for model in (target, draft))
    accepted: dict[str, float] = {}
    cases: dict[str, tuple[Any, Any]] = {name: (proof.engine.make_policy(name), None) for name in LOSSLESS}
    cases["coupled, but the draft has noise of its own"] = (
        phase3.make_policy("coupled"),
        phase3.make_policy("rejection"),
    )
    for name, (policy, other) in cases.items():

        def drafter(walker: Any, noise: Any, other: Any = other) -> Any:
            return phase3.ModelDrafter(draft, walker, other.draft_noise if other else noise)

        histories = proof.histories(target, drafter, params, PROMPT, policy, CONTROLLERS["fixed 1"])
        accepted[name] = sum(weight * counts[0] for (_, _, counts), weight in histories.items())
        law: dict[Any, float] = {}
        for (tokens, _, _), weight in histories.items():
            law[tokens] = law.get(tokens, 0.0) + weight
        assert proof.total_variation(law, proof.plain_law(target, params, PROMPT)) < EXACT, name
    assert accepted["rejection"] == pytest.approx(float(torch.minimum(p, q).sum()))
    assert accepted["longest_prefix"] == pytest.approx(float((p * q).sum()))
    assert accepted["longest_prefix"] < accepted["coupled"] < accepted["rejection"]
    assert accepted["coupled, but the draft has noise of its own"] == pytest.approx(accepted["longest_prefix"])


def test_children_are_walked_without_replacement(proof: Any) -> None:
    """The walker's law of two children equals the product of the two draws."""
    probs = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    key, at = torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    law = proof.Walker().law(lambda walker: tuple(walker.draw_several(probs, 2, key, at, 1)[0].tolist()))
    expected = {
        (a, b): float(probs[0, a] * probs[0, b] / (1 - probs[0, a])) for a, b in itertools.permutations(range(3), 2)
    }
    assert proof.total_variation(law, expected) < EXACT
