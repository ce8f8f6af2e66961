"""Several requests of one call to an LLM, each with its own sampling parameters; streaming; and torch's threads."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from common.errors import UserError
from common.phases import Phase
from tests.support.small import small_session

pytestmark = pytest.mark.newest

REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("def read(path):\n    ", {}),
    ("import os\nfrom ", {"temperature": 1.0, "seed": 3}),
    ("class Stack:\n    def ", {"temperature": 0.8, "top_k": 20, "seed": -4, "max_new_tokens": 4}),
    ("for i in", {"temperature": 1.2, "top_p": 0.8, "seed": 2**63 + 1, "frequency_penalty": 0.5}),
    (
        "    return self.",
        {"temperature": 1.0, "min_p": 0.05, "seed": 9, "stop": ("(", ".", "\n"), "max_new_tokens": 14},
    ),
    ("import os\nfrom ", {"temperature": 1.0, "seed": 4}),
    ("x = x = x =", {"repetition_penalty": 1.3, "max_new_tokens": 9}),
]
TEXTS = [text for text, _ in REQUESTS]
STATIC, DYNAMIC = {"tree": "static", "tree_nodes": 6}, {"tree": "dynamic", "tree_nodes": 6}
WAYS: list[dict[str, Any]] = [  # to draft; policies came with phase 3
    {"k": 3},
    {"policy": "coupled", "k": 3},
    {"policy": "longest_prefix", "drafter": "ngram"},
    {"policy": "rejection", "drafter": "ngram"},
    {"policy": "rejection", "controller": "confidence"},
    {"policy": "coupled", "controller": "adaptive"},
    {"policy": "coupled", "drafter": "extrapolate", "k": 2},
    {"policy": "rejection", "drafter": "medusa", "k": 2},
    {"policy": "rejection", "drafter": "eagle", "k": 2},
    *({"policy": policy, "k": 3, **tree} for policy in ("coupled", "rejection") for tree in (STATIC, DYNAMIC)),
    {"policy": "typical", "k": 3},
    {"policy": "topk_agree", "k": 3, **STATIC},
]
SAME_AS_PLAIN = ("coupled", "longest_prefix")


def since(way: dict[str, Any]) -> int:
    return 3 if "policy" in way else 2


def params_of(engine: ModuleType) -> list[Any]:
    return [engine.SamplingParams(**{"max_new_tokens": 6, **settings}) for _, settings in REQUESTS]


def kinds(phase: Phase) -> list[dict[str, Any]]:
    """Return options that choose who computes."""
    return [{}] if phase.number < 5 else [{"kernels": "torch", "kv": "static"}, {}]


def make(engine: ModuleType, **options: Any) -> Any:
    """Make an LLM on the embedded models whose own parameters are none of the requests'."""
    own: dict[str, Any] = {"max_tokens": 2, "temperature": 0.3, "seed": 77}
    if "draft" in engine.Options.model_fields:
        own["draft"] = "none"
    return engine.LLM(engine.Options(**{"device": "cpu", "dtype": "float32", **own, **options}))


def outcomes(done: list[Any]) -> list[tuple[list[int], str, str]]:
    return [(each.tokens, each.text, each.finish_reason) for each in done]


@pytest.mark.newest(2)
def test_requests_of_one_call_are_answered_as_alone(engine: ModuleType, phase: Phase) -> None:
    """Plain, and with drafts by a model: with a fixed K the tokens depend on the seed alone."""
    params = params_of(engine)
    for kind in kinds(phase):
        llm = make(engine, **kind)
        plain = answers(llm, params)
        assert {len(tokens) for tokens, _, _ in plain} >= {4, 6, 9}
        assert {reason for _, _, reason in plain} >= {"length", "stop"}
        assert plain[1] != plain[5]  # one text, two seeds
        for way in WAYS[:2]:
            if phase.number >= since(way):
                got = answers(make(engine, draft="auto", **kind, **way), params)
                equal = [way.get("policy") == "coupled" or mine.greedy for mine in params]
                assert list(itertools.compress(got, equal)) == list(itertools.compress(plain, equal)), (kind, way)


