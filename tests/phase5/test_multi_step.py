"""Whole loops in C++: the same tokens as in torch, and speculation that equals plain decoding in every format."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from typing import Any, Literal

import pytest
import torch

import phase5
from common.errors import UserError
from common.philox import Purpose
from common.prompts import load_prompts
from phase5.controllers import ALWAYS, LOOKS, Bounds, CostController, observe_plain
from phase5.cost_model import START
from phase5.cpp_runner import CppRunner
from phase5.drafters.chains import ChainBuilder
from phase5.drafters.model_fast import FastModelDrafter
from phase5.generate import stats_of
from phase5.kernels import cpp, registry
from phase5.multi_step import WARM, states_of_rows
from phase5.show import Show

pytestmark = [
    pytest.mark.skipif(
        registry.why_not("cpp", torch.device("cpu")) is not None,
        reason=f"no C++ backend here: {registry.why_not('cpp', torch.device('cpu'))}",
    ),
]
DRAFTING: dict[str, dict[str, Any]] = {
    "plain": {"draft": "none"},
    "model": {"k": 4},
    "model, confidence": {"controller": "confidence"},
    "model, static tree": {"k": 3, "tree": "static", "tree_nodes": 8},
    "model, dynamic tree": {"k": 3, "tree": "dynamic", "tree_nodes": 8},
    "ngram": {"drafter": "ngram", "k": 4},
    "extrapolate": {"drafter": "extrapolate", "k": 2},
    "medusa": {"drafter": "medusa", "k": 4},
    "eagle": {"drafter": "eagle", "k": 4},
    "eagle, confidence": {"drafter": "eagle", "controller": "confidence"},
    "eagle, static tree": {"drafter": "eagle", "k": 3, "tree": "static", "tree_nodes": 8},
}
LONGEST = 200  # characters of a prompt
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "int8": {"dtype": "float32", "quant": "int8"},
    "int4": {"dtype": "float32", "quant": "int4"},
    "int8 cache": {"dtype": "float32", "kv_dtype": "int8"},
    "pages": {"dtype": "float32", "kv": "paged"},
    "bfloat16 pages": {"dtype": "bfloat16", "kv": "paged"},
}


def llm(**options: Any) -> Any:
    chosen = {"dtype": "float32", "max_tokens": 24, "device": "cpu", "kernels": "cpp", **options}
    return phase5.LLM(phase5.Options(**chosen))


def texts(count: int, longest: float = LONGEST) -> list[str]:
    """Return prompts of different lengths."""
    return [prompt.text for prompt in load_prompts("code", "test") if len(prompt.text) < longest][:count]


def decoded(made: Any, count: int = 2, multi_step: bool = True) -> list[phase5.Sequence]:
    sequences: list[phase5.Sequence] = made.sequences(texts(count))
    for _ in made.run(sequences, multi_step):
        pass
    return sequences


def written(made: Any, count: int = 2, multi_step: bool = True) -> list[list[int]]:
    return [each.tokens for each in decoded(made, count, multi_step)]


@pytest.mark.parametrize(("tokens", "longest"), [(12, LONGEST), pytest.param(24, math.inf, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", list(DRAFTING))
def test_greedy_tokens_and_steps_are_those_of_torch(how: str, tokens: int, longest: float) -> None:
    fast, slow = (llm(max_tokens=tokens, **DRAFTING[how], kernels=kernels) for kernels in ("cpp", "torch"))
    prompts = texts(3, longest)
    found = [[(each.tokens, each.stats.target_forwards) for each in made.generate(prompts)] for made in (fast, slow)]
    assert isinstance(fast.runner, CppRunner)
    assert found[0] == found[1]


def acceptance(made: Any) -> float:
    steps = [step for sequence in decoded(made) for step in sequence.steps]
    return sum(step.accepted for step in steps) / sum(step.proposed for step in steps)


@pytest.mark.covering(1)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("how", [name for name in DRAFTING if name.startswith("eagle")])
def test_eagles_layer_runs_in_cpp(how: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The drafter computes nothing in torch, and its drafts are as good as torch's."""
    options = {"temperature": temperature, "max_tokens": 48, **DRAFTING[how]}
    slow = llm(kernels="torch", **options)
    assert slow.backends.report["draft_step"] == "torch"
    counts = [acceptance(slow)]

    def never(*arguments: Any, **more: Any) -> None:
        raise AssertionError("EAGLE's layer ran in torch")

    monkeypatch.setattr("phase5.drafters.eagle.EagleHead.forward", never)
    monkeypatch.setattr("phase5.drafters.eagle.EagleHead.inputs", never)
    fast = llm(**options)
    assert fast.backends.report["draft_step"] == "cpp"
    counts.append(acceptance(fast))
    assert counts[0] > 0.2
    assert counts[1] == pytest.approx(counts[0], abs=0.1)


