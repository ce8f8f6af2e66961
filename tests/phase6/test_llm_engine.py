"""The engine: what it shares, when it preempts, how it fails, and what it says of each request."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import phase6
from common.errors import UserError
from common.philox import Purpose
from phase6.cost_model import CostModel
from phase6.scheduler import Scheduler
from tests.support.served import CONTEXT, TEXT, WHY_NOT_CPP, Pair, Result, add, asked, drain, take

KERNELS = [pytest.param("cpp", marks=pytest.mark.skipif(WHY_NOT_CPP is not None, reason=str(WHY_NOT_CPP))), "torch"]


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_known_prompt_is_not_computed_again(pair: Callable[..., Pair], kernels: str) -> None:
    """Of 33 tokens two blocks are known; the other token, and those that are decoded, are computed."""
    made = pair(kernels, "plain")
    engine = made.engine()
    manager = engine.target.manager
    for known in (0, 2 * 16):
        before, number = manager.positions, add(engine, asked())
        assert drain(engine)[number, 0] == made.alone(asked())
        assert manager.positions - before == 33 - known + 7


def test_samples_of_a_prompt_share_its_blocks(pair: Callable[..., Pair]) -> None:
    """All but the first sample compute one token of the prompt, and hold blocks of their own for what differs."""
    made = pair("torch", "plain")
    engine = made.engine(rows=3)
    manager, request = engine.target.manager, asked(temperature=1.0, tokens=4)
    number, found = add(engine, request, n=3), dict[Any, Any]()
    while len(engine.scheduler.running) < 3:
        take(engine, found)
    tables = manager.cache.tables
    assert tables[0][:2] == tables[1][:2] == tables[2][:2]
    assert manager.cache.blocks.users[tables[0][0]] == 3
    assert drain(engine, found) == {(number, sample): made.alone(request, sample) for sample in range(3)}
    assert manager.positions <= 33 + 2 + 3 * 3  # those of the prompt, once, its last token again, and the outputs


def test_a_long_prompt_does_not_stop_those_that_decode(pair: Callable[..., Pair]) -> None:
    made = pair("torch", "plain")
    engine = made.engine(budget=16)
    first = add(engine, asked(TEXT[:4], tokens=20))
    found = dict[tuple[int, int], Result]()
    take(engine, found)
    second = add(engine, asked(TEXT[::-1] + TEXT[:20], tokens=2))
    steps = 0
    while (second, 0) not in found:
        before = len(found[first, 0].tokens)
        take(engine, found)
        steps += 1
        assert len(found[first, 0].tokens) == before + 1
    assert steps == 3  # chunks of 15 tokens beside the one that decodes; the last 8 are computed by the step itself
    drain(engine, found)


@pytest.mark.parametrize("how", ["plain", "model", "eagle"])
def test_the_youngest_is_preempted_and_goes_on_where_it_was(pair: Callable[..., Pair], how: str) -> None:
    made = pair("torch", how)
    engine = made.engine(rows=3, pages=6)
    requests = [asked(tuple(range(start, start + 20)), tokens=30) for start in (10, 40, 70)]
    numbers = [add(engine, request) for request in requests]
    sequences = [engine.requests[number][0] for number in numbers]
    found = drain(engine)
    assert [found[number, 0] for number in numbers] == [made.alone(request) for request in requests]
    preemptions = [sequence.progress.preemptions for sequence in sequences]
    assert preemptions[0] == 0
    assert sum(preemptions) > 0


@pytest.mark.parametrize(
    ("how", "pages", "prompts"), [("plain", 2, (TEXT[:24], TEXT[:24])), ("model", 3, (TEXT[:30], TEXT[::-1][:10]))]
)
def test_a_request_that_would_be_preempted_at_once_is_not_admitted(
    pair: Callable[..., Pair], how: str, pages: int, prompts: tuple[tuple[int, ...], ...]
) -> None:
    """No block is left for a copy of the shared one, which is partly filled; or for the first request's draft."""
    made = pair("torch", how)
    engine = made.engine(rows=2, pages=pages)
    requests = [asked(prompt, tokens=8, k=8) for prompt in prompts]
    numbers = [add(engine, request) for request in requests]
    sequences = [engine.requests[number][0] for number in numbers]
    found = drain(engine)
    assert [found[number, 0] for number in numbers] == [made.alone(request) for request in requests]
    assert [sequence.progress.preemptions for sequence in sequences] == [0, 0]


