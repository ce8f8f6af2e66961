"""Counts: one target forward per step, and draft tokens past the end of the text are not counted."""

from __future__ import annotations

from typing import Any

import pytest

import phase3


class Counted(phase3.FakeModel):
    """Counts forwards, and the positions whose logits were computed."""

    forwards = 0
    asked = 0

    def states(self, *arguments: Any, **named: Any) -> Any:
        self.forwards += 1
        return super().states(*arguments, **named)

    def logits(self, hidden: Any) -> Any:
        self.asked += hidden.shape[:-1].numel()
        return super().logits(hidden)


def speculate(model: Any, draft: Any, params: Any, policy: str, controller: Any, ending: Any = None) -> tuple[Any, Any]:
    """Decode after a prompt of one token; return the sequence and the stats of its steps."""
    rule = phase3.make_policy(policy)  # type: ignore[arg-type]
    source = phase3.GreedySource() if params.greedy else phase3.KeyedSource()
    drafter = phase3.ModelDrafter(draft, source, rule.draft_noise)
    sequence = phase3.Sequence([1], params, ending or phase3.Ending())
    steps = phase3.decode(model, drafter, [sequence], rule, lambda: controller, source)
    return sequence, [step.stats[0] for step in steps]


@pytest.mark.parametrize("policy", ["rejection", "coupled", "longest_prefix", "typical"])
def test_one_target_forward_per_step_and_none_besides(policy: str) -> None:
    model, draft = Counted(40, 256), phase3.FakeModel(40, 256, 0.7)
    params = phase3.SamplingParams(temperature=1.0, max_new_tokens=60)
    _, steps = speculate(model, draft, params, policy, phase3.ConfidenceController(phase3.Bounds(1, 6), 0.5))
    assert model.forwards == len(steps) < 60
    assert model.asked == sum(stats.depth + 1 for stats in steps)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_counts_add_up(temperature: float) -> None:
    model, draft = phase3.FakeModel(40, 256), phase3.FakeModel(40, 256, 0.6)
    params = phase3.SamplingParams(temperature=temperature, max_new_tokens=101)
    sequence, steps = speculate(
        model, draft, params, "rejection", phase3.AdaptiveController(3, phase3.Bounds(1, 6), 0.5)
    )
    assert sum(stats.emitted for stats in steps) == len(sequence.tokens) == 101
    length = 1
    for stats in steps:
        assert stats.length == length
        assert stats.emitted == stats.accepted + 1  # the token after the draft: a correction or a bonus
        assert stats.k == stats.proposed == stats.depth >= stats.accepted
        length += stats.emitted


@pytest.mark.about("engine/steps.py, step_stats")
def test_draft_tokens_past_the_end_are_not_counted() -> None:
    """A draft that is always accepted is cut by the end of the text in the middle of a block."""
    model, draft = phase3.FakeModel(40, 256), phase3.FakeModel(40, 256, 1.0)
    free = phase3.generate(model, [[1]], phase3.SamplingParams(max_new_tokens=12))[0].tokens
    ends_at = next(i for i in range(5, 9) if free.index(free[i]) == i)  # inside the second block of five
    params, ending = phase3.SamplingParams(max_new_tokens=40), phase3.Ending((free[ends_at],))
    for policy in ("rejection", "longest_prefix", "conf_threshold"):
        sequence, steps = speculate(model, draft, params, policy, phase3.FixedController(4), ending)
        assert sequence.tokens == free[: ends_at + 1]
        last = steps[-1]
        assert last.proposed == last.depth == last.accepted == last.emitted == ends_at - 4
