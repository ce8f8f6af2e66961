"""Acceptance on given text: at every position, the number of draft tokens that a decoding step would accept."""

from __future__ import annotations

from typing import Any

import pytest

import phase3
from common.philox import Purpose
from phase3.teacher_forced import teacher_forced_acceptance


def make_drafter(name: str, target: Any, draft: Any, source: Any, noise: Purpose) -> Any:
    if name == "ngram":
        return phase3.NgramDrafter(1, 3)
    if name == "extrapolate":
        return phase3.ExtrapolateDrafter(target, source, noise)
    return phase3.ModelDrafter(draft, source, noise)


@pytest.mark.covering(2)
@pytest.mark.parametrize("drafter", ["model", "ngram", "extrapolate"])
@pytest.mark.parametrize("policy", ["coupled", "longest_prefix"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_on_its_own_output_it_accepts_what_decoding_accepted(drafter: str, policy: Any, temperature: float) -> None:
    """If the given text is the output of decoding itself, all counts equal those of decoding."""
    model, draft, prompt = phase3.FakeModel(12, 512), phase3.FakeModel(12, 512, 0.7), [1, 2, 3, 1, 2]
    params = phase3.SamplingParams(temperature=temperature, max_new_tokens=120, seed=5)
    rule = phase3.make_policy(policy)
    source = phase3.GreedySource() if params.greedy else phase3.KeyedSource()

    def guess() -> Any:
        return make_drafter(drafter, model, draft, source, rule.draft_noise)

    sequence = phase3.Sequence(prompt, params, phase3.Ending())
    steps = phase3.decode(model, guess(), [sequence], rule, lambda: phase3.FixedController(3), source)
    expected = [step.stats[0].accepted for step in steps]
    accepted = teacher_forced_acceptance(model, guess(), prompt, sequence.tokens, params, rule, 3, source)
    assert accepted == expected[: len(accepted)]
    assert sum(expected[: len(accepted)]) + len(accepted) >= 120 - 4
    assert sum(accepted) > 0


@pytest.mark.parametrize(("agreement", "share"), [(1.0, 3), (0.0, 0)])
def test_the_text_advances_by_the_accepted_tokens_and_one_more(agreement: float, share: int) -> None:
    """A fake draft that is always or never accepted, on arbitrary text."""
    model, draft = phase3.FakeModel(40, 512), phase3.FakeModel(40, 512, agreement)
    params = phase3.SamplingParams(temperature=1.0, max_new_tokens=1000)
    source = phase3.KeyedSource()
    drafter = phase3.ModelDrafter(draft, source)
    truth = [(7 * i * i + i) % 40 for i in range(83)]
    accepted = teacher_forced_acceptance(
        model, drafter, [1, 2], truth, params, phase3.make_policy("rejection"), 3, source
    )
    assert set(accepted) == {share}
    assert len(accepted) == (20 if share else 80)