def answers(llm: Any, params: list[Any]) -> list[tuple[list[int], str, str]]:
    """Return the outcomes of all requests, after a check that they are the same together and alone."""
    together = outcomes(llm.generate(TEXTS, params))
    assert together == [outcomes(llm.generate([text], [mine]))[0] for text, mine in zip(TEXTS, params, strict=True)]
    return together


@pytest.mark.newest(2)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_every_way_to_draft(
    engine: ModuleType, phase: Phase, way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On small models, whose drafts are often rejected; `coupled` and `longest_prefix` give plain decoding's tokens."""
    if phase.number < since(way):
        pytest.skip(f"comes with phase {since(way)}")
    settings = [{**settings, "stop": (), "max_new_tokens": 12 + 3 * at} for at, (_, settings) in enumerate(REQUESTS)]
    params = [engine.SamplingParams(**mine) for mine in settings]
    llm = small_session(engine, monkeypatch, **{"draft": "fake:0.7", **way})

    def sequences() -> list[Any]:
        return [engine.Sequence([1, 2, 3, 1, 2, at % 3], mine, engine.Ending()) for at, mine in enumerate(params)]

    def run(each: list[Any]) -> None:
        for _ in llm.run(each):
            pass

    together, alone = sequences(), sequences()
    run(together)
    for sequence in alone:
        run([sequence])
    assert [each.tokens for each in together] == [each.tokens for each in alone]
    assert [len(each.tokens) for each in together] == [mine.max_new_tokens for mine in params]
    steps = [step for sequence in together for step in sequence.steps]
    assert sum(step.proposed for step in steps) > sum(step.accepted for step in steps) > 0
    equal = [way.get("policy") in SAME_AS_PLAIN or (llm_is_lossless(llm) and mine.greedy) for mine in params]
    for sequence, mine, same in zip(together, params, equal, strict=True):
        if same:
            (plain,) = engine.generate(llm.loaded.model, [sequence.prompt], mine)
            assert sequence.tokens == plain.tokens


def llm_is_lossless(llm: Any) -> bool:
    return not hasattr(llm, "policy") or bool(llm.policy.lossless)


def test_one_for_all_one_for_each_or_the_options(engine: ModuleType, llama_folder: Path) -> None:
    options = {"model": str(llama_folder), "max_tokens": 6, "temperature": 1.0, "seed": 5}
    llm = engine.LLM(engine.Options(**options))
    own, other = llm.params, engine.SamplingParams(max_new_tokens=4)
    texts = ["import os", "x"]
    for given, each in ((None, [own, own]), (other, [other, other]), ([other, own], [other, own])):
        assert [sequence.params for sequence in llm.sequences(texts, given)] == each
        solo = [outcomes(llm.generate([text], mine))[0] for text, mine in zip(texts, each, strict=True)]
        assert outcomes(llm.generate(texts, given)) == solo
    three = engine.LLM(engine.Options(**{**options, "n": 3}))
    sequences = three.sequences(texts, [other, own])
    assert [(each.params, each.sample) for each in sequences] == [(p, n) for p in (other, own) for n in range(3)]
    assert [len(each.tokens) for each in three.generate(texts, [other, own])] == [4, 4, 4, 6, 6, 6]


def test_so_many_parameters_as_prompts(engine: ModuleType, llama_folder: Path) -> None:
    llm = engine.LLM(engine.Options(model=str(llama_folder), max_tokens=2))
    mine = engine.SamplingParams(max_new_tokens=2)
    for count in (0, 1, 2, 4):
        with pytest.raises(UserError, match=f"{count} sampling parameters for 3 prompts: give one for each, or one"):
            llm.generate(["a", "b", "c"], [mine] * count)


@pytest.mark.newest(2)
def test_pieces_of_a_stream_add_up_to_the_text(engine: ModuleType, phase: Phase) -> None:
    """With a stop string, text that may begin it is held back; a draft gives several tokens at once."""
    for kind in kinds(phase):
        for draft in [{}] if phase.number < 2 else [{"draft": "none"}, {"draft": "auto"}]:
            llm = make(engine, **kind, **draft)
            whole = ""
            for _ in range(2):
                stop = (whole[5:8],) if whole else ()  # in the middle, also of a token
                mine = engine.SamplingParams(temperature=1.0, seed=3, max_new_tokens=16, stop=stop)
                pieces = list(llm.stream(TEXTS[0], mine))
                (done,) = llm.generate(TEXTS[:1], mine)
                assert "".join(pieces) == done.text
                assert all(pieces)
                if stop:
                    assert (done.text, done.finish_reason) == (whole[: whole.index(*stop)], "stop")
                else:
                    assert len(pieces) > 1  # one call may make all steps but the first
                whole = done.text
            assert "".join(llm.stream(TEXTS[0])) == llm.generate(TEXTS[:1])[0].text


def test_a_stream_gives_text_before_its_end(engine: ModuleType) -> None:
    llm = make(engine)
    mine = engine.SamplingParams(max_new_tokens=400, ignore_eos=True)
    stream = llm.stream(TEXTS[0], mine)
    first = "".join(next(stream) for _ in range(3))  # a piece of a fast model may have many tokens
    stream.close()
    start = llm.generate(TEXTS[:1], engine.SamplingParams(max_new_tokens=24, ignore_eos=True))[0].text
    assert start.startswith(first) or first.startswith(start)


@pytest.fixture
def threads() -> Any:
    """Let torch start with a number of threads that no test asks for."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


@pytest.mark.newest(2)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_torch_has_as_many_threads_afterwards(
    engine: ModuleType, phase: Phase, threads: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--threads` holds within the steps; between them, after them and after an error it does not."""
    for kind in kinds(phase):
        llm = make(engine, threads=count, **kind)
        assert torch.get_num_threads() == threads
        inside = set[int]()
        appended = engine.Sequence.append

        def append(sequence: Any, token: int) -> bool:
            inside.add(torch.get_num_threads())  # noqa: B023
            more: bool = appended(sequence, token)  # noqa: B023
            return more

        with monkeypatch.context() as within:
            within.setattr(engine.Sequence, "append", append)
            llm.generate(TEXTS[:2])
        assert torch.get_num_threads() == threads
        in_cpp = getattr(getattr(llm, "backends", None), "fast", False)  # then torch's threads would be in the way
        assert inside == {1 if in_cpp else count or threads}
        for _ in llm.run(llm.sequences(TEXTS[:1], engine.SamplingParams(max_new_tokens=4))):
            assert torch.get_num_threads() == threads
        next(llm.stream(TEXTS[0], engine.SamplingParams(max_new_tokens=30)))
        assert torch.get_num_threads() == threads

        def broken(sequence: Any, token: int) -> bool:
            raise KeyboardInterrupt

        with monkeypatch.context() as within:
            within.setattr(engine.Sequence, "append", broken)
            with pytest.raises(KeyboardInterrupt):
                llm.generate(TEXTS[:1])
        assert torch.get_num_threads() == threads


def test_searching_with_beams_takes_each_ones_parameters(engine: ModuleType, phase: Phase, llama_folder: Path) -> None:
    llm = make(engine, model=str(llama_folder), beams=2, temperature=0.0)
    short, long = engine.SamplingParams(max_new_tokens=3), engine.SamplingParams(max_new_tokens=6)
    done = llm.generate(TEXTS[:2], [short, long])
    beam = importlib.import_module(f"{phase.package}.beam")
    for text, mine, each in zip(TEXTS[:2], (short, long), done, strict=True):
        prompt = llm.loaded.tokenizer.encode(text)
        assert each.tokens == beam.beam_search(llm.loaded.model, prompt, mine, llm.loaded.ending, 2, 1.0).tokens
    assert "".join(llm.stream(TEXTS[1], long)) == done[1].text
