"""Speculative steps in one C++ call equal single steps and the torch rule, and follow the target's distribution."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import phase5
from common.philox import Purpose
from phase5 import load
from phase5.controllers import FixedController
from phase5.cpp_runner import CppRunner
from phase5.drafters.model_fast import FastModelDrafter
from phase5.kernels import cpp
from phase5.kernels.cpp import library
from phase5.kv_cache import KVOptions
from phase5.model import Transformer
from phase5.multi_step import multi_step
from phase5.pair import fit_vocabulary
from phase5.policies import AcceptancePolicy, Rejection, SampleMatch, TargetProbs
from phase5.sampling import SamplingParams, probabilities
from phase5.sequence import Ending, Sequence
from phase5.speculative import decode
from phase5.verify import GreedySource, KeyedSource, RandomSource
from tests.support.cpp import draft_chain, make_cpp_runner

pytestmark = pytest.mark.skipif(cpp.why_not() is not None, reason=str(cpp.why_not()))

STATIC = KVOptions("static")
PROMPT = [5, 9, 200, 31]
WAYS = {
    "greedy": SamplingParams(),
    "filtered": SamplingParams(temperature=0.7, top_k=50, top_p=0.95, seed=11),
    "plain": SamplingParams(temperature=1.0, seed=-3),
}
POLICIES: dict[str, AcceptancePolicy] = {
    "rejection": Rejection(),
    "longest_prefix": SampleMatch(Purpose.DRAFT),
    "coupled": SampleMatch(Purpose.SAMPLE),
}


class Pair(NamedTuple):
    model: Transformer
    near: Transformer
    target: cpp.CppModel
    drafter: cpp.CppModel


def shaken(model: Transformer, by: float) -> Transformer:
    """Return a model that often agrees with another: a copy with slightly changed matrices."""
    near = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in near.modules():
            if isinstance(module, nn.Linear):
                weight = module.weight
                weight += torch.randn(weight.shape, generator=generator) * weight.std() * by
    return near


def pair_of(model: Transformer, by: float, threads: int) -> Pair:
    near = shaken(model, by)
    return Pair(model, near, *(cpp.CppModel(each, "float32", threads) for each in (model, near)))


def loaded(folder: Path) -> Transformer:
    model = load(str(folder), torch.float32, torch.device("cpu")).model
    assert isinstance(model, Transformer)
    return model


@pytest.fixture(scope="module")
def pair(llama_folder: Path) -> Pair:
    model = loaded(llama_folder)
    with torch.no_grad():  # without it, random models find all tokens about equally likely
        model.head.weight *= 8
    return pair_of(model, 0.2, 2)


@pytest.fixture(scope="module")
def small(llama_folder: Path) -> Pair:
    """Return a model with a small vocabulary, and an output matrix that makes several tokens likely."""
    whole = loaded(llama_folder)
    state = {
        name: tensor[:16] if name in ("embedding.weight", "head.weight") else tensor
        for name, tensor in whole.state_dict().items()
    }
    generator = torch.Generator().manual_seed(2)
    state["head.weight"] = torch.randn(state["head.weight"].shape, generator=generator) * 0.2
    model = Transformer(dataclasses.replace(whole.config, vocab_size=16))
    model.load_state_dict(state)
    return pair_of(model.requires_grad_(False).eval(), 0.4, 1)  # threads would mostly wait for each other


def runners(pair: Pair, tokens: int) -> tuple[CppRunner, CppRunner]:
    target = make_cpp_runner(pair.model, pair.target, STATIC, 1, tokens)
    return target, make_cpp_runner(pair.near, pair.drafter, STATIC, 1, tokens)


class Made(NamedTuple):
    """A step of one sequence."""

    draft: list[int]
    accepted: int
    next: int
    computed: int


def call(
    pair: Pair, caches: Any, text: list[int], params: SamplingParams, policy: AcceptancePolicy, count: int, steps: int
) -> list[Any]:
    """Make steps of one sequence in one call, and keep in both caches what it appended."""
    new = [text[cache.lengths[0] :] for cache in caches]
    mine = pair.target.sequence(caches[0], 0, new[0], params, 2, len(text))
    its = pair.drafter.sequence(caches[1], 0, new[1], params, 2, len(text))
    drafter = library().ModelDrafter(pair.drafter._engine, [its], [int(policy.draft_noise)])
    made, _ = pair.target.decode([mine], drafter, [count], steps, own=[isinstance(policy, SampleMatch)])
    assert len(made) == steps
    done = [Made(step.drafts[0], step.accepted[0], step.next[0], step.computed[0]) for step in made]
    gained = sum(each.accepted + 1 for each in done)
    caches[0].keep(0, list(range(len(new[0]) + gained - 1)))
    caches[1].keep(0, list(range(len(new[1]) + gained - (2 if done[-1].accepted == count else 1))))
    return done


def several_steps(pair: Pair, params: SamplingParams, policy: AcceptancePolicy, count: int, calls: list[int]) -> Any:
    """Decode, and return all steps; calls[i]: steps in the i-th call."""
    caches = pair.target.new_cache(1, 120), pair.drafter.new_cache(1, 120)
    text, done = list(PROMPT), list[Any]()
    for steps in calls:
        found = call(pair, caches, text, params, policy, count, steps)
        text += [token for each in found for token in as_said(each)]
        done += found
    return done


def one_by_one(pair: Pair, params: SamplingParams, policy: AcceptancePolicy, count: int, steps: int) -> Iterator[Any]:
    """Decode step by step: a chain, a forward pass over it, and the rule of policies.py in torch.

    Yields each step's draft, how many of its tokens are accepted, and the token after them.
    """
    caches = pair.target.new_cache(1, 120), pair.drafter.new_cache(1, 120)
    source: RandomSource = GreedySource() if params.greedy else KeyedSource()
    text = list(PROMPT)
    for _ in range(steps):
        new = [text[cache.lengths[0] :] for cache in caches]
        drawn, draft_probs = draft_chain(
            pair.drafter, caches[1], 0, new[1], count, params, sample=2, position=len(text), noise=policy.draft_noise
        )
        wanted = range(len(new[0]) - 1, len(new[0]) + count)
        logits = pair.target.step(caches[0], [new[0] + drawn], wanted=wanted).logits
        assert logits is not None
        probs = probabilities(logits, [params] * len(logits))[None]
        draft = phase5.drafting.Draft(torch.tensor([drawn]), None if params.greedy else draft_probs[None], [count])
        keys = torch.tensor([count]), torch.tensor([[params.seed, 2]]), torch.tensor([len(text)])
        verdict = policy.verify(draft, TargetProbs(probs, probs), phase5.DraftRows(*keys, source))
        accepted, following = int(verdict.accepted), int(verdict.next_tokens)
        yield drawn, accepted, following
        text += [*drawn[:accepted], following]
        caches[0].keep(0, list(range(len(new[0]) + accepted)))
        caches[1].keep(0, list(range(len(new[1]) + min(accepted, count - 1))))


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("count", [1, 4])
def test_several_steps_in_a_call_are_single_ones_and_those_of_torch(
    pair: Pair, way: str, policy: str, count: int
) -> None:
    params, rule, steps = WAYS[way], POLICIES[policy], 12
    expected = list(one_by_one(pair, params, rule, count, steps))
    accepted = [each[1] for each in expected]
    assert 0 < sum(accepted) < count * steps, "drafts that are all accepted, or all rejected, prove little"
    for calls in ([1] * steps, [steps], [1, 5, 2, 4]):
        done = several_steps(pair, params, rule, count, calls)
        assert [(each.draft, each.accepted, each.next) for each in done] == expected
        assert {each.computed for each in done[1:]} == {1 + count}  # accepted tokens are in the cache already


def law(model: Transformer) -> Tensor:
    """Return the probability [V, V] of the first two tokens after the prompt."""
    V, prompt = model.config.vocab_size, [1, 2, 3]
    with torch.inference_mode():
        first = model(torch.tensor([prompt]))[0, -1].double().softmax(-1)
        second = model(torch.tensor([[*prompt, token] for token in range(V)]))[:, -1].double().softmax(-1)
    both: Tensor = first[:, None] * second
    return both


def chances(small: Pair, verdict: Callable[[Any], list[int]], policy: str = "rejection", seeds: int = 4000) -> float:
    """Return the chi-square p-value of samples of the first two tokens under the target's distribution."""
    V, rule = small.model.config.vocab_size, POLICIES[policy]
    seen = torch.zeros(V, V)
    caches = small.target.new_cache(1, 16), small.drafter.new_cache(1, 16)
    for seed in range(seeds):
        found: list[int] = []
        for cache in caches:
            cache.truncate(0, 0)
        for each in call(small, caches, [1, 2, 3], SamplingParams(temperature=1.0, seed=seed), rule, 2, 2):
            found += verdict(each)
        seen[found[0], found[1]] += 1
    expected = law(small.model).flatten() * seeds
    common = expected >= 5  # rarer cells are merged
    observed = [*seen.flatten()[common].tolist(), float(seen.flatten()[~common].sum())]
    wanted = [*expected[common].tolist(), float(expected[~common].sum())]
    scale = sum(observed) / sum(wanted)
    return float(stats.chisquare(observed, [each * scale for each in wanted]).pvalue)


