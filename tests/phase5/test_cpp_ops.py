"""Sampling, acceptance, drafting and generation in C++: the tokens of the torch path."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from common.philox import Purpose, uniforms
from phase5 import load, sampling
from phase5.kernels import cpp
from phase5.model import Transformer
from phase5.sampling import KeyedSampler, SamplingParams, choose
from phase5.verify import GreedySource, KeyedSource, verify
from tests.support.cpp import cpp_probabilities, draft_chain, generate_plain

pytestmark = pytest.mark.skipif(cpp.why_not() is not None, reason=str(cpp.why_not()))

WAYS = (
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=3),
    SamplingParams(temperature=0.7, seed=-5),
    SamplingParams(temperature=1.3, top_k=7, seed=2**40 + 1),
    SamplingParams(temperature=1.0, top_p=0.8, seed=1),
    SamplingParams(temperature=1.0, min_p=0.1),
    SamplingParams(temperature=0.9, top_k=20, top_p=0.9, min_p=0.02),
)


def logits_of(rows: int, vocab: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    return sampling.probabilities(logits, [params] * len(logits))


def test_uniforms_are_those_of_philox() -> None:
    for seed in (0, 7, 2**63 + 5):
        expected = uniforms(seed, torch.tensor([9]), torch.tensor([31]), Purpose.ACCEPT, 11)[0]
        got = [cpp.library().uniform(seed, 9, 31, int(Purpose.ACCEPT), index) for index in range(11)]
        assert got == expected.tolist()


@pytest.mark.parametrize("params", WAYS, ids=str)
@pytest.mark.parametrize("vocab", [5, 123, 4096])
@pytest.mark.parametrize("isa", ["", "avx2", "portable"])
def test_the_same_distribution_and_the_same_token(
    params: SamplingParams, vocab: int, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isa:
        if not cpp.has_isa(isa):
            pytest.skip(f"this processor lacks {isa}")
        monkeypatch.setenv("SPECDEC_CPU_ISA", isa)
    logits = logits_of(40, vocab)
    torch.testing.assert_close(cpp_probabilities(logits, params), probabilities(logits, params), rtol=2e-6, atol=1e-7)
    keys, positions, texts = [(params.seed, at) for at in range(40)], [3 * at + 1 for at in range(40)], [[1, 2]] * 40
    arguments: Any = logits, [params] * 40, KeyedSampler(), keys, positions, texts, texts
    assert cpp.sample(*arguments) == choose(*arguments)


@pytest.fixture(params=["", "avx2", "portable"])
def _isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        if not cpp.has_isa(request.param):
            pytest.skip(f"this processor lacks {request.param}")
        monkeypatch.setenv("SPECDEC_CPU_ISA", request.param)


@pytest.mark.usefixtures("_isa")
@pytest.mark.parametrize("vocab", [1, 17, 300])
def test_the_same_tokens_are_kept_where_logits_are_equal(vocab: int) -> None:
    choose = random.Random(vocab)
    for seed in range(60):
        logits = (logits_of(8, vocab, seed) * choose.choice([0.1, 0.5, 1])).round()
        params = SamplingParams(
            temperature=choose.choice([0.7, 1.0, 1.9]),
            top_k=choose.choice([0, 1, 2, 7, vocab // 2, vocab + 1]),
            top_p=choose.choice([1.0, 0.93, 0.61, 0.37, 1e-9]),
            min_p=choose.choice([0.0, 0.013, 0.3]),
        )
        kept = cpp_probabilities(logits, params) > 0
        assert torch.equal(kept, probabilities(logits, params) > 0), params


@pytest.mark.usefixtures("_isa")
def test_what_is_impossible_has_probability_zero() -> None:
    logits = torch.tensor([[0.0, -1.0, -200.0, -5000.0, -80.0, -float("inf")] + [-300.0] * 30])
    for params in (SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, min_p=1e-30)):
        found, expected = cpp_probabilities(logits, params), probabilities(logits, params)
        assert torch.equal(found > 0, expected > 0)
        assert found[0, 2:4].tolist() == [0, 0]


@pytest.mark.usefixtures("_isa")
def test_tokens_exactly_at_the_edge_of_a_filter() -> None:
    """With four tokens of probability 1/4, top_p = 0.5 keeps two of them; min_p = 1 keeps all of the most likely."""
    equal = torch.zeros(1, 4)
    for params, count in (
        (SamplingParams(temperature=1.0, top_p=0.5), 2),
        (SamplingParams(temperature=1.0, min_p=1.0), 4),
    ):
        for found in (cpp_probabilities(equal, params), probabilities(equal, params)):
            assert found[0].tolist() == [1 / count] * count + [0] * (4 - count)


def test_any_number_of_tokens_may_be_kept() -> None:
    logits = logits_of(3, 40)
    for top_k in (2**31 - 1, 5_000_000_000, 10**30):
        params = [SamplingParams(temperature=1.0, top_k=top_k)] * 3
        keys: Any = [(0, 0), (0, 1), (0, 2)], [4, 5, 6], [[1]] * 3, [[]] * 3
        assert cpp.sample(logits, params, KeyedSampler(), *keys) == choose(logits, params, KeyedSampler(), *keys)


def test_penalties_and_other_randomness_are_kept() -> None:
    logits = logits_of(4, 50)
    params = [SamplingParams(temperature=0.8, repetition_penalty=1.5, frequency_penalty=0.5, seed=4)] * 4
    keys = [(4, 0), (4, 1), (4, 2), (4, 3)]
    arguments = (keys, [5, 6, 7, 8], [[1, 2], [3], [4], [5]], [[1, 1], [9], [8], [7, 7, 7]])
    keyed = KeyedSampler()
    assert cpp.sample(logits, params, keyed, *arguments) == choose(logits, params, keyed, *arguments)

    class Last:
        def draw(self, probs: Tensor, keys: Tensor, positions: Tensor, purpose: Purpose) -> Tensor:
            return torch.full((len(probs),), 49)

    assert cpp.sample(logits, [SamplingParams(temperature=1.0)] * 4, Last(), *arguments) == [49] * 4


Sample = Callable[..., list[int]]


def of_the_first(name: str) -> Sample:
    """Wrong: every row has this parameter of row 0."""

    def wrong(logits: Tensor, params: list[SamplingParams], *rest: Any) -> list[int]:
        own = [dataclasses.replace(each, **{name: getattr(params[0], name)}) for each in params]
        return cpp.sample(logits, own, *rest)

    return wrong


def seed_of_the_first(logits: Tensor, params: Any, sampler: Any, keys: Any, *rest: Any) -> list[int]:
    return cpp.sample(logits, params, sampler, [(keys[0][0], number) for _, number in keys], *rest)


def sample_of_the_first(logits: Tensor, params: Any, sampler: Any, keys: Any, *rest: Any) -> list[int]:
    return cpp.sample(logits, params, sampler, [(seed, keys[0][1]) for seed, _ in keys], *rest)


def draws_greedy_rows(logits: Tensor, params: list[SamplingParams], *rest: Any) -> list[int]:
    own = [dataclasses.replace(each, temperature=each.temperature or 1.0) for each in params]
    return cpp.sample(logits, own, *rest)


def check_different_requests(sample: Sample) -> None:
    """Check that rows with their own parameters, keys and texts are those of the reference, and the rows alone."""
    penalised = (
        SamplingParams(temperature=0.8, presence_penalty=2.0),
        SamplingParams(temperature=0.8, frequency_penalty=2.0),
        SamplingParams(temperature=0.8, repetition_penalty=2.0),
    )
    for ways in (WAYS, (*WAYS, *penalised, SamplingParams(repetition_penalty=2.0))):
        params = [WAYS[1], *ways, *reversed(ways)] * 3  # row 0 has no filter and no penalty
        R = len(params)
        keys, positions = [(way.seed, row % 3) for row, way in enumerate(params)], [7 * row for row in range(R)]
        for vocab in (5, 123, 4096):
            logits = logits_of(R, vocab, 3)
            likeliest = logits.argmax(-1).tolist()  # a penalty for it matters most
            prompts, outputs = [[token, 1] for token in likeliest], [[token] * 3 for token in likeliest]

            together = sample(logits, params, KeyedSampler(), keys, positions, prompts, outputs)
            assert together == choose(logits, params, KeyedSampler(), keys, positions, prompts, outputs)
            alone = list[int]()
            for row, *own in zip(logits[:, None], params, keys, positions, prompts, outputs, strict=True):
                mine, *rest = ([each] for each in own)
                alone += sample(row, mine, KeyedSampler(), *rest)
            assert together == alone


@pytest.mark.usefixtures("_isa")
def test_rows_of_different_requests_are_those_alone() -> None:
    check_different_requests(cpp.sample)


PARAMETERS = ("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


@pytest.mark.parametrize(
    "wrong", [*map(of_the_first, PARAMETERS), seed_of_the_first, sample_of_the_first, draws_greedy_rows]
)
def test_mixed_up_requests_are_found_out(wrong: Sample) -> None:
    with pytest.raises(AssertionError):
        check_different_requests(wrong)


def test_every_row_needs_its_own() -> None:
    logits, way, key = logits_of(2, 5), SamplingParams(temperature=1.0), (0, 0)
    for params, keys, positions in (
        ([way], [key] * 2, [0] * 2),
        ([way] * 2, [key], [0] * 2),
        ([way] * 3, [key] * 3, [0] * 3),
    ):
        with pytest.raises(ValueError, match="for 2 rows"):
            cpp.sample(logits, params, KeyedSampler(), keys, positions, [[]] * 2, [[]] * 2)


def test_noise_is_distributed_as_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    count = 20_000
    tokens = cpp.sample(
        logits.expand(count, 5),
        [SamplingParams(temperature=1.0)] * count,
        KeyedSampler(),
        [(0, 0)] * count,
        list(range(count)),
        [[]] * count,
        [[]] * count,
    )
    frequencies = torch.bincount(torch.tensor(tokens), minlength=5) / count
    torch.testing.assert_close(frequencies, logits.softmax(-1), rtol=0, atol=0.015)


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("vocab", [6, 321])
def test_the_rule_of_acceptance(one_hot: bool, vocab: int) -> None:
    rows, K = 300, 5
    draft_probs = (logits_of(rows * K, vocab, 1) / 2).softmax(-1).view(rows, K, vocab)
    target_probs = (logits_of(rows * (K + 1), vocab, 2) / 2).softmax(-1).view(rows, K + 1, vocab)
    # Half of each draft distribution is the target's, so that several tokens are accepted.
    draft_probs = (draft_probs * 0.3 + target_probs[:, :K] * 0.7).contiguous()
    seeds = torch.tensor([11, -5, 2**40 + 1])[torch.arange(rows) % 3]
    keys = torch.stack((seeds, torch.arange(rows)), 1), torch.arange(rows) * 7
    tokens = torch.stack([draft_probs[:, k].argmax(-1) for k in range(K)], 1)
    widths = torch.arange(rows) % (K + 1)
    arguments: Any = (tokens, None if one_hot else draft_probs, target_probs, widths, *keys, KeyedSource())
    expected = verify(*arguments)
    got = cpp.verify_sample(*arguments)
    assert torch.equal(got.accepted, expected.accepted)
    assert torch.equal(got.next_tokens, expected.next_tokens)
    counted = torch.arange(K) < widths[:, None]
    torch.testing.assert_close(got.ratios[counted], expected.ratios[counted])
    assert 0 < int(got.accepted.sum()) < int(widths.sum())
    for row in range(6):
        alone: Any = [each[row : row + 1] if isinstance(each, torch.Tensor) else each for each in arguments]
        verdict = cpp.verify_sample(*alone)
        assert (verdict.accepted[0], verdict.next_tokens[0]) == (got.accepted[row], got.next_tokens[row])
    first = torch.stack((seeds[0].expand(rows), torch.arange(rows)), 1)  # a mutant: the seed of row 0 for all
    mutated: Any = (*arguments[:4], first, *arguments[5:])
    mutant = cpp.verify_sample(*mutated)
    assert not torch.equal(mutant.accepted, got.accepted)


def test_certain_verification() -> None:
    target = torch.eye(7)[torch.tensor([[1, 2, 3, 4], [1, 5, 3, 4]])]
    draft = torch.tensor([[1, 2, 3], [1, 2, 3]])
    arguments = (
        draft,
        None,
        target,
        torch.tensor([3, 3]),
        torch.zeros(2, 2).long(),
        torch.zeros(2).long(),
        GreedySource(),
    )
    got, expected = cpp.verify_sample(*arguments), verify(*arguments)
    assert got.accepted.tolist() == expected.accepted.tolist() == [3, 1]
    assert got.next_tokens.tolist() == expected.next_tokens.tolist() == [4, 5]


@pytest.fixture(scope="module")
def models(llama_folder: Path) -> tuple[Transformer, cpp.CppModel]:
    model = load(str(llama_folder), torch.float32, torch.device("cpu")).model
    assert isinstance(model, Transformer)
    return model, cpp.CppModel(model, "float32", 2)


@pytest.mark.parametrize("noise", [Purpose.DRAFT, Purpose.SAMPLE])
@pytest.mark.parametrize("params", WAYS, ids=str)
def test_a_chain_is_that_of_single_steps(
    models: tuple[Transformer, cpp.CppModel], params: SamplingParams, noise: Purpose
) -> None:
    """Return the tokens that chains.py draws from the same logits, and their distributions."""
    _, fast = models
    prompt, K = [5, 9, 200, 31], 6
    cache = fast.new_cache(1, 64)
    drawn, probs = draft_chain(fast, cache, 0, prompt, K, params, sample=2, position=40, noise=noise)
    single = fast.new_cache(1, 64)
    text, source = list(prompt), GreedySource() if params.greedy else KeyedSource()
    new = list(prompt)
    for at in range(K):
        logits = fast.step(single, [new]).logits
        single.keep(0, list(range(len(new))))
        assert logits is not None
        of_torch = probabilities(logits, params)
        token = int(source.draw(of_torch, torch.tensor([[params.seed, 2]]), torch.tensor([40 + at]), noise))
        assert drawn[at] == token
        if params.greedy:
            assert torch.equal(probs[at], logits[0])  # the logits: a greedy draft is certain
        else:
            torch.testing.assert_close(probs[at], of_torch[0], rtol=2e-6, atol=1e-7)
        text.append(token)
        new = [token]
    cache.keep(0, list(range(len(prompt) + K - 1)))
    after, expected = fast.step(cache, [[1]]).logits, fast.step(single, [[1]]).logits
    assert after is not None
    assert cache.lengths == single.lengths
    assert expected is not None
    assert torch.equal(after, expected)


@pytest.mark.parametrize("params", WAYS, ids=str)
def test_a_whole_generation_is_that_of_single_steps(
    models: tuple[Transformer, cpp.CppModel], params: SamplingParams
) -> None:
    _, fast = models
    prompt = [5, 9, 200, 31]
    made = generate_plain(fast, fast.new_cache(1, 64), 0, prompt, 40, params, sample=1)
    single = fast.new_cache(1, 64)
    new, text = list(prompt), list(prompt)
    for token in made:
        logits = fast.step(single, [new]).logits
        assert logits is not None
        single.keep(0, list(range(len(new))))
        [expected] = choose(logits, [params], KeyedSampler(), [(params.seed, 1)], [len(text)], [prompt], [[]])
        assert token == expected
        text.append(token)
        new = [token]
    ended = generate_plain(fast, fast.new_cache(1, 64), 0, prompt, 40, params, sample=1, ends=[made[7]])
    assert ended == made[: made.index(made[7]) + 1]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_large_vocabulary_is_shared_out(threads: int) -> None:
    """The embedded draft with 4,096 tokens: threads share the noise."""
    model = load("stdlib-1m", torch.float32, torch.device("cpu")).model
    assert isinstance(model, Transformer)
    params = SamplingParams(temperature=0.9, seed=8)
    fast = cpp.CppModel(model, "bfloat16", threads)
    made = generate_plain(fast, fast.new_cache(1, 80), 0, [5, 6, 7], 60, params)
    cache, new, text = fast.new_cache(1, 80), [5, 6, 7], [5, 6, 7]
    for token in made:
        logits = fast.step(cache, [new]).logits
        assert logits is not None
        cache.keep(0, list(range(len(new))))
        assert cpp.sample(logits, [params], KeyedSampler(), [(8, 0)], [len(text)], [[]], [[]]) == [token]
        text.append(token)
        new = [token]


def test_what_the_loops_in_cpp_do_not_take(models: tuple[Transformer, cpp.CppModel]) -> None:
    _, fast = models
    with pytest.raises(UserError, match="penalties need the whole sequence"):
        generate_plain(fast, fast.new_cache(1, 8), 0, [1], 2, SamplingParams(presence_penalty=1))
    with pytest.raises(ValueError, match="at least one token of the sequence must not be cached"):
        generate_plain(fast, fast.new_cache(1, 8), 0, [], 2, SamplingParams())
    with pytest.raises(ValueError, match="no room"):
        generate_plain(fast, fast.new_cache(1, 8), 0, [1, 2], 8, SamplingParams())


def keys_of(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return keys and positions."""
    samples = torch.arange(rows)
    return torch.stack((torch.full_like(samples, seed), samples), 1), samples * 3


