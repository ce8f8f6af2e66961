"""Requests of one engine that choose different drafters: each gets what it gets alone with that drafter.

Alone is phase 5; for a model that several ranks share, it is one process with one drafter.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import phase6
from common.errors import UserError
from phase6.cost_model import CostModel
from phase6.drafters.heads import build_heads, save_heads
from phase6.options import BRANCHING
from tests.support.ranks import end, same_bits, split
from tests.support.served import CONTEXT, TEXT, WHY_NOT_CPP, Pair, Request, Result, asked, drain, take
from tests.support.small import randomise, small_heads

NAMES: tuple[Any, ...] = ("model", "ngram", "medusa", "eagle")
HEADS: dict[Any, dict[str, Any]] = {  # they read layers of both ranks
    "medusa": {"heads": 3, "taps": (2, 1)},
    "eagle": {"ffn_width": 64, "reach": 32, "taps": (3, 0)},
}
REPEATED = (*TEXT[:9], *TEXT[:9], *TEXT[:9], 17)  # a prompt in which a lookup finds something
KERNELS = [pytest.param("cpp", marks=pytest.mark.skipif(WHY_NOT_CPP is not None, reason=str(WHY_NOT_CPP))), "torch"]


class Mixed(NamedTuple):
    """The LLMs of an engine with all drafters, and for each drafter an LLM of phase 5 that has no other."""

    llm: Any
    others: list[Any]
    alone: dict[str, Pair]

    def engine(self, rows: int = 12, pages: int = 0) -> Any:
        self.llm.caches.clear()
        self.llm.options = self.llm.options.model_copy(update={"kv_pages": pages})
        return phase6.LLMEngine(self.llm, rows=rows, tokens=CONTEXT, budget=32, others=self.others)


@pytest.fixture(scope="module")
def mixed(small_folder: Path, make_checkpoint: Callable[..., Path]) -> Callable[..., Mixed]:
    """`mixed("cpp")`: the drafters of NAMES, `model` by default; a tree for those that can branch."""
    draft = str(make_checkpoint("llama", max_position_embeddings=CONTEXT, num_hidden_layers=1))

    @cache
    def get(kernels: str, tree: str = "off") -> Mixed:
        more: dict[str, Any] = {"tree": tree, "tree_nodes": 6}
        alone = {"model": Pair(small_folder, kernels, "model", draft_quant="none", draft=draft, **more)}
        for name in NAMES[1:]:
            alone[name] = Pair(small_folder, kernels, name, **(more if name != "ngram" else {}))
        llm = alone["model"].llm
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("phase6.llm.find_heads", lambda option, target, kind: None)
            patch.setattr("phase6.llm.load_heads", lambda folder, target, kind: small_heads(phase6, kind, target.model))
            return Mixed(llm, [phase6.with_drafter(llm, name) for name in NAMES[1:]], alone)

    return get


def add(engine: Any, request: Request, drafter: str | None) -> Any:
    """Queue a request; return its sequence."""
    params = phase6.SamplingParams(**dataclasses.asdict(request.params))
    how: dict[str, Any] = {"policy": request.policy, "controller": request.controller, "k": request.k}
    number = engine.add_request(list(request.prompt), params, drafter=drafter, **how)
    return engine.requests[number][0]


def many(names: tuple[Any, ...] = NAMES) -> list[tuple[Any, Request]]:
    """Every drafter with every kind of request, so that neighbours differ in their drafters."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "policy": "coupled", "seed": 3},
        {"temperature": 1.0, "policy": "rejection", "seed": 4, "k": 2},
    ]
    return [(name, asked(REPEATED, tokens=24, **kind)) for kind, name in itertools.product(kinds, names)]


