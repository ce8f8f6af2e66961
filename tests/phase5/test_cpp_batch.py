"""Batches in C++: each of R sequences with parameters and drafts of its own gets what it gets alone, step by step."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, NamedTuple, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import phase5
from common.errors import UserError
from common.philox import Purpose
from common.prompts import load_prompts
from phase5.config import ModelConfig
from phase5.controllers import FixedController
from phase5.cpp_runner import CppRunner
from phase5.drafters import DynamicTreeDrafter, NgramDrafter, StaticTreeDrafter
from phase5.drafters.eagle import EagleHead, EagleShape
from phase5.drafters.eagle_fast import FastEagleDrafter
from phase5.drafters.medusa import MedusaHeads, MedusaShape
from phase5.drafters.medusa_fast import FastMedusaDrafter
from phase5.drafters.model_fast import FastModelDrafter
from phase5.drafting import Brancher, Drafter, Outcome
from phase5.kernels import cpp, registry
from phase5.kv_cache import KVOptions
from phase5.model import Transformer
from phase5.multi_step import multi_step
from phase5.policies import AcceptancePolicy, Rejection, SampleMatch
from phase5.sampling import SamplingParams
from phase5.sequence import Ending, Sequence
from phase5.speculative import decode
from phase5.verify import KeyedSource
from tests.support.cpp import make_cpp_runner

pytestmark = pytest.mark.skipif(cpp.why_not() is not None, reason=str(cpp.why_not()))

Kind = Literal["static", "paged", "ring"]
DRAFTERS = ("none", "model", "eagle", "medusa", "ngram")
TREES = tuple(f"{drafter}, {shape} tree" for drafter in ("model", "eagle", "medusa") for shape in ("static", "dynamic"))
KINDS: tuple[Kind, ...] = ("static", "paged", "ring")
POLICIES: dict[str, AcceptancePolicy] = {
    "rejection": Rejection(),
    "longest_prefix": SampleMatch(Purpose.DRAFT),
    "coupled": SampleMatch(Purpose.SAMPLE),
}
WIDTH, VOCABULARY, CONTEXT = 16, 12, 64
# A small vocabulary, so that random heads sometimes guess right. A window in every layer, so that a ring can be used.
MODELS = {
    "rope": ModelConfig(
        family="llama", vocab_size=VOCABULARY, layers=2, width=WIDTH, heads=4, kv_heads=2, head_dim=6, ffn_width=20,
        context=CONTEXT, norm="rms", norm_eps=1e-5, positions="rope", activation="silu", gated=True, windows=(9,),
    ),
    "learned": ModelConfig(
        family="gpt2", vocab_size=VOCABULARY, layers=1, width=WIDTH, heads=2, kv_heads=2, head_dim=8, ffn_width=24,
        context=CONTEXT, norm="layer", norm_eps=1e-5, positions="learned", activation="gelu", gated=False,
        windows=(20,),
    ),
}  # fmt: skip


class Party(NamedTuple):
    """A target, and who drafts for it."""

    model: Transformer
    near: Transformer
    target: cpp.CppModel
    draft: cpp.CppModel
    eagle: cpp.CppEagle
    head: EagleHead
    medusa: cpp.CppMedusa


class Asked(NamedTuple):
    """One sequence of a batch, and how many tokens to draft for it."""

    prompt: list[int]
    params: SamplingParams
    k: int
    sample: int = 0
    eos: tuple[int, ...] = ()


def random_(module: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4 + (parameter.ndim == 1))
    return module.requires_grad_(False).eval()


@cache
def party(name: str) -> Party:
    config = MODELS[name]
    model = random_(Transformer(config), 0)
    near = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05
    target, draft = cpp.CppModel(model, "float32", 1), cpp.CppModel(near, "float32", 1)
    kernels = registry.choose("cpp", torch.device("cpu")).kernels
    registry.use(model, kernels)
    for policy in POLICIES.values():
        registry.use(policy, kernels)
    head = random_(EagleHead(EagleShape(ffn_width=20, reach=12, taps=(0,)), config), 2)
    heads = random_(MedusaHeads(MedusaShape(heads=4, taps=(0,), read_token=True), WIDTH), 3)
    return Party(
        model, near, target, draft, cpp.CppEagle(head, model, target), head, cpp.CppMedusa(heads, model, target)
    )


def drafter_of(of: Party, name: str, noise: Purpose, kv: KVOptions, rows: int) -> Drafter | None:
    source = KeyedSource()
    if name == "model":
        return FastModelDrafter(make_cpp_runner(of.near, of.draft, kv, rows, CONTEXT), source, noise)
    if name == "eagle":
        return FastEagleDrafter(of.eagle, of.model, of.head, source, noise)
    if name == "medusa":
        return FastMedusaDrafter(of.medusa, of.model, of.medusa.heads, source, noise)
    return NgramDrafter() if name == "ngram" else None


def tree_drafter_of(of: Party, name: str, rule: AcceptancePolicy, kv: KVOptions, rows: int) -> Drafter:
    """Make the drafter of a name such as "eagle, static tree"."""
    base = cast(Brancher, drafter_of(of, name.split(",")[0], rule.draft_noise, kv, rows))
    if "dynamic" in name:
        return DynamicTreeDrafter(base, nodes=7)
    return StaticTreeDrafter(base, [-1, -1, 0, 0, 1, 2, 5], KeyedSource(), rule.draft_noise, rule.draws_children)


class Done(NamedTuple):
    tokens: list[int]
    reason: Any
    steps: list[tuple[int, int, int, int]]  # asked, proposed, accepted, emitted


def run(
    of: Party, drafter: str, policy: str, kind: Kind, batch: list[Asked], together: bool, pages: int = 0
) -> list[Done]:
    """Decode a batch. together: several steps in one call; otherwise single ones."""
    kv, rule = KVOptions(kind, pages=pages), POLICIES[policy]
    runner = make_cpp_runner(of.model, of.target, kv, len(batch), CONTEXT)
    sequences = [Sequence(each.prompt, each.params, Ending(each.eos), each.sample) for each in batch]
    widths = iter([each.k for each in batch])
    if "tree" in drafter:
        drafting: Drafter | None = tree_drafter_of(of, drafter, rule, kv, len(batch))
    else:
        drafting = drafter_of(of, drafter, rule.draft_noise, kv, len(batch))
    several = multi_step if together else None
    steps: dict[Sequence, list[tuple[int, int, int, int]]] = {each: [] for each in sequences}
    loop = decode(runner, drafting, sequences, rule, lambda: FixedController(next(widths)), KeyedSource(), several)
    for step in loop:
        for sequence, stats in zip(step.sequences, step.stats, strict=True):
            steps[sequence].append((stats.k, stats.proposed, stats.accepted, stats.emitted))
    assert runner.manager.idle
    return [Done(each.tokens, each.finish_reason, steps[each]) for each in sequences]


def check(of: Party, drafter: str, policy: str, kind: Kind, batch: list[Asked]) -> list[Done]:
    """Each sequence of the batch gets the tokens, and the steps, that it gets alone in single steps."""
    found = run(of, drafter, policy, kind, batch, together=True)
    for each, mine in zip(batch, found, strict=True):
        (alone,) = run(of, drafter, policy, "static", [each], together=False)
        assert mine.tokens == alone.tokens
        assert mine.reason == alone.reason
        assert mine.steps == alone.steps
    return found


RAGGED = [
    Asked([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], SamplingParams(max_new_tokens=40), 3),
    Asked([2, 7], SamplingParams(temperature=1.0, seed=7, max_new_tokens=33), 4, 1),
    Asked([1, 8] * 9, SamplingParams(temperature=0.6, top_k=5, seed=-9, max_new_tokens=17), 1, 2),
    Asked([11], SamplingParams(temperature=1.3, top_p=0.8, min_p=0.02, seed=3, max_new_tokens=40), 0, 0),
    Asked([2, 7, 1, 8], SamplingParams(max_new_tokens=25), 2),
    Asked([2, 7, 1, 8], SamplingParams(temperature=0.9, seed=7, max_new_tokens=40), 3, 5),
]


@pytest.mark.covering(2)
@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("drafter", [*DRAFTERS, *TREES])
def test_a_ragged_batch_is_its_sequences(drafter: str, policy: str, kind: Kind, model: str) -> None:
    found = check(party(model), drafter, policy, kind, RAGGED)
    accepted = sum(step[2] for each in found for step in each.steps)
    rejected = sum(step[1] - step[2] for each in found for step in each.steps)
    if drafter != "none":
        assert accepted > 0 < rejected, "drafts that are all accepted, or all rejected, prove little"
    for each, one in zip(found, RAGGED, strict=True):
        if drafter == "none" or one.k == 0 or one.params.greedy or policy != "rejection":
            (plain,) = run(party(model), "none", "rejection", "static", [one._replace(k=0)], together=False)
            assert each.tokens == plain.tokens


@pytest.mark.parametrize("noise", [Purpose.DRAFT, Purpose.SAMPLE])
@pytest.mark.parametrize("drafter", ["model", "eagle", "medusa"])
def test_drafts_are_drawn_with_the_noise_of_the_policy(
    drafter: str, noise: Purpose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another noise would leave the output as it is, and have `coupled` accept less."""
    of, source = party("rope"), KeyedSource()
    drafting = drafter_of(of, drafter, noise, KVOptions(), 2)
    assert drafting is not None
    propose, drawn = drafting.propose, 0

    def checked(sequences: list[Sequence], widths: list[int], stop: Any = None) -> Any:
        nonlocal drawn
        draft = propose(sequences, widths, stop)
        for row, sequence in enumerate(sequences):
            for column in range(draft.widths[row]):
                assert draft.probs is not None
                key, position = torch.tensor([sequence.key]), torch.tensor([sequence.length + column])
                (token,) = source.draw(draft.probs[row, column][None], key, position, noise).tolist()
                assert token == draft.tokens[row, column]
                drawn += 1
        return draft

    monkeypatch.setattr(drafting, "propose", checked)
    params = [SamplingParams(temperature=1.0, seed=seed, max_new_tokens=24) for seed in (1, 2)]
    sequences = [Sequence([2, 7, seed], mine, Ending()) for seed, mine in enumerate(params)]
    runner = make_cpp_runner(of.model, of.target, KVOptions(), 2, CONTEXT)
    for _ in decode(runner, drafting, sequences, Rejection(), lambda: FixedController(3), source):
        pass
    assert drawn > 30