def test_a_request_that_found_no_block_enters_when_the_other_has_ended(pair: Callable[..., Pair]) -> None:
    """As many blocks are free then as when it was refused, for the first request had not taken its own yet."""
    made = pair("torch", "plain")
    engine = made.engine(rows=2, pages=1)
    numbers = [add(engine, asked(TEXT[at:][:3], tokens=2)) for at in range(2)]
    found = drain(engine)
    assert [found[number, 0] for number in numbers] == [made.alone(asked(TEXT[at:][:3], tokens=2)) for at in range(2)]


def test_a_request_without_drafts_runs_beside_one_with_drafts(pair: Callable[..., Pair]) -> None:
    """It has no row in the draft model's cache."""
    made = pair("torch", "model")
    engine = made.engine(rows=2)
    numbers = [engine.add_request(list(TEXT), phase6.SamplingParams(max_new_tokens=8, ignore_eos=True), k=0)]
    engine.step()
    numbers.append(add(engine, asked(TEXT[::-1])))
    found = drain(engine)
    assert found[numbers[1], 0] == made.alone(asked(TEXT[::-1]))


def test_the_oldest_prompt_gains_a_block_beside_any_number_that_decode(pair: Callable[..., Pair]) -> None:
    """Even if those that decode use up the budget: so the bound on waiting holds."""
    engine = pair("torch", "model").engine(rows=4, budget=8)
    numbers = [add(engine, asked(prompt, tokens=6)) for prompt in (TEXT[::-1], (5,), (6,), (7,))]
    oldest, *others = (engine.requests[number][0] for number in numbers)
    assert engine.scheduler.schedule() == ([(oldest, 16)], others)
    engine.close()


def test_prompts_of_one_step_share_its_budget(pair: Callable[..., Pair]) -> None:
    engine = pair("torch", "plain").engine(rows=2, budget=20)
    first, _ = (engine.requests[add(engine, asked(prompt))][0] for prompt in (TEXT, TEXT[::-1]))
    chunks, _ = engine.scheduler.schedule()
    assert chunks == [(first, 20)]
    engine.close()


def test_no_block_is_reserved_for_drafts_that_would_pass_the_end(pair: Callable[..., Pair]) -> None:
    """Prompt and output fill three blocks each, so six are enough for two requests. Two steps or more: K is 8."""
    made = pair("torch", "model")
    engine = made.engine(rows=2, pages=6)
    numbers = [add(engine, asked(prompt, tokens=15, k=8)) for prompt in (TEXT, TEXT[::-1])]
    sequences = [engine.requests[number][0] for number in numbers]
    drain(engine)
    assert [(each.progress.preemptions, each.progress.blocks) for each in sequences] == [(0, 3)] * 2


def test_requests_run_in_the_order_of_their_arrival(pair: Callable[..., Pair]) -> None:
    """A short request behind a long one that does not fit waits for it: nobody is overtaken."""
    made = pair("torch", "plain")
    engine = made.engine(rows=4, pages=5)
    numbers = [add(engine, asked(prompt, tokens=8)) for prompt in (TEXT, TEXT[::-1], TEXT[:2])]
    sequences = [engine.requests[number][0] for number in numbers]
    drain(engine)
    times = [sequence.progress.began + (sequence.progress.scheduled or 0.0) for sequence in sequences]
    assert times == sorted(times)
    assert times[2] > sequences[0].progress.began + sequences[0].progress.first  # it did not start with the first one


