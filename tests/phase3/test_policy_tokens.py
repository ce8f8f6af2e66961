"""Token for token: `coupled` and `longest_prefix` equal plain sampling; at temperature 0 others do too."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import phase1
import phase2
import phase3
from common.philox import Purpose
from common.prompts import load_prompts

CPU = torch.device("cpu")
TEMPERATURES = [0.5, 1.0, 1.5]
OWN = ["coupled", "longest_prefix"]
STRICT: dict[str, Callable[[], Any]] = {  # not for greedy decoding; `typical` accepts near ties in all cases
    "rejection": lambda: phase3.make_policy("rejection"),
    "coupled": lambda: phase3.make_policy("coupled"),
    "longest_prefix": lambda: phase3.make_policy("longest_prefix"),
    "conf_threshold, tau = 1": lambda: phase3.ConfThreshold(1.0),
    "conf_threshold, tau just above a half": lambda: phase3.ConfThreshold(0.51),  # no second token can be as likely
    "topk_agree, k = 1": lambda: phase3.TopkAgree(1),
}
CONTROLLERS: dict[str, Callable[[], Any]] = {
    **{f"fixed {k}": lambda k=k: phase3.FixedController(k) for k in range(1, 9)},  # type: ignore[misc]
    "adaptive": lambda: phase3.AdaptiveController(2, phase3.Bounds(1, 8), 0.5),
    "confidence": lambda: phase3.ConfidenceController(phase3.Bounds(1, 8), 0.3),
    "cost": lambda: phase3.CostController(phase3.Bounds(1, 8)),  # its K depends on the clock and differs between runs
}


class Pair:
    """The embedded models, and prompts for them."""

    def __init__(self) -> None:
        self.target = phase3.load("stdlib-10m", torch.float32, CPU)
        self.draft = phase3.load("stdlib-1m", torch.float32, CPU)

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Return the last tokens of the first prompts, which are short for speed."""
        return [self.target.tokenizer.encode(prompt.text)[-length:] for prompt in load_prompts("code")[:count]]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


def make_drafter(name: str, model: Any, draft: Any, source: Any, noise: Purpose) -> Any:
    if name == "ngram":
        return phase3.NgramDrafter(1, 3)
    if name == "extrapolate":
        return phase3.ExtrapolateDrafter(model, source, noise, alpha=0.5)
    return phase3.ModelDrafter(draft, source, noise)


def speculate(
    model: Any,
    draft: Any,
    prompts: list[list[int]],
    params: Any,
    ending: Any,
    policy: Any,
    controller: Callable[[], Any],
    drafter: str = "model",
    samples: list[int] | None = None,
) -> tuple[list[Any], list[Any]]:
    """Decode; return the finished sequences, and the stats of all their steps."""
    source = phase3.GreedySource() if params.greedy else phase3.KeyedSource()
    guess = make_drafter(drafter, model, draft, source, policy.draft_noise)
    numbers = samples or [0] * len(prompts)
    sequences = [phase3.Sequence(p, params, ending, s) for p, s in zip(prompts, numbers, strict=True)]
    steps = phase3.decode(model, guess, sequences, policy, controller, source)
    return sequences, [stats for step in steps for stats in step.stats]


@pytest.fixture(scope="module")
def plain(pair: Pair) -> Callable[..., list[list[int]]]:
    """Decode plainly, with phase 1."""
    loaded = phase1.load("stdlib-10m", torch.float32, CPU)

    @cache
    def write(temperature: float, count: int, length: int, tokens: int) -> list[list[int]]:
        params = phase1.SamplingParams(temperature=temperature, max_new_tokens=tokens, seed=7)
        prompts, batch = pair.prompts(count, length), 20
        parts = [prompts[start : start + batch] for start in range(0, count, batch)]
        return [done.tokens for part in parts for done in phase1.generate(loaded.model, part, params, loaded.ending)]

    return write


def test_plain_decoding_is_the_same_in_every_phase(pair: Pair, plain: Callable[..., list[list[int]]]) -> None:
    for phase, model in ((phase2, phase2.load("stdlib-10m", torch.float32, CPU).model), (phase3, pair.target.model)):
        params = phase.SamplingParams(temperature=1.0, max_new_tokens=16, seed=7)
        done = phase.generate(model, pair.prompts(4, 16), params, phase.Ending(pair.target.ending.eos_ids))
        assert [generation.tokens for generation in done] == plain(1.0, 4, 16, 16)