def test_several_steps_of_a_batch_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above would compare single steps with single steps."""
    calls = list[tuple[int, int, int]]()
    decode_ = cpp.CppModel.decode

    def noting(self: Any, batch: Any, drafter: Any, counts: list[int], steps: int, **more: Any) -> Any:
        made = decode_(self, batch, drafter, counts, steps, **more)
        calls.append((len(batch), max(counts), len(made[0])))
        return made

    monkeypatch.setattr(cpp.CppModel, "decode", noting)
    for drafter in DRAFTERS:
        calls.clear()
        run(party("rope"), drafter, "coupled", "paged", RAGGED, together=True)
        most = {"none": (6, 0, 8), "ngram": (6, 4, 1)}.get(drafter, (6, 4, 3))
        assert max(calls) >= most, drafter


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drafter", ["model", "eagle", "medusa", "none"])
def test_sequences_that_end_at_different_steps(drafter: str, kind: Kind) -> None:
    """Each of these ends with an end-of-text token, at its limit, or goes on; the others are not disturbed."""
    of, k = party("rope"), 0 if drafter == "none" else 3
    sampled = [SamplingParams(temperature=1.0, seed=seed, max_new_tokens=40) for seed in range(4)]
    batch = [Asked([5, seed], mine, k, 0, (4,)) for seed, mine in enumerate(sampled)]
    batch.append(Asked([5, 1], dataclasses.replace(sampled[1], ignore_eos=True), k, 0, (4,)))
    batch.append(Asked([5, 2], dataclasses.replace(sampled[2], max_new_tokens=2), k, 0, ()))
    for order in (batch, batch[::-1]):  # the end-of-text tokens of the first sequence may be those of all, or none
        found = check(of, drafter, "coupled", kind, order)
        assert {each.reason for each in found} == {"eos", "length"}
        assert len({len(each.tokens) for each in found}) > 3
        assert all(each.tokens[-1] == 4 and 4 not in each.tokens[:-1] for each in found if each.reason == "eos")


@pytest.mark.parametrize("options", [{"draft": "none"}, {"k": 4}, {"drafter": "eagle", "k": 4}], ids=str)
def test_a_stop_string_ends_one_sequence_of_a_batch(options: dict[str, Any]) -> None:
    chosen: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "kernels": "cpp",
        "threads": 1,
        "temperature": 1.0,
        **options,
    }
    made = phase5.LLM(phase5.Options(max_tokens=40, policy="coupled", **chosen))
    prompts = [prompt.text for prompt in load_prompts("code", "test")[:4]]
    whole = made.generate(prompts)
    stop = whole[1].text[7:12]
    ways = [dataclasses.replace(made.params, stop=(stop,) if at == 1 else ()) for at in range(4)]
    (alone,) = made.generate(prompts[1:2], ways[1])
    sequences = made.sequences(prompts, ways)
    for _ in made.run(sequences):
        pass
    assert sequences[1].finish_reason == "stop"
    assert (sequences[1].text, sequences[1].tokens) == (alone.text, alone.tokens)
    assert stop not in sequences[1].text
    for at in (0, 2, 3):
        assert sequences[at].tokens == whole[at].tokens


@pytest.mark.parametrize("drafter", ["none", "model", "eagle"])
def test_out_of_pages_in_a_call_takes_single_steps_and_then_refuses_one(
    drafter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages that several steps would need, but one does not, refuse nobody."""
    of, calls, decode_ = party("rope"), list[int](), cpp.CppModel.decode

    def noting(self: Any, batch: Any, drafter: Any, counts: list[int], steps: int, **more: Any) -> Any:
        calls.append(steps)
        return decode_(self, batch, drafter, counts, steps, **more)

    monkeypatch.setattr(cpp.CppModel, "decode", noting)
    k = 0 if drafter == "none" else 2
    params = [
        SamplingParams(temperature=1.0, seed=seed, max_new_tokens=most) for seed, most in ((1, 50), (2, 50), (3, 20))
    ]
    batch = [Asked(list(range(1, 1 + length)), mine, k) for length, mine in zip((10, 6, 3), params, strict=True)]
    whole = run(of, drafter, "coupled", "paged", batch, together=True)
    assert all(each.reason == "length" for each in whole)
    for pages in range(4, 12):
        calls.clear()
        found, single = (run(of, drafter, "coupled", "paged", batch, together, pages) for together in (True, False))
        assert [(each.tokens, each.reason) for each in found] == [(each.tokens, each.reason) for each in single], pages
        assert any(each.reason == "length" for each in found)
        for mine, all_of_it in zip(found, whole, strict=True):
            assert mine.tokens == all_of_it.tokens[: len(mine.tokens)]
            assert mine.reason == "refused" or mine.tokens == all_of_it.tokens
        refused = sum(each.reason == "refused" for each in found)
        assert refused <= 2 if pages < 8 else not refused
        assert refused or pages > 6
    alone = batch[:1]
    with pytest.raises(UserError, match="out of pages"):
        run(of, drafter, "coupled", "paged", alone, together=True, pages=3)