def as_said(step: Any) -> list[int]:
    return [*step.draft[: step.accepted], step.next]


def test_each_sequence_of_a_call_has_its_own_rule(pair: Pair) -> None:
    """Of one text, each with another rule or purpose: the steps are those of calls of their own."""
    params = SamplingParams(temperature=1.0, seed=3)
    policies: list[AcceptancePolicy] = [Rejection(), SampleMatch(Purpose.SAMPLE), SampleMatch(Purpose.DRAFT)]
    target, draft = (model.new_cache(3, 120) for model in (pair.target, pair.drafter))
    mine = [pair.target.sequence(target, row, PROMPT, params, 2) for row in range(3)]
    its = [pair.drafter.sequence(draft, row, PROMPT, params, 2) for row in range(3)]
    drafter = library().ModelDrafter(pair.drafter._engine, its, [int(policy.draft_noise) for policy in policies])
    made, _ = pair.target.decode(mine, drafter, [3] * 3, 6, own=[isinstance(each, SampleMatch) for each in policies])
    together = [
        [Made(step.drafts[row], step.accepted[row], step.next[row], step.computed[row]) for step in made]
        for row in range(3)
    ]
    assert together == [several_steps(pair, params, policy, 3, [6]) for policy in policies]
    assert together[0] != together[1] != together[2] != together[0]