@pytest.mark.covering(1)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(
    "how",
    [
        *[("coupled", "model", name) for name in ("fixed 4", "adaptive", "cost")],
        *[("longest_prefix", "model", name) for name in ("fixed 4", "confidence")],
        *[
            pytest.param(("coupled", "model", name), marks=pytest.mark.slow)
            for name in ("fixed 1", "fixed 8", "confidence")
        ],
        *[("coupled", drafter, "adaptive") for drafter in ("ngram", "extrapolate")],
    ],
    ids=", ".join,
)
def test_own_choices_write_what_plain_sampling_writes(
    pair: Pair, plain: Callable[..., list[list[int]]], how: tuple[Any, str, str], temperature: float
) -> None:
    """200 prompts, all K, in the slow test; here 4."""
    policy, drafter, controller = how
    params = phase3.SamplingParams(temperature=temperature, max_new_tokens=16, seed=7)
    sequences, steps = speculate(
        pair.target.model, pair.draft.model, pair.prompts(4, 16), params, pair.target.ending,
        phase3.make_policy(policy), CONTROLLERS[controller], drafter,
    )  # fmt: skip
    assert [sequence.tokens for sequence in sequences] == plain(temperature, 4, 16, 16)
    assert sum(stats.accepted for stats in steps) > 0


@pytest.mark.slow
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(
    ("policy", "k"),
    [
        ("coupled", 1),
        ("coupled", 4),
        ("longest_prefix", 4),
        *[pytest.param("coupled", k, marks=pytest.mark.slow) for k in (2, 3, 5, 6, 7, 8)],
    ],
)
def test_own_choices_write_what_plain_sampling_writes_on_200_prompts(
    pair: Pair, plain: Callable[..., list[list[int]]], policy: Any, k: int, temperature: float
) -> None:
    """The last 32 tokens of every prompt, 24 new ones, in batches of 20."""
    params = phase3.SamplingParams(temperature=temperature, max_new_tokens=24, seed=7)
    prompts, expected = pair.prompts(200, 32), plain(temperature, 200, 32, 24)
    for start in range(0, 200, 20):
        sequences, _ = speculate(
            pair.target.model, pair.draft.model, prompts[start : start + 20], params, pair.target.ending,
            phase3.make_policy(policy), CONTROLLERS[f"fixed {k}"],
        )  # fmt: skip
        assert [sequence.tokens for sequence in sequences] == expected[start : start + 20]


@pytest.mark.parametrize("name", list(STRICT))
def test_greedy_equals_phase_1(pair: Pair, plain: Callable[..., list[list[int]]], name: str) -> None:
    """100 prompts in the slow test; here 4."""
    params = phase3.SamplingParams(max_new_tokens=16, seed=7)
    sequences, steps = speculate(
        pair.target.model, pair.draft.model, pair.prompts(4, 16), params, pair.target.ending, STRICT[name](),
        CONTROLLERS["confidence"],
    )  # fmt: skip
    assert [sequence.tokens for sequence in sequences] == plain(0.0, 4, 16, 16)
    assert (sum(stats.accepted for stats in steps) > 0) == (name != "conf_threshold, tau = 1")


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["model", "ngram", "extrapolate"])
@pytest.mark.parametrize("name", list(STRICT))
def test_greedy_equals_phase_1_on_100_prompts(
    pair: Pair, plain: Callable[..., list[list[int]]], name: str, drafter: str
) -> None:
    params = phase3.SamplingParams(max_new_tokens=24, seed=7)
    prompts, expected = pair.prompts(100, 32), plain(0.0, 100, 32, 24)
    for start in range(0, 100, 20):
        sequences, _ = speculate(
            pair.target.model, pair.draft.model, prompts[start : start + 20], params, pair.target.ending,
            STRICT[name](), CONTROLLERS["fixed 4"], drafter,
        )  # fmt: skip
        assert [sequence.tokens for sequence in sequences] == expected[start : start + 20]


