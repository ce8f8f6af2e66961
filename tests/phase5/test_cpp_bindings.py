"""Bad arguments of the C++ kernels raise an exception and never cause a signal."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from common.philox import Purpose
from phase5.config import ModelConfig
from phase5.drafters.eagle import EagleHead, EagleShape
from phase5.drafters.medusa import MedusaHeads, MedusaShape
from phase5.kernels import cpp
from phase5.kernels.cpp import library
from phase5.kernels.cpp.model import idle
from phase5.kernels.cpp.ops import sampling_of
from phase5.kv_cache import CacheShape, PagedCache, RingCache
from phase5.model import Transformer
from phase5.sampling import SamplingParams
from phase5.verify import GreedySource, KeyedSource
from tests.support import forked
from tests.support.cpp import draft_chain, generate_plain

pytestmark = pytest.mark.skipif(cpp.why_not() is not None, reason=str(cpp.why_not()))
HOSTILE = (-(2**31), -1000, -1, 0, 1, 2, 3, 7, 31, 32, 39, 40, 41, 63, 64, 1000, 2**20, 2**30, 2**31 - 1)
CALLS = 2_000
TINY = ModelConfig(
    family="llama", vocab_size=40, layers=1, width=32, heads=1, kv_heads=1, head_dim=32, ffn_width=32, context=64,
    norm="rms", norm_eps=1e-5, positions="rope", activation="silu", gated=True,
)  # fmt: skip


def model_of(config: ModelConfig, seed: int) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))
    return model


@pytest.fixture(scope="module")
def fast() -> cpp.CppModel:
    return cpp.CppModel(model_of(TINY, 0), "float32", 2)


def verdict(tokens: list[int], widths: list[int], V: int = 100, more: dict[str, Tensor] | None = None) -> Any:
    R, K = len(widths), len(tokens) // max(1, len(widths))
    arguments = {
        "draft_tokens": torch.tensor(tokens).view(R, K),
        "draft_probs": torch.full((R, K, V), 1 / V),
        "target_probs": torch.full((R, K + 1, V), 1 / V),
        "widths": torch.tensor(widths),
        "keys": torch.zeros(R, 2, dtype=torch.long),
        "positions": torch.zeros(R, dtype=torch.long),
        **(more or {}),
    }
    given: list[Any] = [*arguments.values(), KeyedSource()]
    return cpp.verify_sample(*given)


@pytest.mark.parametrize("token", [-1, 100, 5000, 10**9, -(2**62)])
def test_draft_tokens_outside_the_vocabulary_are_refused(token: int) -> None:
    with pytest.raises(ValueError, match="not in the vocabulary"):
        verdict([3, token], [2])


@pytest.mark.parametrize("width", [3, 10**6, -1, 2**40])
def test_widths_outside_the_draft_are_refused(width: int) -> None:
    with pytest.raises(ValueError, match=r"widths must be in 0 \.\. 2"):
        verdict([3, 4], [width])


def test_shapes_that_do_not_fit_together_are_refused() -> None:
    for wrong in (
        {"target_probs": torch.ones(1, 2, 100)},
        {"draft_probs": torch.ones(1, 2, 99)},
        {"keys": torch.zeros(2, 2, dtype=torch.long)},
        {"keys": torch.zeros(1, dtype=torch.long)},
        {"positions": torch.zeros(2, dtype=torch.long)},
    ):
        with pytest.raises(ValueError, match="do not fit together"):
            verdict([3, 4], [2], more=wrong)


def test_steps_that_cannot_be_are_refused(fast: cpp.CppModel) -> None:
    cache, params = fast.new_cache(2, 16), SamplingParams()
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("occurs twice", lambda: fast.step(cache, [[1], [2]], rows=[0, 0])),
        ("no such row", lambda: step(fast, cache, pages=[2])),
        ("no such row", lambda: step(fast, cache, pages=[-1])),
        ("below 0 or absurd", lambda: step(fast, cache, held=2**31 - 1)),
        ("below 0 or absurd", lambda: step(fast, cache, held=-1)),
        ("no room", lambda: step(fast, cache, held=16)),
        ("no room", lambda: step(fast, cache, held=32, pages=[0, 1])),
        ("no room", lambda: step(fast, cache, pages=[])),
        ("occurs twice", lambda: step(fast, cache, held=15, pages=[1, 1], tokens=2)),
        ("no cache", lambda: raw_step(fast, library().Row(None, [0], 0))),
        ("past the model's", lambda: fast.step(cache, [[1]], positions=[[2**31 - 1]])),
        ("at least one step", lambda: generate_plain(fast, cache, 0, [1], 0, params)),
        ("no room", lambda: decode(fast, cache, states=True, room=31)),
        ("tapped layer is not there", lambda: decode(fast, cache, states=True, taps=[1])),
        ("inputs must be", lambda: fast.step(cache, [[1]], inputs=torch.empty(2, 32))),
    ]
    for words, call in refused:
        with pytest.raises(ValueError, match=words):
            call()
    assert cache.lengths == [0, 0]


def step(fast: cpp.CppModel, cache: Any, held: int = 0, pages: Sequence[int] = (0,), tokens: int = 1) -> None:
    raw_step(fast, library().Row(fast.view(cache), list(pages), held), tokens)


def raw_step(fast: Any, row: Any, tokens: int = 1) -> None:
    engine = getattr(fast, "_engine", fast)
    engine.step([1] * tokens, [0] * tokens, [row], [tokens], [], [0], [], 0, 0, 0, 0)


def decode(
    fast: cpp.CppModel, cache: Any, states: bool, room: int = 10**6, taps: Sequence[int] = (), ms: float = 0
) -> None:
    memory = torch.empty(4096)
    batch = [fast.sequence(cache, 0, [1], SamplingParams())]
    library().decode(
        fast._engine, batch, None, [0], 1, [1], [False], [], memory.data_ptr() * states, room, list(taps), ms
    )


def test_a_view_describes_a_cache_that_can_be(fast: cpp.CppModel) -> None:
    at = torch.zeros(64).data_ptr()
    good: dict[str, Any] = {"kind": 0, "pages": 2, "kv_heads": 1, "slots": 4, "head_dim": 32, "ring": False}
    of_good = [[at], [at], [], []]
    library().View(*good.values(), *of_good, None)
    for wrong, words in (
        ({"kind": 4}, "four bits"),
        ({"kind": 5}, "no such number format"),
        ({"kind": 3}, "int8 has scales"),
        ({"pages": 0}, "at least one of everything"),
        ({"slots": -1}, "at least one of everything"),
        ({"pages": 2**20, "slots": 2**20}, "fewer than 2\\^30 entries"),
    ):
        with pytest.raises(ValueError, match=words):
            library().View(*{**good, **wrong}.values(), *of_good, None)
    for pointers, words in (
        ([[at], [], [], []], "different numbers of layers"),
        ([[at], [0], [], []], "is not there"),
        ([[at], [at], [at], [at]], "nothing else has"),
    ):
        with pytest.raises(ValueError, match=words):
            library().View(*good.values(), *pointers, None)
    for wrong, pointers, words in (
        ({"kv_heads": 2}, of_good, "another shape"),
        ({}, [[at, at], [at, at], [], []], "another number of layers"),
    ):
        view = library().View(*{**good, **wrong}.values(), *pointers, None)
        with pytest.raises(ValueError, match=words):
            raw_step(fast, library().Row(view, [0], 0))


def test_a_ring_has_room_for_its_window_and_the_new_tokens() -> None:
    model = model_of(dataclasses.replace(TINY, windows=(8,)), 0)
    fast = cpp.CppModel(model, "float32", 1)
    shape = CacheShape(TINY.layers, TINY.kv_heads, TINY.head_dim)
    cache = RingCache(shape, 2, 8, torch.float32, torch.float32, torch.device("cpu"))
    fast.step(cache, [[1] * 17])
    for tokens in (18, 24, 64):
        with pytest.raises(ValueError, match="smaller than the window and the tokens"):
            fast.step(cache, [[1] * tokens])
    for pages in ([], [0, 1]):
        with pytest.raises(ValueError, match="a row of a ring has one page"):
            step(fast, cache, pages=pages)
    without = cpp.CppModel(model_of(TINY, 0), "float32", 1)
    with pytest.raises(ValueError, match="smaller than the window"):
        without.step(cache, [[1]])


def test_two_rows_do_not_write_the_same_page(fast: cpp.CppModel) -> None:
    """They may share pages that both only read."""
    cache = paged(fast, rows=2, pages=4)
    cache.make_room(0, 20)
    fast.step(cache, [list(range(20))], rows=[0], logits=False, wanted=[])
    cache.keep(0, list(range(20)))
    cache.fork(0, 1)
    with pytest.raises(ValueError, match="a row or page occurs twice"):
        fast.step(cache, [[1], [2]])
    with pytest.raises(ValueError, match="a row or page occurs twice"):
        fast.decode([fast.sequence(cache, row, [1], SamplingParams()) for row in (0, 1)], None, [0, 0], 1)
    for row in (0, 1):  # the second page is copied
        cache.make_room(row, 1)
    assert cache.tables[0][0] == cache.tables[1][0]
    fast.step(cache, [[1], [2]])


def paged(fast: cpp.CppModel, rows: int, pages: int) -> PagedCache:
    shape = CacheShape(fast.config.layers, fast.config.kv_heads, fast.config.head_dim)
    return PagedCache(shape, rows, pages, torch.float32, torch.float32, torch.device("cpu"))


def test_batches_that_cannot_be_are_refused(fast: cpp.CppModel) -> None:
    other, params = cpp.CppModel(model_of(TINY, 1), "float32", 1), SamplingParams()
    foreign = cpp.CppModel(model_of(dataclasses.replace(TINY, vocab_size=41), 1), "float32", 1)
    cache = fast.new_cache(2, 16)

    def batch(of: cpp.CppModel, rows: Sequence[int] = (0, 1), at: Any = None) -> list[Any]:
        at = of.new_cache(2, 16) if at is None else at
        return [of.sequence(at, row, [1], params) for row in rows]

    def drafter(of: cpp.CppModel, rows: Sequence[int] = (0, 1), at: Any = None) -> Any:
        return library().ModelDrafter(of._engine, batch(of, rows, at), [int(Purpose.DRAFT)] * len(rows))

    def given(*tokens: list[int]) -> Any:
        return library().GivenDrafter(fast._engine, list(tokens))

    def run(by: Any, counts: Sequence[int] = (2, 2), steps: int = 1, rows: Sequence[int] = (0, 1)) -> None:
        fast.decode(batch(fast, rows, cache), by, list(counts), steps)

    refused: list[tuple[str, Callable[[], Any]]] = [
        ("no sequences", lambda: run(None, [], rows=[])),
        ("nobody drafts", lambda: run(None)),
        ("sequences and counts differ", lambda: run(drafter(other), [2])),
        ("sequences and counts differ", lambda: run(None, [0, 0, 0])),
        ("at least one step", lambda: run(None, [0, 0], 0)),
        ("absurd", lambda: run(None, [0, 0], 2**21)),
        ("below 0 or absurd", lambda: run(drafter(other), [2, -1])),
        ("below 0 or absurd", lambda: run(drafter(other), [2**21, 1])),
        ("sequences and rules differ", lambda: fast.decode(batch(fast, at=cache), None, [0, 0], 1, own=[True])),
        ("sequences and limits differ", lambda: fast.decode(batch(fast, at=cache), None, [0, 0], 1, limits=[1])),
        ("limit is below", lambda: fast.decode(batch(fast, at=cache), drafter(other), [2, 1], 1, limits=[2, 2])),
        ("sequences and purposes differ", lambda: run(library().ModelDrafter(other._engine, batch(other), [1]))),
        ("other sequences", lambda: run(drafter(other, [0]))),
        ("different vocabularies", lambda: run(drafter(foreign))),
        ("a cache of its own", lambda: run(drafter(other, at=cache))),
        ("no room", lambda: run(drafter(other), [15, 15], 2)),
        ("occurs twice", lambda: run(None, [0, 0], rows=[1, 1])),
        ("occurs twice", lambda: run(drafter(other, [1, 1]))),
        ("fewer tokens than were asked for", lambda: run(given([1, 2], [3]))),
        ("not in the vocabulary", lambda: run(given([1, 2], [3, 40]))),
        ("fewer tokens than were asked for", lambda: run(given([1, 2], [3, 4]), steps=2)),
        ("sequences and counts differ", lambda: drafter(other).propose([2], 0)),
        (
            "cached already",
            lambda: fast.decode([library().Sequence(fast.row(cache, 0), [], way(), 0, 0)], None, [0], 1),
        ),
        ("no cache", lambda: fast.decode([idle()], drafter(other, [0]), [1], 1)),
        (
            "no cache",
            lambda: fast.decode([library().Sequence(library().Row(None, [], 0), [1], way(), 0, 0)], None, [0], 1),
        ),
    ]
    for words, call in refused:
        with pytest.raises(ValueError, match=words):
            call()
    run(drafter(other), [2, 0])
    run(given([1, 2], []), [2, 0])


def way() -> Any:
    return sampling_of(SamplingParams())


def test_a_model_that_is_not_finished_does_not_run(fast: cpp.CppModel) -> None:
    from phase5.kernels.cpp.weights import describe

    raw = library().Engine(describe(TINY), 1, cpp.chosen_isa())
    cache = fast.new_cache(1, 8)
    with pytest.raises(ValueError, match="not finished"):
        raw_step(raw, fast.row(cache, 0))
    with pytest.raises(ValueError, match="norm is missing"):
        raw.finish()
    with pytest.raises(ValueError, match="a window is at least 0"):
        raw.set_window(0, -1)
    for layer in (-1, 1):
        with pytest.raises(IndexError):
            raw.set_window(layer, 4)
    for wrong in ({"heads": 0}, {"layers": 2**31 - 1}, {"kv_heads": 3}, {"vocab": -5}, {"activation": 9}):
        with pytest.raises(ValueError, match=r"size|heads|activation"):
            library().Engine({**describe(TINY), "heads": 4, **wrong}, 1, cpp.chosen_isa())


def test_logits_that_are_not_finite_end_every_loop(fast: cpp.CppModel) -> None:
    model = model_of(dataclasses.replace(TINY, vocab_size=64), 2)
    with torch.no_grad():
        next(model.norm.parameters())[3] = float("nan")
    broken = cpp.CppModel(model, "float32", 2)
    for params in (SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.9)):
        for call in (partial(generate_plain, broken), partial(draft_chain, broken)):
            with pytest.raises(UserError, match="not finite"):
                call(broken.new_cache(1, 16), 0, [1, 2], 3, params)
        for logits in (torch.full((1, 9), float("nan")), torch.tensor([[0.0, float("inf")]])):
            with pytest.raises(UserError, match="not finite"):
                cpp.sample(logits, [params], KeyedSource(), [(0, 0)], [0], [[1]], [[]])


@pytest.mark.parametrize("threads", range(2, 9))
def test_heads_that_share_keys_are_split_between_threads(threads: int) -> None:
    """One token and one key head: all threads except one begin inside the group."""
    config = dataclasses.replace(TINY, heads=8, kv_heads=1, head_dim=16)
    model = model_of(config, 5)
    found = []
    for number in (1, threads):
        fast = cpp.CppModel(model, "float32", number)
        cache, logits = fast.new_cache(1, 16), []
        for token in (3, 9, 27, 4):
            done = fast.step(cache, [[token]]).logits
            assert done is not None
            logits.append(done)
            cache.keep(0, [0])
        found.append(torch.cat(logits))
    assert torch.equal(found[0], found[1])


def test_random_calls_end_in_an_exception_or_a_result() -> None:
    """Run in a separate process, because a signal would end this one."""
    run_fuzz(CALLS, {})


@pytest.mark.slow
def test_random_calls_touch_no_memory_that_is_not_theirs(tmp_path: Path) -> None:
    """Make 10,000 calls of a library with the address sanitizer, which ends the process at the first bad access."""

    def library(name: str) -> str:
        return subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()

    runtime = library("libasan.so")
    if not Path(runtime).is_file():
        pytest.skip("this compiler has no address sanitizer")
    flags = "-fsanitize=address -O1 -g"
    # The sanitizer looks up what throws when the process starts, and Python alone does not load the C++ library.
    preload = f"{runtime} {library('libstdc++.so.6')}"
    more = {"SPECDEC_CXXFLAGS": flags, "SPECDEC_BUILD_DIR": str(tmp_path), "LD_PRELOAD": preload}
    run_fuzz(10_000, {**more, "ASAN_OPTIONS": "detect_leaks=0", "CXX": "g++"})


def run_fuzz(calls: int, environment: dict[str, str]) -> None:
    command = [sys.executable, __file__, str(calls)]
    how = partial(subprocess.run, capture_output=True, text=True) if environment else forked.run
    done = how(command, env={**os.environ, **environment})
    assert done.returncode == 0, (done.returncode, done.stdout[-2000:], done.stderr[-4000:])
    results, refusals = map(int, done.stdout.split())
    assert results + refusals == calls
    assert results > 50 < refusals


FORKED = """
import os, signal, sys
from tests.phase5.test_cpp_bindings import TINY, cpp, model_of

