"""Log-probabilities of output and prompt: those of one forward over the whole text, whatever the schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import phase6
from common.errors import UserError
from phase6.drafters.eagle import EagleDrafter
from tests.support.served import TEXT, WHY_NOT_CPP, Pair, add, asked

KERNELS = [pytest.param("cpp", marks=pytest.mark.skipif(WHY_NOT_CPP is not None, reason=str(WHY_NOT_CPP))), "torch"]
TOP = 3


def scored(engine: Any, request: Any, **more: Any) -> list[phase6.Output]:
    """Return the outputs of a request with log-probabilities, all others of the engine left aside."""
    params = phase6.SamplingParams(**vars(request.params))
    how = {"policy": request.policy, "controller": request.controller, "k": request.k, "logprobs": TOP}
    number = engine.add_request(list(request.prompt), params, **how, **more)
    found = list[phase6.Output]()
    while engine.busy:
        found += [output for output in engine.step() if output.request == number]
    return found


def expected(pair: Callable[..., Pair], text: list[int]) -> list[Any]:
    """Return the log-probabilities of all tokens of a text but the first, by one forward without a cache."""
    output = phase6.target_forward(pair("torch", "plain").llm.loaded.model, [text[:1]], [phase6.Tree.chain(text[1:])])
    return phase6.logprobs.of_tokens(output.logits[0, :-1], text[1:], TOP)


def check(found: list[Any], wanted: list[Any]) -> None:
    assert [each.token for each in found] == [each.token for each in wanted]
    assert [each.rank for each in found] == [each.rank for each in wanted]
    assert [[token for token, _ in each.top] for each in found] == [[t for t, _ in each.top] for each in wanted]
    values = torch.tensor([[each.logprob, *(value for _, value in each.top)] for each in found])
    torch.testing.assert_close(
        values,
        torch.tensor([[each.logprob, *(value for _, value in each.top)] for each in wanted]),
        atol=2e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("how", ["plain", "model", "eagle", "tree"])
def test_output_and_prompt_have_those_of_one_forward(pair: Callable[..., Pair], kernels: str, how: str) -> None:
    """Also the tokens are those without log-probabilities, which several steps of a call give."""
    made, request = pair(kernels, how), asked(tokens=9, temperature=1.0)
    outputs = scored(made.engine(), request, prompt_logprobs=TOP)
    tokens = [token for output in outputs for token in output.tokens]
    assert tokens == made.alone(request).tokens
    wanted = expected(pair, [*TEXT, *tokens])
    check(outputs[0].prompt_logprobs, wanted[: len(TEXT) - 1])
    check([each for output in outputs for each in output.logprobs], wanted[len(TEXT) - 1 :])
    assert not any(output.prompt_logprobs for output in outputs[1:])


@pytest.mark.parametrize("how", ["model", "medusa"])
def test_a_known_prompt_in_small_chunks_beside_others(pair: Callable[..., Pair], how: str) -> None:
    """Blocks of the prompt are known, it is computed in chunks, and others decode with several steps a call."""
    made = pair("cpp" if WHY_NOT_CPP is None else "torch", how)
    engine = made.engine(budget=16)
    add(engine, asked(tokens=3))
    while engine.busy:
        engine.step()
    add(engine, asked(TEXT[:9], tokens=20))
    outputs = scored(engine, asked(tokens=5), prompt_logprobs=TOP)
    text = [*TEXT, *made.alone(asked(tokens=5)).tokens]
    check(
        [*outputs[0].prompt_logprobs, *(each for output in outputs for each in output.logprobs)], expected(pair, text)
    )


@pytest.mark.parametrize(("length", "budget"), [(2, 32), (5, 32), (33, 30)])
def test_the_last_tokens_of_a_prompt_are_scored(pair: Callable[..., Pair], length: int, budget: int) -> None:
    """So few tokens, of a short prompt or left by a chunk, would else be computed with the first step."""
    prompt = TEXT[:length]
    outputs = scored(pair("torch", "plain").engine(budget=budget), asked(prompt, tokens=3), prompt_logprobs=TOP)
    text = [*prompt, *(token for output in outputs for token in output.tokens)]
    check(
        [*outputs[0].prompt_logprobs, *(each for output in outputs for each in output.logprobs)],
        expected(pair, text),
    )


def test_states_of_a_scored_prompt_reach_the_drafter(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """EAGLE drafts the same after a prompt with log-probabilities as after one without."""
    made, drafts = pair("torch", "eagle"), list[list[list[int]]]()
    propose = EagleDrafter.propose

    def recorded(self: EagleDrafter, *arguments: Any) -> Any:
        draft = propose(self, *arguments)
        drafts[-1] += draft.tokens.tolist()
        return draft

    monkeypatch.setattr(EagleDrafter, "propose", recorded)
    for how in ({}, {"prompt_logprobs": TOP}):
        drafts.append([])
        scored(made.engine(), asked(tokens=6), **how)
    assert drafts[0] == drafts[1] != []


def test_a_chunk_leaves_the_last_token_to_the_first_step(pair: Callable[..., Pair]) -> None:
    engine, text = pair("torch", "plain").engine(), list(TEXT[:5])
    engine.target.admit("a text", text, 0)
    start, logits = engine.target.score("a text", text, most=9)
    assert (start, len(logits)) == (0, 4)
    engine.target.release("a text")
    engine.close()


def test_a_preempted_prompt_is_scored_once(pair: Callable[..., Pair]) -> None:
    """It loses its blocks after a chunk, which is then computed again."""
    made = pair("torch", "plain")
    engine = made.engine(budget=16)
    engine.add_request(list(TEXT), phase6.SamplingParams(max_new_tokens=2, ignore_eos=True), prompt_logprobs=TOP)
    engine.step()
    (sequence,) = engine.scheduler.running
    assert 0 < len(sequence.prompt_logprobs) < len(TEXT) - 1
    engine.scheduler.preempt(sequence)
    while engine.busy:
        engine.step()
    check(sequence.prompt_logprobs, expected(pair, list(TEXT)))


def test_a_step_says_where_its_tokens_come_from(pair: Callable[..., Pair]) -> None:
    """The steps of the outputs add up to the tokens; those of a request alone and in a batch are the same."""
    made = pair("torch", "model")
    engine = made.engine()
    numbers = [add(engine, asked(TEXT[at:], tokens=9)) for at in range(2)]
    found = list[phase6.Output]()
    while engine.busy:
        found += engine.step()
    for number in numbers:
        steps = [step for output in found if output.request == number for step in output.steps]
        assert sum(step.emitted for step in steps) == 9
        assert 0 < sum(step.accepted for step in steps) <= sum(step.proposed for step in steps)


def test_a_single_token_has_nothing_before_it(pair: Callable[..., Pair]) -> None:
    outputs = scored(pair("torch", "plain").engine(), asked(TEXT[:1], tokens=2), prompt_logprobs=0)
    assert outputs[0].prompt_logprobs == []
    assert len(outputs[0].logprobs) == 1


def test_what_cannot_be_scored_is_refused(pair: Callable[..., Pair], small_folder: Any) -> None:
    engine = pair("torch", "plain").engine()
    params = phase6.SamplingParams(max_new_tokens=2)
    with pytest.raises(UserError, match="longer than the context"):
        engine.add_request([1] * 65, params, prompt_logprobs=1)
    with pytest.raises(UserError, match="at least 0"):
        engine.add_request([1], params, logprobs=-1)
    options = phase6.Options(model=str(small_folder), device="cpu", dtype="float32", kernels="torch", kv="off")
    with pytest.raises(UserError, match="KV cache"):
        phase6.LLMEngine(phase6.LLM(options), rows=1).add_request([1, 2], params, prompt_logprobs=1)


def test_ties_and_logits_that_are_not_finite() -> None:
    (found,) = phase6.logprobs.of_tokens(torch.tensor([[0.0, 1.0, 1.0, 0.0]]), [2], 3)
    assert found.rank == 1
    assert [token for token, _ in found.top] == [1, 2, 0]
    with pytest.raises(UserError, match="not finite"):
        phase6.logprobs.of_tokens(torch.tensor([[0.0, float("nan")]]), [0], 1)