@pytest.mark.parametrize("tree", ["off", "static"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_each_gets_what_it_gets_alone_with_its_drafter(mixed: Callable[..., Mixed], kernels: str, tree: str) -> None:
    """The tokens, and how many were drafted and accepted: so no step used another drafter."""
    made, proposed = mixed(kernels, tree), dict.fromkeys(NAMES, 0)
    engine = made.engine()
    sequences = [add(engine, request, name) for name, request in many()]
    drain(engine)
    for sequence, (name, request) in zip(sequences, many(), strict=True):
        assert sequence.tokens == made.alone[name].alone(request).tokens
        only = made.engine(rows=1)
        single = add(only, request, name)
        drain(only)
        counts = [(step.proposed, step.accepted) for step in sequence.steps]
        assert counts == [(step.proposed, step.accepted) for step in single.steps]
        proposed[name] += sum(count for count, _ in counts)
    assert all(proposed.values()), proposed


@pytest.mark.parametrize("kernels", KERNELS)
def test_they_come_and_go_with_few_blocks(mixed: Callable[..., Mixed], kernels: str) -> None:
    """Some are preempted, some draft nothing; a row of the draft model's cache is for what it drafts for."""
    made = mixed(kernels)
    engine = made.engine(rows=5, pages=11)
    requests = [*many(), ("model", asked(REPEATED, temperature=1.0, seed=9)._replace(k=0))]
    sequences, found = list[Any](), dict[tuple[int, int], Result]()
    for name, request in requests:
        sequences.append(add(engine, request, name))
        take(engine, found)
        drafted = {each for each in sequences if each.drafter is engine.drafters["model"] and each.reach}
        assert set(engine.draft.manager.rows) <= drafted
    drain(engine, found)
    for sequence, (name, request) in zip(sequences, requests, strict=True):
        assert sequence.tokens == made.alone[name].alone(request).tokens
    assert sum(sequence.progress.preemptions for sequence in sequences) > 0
    for runner in (engine.target, engine.draft):
        assert not any(runner.manager.cache.blocks.users)


@pytest.mark.skipif(WHY_NOT_CPP is not None, reason=str(WHY_NOT_CPP))
@pytest.mark.parametrize(
    ("ranks", "tree"),
    [
        ({"tensor_parallel": 2}, "off"),
        ({"tensor_parallel": 2, "draft_parallel": True}, "static"),
        ({"pipeline_parallel": 2}, "static"),
    ],
    ids=["gather", "gather, and the draft model", "layers"],
)
def test_on_a_split_model_each_has_the_bits_of_one_process_and_one_drafter(
    make_checkpoint: Callable[..., Path], tmp_path: Path, ranks: dict[str, Any], tree: str
) -> None:
    """Logits of draft tokens are compared too, so equal bits are equal drafts. Rank 0 loads the model's ends once."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
    folder = str(make_checkpoint("llama", hidden_size=64, max_position_embeddings=CONTEXT, **sizes))
    whole = phase6.load(folder, torch.float32, torch.device("cpu"))
    for kind, shape in HEADS.items():
        save_heads(tmp_path / kind, randomise(build_heads(kind, shape, whole.config), seed=2), whole)
    names: tuple[Any, ...] = (*NAMES, "extrapolate")
    chosen: dict[str, Any] = {"model": folder, "draft": folder, "dtype": "float32", "device": "cpu", "threads": 1}
    chosen |= {"tree_nodes": 6}

    def options(name: Any, **more: Any) -> Any:
        """Return those of one drafter; the draft model and heads are int8."""
        branching: dict[str, Any] = {"draft_quant": "int8", "tree": tree} if name in BRANCHING else {}
        return phase6.Options(**chosen, drafter=name, **branching, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phase6.llm.find_heads", lambda option, target, kind: tmp_path / kind)
        llm, threads = split(options("model", **ranks))
        others = [phase6.with_drafter(llm, name) for name in names[1:]]
        alone = {name: phase6.LLM(options(name)) for name in names}
    assert len({id(other.beside) for other in others if other.options.drafter != "ngram"}) == 1
    assert len(llm.backends.fast) == 3  # the target, the draft model, the ends
    requests = many(names)
    found = bits(phase6.LLMEngine(llm, rows=8, tokens=CONTEXT, budget=32, others=others), requests)
    for (name, request), (tokens, logits) in zip(requests, found, strict=True):
        single = phase6.LLMEngine(alone[name], rows=1, tokens=CONTEXT, multi_step=False)
        ((expected, its_logits),) = bits(single, [(name, request)])
        assert tokens == expected
        assert same_bits(logits, its_logits)
        assert max(map(len, logits)) > 1  # something was drafted
    end(llm, threads)


def bits(engine: Any, requests: list[tuple[Any, Request]]) -> list[tuple[list[int], list[Tensor]]]:
    """Return of each request the tokens, and the logits of every step: after its text, and after each draft token."""
    sequences, logits = [add(engine, request, name) for name, request in requests], defaultdict[Any, list[Tensor]](list)
    with engine.llm.computing():
        while engine.busy:
            for step in engine.advance():
                for row, (sequence, tree) in enumerate(zip(step.sequences, step.trees, strict=True)):
                    logits[sequence].append(step.output.logits[row, : len(tree.tokens) + 1].clone())
            assert not engine.ended, [sequence.error for sequence in engine.ended]
    return [(sequence.tokens, logits[sequence]) for sequence in sequences]


def test_each_drafter_has_costs_of_its_own(mixed: Callable[..., Mixed], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps alone are observed, and its costs are measured once, for the first request that needs them."""
    made, measured = mixed("torch"), list[tuple[str, CostModel]]()
    for llm in (made.llm, *made.others):
        monkeypatch.setattr(llm, "cost_model", CostModel())

        def provide(cost_model: CostModel, params: Any, rows: int, name: str = llm.options.drafter) -> None:
            measured.append((name, cost_model))
            for table in cost_model.tables.values():
                table.observe(1, 1e-9 if table is cost_model.draft else 1.0)  # so drafts pay

        monkeypatch.setattr(llm.prices, "provide", provide)
    engine = made.engine()
    request = asked(REPEATED, controller="cost", tokens=20)
    sequences = [add(engine, request, name) for name in ("model", "ngram", None, "ngram")]
    drain(engine)
    add(engine, request, "ngram")
    drain(engine)
    own = {name: engine.drafting[name].cost_model for name in NAMES}
    assert dict(measured) == {name: own[name] for name in ("model", "ngram")}
    assert len(measured) == 2
    for sequence, name in zip(sequences, ("model", "ngram", "model", "ngram"), strict=True):
        assert sequence.controller.cost_model is own[name]
        assert sum(step.proposed for step in sequence.steps) > 0
    tried = {name: bool(own[name].acceptance.tried) for name in NAMES}
    assert tried == {"model": True, "ngram": True, "medusa": False, "eagle": False}


def test_a_drafter_that_is_not_loaded_is_refused(mixed: Callable[..., Mixed]) -> None:
    llm = mixed("torch").llm
    engine = phase6.LLMEngine(llm, 1, CONTEXT, others=[phase6.with_drafter(llm, "ngram")])
    with pytest.raises(UserError, match="the drafter eagle is not loaded; loaded: model, ngram"):
        engine.add_request([5, 6], drafter="eagle")
    assert not engine.busy


def test_two_llms_with_one_drafter_are_refused(mixed: Callable[..., Mixed]) -> None:
    """A request could name one of them alone. An LLM that drafts nothing has no name to clash."""
    llm = mixed("torch").llm
    lookups = [phase6.with_drafter(llm, "ngram") for _ in range(2)]
    for others, name in ((lookups, "ngram"), ([phase6.with_drafter(llm, "model")], "model")):
        with pytest.raises(UserError, match=f"two LLMs have the drafter {name}, and requests choose by that name"):
            phase6.LLMEngine(llm, 1, CONTEXT, others=others)
    plain = phase6.with_drafter(llm, "ngram")
    plain.options = plain.options.model_copy(update={"draft": "none"})
    assert list(phase6.LLMEngine(llm, 1, CONTEXT, others=[plain, lookups[0]]).drafters) == ["model", "ngram"]


def test_a_drafter_that_cannot_be_loaded_is_an_error(small_folder: Path) -> None:
    llm = phase6.LLM(phase6.Options(model=str(small_folder), drafter="ngram", device="cpu", kernels="torch"))
    with pytest.raises(UserError, match="there is no draft model for the drafter model: name one with --draft"):
        phase6.with_drafter(llm, "model")
    with pytest.raises(UserError, match="no eagle heads"):
        phase6.with_drafter(llm, "eagle")
    assert llm.options.drafter == "ngram"