@pytest.mark.parametrize(
    "policy", ["rejection", *(pytest.param(name, marks=pytest.mark.slow) for name in ("coupled", "longest_prefix"))]
)
def test_two_tokens_are_distributed_as_the_targets(small: Pair, policy: str) -> None:
    assert chances(small, as_said, policy) > 1e-4


@pytest.mark.slow
def test_the_law_is_tested(small: Pair) -> None:
    """The test detects a rule that accepts every token, and one that accepts the first rejected token."""
    assert chances(small, lambda step: [*step.draft, step.next]) < 1e-4
    assert chances(small, lambda step: [*step.draft[: step.accepted + 1], step.next]) < 1e-4


@pytest.mark.parametrize("own", [12, pytest.param(20, marks=pytest.mark.slow)])
def test_a_draft_of_another_width_keeps_the_targets_law(small: Pair, own: int) -> None:
    near = copy.deepcopy(small.near)
    fit_vocabulary(near, own)
    near.head.register_parameter("bias", None)
    with torch.no_grad():
        extra = near.head.weight[16:]
        extra.copy_(torch.randn(extra.shape, generator=torch.Generator().manual_seed(3)) * 0.2)
    fit_vocabulary(near, 16)
    padded = small._replace(near=near, drafter=cpp.CppModel(near, "float32", 1))
    cache = padded.drafter.new_cache(1, 16)
    tokens, probs = draft_chain(padded.drafter, cache, 0, [1, 15, 3], 8, SamplingParams(temperature=1.0))
    assert max(tokens) < min(own, 16)
    assert not probs[:, own:].any()
    torch.testing.assert_close(probs[0], near(torch.tensor([[1, 15, 3]]))[0, -1].softmax(-1), rtol=1e-4, atol=1e-6)
    assert chances(padded, as_said) > 1e-4