fast = cpp.CppModel(model_of(TINY, 0), "float32", int(sys.argv[1]))
cache = fast.new_cache(1, 16)
before = fast.step(cache, [[3]]).logits
child = os.fork()
if child == 0:
    signal.alarm(30)  # a process that hangs is killed
    try:
        print("same" if fast.step(cache, [[3]]).logits.equal(before) else "other", flush=True)
    except RuntimeError as error:
        print(error, flush=True)
    mine = cpp.CppModel(model_of(TINY, 0), "float32", int(sys.argv[1]))
    print("same" if mine.step(mine.new_cache(1, 16), [[3]]).logits.equal(before) else "other", flush=True)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize(("threads", "said"), [(1, "same"), (2, "the model's threads are in another process")])
def test_a_fork_works_or_is_refused(threads: int, said: str) -> None:
    command, root = [sys.executable, "-c", FORKED, str(threads)], Path(__file__).parents[2]
    done = forked.run(command, cwd=root)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    old, new = done.stdout.splitlines()
    assert old.startswith(said)
    assert new == "same"


def all_caches(fast: cpp.CppModel) -> list[Any]:
    """A cache of every kind with three rows, whose pages are allocated out of order."""
    pages = paged(fast, rows=3, pages=12)
    for row in (0, 1, 2, 0, 2, 1, 0, 1, 2):
        pages.make_room(row, len(pages.tables[row]) * 16 + 16)
    ring = RingCache(pages.shape, 3, 8, torch.float32, torch.float32, torch.device("cpu"))
    return [fast.new_cache(3, 64), pages, ring]


