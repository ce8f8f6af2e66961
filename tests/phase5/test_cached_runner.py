"""The cache in every loop: after every step it equals a fresh prefill of the sequence."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
from torch import Tensor

import phase1
import phase4
import phase5
from common.checkpoint import MODELS
from common.errors import UserError
from common.prompts import load_prompts
from phase5.capacity import cached_bytes
from phase5.cli import main
from phase5.drafters import make_drafter
from phase5.drafters.eagle import EagleDrafter, Lookahead
from phase5.kernels import cpp, registry
from phase5.kv_cache import Kind, KVOptions, OutOfBlocks, storage
from phase5.runner import NO_DRAFT, CachedRunner, UncachedRunner, make_runner

CPU = torch.device("cpu")
slow = pytest.mark.slow
LONGEST = 120  # characters: a step without a cache computes the whole text
KINDS = ["dynamic", "static", "paged"]
SMALL = {"model": "stdlib-1m"}  # wherever no draft and no heads of the large model are needed
DRAFTING: dict[str, dict[str, Any]] = {
    "plain": {"draft": "none", **SMALL},
    "model": {"k": 4},
    "model, static tree": {"k": 3, "tree": "static", "tree_nodes": 8},
    "model, dynamic tree": {"k": 3, "tree": "dynamic", "tree_nodes": 8},
    "ngram": {"drafter": "ngram", "k": 4, **SMALL},
    "extrapolate": {"drafter": "extrapolate", "k": 2, **SMALL},
    "medusa": {"drafter": "medusa", "k": 4},
    "medusa, static tree": {"drafter": "medusa", "k": 3, "tree": "static", "tree_nodes": 8},
    "eagle": {"drafter": "eagle", "k": 4},
    "eagle, static tree": {"drafter": "eagle", "k": 3, "tree": "static", "tree_nodes": 8},
    "eagle, dynamic tree": {"drafter": "eagle", "k": 3, "tree": "dynamic", "tree_nodes": 8},
}
# Bounds of the difference between cached and fresh numbers: rounding depends on the batch size; int8 adds half a step
# of the scale in every layer before.
WITHIN = {"float32": 1e-4, "bfloat16": 0.15, "float16": 0.02, "int8": 0.15}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill uninitialised memory with NaN, so that reads of it are noticed."""

    def reserve(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(shape, 99 if dtype == torch.int8 else float("nan"), dtype=dtype, device=device)

    monkeypatch.setattr(storage, "reserve", reserve)


def texts(count: int, longest: float = LONGEST) -> list[str]:
    """Return prompts of different lengths."""
    return [prompt.text for prompt in load_prompts("code", "test") if len(prompt.text) < longest][:count]


def llm(**options: Any) -> Any:
    chosen = {"dtype": "float32", "max_tokens": 20, "device": "cpu", "kernels": "torch", **options}
    return phase5.LLM(phase5.Options(**chosen))


class Watched:
    """Collect the runners that an LLM makes, so that tests can read their caches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runners: list[CachedRunner] = []

        def make(*arguments: Any) -> Any:
            self.runners.append(CachedRunner(*arguments))
            return self.runners[-1]

        monkeypatch.setattr("phase5.backends.CachedRunner", make)


def difference(runner: CachedRunner) -> float:
    """Return the largest difference of any row from a prefill of the same tokens."""
    worst, options = 0.0, KVOptions("static")
    for row in runner.manager.rows.values():
        if not row.held:
            continue
        fresh = make_runner(runner.model, options, 1, len(row.held) + 1)
        assert isinstance(fresh, CachedRunner)
        fresh.max_inline = 1
        fresh._begin("fresh", [*row.held, 0], NO_DRAFT, None, ())
        for layer in range(runner.model.config.layers):
            here = runner.manager.cache.read(layer, row.number, 0)
            for mine, other in zip(here, fresh.manager.cache.read(layer, 0, 0), strict=True):
                worst = max(worst, float((mine.float() - other.float()).abs().max()))
    return worst


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", list(DRAFTING))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("tokens", "longest"), [(10, LONGEST), pytest.param(20, math.inf, marks=slow)])
def test_every_step_leaves_what_a_prefill_gives(
    how: str, kind: str, temperature: float, tokens: int, longest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of different lengths in one batch, for the target's and the draft's cache."""
    watched = Watched(monkeypatch)
    made = llm(kv=kind, temperature=temperature, max_tokens=tokens, **DRAFTING[how])
    sequences = made.sequences(texts(2, longest))
    for _ in made.run(sequences):
        for runner in watched.runners:
            assert difference(runner) < WITHIN["float32"]
    assert len(watched.runners) == (2 if how.startswith("model") else 1)


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "kv_dtype"), [("bfloat16", "auto"), ("float32", "float16"), ("float32", "int8")])
def test_narrow_caches_stay_near(dtype: str, kv_dtype: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    made = llm(kv=kind, dtype=dtype, kv_dtype=kv_dtype, tree="static", tree_nodes=6, max_tokens=10)
    for _ in made.run(made.sequences(texts(1))):
        assert difference(watched.runners[0]) < WITHIN[dtype if kv_dtype == "auto" else kv_dtype]


@pytest.mark.parametrize("kind", ["static", *(pytest.param(k, marks=slow) for k in ("dynamic", "paged"))])
@pytest.mark.parametrize("how", list(DRAFTING))
@pytest.mark.parametrize(("count", "tokens", "longest"), [(2, 12, LONGEST), pytest.param(3, 20, math.inf, marks=slow)])
def test_tokens_and_steps_are_those_without_a_cache(
    how: str, kind: str, count: int, tokens: int, longest: float
) -> None:
    found = {}
    for kv in ("off", kind):
        made = llm(kv=kv, max_tokens=tokens, **DRAFTING[how])
        done = made.generate(texts(count, longest))
        found[kv] = [(each.tokens, each.stats.steps) for each in done]
    assert found[kind] == found["off"]


@pytest.mark.parametrize("how", [how for how in DRAFTING if how != "plain"])
def test_the_target_computes_the_prompt_and_every_draft_once(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill computes prompt - 1 positions, each step one token and its draft."""
    watched = Watched(monkeypatch)
    made = llm(**DRAFTING[how])
    sequences = made.sequences(texts(1))
    drafted = [len(step.trees[0].tokens) for step in made.run(sequences)]
    assert watched.runners[0].manager.positions == len(sequences[0].prompt) - 1 + sum(n + 1 for n in drafted)


@pytest.mark.parametrize("kernels", ["torch", "cpp"])
@pytest.mark.parametrize("how", ["model, static tree", "model, dynamic tree"])
def test_trees_of_a_batch_take_one_draft_forward_per_level(
    how: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "cpp" and (reason := cpp.why_not()):
        pytest.skip(reason)
    rows, forward = list[int](), CachedRunner.forward

    def counting(self: CachedRunner, owners: list[Any], *more: Any) -> Any:
        rows.append(len(owners))
        return forward(self, owners, *more)

    monkeypatch.setattr(CachedRunner, "forward", counting)
    made = llm(kernels=kernels, **DRAFTING[how])
    step = next(made.run(made.sequences(texts(4))))
    assert [tree.depth for tree in step.trees] == [3] * 4
    assert rows == [4] * (3 + 1)  # a level each, and the target's


def test_samples_of_a_prompt_share_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    made = llm(kv="paged", n=4, temperature=1.0, draft="none", max_tokens=4)
    sequences = made.sequences(texts(1))
    length = len(sequences[0].prompt)
    caches: list[phase5.kv_cache.PagedCache] = []
    for _ in made.run(sequences):
        cache = watched.runners[0].manager.cache
        assert isinstance(cache, phase5.kv_cache.PagedCache)
        caches.append(cache)
        if sequences[0].finish_reason is None:
            assert cache.users.count(4) == (length - 1) // 16
    assert len({tuple(s.tokens) for s in sequences}) > 1
    assert watched.runners[0].manager.positions < 2 * length
    assert len(caches[-1].free) == len(caches[-1].users)  # all pages are freed at the end


@pytest.mark.covering(1)
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("how", ["plain", "model", "ngram", "eagle, static tree"])
def test_a_request_that_finds_no_page_is_refused_and_the_others_go_on(how: str, begun: bool) -> None:
    """A refused sequence keeps its tokens, which equal those of a run without refusal."""
    options = {"kv": "paged", "max_tokens": 36, **DRAFTING[how]}  # three pages for a short prompt
    long, short = "x = 1\n" * 50, ["import os", "class Stack:"]
    prompts, pages = (short, 3) if begun else ([short[0], long, short[1]], 8)
    whole, done = (llm(**options, **more).generate(prompts) for more in ({}, {"kv_pages": pages}))
    refused = [each for each in done if each.finish_reason == "refused"]
    assert len(refused) == 1
    assert bool(refused[0].tokens) == begun
    for each, other in zip(done, whole, strict=True):
        assert other.tokens[: len(each.tokens)] == each.tokens
        assert each is refused[0] or (each.tokens, each.text) == (other.tokens, other.text)


@pytest.mark.parametrize("kernels", ["torch", "cpp"])
def test_the_states_of_a_prefill_survive_a_step_that_finds_no_page(kernels: Literal["torch", "cpp"]) -> None:
    """Drafters read them: the next step returns them, although it computes none of the prompt again."""
    if kernels == "cpp" and (reason := cpp.why_not()):
        pytest.skip(reason)
    made = llm(draft="none", kernels=kernels, **SMALL)
    first, second = list(range(40)), list(range(50, 90))  # three pages each

    def runner(pages: int) -> Any:
        return made.backends.runner(
            made.loaded.model, made.backends.manager(made.loaded.model, KVOptions("paged", pages=pages), 2, 64)
        )

    whole, short = runner(8), runner(5)
    expected = whole.forward(["first"], [first], states_from=[0])
    with pytest.raises(OutOfBlocks):
        short.forward(["first", "second"], [first, second], states_from=[0, 0])
    short.release("second")
    output = short.forward(["first"], [first], states_from=[0])
    assert short.computed == [1]
    assert expected.states is not None
    assert output.states is not None
    assert torch.equal(output.states[0], expected.states[0])


def test_the_command_line_tells_of_a_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--prompt", "import os", "--prompt", "class Stack:", "--max-tokens", "36", "--json"]
    assert main([*wanted, "--kv", "paged", "--kv-pages", "3", "--draft", "none", "--dtype", "float32"]) == 2
    out, err = capsys.readouterr()
    completions = json.loads(out)["completions"]
    at = next(at for at, each in enumerate(completions) if each["finish_reason"] == "refused")
    assert completions[1 - at]["finish_reason"] == "length"
    assert len(completions[1 - at]["tokens"]) == 36
    assert completions[at]["error"].startswith("out of pages: 1 of 16 tokens are needed")
    assert f"error: completion {at + 1} was refused: out of pages" in err.splitlines()[-1]


def test_a_cache_that_is_not_there_is_said() -> None:
    for options, why in (({"kv": "off"}, "--kv off"), ({"beams": 2}, "beam search"), ({"model": "fake"}, "nothing to")):
        made = llm(draft="none", max_tokens=3, **options)
        made.generate(["x y"])
        assert made.remembered()["kind"] == "off"
        assert why in made.remembered()["why"]


def test_past_the_context_the_window_is_prefilled_again(make_checkpoint: Callable[..., Path]) -> None:
    folder = str(make_checkpoint("llama", max_position_embeddings=32))
    options = {"model": folder, "max_tokens": 48, "draft": folder, "k": 3}
    assert llm(**options).generate(["import "])[0].tokens == llm(kv="off", **options).generate(["import "])[0].tokens


@pytest.mark.parametrize(
    ("kind", "kernels", "penalty", "period"),
    [
        *((kind, "torch", 0.01, period) for kind in get_args(Kind) for period in ([3] if kind == "off" else [1, 3, 7])),
        ("static", "cpp", 0.01, 3),
        *(
            (kind, "cpp", 1.0, 3) for kind in ("static", "paged", "ring")
        ),  # without penalties a call makes several steps
    ],
)
@pytest.mark.covering(1)
@pytest.mark.parametrize("how", ["plain", "ngram", "model"])
def test_constant_and_periodic_texts_past_the_context(
    how: str, kind: str, kernels: str, penalty: float, period: int, looping: Path
) -> None:
    """After a jump the row may have a common prefix with the window again; a ring has overwritten part of it.

    Phase 1 gives the expected tokens.
    """
    if kernels == "cpp" and (reason := registry.why_not("cpp", CPU)) is not None:
        pytest.skip(f"no C++ backend here: {reason}")
    options: dict[str, Any] = {"model": str(looping), "max_tokens": 80, "repetition_penalty": penalty}
    drafting: dict[str, dict[str, Any]] = {
        "plain": {"draft": "none"},
        "ngram": {"drafter": "ngram"},
        "model": {"draft": str(looping), "k": 3},
    }
    text = "".join([" 0", " 1", " 2", " 3", " 4", " 5", " 6"][at % period] for at in range(80))
    first = phase1.LLM(phase1.Options(dtype="float32", device="cpu", **options))
    (expected,) = first.generate([text])
    made = llm(kv=kind, kernels=kernels, **options, **drafting[how])
    (done,) = made.generate([text])
    assert done.tokens == expected.tokens
    assert penalty == 1 or len(set(done.tokens[-32:])) <= 8  # the output repeats


@pytest.fixture(scope="module")
def looping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stdlib-1m as a Mistral whose window is 24 tokens and whose context 96."""
    folder = tmp_path_factory.mktemp("looping") / "stdlib-1m"
    shutil.copytree(MODELS / "stdlib-1m", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    config |= {"sliding_window": 24, "max_position_embeddings": 96}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.covering(1)
@pytest.mark.parametrize("options", [{}, {"drafter": "eagle"}], ids=["model", "eagle"])
@pytest.mark.parametrize("kind", [*KINDS, "ring"])
def test_deep_dynamic_trees_fit_into_the_cache(
    options: dict[str, Any], kind: str, looping: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draft's cache has room for the tree's budget; EAGLE's for every node that it extends, to any depth."""
    if kind == "ring":
        if options:
            pytest.skip("EAGLE's layer was trained for another model")
        options = {"model": str(looping), "draft": str(looping), "tree_nodes": 8}
    found = {}
    for kv in ("off", kind):
        made = llm(kv=kv, tree="dynamic", k=32 if "drafter" in options else 7, max_tokens=16, **options)
        found[kv] = [each.tokens for each in made.generate(["import ", "def f(x"])]
    assert found[kind] == found["off"]


def test_eagles_layer_has_room_for_all_that_a_deep_tree_extends() -> None:
    """A full tree fits: four nodes on each of 64 levels; nodes of the last level are not extended."""
    made = llm(drafter="eagle")
    layer = Lookahead(made.heads, made.loaded.model, 300)
    fed = max(n for n in range(300) if layer.has_room(n))
    with torch.inference_mode():
        layer.begin(torch.randn(fed, made.loaded.config.width), fed)
        tokens, parents, level = list[int](), list[int](), [-1] * 4
        for depth in range(63):
            nodes = list(range(4 * depth, 4 * depth + 4))
            tokens, parents, level = [*tokens, 5, 6, 7, 8], parents + level, nodes
            assert layer.extend(phase5.Tree(tokens, parents), nodes).shape == (4, made.loaded.config.width)


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen3", "mistral"])
def test_other_families(family: str, make_checkpoint: Callable[..., Path]) -> None:
    folder = str(make_checkpoint(family))
    prompts = ["import os", "def function(left, right):\n    return"]
    expected = [each.tokens for each in llm(model=folder, kv="off", draft="none").generate(prompts)]
    for kind in (*KINDS, *(["ring"] if family == "mistral" else [])):
        for options in ({"draft": "none"}, {"draft": folder, "k": 3}):
            assert [e.tokens for e in llm(model=folder, kv=kind, **options).generate(prompts)] == expected, kind


@pytest.mark.about("engine/kv_cache/manager.py, CacheManager.begin")
def test_a_text_that_changes_is_computed_from_where_it_does(make_checkpoint: Callable[..., Path]) -> None:
    model = phase5.load(str(make_checkpoint("llama")), torch.float32, CPU).model
    runner, whole = make_runner(model, KVOptions(), 2, 64), UncachedRunner(model)
    assert isinstance(runner, CachedRunner)
    for text in ([5, 6, 7, 8], [5, 6, 7, 8, 9], [5, 6, 10], [11], [5, 6, 10, 12]):
        torch.testing.assert_close(
            runner.forward(["a"], [text]).logits, whole.forward(["a"], [text]).logits, atol=1e-5, rtol=1e-4
        )
    assert runner.manager.positions == 4 + 1 + 1 + 1 + 4
    runner.forward(["b"], [[5, 6, 10, 13]])  # has a common prefix with the other
    assert runner.manager.positions == 11 + 1


def test_eagle_feeds_its_layer_each_input_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """EAGLE's cache equals that of a layer that computes all inputs at once."""
    made = llm(drafter="eagle", max_tokens=24, tree="dynamic", k=3, tree_nodes=8)
    drafters: list[EagleDrafter] = []

    def make(*arguments: Any, **more: Any) -> EagleDrafter:
        made = make_drafter(*arguments, **more)
        assert isinstance(made, EagleDrafter)
        drafters.append(made)
        return made

    monkeypatch.setattr("phase5.llm.make_drafter", make)
    sequences = made.sequences(texts(1))
    for step in made.run(sequences):
        if step.trees[0].tokens and sequences[0].finish_reason is None:
            drafter = drafters[0]
            layer, inputs = drafter._layers[sequences[0]], drafter.inputs(sequences[0], drafter.head.shape.reach)
            assert inputs is not None
            fresh = Lookahead(drafter.head, drafter.target, 512)
            fresh.begin(inputs[: layer.confirmed], 0)
            layer.cache.truncate(0, layer.confirmed)
            for mine, other in zip(layer.cache.read(0, 0, 0), fresh.cache.read(0, 0, 0), strict=True):
                torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_wrong_wishes_are_named(make_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="--kv ring overwrites tokens"):
        llm(kv="ring", draft="none").generate(["import "])
    made = llm(kv_slots=30, draft="none")
    needed = len(made.encoder.encode(texts(1))[0]) + 20
    with pytest.raises(UserError, match=rf"holds 30 tokens per text, and {needed} are needed .*a larger --kv-slots"):
        made.generate(texts(1))
    for drafting, more in (({"draft": "none"}, 0), (DRAFTING["model"], 0), (DRAFTING["eagle, static tree"], 8)):
        with pytest.raises(UserError, match=f"and {needed + more} are needed"):
            llm(kv_slots=needed + more - 1, **drafting).generate(texts(1))
        assert len(llm(kv_slots=needed + more, **drafting).generate(texts(1))[0].tokens) == 20
    pages = -(-needed // 16)
    with pytest.raises(UserError, match=f"out of pages: there are {pages - 1} of 16 tokens, and {pages} are needed"):
        llm(kv="paged", kv_pages=pages - 1, draft="none").generate(texts(1))


@pytest.mark.no_exercise
def test_memory_is_asked_for_as_it_will_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a cache the masks of all sequences count; with one, the cache and the mask of a chunk."""
    monkeypatch.setattr("phase5.capacity.available_memory", lambda device: 100 * 2**20)
    few = {"draft": "none", "max_tokens": 900, "n": 8, "temperature": 1.0}
    assert len(llm(kv="static", **few).sequences(["x"])) == 8
    for wrong in ({"kv": "off"}, {"n": 40}, {"kv": "paged", "n": 40}):
        with pytest.raises(UserError, match=r"completions of up to 9\d\d tokens need about \d+\.\d GiB at once"):
            llm(**{**few, **wrong}).sequences(["x"])
    config, dtype = llm(**few).loaded.config, torch.float32
    narrow, whole = (cached_bytes(config, KVOptions("static", kind), 8, 900, dtype) for kind in ("int8", "auto"))
    assert narrow < whole * 0.6


def test_plain_and_cached_write_what_phase_4_writes() -> None:
    options: dict[str, Any] = {"dtype": "float32", "max_tokens": 12, "device": "cpu", "draft": "none"}
    before = phase4.LLM(phase4.Options(**options)).generate(texts(2))
    for kind in KINDS:
        assert [e.tokens for e in llm(kv=kind, **options).generate(texts(2))] == [e.tokens for e in before]