class Noted:
    """Notes the states that a drafter is handed."""

    def __init__(self, drafter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.states: dict[Sequence, list[torch.Tensor]] = {}
        observe = type(drafter).observe

        def noting(this: Any, outcome: Outcome) -> None:
            assert outcome.states is not None
            for sequence, states in zip(outcome.sequences, outcome.states, strict=True):
                self.states.setdefault(sequence, []).append(states)
            observe(this, outcome)

        monkeypatch.setattr(type(drafter), "observe", noting)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drafter", ["eagle", "medusa"])
def test_states_are_those_of_single_steps(drafter: str, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    of = party("rope")
    noted = Noted(drafter_of(of, drafter, Purpose.DRAFT, KVOptions(), 1), monkeypatch)
    batch = [each for each in RAGGED if each.params.max_new_tokens > 20]
    found = run(of, drafter, "rejection", kind, batch, together=True)
    together = [torch.cat(states) for states in noted.states.values()]
    for at, one in enumerate(batch):
        noted.states.clear()
        (alone,) = run(of, drafter, "rejection", "static", [one], together=False)
        assert alone.tokens == found[at].tokens
        (states,) = [torch.cat(parts) for parts in noted.states.values()]
        assert states.shape[1] == 2 * WIDTH
        assert len(states) >= len(alone.tokens) - 1
        assert torch.equal(states, together[at])


params_of = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    top_k=st.sampled_from([0, 0, 1, 4]),
    top_p=st.sampled_from([1.0, 1.0, 0.7]),
    min_p=st.sampled_from([0.0, 0.0, 0.1]),
    seed=st.integers(-(2**63), 2**63 - 1),
    max_new_tokens=st.integers(1, 30),
    ignore_eos=st.booleans(),
)
asked_of = st.builds(
    Asked,
    prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=40),
    params=params_of,
    k=st.integers(0, 7),
    sample=st.integers(0, 3),
    eos=st.sampled_from([(), (), (3,), (0, 8)]),
)