def fuzz(calls: int = CALLS) -> None:
    """Calls with hostile numbers; memory has the size that accepted numbers require."""
    chosen = random.Random(1)
    any_of = chosen.choice
    windowed = dataclasses.replace(TINY, windows=(8,))
    model = model_of(windowed, 0)
    target, draft = (cpp.CppModel(each, "float32", 2) for each in (model, model_of(windowed, 1)))
    caches, its_caches = all_caches(target), all_caches(draft)
    layer = cpp.CppEagle(EagleHead(EagleShape(ffn_width=32, taps=(0,)), windowed).eval(), model, target)
    its_layers = layer.new_cache(3, 64)
    medusa = cpp.CppMedusa(MedusaHeads(MedusaShape(heads=2, taps=(0,)), windowed.width).eval(), model, target)
    spare, wide = torch.zeros(1 << 18), torch.zeros(1 << 12)
    at, far = spare.data_ptr(), wide.data_ptr()
    views = [target.view(each) for each in caches]

    def numbers(most: int = 4) -> list[int]:
        return [
            any_of(HOSTILE) if chosen.random() < 0.4 else chosen.randint(0, 3) for _ in range(chosen.randint(0, most))
        ]

    def small() -> int:
        return any_of(HOSTILE) if chosen.random() < 0.3 else chosen.randint(0, 3)

    def params() -> SamplingParams:
        return SamplingParams(temperature=any_of([0.0, 1.0]), top_k=any_of([0, 3, 10**12]), top_p=any_of([1.0, 0.7]))

    def view() -> Any:
        pointers = [[any_of([0, at])] * chosen.randint(0, 2) for _ in range(4)]
        return library().View(*(small() for _ in range(5)), any_of([True, False]), *pointers, None)

    def row() -> Any:
        """A row of a good cache, mostly, with any pages and any length."""
        return library().Row(any_of(views) if chosen.random() < 0.9 else None, numbers(), small())

    def stepped() -> Any:
        return target._engine.step(
            numbers(), numbers(), [row() for _ in range(chosen.randint(0, 2))], numbers(2), numbers(), numbers(),
            numbers(2), any_of([0, at]), any_of([0, at]), any_of([0, at]), 0,
        )  # fmt: skip

    def good_step() -> Any:
        tokens = [chosen.randint(0, 39) for _ in range(chosen.randint(1, 5))]
        return target.step(
            any_of(caches), [tokens], rows=[small()], parents=any_of([None, [numbers(5)]]), taps=tuple(numbers(1))
        )

    def drawn() -> Any:
        method: Any = any_of([partial(draft_chain, target), partial(generate_plain, target)])
        count = any_of([small(), chosen.randint(0, 60)])
        return method(
            any_of(caches), chosen.randint(0, 2), numbers(), min(count, 4096), params(), sample=small(),
            position=small(),
        )  # fmt: skip

    def sequence(of: Any, at: Any, row_of: int) -> Any:
        if chosen.random() < 0.15:
            return library().Sequence(row(), numbers(), sampling_of(params()), small(), small())
        new = [chosen.randint(0, 39) for _ in range(chosen.randint(1, 3))] if chosen.random() < 0.8 else numbers()
        return of.sequence(at, row_of, new, params(), sample=small(), position=small())

    def drafter(rows: list[int], new: list[int]) -> Any:
        of, its = any_of([(draft, its_caches), (draft, its_caches), (target, caches)])
        batch = [sequence(of, any_of(its), row_of) for row_of in rows]
        asked = [int(any_of(list(Purpose))) for _ in rows] if chosen.random() < 0.9 else [0]
        if (kind := chosen.randint(0, 4)) == 0:
            return None
        if kind == 1:
            return library().ModelDrafter(of._engine, batch, asked)
        if kind == 2:
            batch = [
                layer.sequence(its_layers, row_of, [1] * max(1, min(count, 4)), params())
                for row_of, count in zip(rows, new, strict=True)
            ]
            counts = [max(1, min(count, 4)) for count in new]
            if chosen.random() < 0.2:
                counts = [min(count, 64) for count in numbers()]
            width = any_of([64, 64, 64, 32, 0, -1, 31])
            return library().EagleDrafter(
                layer._engine, batch, asked, any_of([layer._reduce, None]), width, any_of([at, at, 0]), counts
            )
        if kind == 3:
            return library().MedusaDrafter(medusa._medusa, batch, asked, any_of([at, at, at, 0]))
        return library().GivenDrafter(
            target._engine, [numbers() for _ in range(chosen.randint(len(rows) - 1, len(rows)))]
        )

    def decoded() -> Any:
        rows = chosen.sample(range(3), chosen.randint(1, 3))
        if chosen.random() < 0.1:
            rows = [any_of(rows)] * 2
        new = [chosen.randint(1, 3) for _ in rows]
        batch = [sequence(target, any_of(caches), row_of) for row_of in rows]
        fast, taps = drafter(rows, new), any_of([[], [0], [0], numbers(1)])
        counts = [chosen.randint(0, 3) if chosen.random() < 0.8 else min(small(), 64) for _ in rows]
        if fast is None and chosen.random() < 0.8:
            counts = [0] * len(rows)
        if chosen.random() < 0.1:
            counts = numbers()
        return library().decode(
            target._engine, batch, fast, counts, min(small(), 8), [any_of([True, False]) for _ in rows],
            numbers(2), any_of([at, 0]), any_of([spare.numel(), spare.numel(), 64, 0]), taps,
            any_of([0.0, 0.0, 1.0, -1.0]),
        )  # fmt: skip

    def proposed() -> Any:
        rows = chosen.sample(range(3), chosen.randint(1, 3))
        fast = drafter(rows, [1] * len(rows))
        if fast is None:
            return None
        return fast.propose([min(each, 64) for each in numbers(3)], any_of([at, 0]))

    def headed() -> Any:
        if chosen.random() < 0.5:
            return medusa._medusa.logits(any_of([at, 0]), numbers(), any_of([far, 0]))
        heads, packed = small(), medusa._packed
        some = [any_of([*packed["blocks"], *packed["mix"], None]) for _ in range(chosen.randint(0, 2))]
        return library().Medusa(
            target._engine, heads, small(), any_of([None, packed["mix"][0]]), None, 0, 0.0, some, some
        )

    def verified() -> Any:
        R, K = chosen.randint(0, 3), chosen.randint(0, 3)
        V = chosen.randint(1, 40)
        tokens = torch.tensor([small() for _ in range(R * K)], dtype=torch.long).view(R, K)
        widths = torch.tensor([small() for _ in range(R)], dtype=torch.long)
        probs = torch.rand(R, K + any_of([0, 1, 1, 1]), V)
        keys, positions = torch.full((R, any_of([1, 2, 2, 2])), 3), torch.zeros(R, dtype=torch.long)
        source: Any = any_of([GreedySource(), KeyedSource()])
        return cpp.verify_sample(tokens, any_of([None, probs[:, :K]]), probs, widths, keys, positions, source)

    def chose() -> Any:
        logits = torch.randn(2, 40)
        if chosen.random() < 0.3:
            logits[any_of([0, 1])] = any_of([float("nan"), float("inf"), -float("inf")])
        samples = numbers(2)[:2]
        ways = [sampling_of(params()) for _ in any_of([samples, samples, [0]])]
        return library().choose(
            any_of(["avx2", "portable", "", "magic"]), any_of([0, logits.data_ptr()]), any_of([-1, 0, 40]),
            ways, samples, numbers(2)[:2],
        )  # fmt: skip

    def packed() -> Any:
        kind, outputs, inputs = any_of([0, 1, 2, 3, 4, 5, -1]), min(small(), 64), min(small(), 64)
        shape = library().Shape(kind=kind, outputs=outputs, inputs=inputs, wide=True, pair=any_of([True, False]),
                              scale_group=small(), zeros=any_of([True, False]), factor=False, bias=False)  # fmt: skip
        matrix = library().Packed(library().Arena(shape.bytes), shape)
        any_of([matrix.fill, lambda *a: matrix.fill_levels(a[0], a[1], a[2], at, at)])(
            small(), small(), any_of([0, at]), 0
        )
        matrix.set_bias(at)

    def viewed() -> Any:
        raw_step(target, library().Row(view(), [0], 0))

    results = refusals = 0
    for _ in range(calls):
        try:
            any_of([stepped, good_step, drawn, decoded, decoded, proposed, headed, verified, chose, packed, viewed])()
            results += 1
        except (ValueError, TypeError, IndexError, OverflowError, MemoryError, RuntimeError, UserError):
            refusals += 1
    print(results, refusals)


if __name__ == "__main__":
    fuzz(int(sys.argv[1]))