@pytest.mark.parametrize("how", ["model", "ngram", "medusa", "eagle", "tree"])
@pytest.mark.parametrize("kernels", ["torch", "cpp"])
def test_rows_of_all_policies_share_one_forward(
    kernels: str, how: str, pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pair(kernels, how)
    policies = ["coupled", "rejection", "longest_prefix", "typical"]
    for count in (3, 4):  # without a lossy policy, and with one
        requests = [asked(temperature=t, policy=policy, tokens=20) for t in (1.0, 0.0) for policy in policies[:count]]
        engine, calls = made.engine(rows=8), list[int]()

        def counted(compute: Any, calls: list[int] = calls) -> Any:
            def of_rows(rows: Any, *rest: Any, **more: Any) -> Any:
                calls.append(len(rows))
                return compute(rows, *rest, **more)

            return of_rows

        with monkeypatch.context() as patch:
            patch.setattr(engine.target, "forward", counted(engine.target.forward))
            if kernels == "cpp":
                patch.setattr(engine.target.fast, "decode", counted(engine.target.fast.decode))
            numbers = [add(engine, request) for request in requests]
            sequences = [engine.requests[number][0] for number in numbers]
            while engine.busy:
                before = len(calls)
                engine.step()
                assert len(calls) <= before + 1
        assert calls.count(len(requests)) > 1
        for request, sequence in zip(requests, sequences, strict=True):
            assert sequence.tokens == made.alone(request).tokens


class Flat(phase6.Brancher):
    """A drafter that expects every token alike, so that the noise alone decides which are drawn."""

    taps, deepest = None, 8

    def propose(self, *_: Any) -> Any:
        raise NotImplementedError

    def ready(self, sequence: Any) -> bool:
        return True

    def expand(self, frontiers: list[Any]) -> list[torch.Tensor]:
        return [torch.zeros(len(each.nodes), 64) for each in frontiers]


def test_trees_of_one_draft_have_the_noise_of_their_policies() -> None:
    """`coupled` takes the noise with which the target will draw, `rejection` that of drafts; each node has its own."""
    source, shape = phase6.KeyedSource(), [-1, -1, 0, 0]
    sequences = list[Any]()
    for policy in ("coupled", "rejection"):
        sequences.append(phase6.Sequence([5, 6], phase6.SamplingParams(temperature=1.0, seed=3), phase6.Ending()))
        sequences[-1].policy = phase6.make_policy(policy)
    trees = phase6.StaticTreeDrafter(Flat(), shape, source).propose(sequences, [2, 2]).trees
    for tree, noise in zip(trees or [], (Purpose.SAMPLE, Purpose.DRAFT), strict=True):
        drawn = list[int]()
        for position in (2, 3):
            key, at = torch.tensor([sequences[0].key]), torch.tensor([position])
            drawn += source.draw_several(torch.full((1, 64), 1 / 64), 2, key, at, noise)[0].tolist()
        assert (tree.tokens, tree.parents) == (drawn, shape)


def test_a_request_with_a_seed_is_coupled_and_one_without_draws_its_own(pair: Callable[..., Pair]) -> None:
    engine = pair("torch", "model").engine()
    sampled = phase6.SamplingParams(temperature=1.0, max_new_tokens=4)
    numbers = [
        engine.add_request([5, 6], params, seeded=seeded) for params in (sampled, None) for seeded in (True, False)
    ]
    seeded, drawn, greedy, _ = (engine.requests[number][0] for number in numbers)
    assert isinstance(seeded.policy, phase6.SampleMatch)
    assert seeded.policy.draft_noise == Purpose.SAMPLE
    assert isinstance(drawn.policy, phase6.Rejection)
    assert seeded.params.seed == 0 != drawn.params.seed
    assert isinstance(greedy.policy, phase6.SampleMatch)
    engine.close()


def test_cost_declines_in_a_batch_and_the_tokens_stay(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a draft takes far longer than a plain step, nothing is drafted, not even is the prompt read for it."""
    made = pair("cpp", "model")

    def provide(cost_model: CostModel, *_: object) -> None:
        for table in cost_model.tables.values():
            table.observe(1, 1e-3)
        cost_model.draft.observe(1, 1e6)

    monkeypatch.setattr(made.llm.prices, "provide", provide)
    monkeypatch.setattr(made.llm, "cost_model", CostModel())
    engine = made.engine()
    request = asked(temperature=1.0, controller="cost", tokens=20)
    numbers = [add(engine, request), add(engine, request._replace(prompt=TEXT[:9]))]
    sequences = [engine.requests[number][0] for number in numbers]
    found = drain(engine)
    for number, sequence in zip(numbers, sequences, strict=True):
        alone = made.alone(request._replace(prompt=tuple(sequence.prompt), controller="fixed"))
        assert found[number, 0].tokens == alone.tokens
        assert {step.k for step in sequence.steps} == {0}
    assert engine.draft.prefill_ms == 0 < engine.target.prefill_ms


def test_the_stats_of_a_request(pair: Callable[..., Pair]) -> None:
    engine = pair("torch", "plain").engine(rows=1)
    first, second = add(engine, asked(tokens=3)), add(engine, asked(tokens=5))
    ends = dict[int, Any]()
    while engine.busy:
        for output in engine.step():
            if output.stats is not None:
                ends[output.request] = output.stats
    assert ends[first].queue_ms < ends[first].ttft_ms < ends[first].total_ms
    assert ends[first].ttft_ms < ends[second].queue_ms < ends[second].ttft_ms  # it waited for the first to end
    assert ends[second].new_tokens == 5
    assert ends[second].blocks == 3
    assert ends[second].itl_ms > 0


class Broken(Exception):
    """What the test's model raises."""


def test_an_error_in_a_step_ends_only_the_requests_that_cause_it(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pair("torch", "plain")
    engine, forward = made.engine(), type(made.engine().target).forward

    def failing(self: Any, owners: list[Any], texts: list[list[int]], *more: Any) -> Any:
        if any(77 in text for text in texts):
            raise Broken("token 77")
        return forward(self, owners, texts, *more)

    monkeypatch.setattr(type(engine.target), "forward", failing)
    requests = [asked(TEXT[:5]), asked((*TEXT[:5], 77)), asked(TEXT[5:12])]
    numbers, found = [add(engine, request) for request in requests], dict[int, list[Any]]()
    while engine.busy:
        for output in engine.step():
            found.setdefault(output.request, []).append(output)
    assert found[numbers[1]][-1].finish_reason == "error"
    assert isinstance(found[numbers[1]][-1].error, Broken)
    for at in (0, 2):
        assert [token for output in found[numbers[at]] for token in output.tokens] == made.alone(requests[at]).tokens
    assert not engine.target.manager.rows


@pytest.mark.parametrize("step", ["_prefill", "forward"])
def test_weights_that_are_not_finite_end_every_request_with_the_reason(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    made = pair("torch", "plain")
    engine = made.engine()
    logits = type(made.llm.loaded.model).logits
    monkeypatch.setattr(type(made.llm.loaded.model), "logits", lambda self, hidden: logits(self, hidden) * float("nan"))
    add(engine, asked(TEXT if step == "_prefill" else TEXT[:3]))
    (output,) = [output for _ in range(4) for output in engine.step()]
    assert output.finish_reason == "error"
    assert "not finite" in str(output.error)
    assert not engine.busy


def test_a_request_longer_than_all_blocks_is_refused_at_once(pair: Callable[..., Pair]) -> None:
    engine = pair("torch", "plain").engine(pages=2)
    with pytest.raises(UserError, match=r"there are 2 of 16 tokens, and 3 are needed"):
        add(engine, asked(tokens=8))
    assert not engine.busy
    add(engine, asked(TEXT[:24], tokens=8))
    drain(engine)


def test_bad_requests_leave_the_others_alone(pair: Callable[..., Pair]) -> None:
    made = pair("torch", "plain")
    engine = made.engine()
    number = add(engine, asked())
    for prompt, more, what in (
        ([], {}, "empty"),
        ([5, 99999], {}, "token 99999 is not in the vocabulary"),
        ([5, -1], {}, "token -1"),
        ([5], {"n": 0}, "n must be at least 1"),
        ([5], {"k": -1}, "k from 0"),
        ([5], {"k": 65}, "k from 0 to 64"),
        ([5], {"policy": "best"}, "there is no policy best; give one of rejection, coupled"),
        ([5], {"controller": "best"}, "there is no controller best; give one of fixed, adaptive"),
    ):
        with pytest.raises(UserError, match=what):
            engine.add_request(prompt, **more)
    with pytest.raises(UserError, match="temperature"):
        engine.add_request([5], phase6.SamplingParams(temperature=-1.0))
    assert drain(engine) == {(number, 0): made.alone(asked())}


def test_requests_are_aborted_once(pair: Callable[..., Pair]) -> None:
    made = pair("torch", "model")
    engine = made.engine(rows=1)
    runs, waits, last = (add(engine, asked(tokens=20)) for _ in range(3))
    found = dict[tuple[int, int], Result]()
    take(engine, found)
    assert engine.abort(runs)
    assert engine.abort(waits)
    assert not engine.abort(runs)
    assert not engine.abort(12345)
    drain(engine, found)
    assert found[runs, 0].finish_reason == found[waits, 0].finish_reason == "aborted"
    assert found[last, 0] == made.alone(asked(tokens=20))
    assert not engine.abort(last)


def test_a_step_may_abort_a_request_of_its_own(pair: Callable[..., Pair]) -> None:
    """Whoever reads the steps of a call may end a request, which keeps what the call has given it."""
    made = pair("cpp", "plain")
    engine = made.engine()
    gone, stays = add(engine, asked(tokens=60)), add(engine, asked(TEXT[3:9], tokens=20))
    sequence, other = engine.requests[gone][0], engine.requests[stays][0]
    with made.llm.computing():
        while engine.busy:
            for _ in engine.advance():
                if len(sequence.tokens) >= 5:
                    engine.abort(gone)
            engine.ended = []
    assert 5 <= len(sequence.tokens) < 40
    assert sequence.tokens == made.alone(asked(tokens=60)).tokens[: len(sequence.tokens)]
    assert other.tokens == made.alone(asked(TEXT[3:9], tokens=20)).tokens
    assert not engine.target.manager.rows


def test_a_closed_engine_takes_nothing(pair: Callable[..., Pair]) -> None:
    engine = pair("torch", "plain").engine()
    add(engine, asked())
    engine.step()
    engine.close()
    engine.close()
    assert not engine.target.manager.rows
    with pytest.raises(UserError, match="closed"):
        add(engine, asked())
    with pytest.raises(UserError, match="closed"):
        engine.step()


def test_numbers_of_an_engine_out_of_range_are_refused(pair: Callable[..., Pair]) -> None:
    for wrong in (0, -1, 10**9):
        with pytest.raises(ValueError, match="than or equal to"):
            phase6.Options(batch_size=wrong)
    refused: list[dict[str, Any]] = [{"rows": -1}, {"rows": 10**9}, {"tokens": -1}, {"budget": 0}]
    for more in refused:
        with pytest.raises(UserError, match="rows must be from 1 to 65536, tokens at least 0, the budget at least 1"):
            phase6.LLMEngine(pair("torch", "plain").llm, **more)


def test_blocks_that_another_run_holds_are_an_error_and_not_a_wait(pair: Callable[..., Pair]) -> None:
    made = pair("torch", "plain")
    engine = made.engine(rows=2, pages=4)
    add(engine, asked(tokens=20))
    engine.step()
    other = Scheduler(engine.target, None, 1)
    sequence = phase6.Sequence(list(TEXT[::-1]), phase6.SamplingParams(), phase6.Ending())
    sequence.controller = phase6.FixedController(0)
    other.add(sequence)
    with pytest.raises(UserError, match="other runs hold them"):
        other.schedule()


@pytest.mark.parametrize("kind", ["static", "dynamic", "off"])
def test_other_caches_serve_requests_too(small_folder: Any, kind: Any) -> None:
    """A row is then all the memory of a sequence: nothing is shared in blocks, and nobody is preempted."""
    options = phase6.Options(
        model=str(small_folder), draft="none", kernels="torch", dtype="float32", device="cpu", kv=kind, batch_size=2
    )
    llm = phase6.LLM(options)
    engine = phase6.LLMEngine(llm, tokens=CONTEXT, budget=8)
    params = phase6.SamplingParams(max_new_tokens=40, ignore_eos=True)
    numbers = [engine.add_request(list(TEXT[at:]), params) for at in range(4)]
    found = drain(engine)
    llm.options = llm.options.model_copy(update={"kv": "paged"})
    llm.caches.clear()
    for at, number in enumerate(numbers):
        sequence = phase6.Sequence(list(TEXT[at:]), params, phase6.Ending())
        for _ in llm.run([sequence]):
            pass
        assert found[number, 0].tokens == sequence.tokens


@pytest.mark.parametrize(("kind", "how"), [("ring", "plain"), ("ring", "model"), ("paged", "model")])
@pytest.mark.parametrize("kernels", KERNELS)
def test_a_model_with_window_attention_is_served(
    window_pair: Callable[..., Pair], kernels: str, kind: Any, how: str
) -> None:
    """A ring has a row for every sequence; both kinds go on past the context, with the tokens of each request alone."""
    made = window_pair(kernels, how, kind)
    engine = made.engine(rows=2)
    requests = [asked(TEXT[at:], tokens=tokens) for at, tokens in ((0, 40), (3, 12), (20, 30))]
    numbers = [add(engine, request) for request in requests]
    found = drain(engine)
    assert [found[number, 0] for number in numbers] == [made.alone(request) for request in requests]
    assert not engine.target.manager.rows


def huge(pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, **options: Any) -> phase6.LLM:
    """Return an LLM whose model has a context of 131,072 tokens, on a machine with 64 MiB of free memory."""
    llm: phase6.LLM = pair("torch", "model").llm
    monkeypatch.setattr(llm, "options", llm.options.model_copy(update={"kv_pages": 0, **options}))
    monkeypatch.setattr(llm, "caches", {})
    assert llm.draft is not None
    for loaded in (llm.loaded, llm.draft):
        monkeypatch.setattr(loaded.model, "config", dataclasses.replace(loaded.config, context=131_072))
    monkeypatch.setattr("phase6.capacity.available_memory", lambda device: 64 * 2**20)
    return llm


def test_by_default_pages_take_half_of_the_memory_and_requests_wait(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows at full length would need 100 times as much. A request that fits is served, the other is refused."""
    engine = phase6.LLMEngine(huge(pair, monkeypatch))
    caches = [runner.manager.cache for runner in (engine.target, engine.draft)]  # type: ignore[union-attr]
    pages = [len(cache.blocks.users) for cache in caches]
    assert pages[0] == pages[1]
    assert 0.95 < sum(cache.nbytes() for cache in caches) / 2**25 <= 1
    number = add(engine, asked())
    assert drain(engine)[number, 0] == pair("torch", "model").alone(asked())
    with pytest.raises(UserError, match=f"out of pages: there are {pages[0]} of 16 tokens"):
        engine.add_request([5], phase6.SamplingParams(max_new_tokens=131_000))
    engine.close()


@pytest.mark.parametrize("options", [{"kv": "static"}, {"kv_pages": 10**6}])
def test_caches_that_do_not_fit_in_memory_are_refused(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    llm = huge(pair, monkeypatch, **options)
    with pytest.raises(
        UserError, match=r"KV caches for 16 sequences of up to 131072 tokens need \d+\.\d GiB, and 0\.1"
    ):
        phase6.LLMEngine(llm)


def test_an_engine_with_the_caches_of_an_earlier_one_asks_for_no_memory(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To read the free memory takes as long as several steps. It is read where a cache is to be allocated."""
    llm, times = pair("torch", "model").llm, list[int]()

    def available(device: torch.device) -> int:
        times.append(1)
        return 2**30

    monkeypatch.setattr("phase6.capacity.available_memory", available)
    monkeypatch.setattr(llm, "caches", {})
    for rows, tokens, expected in ((2, 40, 1), (2, 40, 1), (1, 10, 1), (2, CONTEXT, 2), (3, 40, 3), (2, 9, 3)):
        engine = phase6.LLMEngine(llm, rows, tokens)
        number = add(engine, asked(tokens=1))
        assert len(drain(engine)[number, 0].tokens) == 1
        engine.close()
        assert len(times) == expected, (rows, tokens)
    del llm.caches[llm.draft.model]
    phase6.LLMEngine(llm, 3, 40).close()
    assert len(times) == 4


def test_a_row_that_is_too_short_for_a_request_refuses_it(small_folder: Any) -> None:
    options = phase6.Options(model=str(small_folder), draft="none", kernels="torch", kv="static", kv_slots=30)
    engine = phase6.LLMEngine(phase6.LLM(options))
    with pytest.raises(UserError, match="holds 30 tokens per text, and 41 are needed"):
        engine.add_request(list(TEXT), phase6.SamplingParams(max_new_tokens=8))
    assert not engine.busy


def test_an_llm_runs_its_prompts_through_an_engine(pair: Callable[..., Pair]) -> None:
    """The batch size changes the steps and not the texts."""
    made = pair("torch", "model")
    made.llm.caches.clear()
    found = list[Any]()
    for rows in (1, 2, 16):
        made.llm.options = made.llm.options.model_copy(update={"batch_size": rows, "kv_pages": 0, "n": 2})
        params = phase6.SamplingParams(temperature=1.0, max_new_tokens=6)
        sequences = made.llm.sequences(["def f(", "class A", "import os"], params)
        most = max(len(step.sequences) for step in made.llm.run(sequences))
        assert most == min(rows, 6)
        found.append([sequence.tokens for sequence in sequences])
    assert found[0] == found[1] == found[2]
    made.llm.options = made.llm.options.model_copy(update={"batch_size": 16, "n": 1})


def test_torch_threads_are_those_of_the_process_afterwards(pair: Callable[..., Pair]) -> None:
    engine, before = pair("cpp", "plain").engine(), torch.get_num_threads()
    add(engine, asked(tokens=2))
    drain(engine)
    assert torch.get_num_threads() == before


def test_numbers_of_requests_do_not_repeat(pair: Callable[..., Pair]) -> None:
    engine = pair("torch", "plain").engine()
    first = add(engine, asked(tokens=1))
    drain(engine)
    assert add(engine, asked(tokens=1)) != first
    engine.close()


def test_the_controller_cost_needs_no_draft(pair: Callable[..., Pair]) -> None:
    """Nothing drafts, so no prices are measured."""
    made = pair("torch", "plain")
    engine = made.engine()
    number = add(engine, asked(controller="cost"))
    assert drain(engine)[number, 0] == made.alone(asked())


@pytest.mark.parametrize("how", ["plain", "model"])
def test_a_schedule_takes_few_calls(pair: Callable[..., Pair], how: str) -> None:
    """Time wanders, calls do not: those of Scheduler.schedule while sequences decode, for each of them."""
    for rows in (1, 8):
        engine = pair("torch", how).engine(rows=rows)
        for at in range(rows):
            add(engine, asked(TEXT[at : at + 8], tokens=40))
        while len(engine.scheduler.running) < rows or engine.scheduler.prefills:
            engine.step()
        calls = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count)
        engine.scheduler.schedule()
        sys.setprofile(None)
        assert calls <= 10 + rows * (44 if how == "plain" else 72), (rows, calls)
        engine.close()