def random_batches(count: int) -> Any:
    @settings(max_examples=count, deadline=None)
    @given(
        model=st.sampled_from(sorted(MODELS)),
        drafter=st.sampled_from(DRAFTERS),
        policy=st.sampled_from(sorted(POLICIES)),
        kind=st.sampled_from(KINDS),
        batch=st.lists(asked_of, min_size=1, max_size=5),
    )
    def every(model: str, drafter: str, policy: str, kind: Kind, batch: list[Asked]) -> None:
        check(party(model), drafter, policy, kind, batch)

    return every


@pytest.mark.parametrize("count", [15, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_batches(count: int) -> None:
    random_batches(count)()


def test_more_draft_tokens_than_heads_are_cut() -> None:
    """A request for more tokens than Medusa has heads drafts one per head; the library itself refuses more."""
    of = party("rope")
    batch = [each._replace(k=7) for each in RAGGED]
    found = check(of, "medusa", "coupled", "static", batch)
    assert max(step[1] for each in found for step in each.steps) == 4
    assert max(step[0] for each in found for step in each.steps) == 7


def test_a_batch_that_its_cache_cannot_hold() -> None:
    of = party("rope")
    runner = make_cpp_runner(of.model, of.target, KVOptions("ring"), 2, CONTEXT)
    sequences = [Sequence([1, 2], SamplingParams(max_new_tokens=40), Ending()) for _ in range(2)]
    drafter = drafter_of(of, "model", Purpose.DRAFT, KVOptions(), 2)
    loop: Iterator[Any] = decode(runner, drafter, sequences, None, lambda: FixedController(20), None, multi_step)
    with pytest.raises(UserError, match="a ring takes 16 tokens at a time"):
        for _ in loop:
            pass
    assert isinstance(runner, CppRunner)