def plain_text(pair: Pair, params: SamplingParams, ending: Ending) -> Sequence:
    sequence = Sequence(PROMPT, params, ending)
    for _ in decode(runners(pair, 120)[0], None, [sequence], multi_step=multi_step):
        pass
    return sequence


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_that_ends_within_a_call_ends_as_in_plain_decoding(pair: Pair, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, max_new_tokens=60, seed=4)
    whole = plain_text(pair, params, Ending()).tokens
    target, drafter = runners(pair, 120)
    policy = SampleMatch(Purpose.SAMPLE)
    source: RandomSource = GreedySource() if params.greedy else KeyedSource()
    for at in (1, 9, 10, 11, 12, 13):
        ending = Ending(eos_ids=(whole[at],))
        expected = plain_text(pair, params, ending)
        sequence = Sequence(PROMPT, params, ending)  # the same runners again: their rows are free for the next sequence
        drafting = FastModelDrafter(drafter, source, policy.draft_noise)
        steps = list(decode(target, drafting, [sequence], policy, lambda: FixedController(4), source, multi_step))
        assert (sequence.tokens, sequence.finish_reason) == (expected.tokens, "eos")
        assert sum(stats.emitted for step in steps for stats in step.stats) == len(expected.tokens)
        assert len(target.manager.rows) == len(drafter.manager.rows) == 0
        assert target.cache.lengths == drafter.cache.lengths == [0]


@pytest.mark.parametrize("k", [3, 7, 30])
@pytest.mark.parametrize("limit", [1, 2, 5, 8, 9])
def test_near_the_token_limit(pair: Pair, k: int, limit: int) -> None:
    params = SamplingParams(max_new_tokens=limit)
    target, drafter = runners(pair, len(PROMPT) + limit)
    sequence = Sequence(PROMPT, params, Ending())
    drafting = FastModelDrafter(drafter, GreedySource())
    steps = list(decode(target, drafting, [sequence], Rejection(), lambda: FixedController(k), None, multi_step))
    assert sequence.tokens == plain_text(pair, params, Ending()).tokens
    assert all(stats.k < limit for step in steps for stats in step.stats)


@pytest.mark.parametrize("k", [3, pytest.param(7, marks=pytest.mark.slow)])
def test_near_the_context(pair: Pair, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near the end of the context steps are made one by one, and a jump of the window loses no token."""
    context = pair.model.config.context
    params = SamplingParams(max_new_tokens=60)
    calls: list[int] = []
    together, single = cpp.CppModel.decode, phase5.speculative.decode_step

    def noting(self: cpp.CppModel, batch: Any, drafter: Any, counts: list[int], steps: int, **more: Any) -> Any:
        calls.append(steps)
        return together(self, batch, drafter, counts, steps, **more)

    def one(*arguments: Any) -> Any:
        calls.append(0)
        return single(*arguments)

    begin = CppRunner.begin

    def within(self: CppRunner, sequences: list[Sequence], more: list[int], *states: Any) -> Any:
        assert all(each.length + count <= context for each, count in zip(sequences, more, strict=True))
        return begin(self, sequences, more, *states)

    monkeypatch.setattr(cpp.CppModel, "decode", noting)
    monkeypatch.setattr(CppRunner, "begin", within)
    monkeypatch.setattr("phase5.speculative.decode_step", one)
    for length in range(context - 46, context + 3, 8):
        prompt = torch.randint(1, 300, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        expected, sequence = Sequence(prompt, params, Ending()), Sequence(prompt, params, Ending())
        for _ in decode(runners(pair, length + 60)[0], None, [expected], multi_step=multi_step):
            pass
        target, drafter = runners(pair, length + 60)
        drafting = FastModelDrafter(drafter, GreedySource())
        for _ in decode(target, drafting, [sequence], Rejection(), lambda: FixedController(k), None, multi_step):
            pass
        assert sequence.tokens == expected.tokens
    assert 0 in calls
    assert max(calls) > 1