requests = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(0, 39), min_size=1, max_size=90),
        "eos": st.sets(st.integers(0, 39), max_size=3),
        "limit": st.integers(1, 40),
        "agreement": st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        "drafter": st.sampled_from(["model", "ngram", "extrapolate"]),
        "controller": st.sampled_from(list(CONTROLLERS)),
    }
)


def check_request(request: dict[str, Any], policy: Any, **params: Any) -> None:
    """Prompts beyond the context of 64, ends anywhere in a block, any limit, drafter and controller."""
    model, draft = phase3.FakeModel(40, 64), phase3.FakeModel(40, 64, request["agreement"])
    given_params = phase3.SamplingParams(**params, max_new_tokens=request["limit"])
    ending = phase3.Ending(tuple(request["eos"]))
    expected = phase3.generate(model, [request["prompt"]], given_params, ending)[0]
    (sequence,), steps = speculate(
        model, draft, [request["prompt"]], given_params, ending, policy, CONTROLLERS[request["controller"]],
        request["drafter"],
    )  # fmt: skip
    assert sequence.tokens == expected.tokens
    assert sequence.finish_reason == expected.finish_reason
    assert sum(stats.emitted for stats in steps) == len(expected.tokens)
    assert all(stats.accepted <= stats.depth <= stats.proposed <= stats.k for stats in steps)


@given(
    request=requests, policy=st.sampled_from(OWN), temperature=st.sampled_from(TEMPERATURES), seed=st.integers(0, 99)
)
@settings(max_examples=50)
def test_own_choices_equal_plain_sampling_whatever_the_request(
    request: dict[str, Any], policy: Any, temperature: float, seed: int
) -> None:
    check_request(request, phase3.make_policy(policy), temperature=temperature, seed=seed)


@given(request=requests, name=st.sampled_from(list(STRICT)))
@settings(max_examples=50)
def test_greedy_equals_plain_whatever_the_request(request: dict[str, Any], name: str) -> None:
    check_request(request, STRICT[name]())


@pytest.mark.parametrize("policy", ["rejection", "coupled", "typical"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("count", [16, pytest.param(30, marks=pytest.mark.slow)])
def test_ragged_batches_equal_single_runs(policy: Any, temperature: float, count: int) -> None:
    """Rows draft different numbers of tokens, with n-grams and with a model, past the context, with stops."""
    model, draft = phase3.FakeModel(40, 64), phase3.FakeModel(40, 64, 0.7)
    params = phase3.SamplingParams(temperature=temperature, max_new_tokens=count, seed=4)
    prompts, samples = [[1], [5, 6, 7, 8, 9], [30] * 70, [2, 2], [1]], [0, 0, 0, 0, 1]
    for drafter, controller in (("model", "confidence"), ("ngram", "adaptive"), ("extrapolate", "fixed 3")):

        def run(rows: slice, drafter: str = drafter, controller: str = controller) -> list[list[int]]:
            sequences, _ = speculate(
                model, draft, prompts[rows], params, phase3.Ending((3, 17)), phase3.make_policy(policy),
                CONTROLLERS[controller], drafter, samples[rows],
            )  # fmt: skip
            return [sequence.tokens for sequence in sequences]

        together = run(slice(0, 5))
        assert together == [run(slice(row, row + 1))[0] for row in range(5)]
        assert temperature == 0 or together[0] != together[4]


def test_own_choices_stay_the_same_when_the_drafter_has_noise_of_its_own() -> None:
    """The output does not depend on the coupling; acceptance does."""
    model, draft = phase3.FakeModel(40, 2048), phase3.FakeModel(40, 2048, 0.8)
    params, policy = phase3.SamplingParams(temperature=1.0, max_new_tokens=400), phase3.make_policy("coupled")
    source = phase3.KeyedSource()
    rates, texts = [], []
    for noise in (Purpose.SAMPLE, Purpose.DRAFT):
        sequence = phase3.Sequence([1], params, phase3.Ending())
        drafter = phase3.ModelDrafter(draft, source, noise)
        steps = phase3.decode(model, drafter, [sequence], policy, CONTROLLERS["fixed 2"], source)
        stats = [step.stats[0] for step in steps]
        rates.append(sum(s.accepted for s in stats) / sum(s.proposed for s in stats))
        texts.append(sequence.tokens)
    assert texts[0] == texts[1]
    assert rates[1] < 0.8 * rates[0]