@pytest.mark.covering(1)
@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("how", ["model", "model, static tree", "ngram", "eagle"])
@pytest.mark.parametrize("tokens", [24, pytest.param(40, marks=pytest.mark.slow)])
def test_greedy_speculation_equals_plain_decoding_in_every_format(how: str, format: str, tokens: int) -> None:
    plain = llm(draft="none", max_tokens=tokens, **FORMATS[format])
    drafted = llm(max_tokens=tokens, **DRAFTING[how], **FORMATS[format])
    assert written(drafted) == written(plain)


@pytest.mark.parametrize("tokens", [24, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("format", list(FORMATS))
def test_coupled_speculation_equals_plain_sampling_in_every_format(format: str, tokens: int) -> None:
    options = {"temperature": 1.0, "max_tokens": tokens, **FORMATS[format]}
    plain, drafted = llm(draft="none", **options), llm(policy="coupled", k=4, **options)
    sequences = decoded(drafted)
    assert [each.tokens for each in sequences] == written(plain)
    assert any(step.accepted for sequence in sequences for step in sequence.steps)


@pytest.mark.slow
@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculation_equals_plain_decoding_on_200_prompts(temperature: float, format: str) -> None:
    options = {"temperature": temperature, "max_tokens": 32, **FORMATS[format]}
    plain = llm(draft="none", **options)
    drafted = llm(controller="cost", policy="coupled" if temperature else "auto", **options)
    for prompt in load_prompts("code"):
        assert drafted.generate([prompt.text])[0].tokens == plain.generate([prompt.text])[0].tokens


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("how", ["plain", "model"])
def test_several_tokens_in_one_call_are_those_of_single_steps(
    how: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"temperature": temperature, "top_p": 0.95, "top_k": 50, **DRAFTING[how]}
    together = written(llm(**options), 1)
    monkeypatch.setattr(cpp.CppModel, "decode", never)
    assert written(llm(**options), 1, multi_step=False) == together


@pytest.mark.parametrize("how", ["plain", "model", "eagle"])
def test_a_call_returns_when_its_time_is_used_up(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has made at least one step; tokens and counts do not depend on where calls end."""

    def run(budget: float) -> tuple[list[Any], int]:
        made, decode = list[int](), cpp.CppModel.decode

        def counting(*arguments: Any, **more: Any) -> Any:
            found = decode(*arguments, **more)
            made.append(len(found[0]))
            return found

        with monkeypatch.context() as patch:
            patch.setattr(cpp.CppModel, "decode", counting)
            patch.setattr("phase5.multi_step.BUDGET_MS", budget)
            done = decoded(llm(temperature=1.0, **DRAFTING[how]))
        return [[each.tokens, [(s.proposed, s.accepted, s.emitted) for s in each.steps]] for each in done], max(made)

    short, long = run(1e-6), run(1e6)
    assert short[0] == long[0]
    assert (short[1], long[1] > 1) == (1, True)


def test_steps_of_one_call_are_shown_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    """The sequence is then some steps ahead of the step that is shown."""
    made = llm(**DRAFTING["model"])
    shown = []
    for multi_step in (True, False):
        sequences = made.sequences(texts(1))
        show = Show(made.loaded.tokenizer)
        for step in made.run(sequences, multi_step):
            show.step(step)
        shown.append((capsys.readouterr().out, show.lengths))
    assert shown[0] == shown[1]


@pytest.mark.parametrize("counts", [[[1, 1], [1, 1]], [[2, 1], [1, 2]], [[1], [3]], [[3], [1]], [[3, 1, 2], [1, 1, 1]]])
def test_states_of_a_call_belong_to_their_sequences(counts: list[list[int]]) -> None:
    """They are written step by step, and in a step sequence by sequence; those of a prefill come first."""
    states, places, at = torch.arange(2 * sum(map(sum, counts))).view(-1, 2), [list[range]() for _ in counts[0]], 0
    for of_step in counts:
        for row, count in enumerate(of_step):
            places[row].append(range(at, at + count))
            at += count
    expected = [[2 * place for step in mine for place in step] for mine in places]
    nothing: list[list[torch.Tensor]] = [[] for _ in places]
    found = states_of_rows(states, places, nothing)
    assert [of_row[:, 0].tolist() for of_row in found] == expected
    first = [[torch.tensor([[-2, -1]])], *nothing[1:]]
    assert states_of_rows(states, places, first)[0][:, 0].tolist() == [-2, *expected[0]]
    if max(counts[0]) > 1:  # the drafter has the state of the first new position
        row = counts[0].index(max(counts[0]))
        places[row][0] = places[row][0][1:]
        assert states_of_rows(states, places, nothing)[row][:, 0].tolist() == expected[row][1:]


def never(*arguments: Any, **more: Any) -> None:
    raise AssertionError("several steps were made in one call")


@pytest.mark.parametrize("how", ["plain", "model", "ngram"])
def test_steps_after_the_end_of_a_text_are_not_counted(how: str) -> None:
    """Plain decoding that ends with its fifth token reports five steps, however many tokens the call computed."""
    (whole,) = llm(draft="none").generate(texts(1))
    for kernels in ("cpp", "torch"):
        made = llm(kernels=kernels, **DRAFTING[how])
        ending = dataclasses.replace(made.loaded.ending, eos_ids=(whole.tokens[4],))
        (sequence,) = made.sequences(texts(1))
        sequence = phase5.Sequence(sequence.prompt, made.params, ending)
        for _ in made.run([sequence]):
            pass
        stats = stats_of(sequence)
        assert (sequence.finish_reason, sequence.tokens) == ("eos", whole.tokens[: len(sequence.tokens)])
        assert stats.steps == stats.target_forwards <= len(sequence.tokens) <= 5
        if how == "plain":
            assert stats.steps == len(sequence.tokens)


@pytest.mark.parametrize("how", ["plain", "model", "eagle", "medusa"])
def test_batches_and_samples_are_what_each_is_alone(how: str) -> None:
    """Prompts with a common prefix share keys and values; hidden states for a drafter are computed for each."""
    made = llm(temperature=1.0, **DRAFTING[how])
    prompts = [*texts(3), texts(3)[0] + " not"]
    alone = [made.generate([text])[0].tokens for text in prompts]
    assert [each.tokens for each in made.generate(prompts)] == alone


@pytest.mark.parametrize("how", list(DRAFTING))
def test_requests_with_parameters_of_their_own_are_what_each_is_alone(how: str) -> None:
    """Greedy and sampled texts in one batch; draft tokens of greedy ones are certain."""
    made, sampled = llm(**DRAFTING[how]), phase5.SamplingParams(temperature=1.0, seed=7, max_new_tokens=9)
    params = [
        phase5.SamplingParams(max_new_tokens=24),
        sampled,
        dataclasses.replace(sampled, temperature=0.8, top_k=20, top_p=0.9, seed=-1, max_new_tokens=14),
        phase5.SamplingParams(max_new_tokens=11),
    ]
    prompts = [*texts(3), texts(1)[0]]
    alone = [made.generate([text], mine)[0].tokens for text, mine in zip(prompts, params, strict=True)]
    sequences = made.sequences(prompts, params)
    for step in made.run(sequences):
        for row, sequence in enumerate(step.sequences):
            if sequence.params.greedy and step.draft.probs is not None:
                tokens = torch.tensor(step.trees[row].tokens, dtype=torch.long)
                likely = step.draft.probs[row, : len(tokens)]
                assert torch.equal(likely, torch.nn.functional.one_hot(tokens, likely.shape[-1]).float())
    assert [sequence.tokens for sequence in sequences] == alone


def test_a_sampled_text_without_a_draft_beside_a_greedy_one() -> None:
    """No distribution was drawn from, so the draft is certain."""
    greedy, sampled = phase5.SamplingParams(), phase5.SamplingParams(temperature=1.0)
    sequences = [phase5.Sequence([1], params, phase5.Ending()) for params in (greedy, sampled)]
    chains = ChainBuilder(sequences, [2, 0], phase5.KeyedSource(), Purpose.DRAFT, None)
    chains.take([0], [[5, 6]], [torch.empty(2, 9)])
    draft = chains.draft()
    assert (draft.tokens.tolist(), draft.probs, draft.widths) == ([[5, 6], [0, 0]], None, [2, 0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("how", ["eagle", "medusa"])
def test_declined_steps_in_one_call_keep_what_a_drafter_reads(
    how: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts after several plain tokens in one call equal those after as many single steps."""

    def late(drafter: Any, sequences: list[Any], context: int) -> list[int]:
        """Decline up to the 24th token, and then draft."""
        for sequence in sequences:
            sequence.controller.holds = max(1, 24 - len(sequence.tokens))
        return [0 if len(sequence.tokens) < 24 else 3 for sequence in sequences]

    monkeypatch.setattr("phase5.speculative.plan", late)
    monkeypatch.setattr("phase5.prices.Prices.provide", lambda *arguments: None)  # it decodes, too
    options = {"drafter": how, "controller": "cost", "temperature": temperature, "max_tokens": 80}
    asked, decode = [], cpp.CppModel.decode

    def counting(self: Any, batch: Any, drafter: Any, counts: list[int], steps: int, **more: Any) -> Any:
        asked.append((more["taps"] is not None, any(counts), steps > 1))
        return decode(self, batch, drafter, counts, steps, **more)

    def run(multi_step: bool) -> list[Any]:
        (done,) = decoded(llm(**options), 1, multi_step)
        return [done.tokens, [(each.proposed, each.accepted) for each in done.steps]]

    monkeypatch.setattr(cpp.CppModel, "decode", counting)
    together = run(True)
    assert {(True, False, True), (True, True, False)} <= set(asked)
    assert {proposed for proposed, _ in together[1]} >= {0, 3}
    monkeypatch.setattr(cpp.CppModel, "decode", never)
    assert run(False) == together


@pytest.mark.parametrize(
    "drafting", [{"draft": "none"}, *({"k": 2, "drafter": name} for name in ("model", "ngram", "eagle", "medusa"))]
)
def test_no_step_is_made_outside_of_a_call(drafting: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor the first, nor the last, for which nothing is drafted: alone it takes several times as long."""
    alone, single = list[int](), phase5.speculative.decode_step

    def noting(*arguments: Any) -> Any:
        alone.append(len(arguments[2][0].tokens))
        return single(*arguments)

    monkeypatch.setattr("phase5.speculative.decode_step", noting)
    llm = phase5.LLM(phase5.Options(max_tokens=18, dtype="float32", kernels="cpp", **drafting))
    (sequence,) = llm.sequences(["import os\n"], dataclasses.replace(llm.params, ignore_eos=True))
    for _ in llm.run([sequence]):
        pass
    assert not alone


@pytest.mark.parametrize("name", ["eagle", "medusa"])
def test_a_new_drafter_waits_one_step_for_the_states(name: Literal["eagle", "medusa"]) -> None:
    """A run that goes on with an interrupted text makes one plain step, and then drafts."""
    llm = phase5.LLM(phase5.Options(max_tokens=60, dtype="float32", kernels="cpp", k=2, drafter=name))
    (sequence,) = llm.sequences(["import os\n"], dataclasses.replace(llm.params, ignore_eos=True))
    run: Any = llm.run([sequence])
    for _ in range(2):
        next(run)
    run.close()
    assert sequence.finish_reason is None
    proposed = [step.stats[0].proposed for step in llm.run([sequence]) if step is not None]
    assert (proposed[0], proposed[1]) == (0, 2)


def test_time_outside_of_a_call_does_not_make_plain_steps_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts as if the call had made as many steps as it may; a call of few steps teaches nothing."""
    outside, decode = 0.1, cpp.CppModel.decode

    def slow(self: cpp.CppModel, *arguments: Any, **more: Any) -> Any:
        time.sleep(outside)
        return decode(self, *arguments, **more)

    llm = phase5.LLM(phase5.Options(controller="cost", drafter="ngram", dtype="float32", kernels="cpp"))
    monkeypatch.setattr(llm.prices, "provide", lambda *arguments: None)
    monkeypatch.setattr(cpp.CppModel, "decode", slow)
    monkeypatch.setattr("phase5.controllers._choose", lambda controllers, limits: ([0], ALWAYS))
    monkeypatch.setattr("phase5.multi_step.WARM_MS", math.inf)
    monkeypatch.setattr("phase5.multi_step.BUDGET_MS", 0.0)
    plain = llm.cost_model.plain.recent
    for new, known in ((WARM + 1, 0), (WARM + 2, 1)):  # the first token is a call of its own
        params = dataclasses.replace(llm.params, max_new_tokens=new, ignore_eos=True)
        (sequence,) = llm.sequences(["a b c d"], params)
        for _ in llm.run([sequence]):
            pass
        assert len(plain.get(1, [])) == known
    assert max(plain[1]) * START < outside * 1e3 / 4
    monkeypatch.setattr("phase5.multi_step.WARM_MS", 0.0)  # a large model's calls have few steps
    llm.cost_model.age = 1
    plain.clear()
    (sequence,) = llm.sequences(["a b c d"], dataclasses.replace(llm.params, max_new_tokens=3, ignore_eos=True))
    for _ in llm.run([sequence]):
        pass
    assert (len(plain[1]), llm.cost_model.age) == (1, 0)


def test_the_first_step_of_a_call_is_no_price(monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds the weights evicted, by a draft or by Python."""
    decode = cpp.CppModel.decode

    def cold(self: cpp.CppModel, *arguments: Any, **more: Any) -> Any:
        made, states = decode(self, *arguments, **more)
        return [made[0]._replace(verify_ms=1e3), *made[1:]], states

    llm = phase5.LLM(phase5.Options(controller="cost", drafter="ngram", dtype="float32", kernels="cpp"))
    monkeypatch.setattr(llm.prices, "provide", lambda *arguments: None)
    monkeypatch.setattr(cpp.CppModel, "decode", cold)
    monkeypatch.setattr("phase5.multi_step.WARM_MS", math.inf)
    monkeypatch.setattr("phase5.controllers._choose", lambda controllers, limits: ([0], ALWAYS))
    (sequence,) = llm.sequences(["a b c d"], dataclasses.replace(llm.params, max_new_tokens=16, ignore_eos=True))
    for _ in llm.run([sequence]):
        pass
    assert max(llm.cost_model.plain.recent[1]) * START < 30.0  # their mean is above


def test_plain_steps_whose_time_is_unknown_are_recent_all_the_same() -> None:
    """Otherwise a controller would ask for a plain step again and again. Those of short calls pay for tests as well."""
    mine = CostController(Bounds(1, 8))
    for took, spent in ((None, 0.0), (2.0, 6.0)):
        mine.cost_model.age = 5
        observe_plain([mine], 3, took, warm=False)
        assert (mine.cost_model.age, mine.cost_model.plain.recent) == (0, {})
        assert mine.cost_model.spent * START == pytest.approx(spent)


def test_time_outside_of_a_short_call_does_not_make_drafts_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the call had made as many steps as it may."""
    outside, decode = 0.1, cpp.CppModel.decode

    def slow(self: cpp.CppModel, *arguments: Any, **more: Any) -> Any:
        time.sleep(outside)
        return decode(self, *arguments, **more)

    llm = phase5.LLM(phase5.Options(controller="cost", dtype="float32", kernels="cpp"))
    monkeypatch.setattr(llm.prices, "provide", lambda *arguments: None)
    monkeypatch.setattr("phase5.controllers._choose", lambda controllers, limits: ([min(limits[0], 2)], LOOKS))
    (sequence,) = llm.sequences(["import os\n"], dataclasses.replace(llm.params, max_new_tokens=20, ignore_eos=True))
    run = llm.run([sequence])
    next(run)
    monkeypatch.setattr(cpp.CppModel, "decode", slow)
    llm.cost_model.accept.recent.clear()
    slept = [step.stats[0].accept_ms for step in run if step is not None]
    assert max(slept) > outside * 1e3 / 3  # the statistics hold what it took
    assert min(llm.cost_model.accept.recent[1]) * START < outside * 1e3 / 4


def test_the_draft_model_reads_the_prompt_as_a_part_of_drafting(monkeypatch: pytest.MonkeyPatch) -> None:
    pause, start = 0.05, FastModelDrafter.start

    def slow(*given: Any) -> Any:
        time.sleep(pause)
        return start(*given)

    monkeypatch.setattr(FastModelDrafter, "start", slow)
    made = phase5.LLM(phase5.Options(k=2, dtype="float32", kernels="cpp"))
    (sequence,) = made.sequences(["import os\n"], dataclasses.replace(made.params, max_new_tokens=12, ignore_eos=True))
    first = next(step.stats[0] for step in made.run([sequence]) if step is not None)
    assert first.draft_ms > pause * 1e3


@pytest.mark.parametrize("rows", [1, 3])
def test_a_call_goes_on_until_a_step_could_pass_the_end(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call ends where a step could give more tokens than wanted, not where all drafts could have."""
    calls, decode = list[tuple[int, int, int]](), cpp.CppModel.decode

    def noting(self: cpp.CppModel, batch: Any, drafter: Any, counts: Any, steps: Any, **more: Any) -> Any:
        made = decode(self, batch, drafter, counts, steps, **more)
        rooms = [limit - count for limit, count in zip(more["limits"], counts, strict=True)]  # for a step, above 0
        for step in made[0]:
            assert min(rooms) > 0
            rooms = [room - accepted - 1 for room, accepted in zip(rooms, step.accepted, strict=True)]
        calls.append((len(made[0]), steps, min(rooms)))
        return made

    monkeypatch.setattr(cpp.CppModel, "decode", noting)
    monkeypatch.setattr("phase5.multi_step.BUDGET_MS", 0.0)
    llm = phase5.LLM(phase5.Options(kernels="cpp", dtype="float32", temperature=1.0, max_tokens=40, k=3))
    texts = ["import os\n", "def f(x):\n", "class A:\n"][:rows]
    drafted = [each.tokens for each in llm.generate(texts, dataclasses.replace(llm.params, ignore_eos=True))]
    assert all(made == steps or left <= 0 for made, steps, left in calls)  # nothing else ended a call
    assert all(len(tokens) == 40 for tokens in drafted)
    if rows == 1:
        assert max(made for made, _, _ in calls) > 39 // 4


def test_past_the_context_the_window_is_prefilled_again(make_checkpoint: Any) -> None:
    folder = str(make_checkpoint("llama", max_position_embeddings=64))
    options = {"model": folder, "draft": "none", "max_tokens": 60, "dtype": "float32"}
    fast, slow = llm(**options), llm(kernels="torch", **options)
    assert written(fast, 1) == written(slow, 1)


def test_what_computes_is_said() -> None:
    assert llm().backends.report["step"] == "cpp"
    assert llm(kernels="auto", kv="paged").backends.report["step"] == "cpp"
    dynamic = llm(kernels="auto", kv="dynamic").backends.report
    assert dynamic["step"] == "torch"
    assert "static, ring or paged cache" in dynamic["why_no_cpp_step"]
    other: list[dict[str, Any]] = [{"kv": "dynamic"}, {"kv": "off"}, {"model": "fake"}, {"beams": 2}]
    for options, why in zip(other, ("ring or paged", "ring or paged", "Transformer", "beam"), strict=True):
        with pytest.raises(UserError, match=why):
            llm(draft="none", **options)


def test_without_a_compiler_torch_computes_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_FORCE_PY", "1")
    report = llm(kernels="auto").backends.report
    assert report["step"] == "torch"
    assert "SPECDEC_FORCE_PY" in json.dumps(report)
    with pytest.raises(UserError, match="SPECDEC_FORCE_PY"):
        llm(kernels="cpp")