def drawn_by_inverse(probs: Tensor, seed: int) -> Tensor:
    """Sample a token of every row of probs [R, V] with one uniform number each, as the residual after a rejection.

    The draft token has probability 0, so it is always rejected, and the residual equals the target.
    """
    rows, vocab = probs.shape
    target = torch.zeros(rows, 2, vocab + 1)
    target[:, 0, :vocab] = probs
    draft = torch.full((rows, 1), vocab)
    got = cpp.verify_sample(draft, None, target, torch.ones(rows).long(), *keys_of(rows, seed), KeyedSource())
    assert not got.accepted.any()
    return got.next_tokens


@pytest.mark.parametrize("vocab", [5, 31, 32, 33, 64, 100, 4096])
def test_the_inverse_distribution_is_that_of_a_running_sum(vocab: int) -> None:
    rows = 400
    probs = (logits_of(rows, vocab, 5) * 2).softmax(-1)
    expected = KeyedSource().draw(probs, *keys_of(rows, 9), Purpose.RESIDUAL)
    assert torch.equal(drawn_by_inverse(probs, 9), expected)
    assert len(expected.unique()) > 3


@pytest.mark.parametrize("vocab", [40, 96, 1000])
def test_the_inverse_distribution_gives_nothing_of_probability_zero(vocab: int) -> None:
    """Rows with zeros at both ends, whole blocks of zeros, and a single token left."""
    rows = 600
    generator = torch.Generator().manual_seed(vocab)
    weights = torch.rand(rows, vocab, generator=generator)
    blocks = torch.rand(rows, vocab // 8 + 1, generator=generator) < 0.3  # of 8: so 32 in a row as well
    weights *= blocks.repeat_interleave(8, 1)[:, :vocab]
    weights[: rows // 3, vocab // 3 :] = 0
    weights[rows // 3 : rows // 2, : vocab // 2] = 0
    weights[torch.arange(rows), torch.randint(0, vocab, (rows,), generator=generator)] += 1e-30
    weights[: rows // 10] = 0
    only = torch.randint(0, vocab, (rows // 10,), generator=generator)
    weights[torch.arange(rows // 10), only] = 1e-30
    tokens = drawn_by_inverse(weights, 2)
    assert bool((weights[torch.arange(rows), tokens] > 0).all())
    assert torch.equal(tokens[: rows // 10], only)
    assert torch.equal(
        tokens[rows // 10 :],
        KeyedSource().draw(weights, *keys_of(rows, 2), Purpose.RESIDUAL)[rows // 10 :],
    )
