"""Trees are lossless: the law of the whole loop, by enumeration, and mutants that it catches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import phase3

EXACT, FLOAT32 = 1e-12, 1e-5
SHAPES = {"two and two": [-1, -1, 0, 0], "both have children": [-1, -1, 0, 1, 1], "all three": [-1, -1, -1, 0]}
PARAMS = phase3.SamplingParams(temperature=1.0, max_new_tokens=3)


def static(draft: Any, shape: list[int], policy: Any, parts: Any = phase3) -> Callable[..., Any]:
    def make(walker: Any, noise: Any) -> Any:
        base = phase3.ModelDrafter(draft, walker, noise)
        return parts.StaticTreeDrafter(base, shape, walker, noise, policy.draws_children)

    return make


def levels() -> Any:
    return phase3.FixedController(2)


@pytest.mark.covering(1)
@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("name", ["rejection", "longest_prefix", "coupled"])
def test_static_trees(proof: Any, name: Any, shape: str) -> None:
    target, draft = proof.tables(3, seed=21)
    policy = phase3.make_policy(name)
    expected = proof.plain_law(target, PARAMS, [1])
    got = proof.law(target, static(draft, SHAPES[shape], policy), PARAMS, [1], policy, levels)
    assert proof.total_variation(got, expected) < EXACT


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 2}, {"temperature": 0.6, "min_p": 0.2}, {"frequency_penalty": 0.8, "repetition_penalty": 1.4}],
    ids=["top-k", "min-p", "penalties"],
)
def test_static_trees_under_sampling_parameters(proof: Any, settings: dict[str, Any]) -> None:
    """With top-k 2 there are two tokens for three children: the tree is smaller than its shape."""
    target, draft = proof.tables(3, seed=22)
    params = phase3.SamplingParams(**{"temperature": 1.0, "max_new_tokens": 3, **settings})
    policy = phase3.Rejection()
    expected = proof.plain_law(target, params, [1])
    got = proof.law(target, static(draft, SHAPES["all three"], policy), params, [1], policy, levels)
    assert proof.total_variation(got, expected) < EXACT


@pytest.mark.parametrize("name", ["rejection", "longest_prefix", "coupled"])
def test_dynamic_trees(proof: Any, name: Any) -> None:
    target, draft = proof.tables(3, seed=23)

    def make(walker: Any, noise: Any) -> Any:
        return phase3.DynamicTreeDrafter(phase3.ModelDrafter(draft, walker, noise), nodes=4, beam=2)

    policy = phase3.make_policy(name)
    expected = proof.plain_law(target, PARAMS, [1])
    assert proof.total_variation(proof.law(target, make, PARAMS, [1], policy, levels), expected) < EXACT


@pytest.mark.parametrize("name", ["rejection", "longest_prefix", "coupled"])
def test_a_window_per_layer(proof: Any, name: Any) -> None:
    """The target's first layer attends to two tokens and its second to all, on every branch of a tree."""
    target, draft = proof.layered((2, None), seed=1), proof.tables(3, seed=27)[1]
    params, policy = phase3.SamplingParams(temperature=1.0, top_k=2, max_new_tokens=3), phase3.make_policy(name)
    expected = proof.plain_law(target, params, [1, 0, 2])
    got = proof.law(target, static(draft, SHAPES["two and two"], policy), params, [1, 0, 2], policy, levels)
    assert proof.total_variation(got, expected) < FLOAT32
    for windows in ((2, 2), (None, None), (None, 2)):
        other = proof.plain_law(proof.layered(windows, seed=1), params, [1, 0, 2])
        assert proof.total_variation(other, expected) > 1e-3  # the layer with the window matters


def test_end_of_text_inside_a_tree(proof: Any) -> None:
    target, draft = proof.tables(3, seed=24)
    policy, ending = phase3.Rejection(), phase3.Ending(eos_ids=(2,))
    expected = proof.plain_law(target, PARAMS, [1], ending)
    make = static(draft, SHAPES["both have children"], policy)
    got = proof.law(target, make, PARAMS, [1], policy, levels, ending)
    assert len({len(tokens) for tokens in expected}) == 3
    assert proof.total_variation(got, expected) < EXACT


def test_a_tree_accepts_more_than_its_first_branch(proof: Any) -> None:
    target, draft = proof.tables(3, seed=25)
    policy = phase3.Rejection()

    def accepted(shape: list[int]) -> float:
        histories = proof.histories(target, static(draft, shape, policy), PARAMS, [1], policy, levels)
        return float(sum(weight * counts[0] for (_, _, counts), weight in histories.items()))

    assert accepted([-1, -1, 0]) > accepted([-1, 0]) + 0.01


MUTANTS: dict[str, tuple[str, tuple[str, str]]] = {
    "favourite children with the probabilities of drawn ones": (
        "drafters.trees",
        ("        if not drawn:\n            return ranked", "        if True:\n            return ranked"),
    ),
    "the second child is tried against the first one's target": (
        "policies",
        ("target = residual / mass if mass > 0 else target", "target = target"),
    ),
    "the draft keeps the rejected child": ("policies", ("draft[token] = 0\n", "draft[token] = draft[token]\n")),
    "one uniform for all children of a node": ("policies", ("len(nodes), trial)", "len(nodes), 0)")),
    "what follows is drawn from the target, not its residual": (
        "policies",
        ("draw_one(target, row", "draw_one(probs[node + 1], row"),
    ),
}  # fmt: skip


@pytest.mark.no_exercise
@pytest.mark.parametrize("name", list(MUTANTS))
def test_the_proof_catches_this_mutant(proof: Any, name: str) -> None:
    where, change = MUTANTS[name]
    mutant = proof.mutated(where, change)
    target, draft = proof.tables(3, seed=26)
    policy = (mutant if where == "policies" else phase3).Rejection()
    make = static(draft, SHAPES["two and two"], policy, parts=phase3 if where == "policies" else mutant)
    expected = proof.plain_law(target, PARAMS, [1])
    assert proof.total_variation(proof.law(target, make, PARAMS, [1], policy, levels), expected) > 1e-3
