"""Bad arguments of the C++ kernels raise an exception and never cause a signal."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from phase5.config import ModelConfig
from phase5.kernels import cpp
from phase5.kernels.cpp.ops import sampling_of
from phase5.model import Transformer
from phase5.sampling import SamplingParams
from phase5.verify import GreedySource, KeyedSource

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
        ("no such row", lambda: step(fast, cache, row=2)),
        ("no room", lambda: step(fast, cache, held=2**31 - 1)),
        ("no room", lambda: step(fast, cache, held=16)),
        ("past the model's", lambda: fast.step(cache, [[1]], positions=[[2**31 - 1]])),
        ("no memory", lambda: fast.generate_plain(cache, 0, [1], 2, params, taps=(0,))),
        ("hidden must be", lambda: fast.generate_plain(cache, 0, [1], 2, params, hidden=torch.empty(1, 32))),
        ("tapped must be", lambda: fast.generate_plain(cache, 0, [1], 2, params, tapped=torch.empty(2, 31), taps=(0,))),
        ("inputs must be", lambda: fast.step(cache, [[1]], inputs=torch.empty(2, 32))),
    ]
    for words, call in refused:
        with pytest.raises(ValueError, match=words):
            call()
    assert cache.lengths == [0, 0]


def step(fast: cpp.CppModel, cache: Any, row: int = 0, held: int = 0) -> None:
    fast._engine.step(fast.view(cache), [1], [0], [row], [1], [held], [], [0], [], 0, 0, 0, 0)


def test_a_target_and_its_draft_need_a_cache_each(fast: cpp.CppModel) -> None:
    other, cache = cpp.CppModel(model_of(TINY, 1), "float32", 1), fast.new_cache(2, 32)
    with pytest.raises(ValueError, match="a cache of its own"):
        fast.speculate(cache, 0, [1], other, cache, 1, [1], 2, SamplingParams(), own=True, sample=0, position=1)


def test_a_model_that_is_not_finished_does_not_run(fast: cpp.CppModel) -> None:
    from phase5.kernels.cpp.weights import describe

    raw = cpp.library().Engine(describe(TINY), 1, cpp.chosen_isa())
    cache = fast.new_cache(1, 8)
    with pytest.raises(ValueError, match="not finished"):
        raw.step(fast.view(cache), [1], [0], [0], [1], [0], [], [0], [], 0, 0, 0, 0)
    with pytest.raises(ValueError, match="norm is missing"):
        raw.finish()
    with pytest.raises(ValueError, match="a window is at least 0"):
        raw.set_window(0, -1)
    for layer in (-1, 1):
        with pytest.raises(IndexError):
            raw.set_window(layer, 4)
    for wrong in ({"heads": 0}, {"layers": 2**31 - 1}, {"kv_heads": 3}, {"vocab": -5}, {"activation": 9}):
        with pytest.raises(ValueError, match=r"size|heads|activation"):
            cpp.library().Engine({**describe(TINY), "heads": 4, **wrong}, 1, cpp.chosen_isa())


def test_logits_that_are_not_finite_end_every_loop(fast: cpp.CppModel) -> None:
    model = model_of(dataclasses.replace(TINY, vocab_size=64), 2)
    with torch.no_grad():
        next(model.norm.parameters())[3] = float("nan")
    broken = cpp.CppModel(model, "float32", 2)
    for params in (SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.9)):
        for call in (broken.generate_plain, broken.draft_chain):
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
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
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
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    old, new = done.stdout.splitlines()
    assert old.startswith(said)
    assert new == "same"


def fuzz(calls: int = CALLS) -> None:
    """Calls with hostile numbers; memory has the size that accepted numbers require."""
    chosen = random.Random(1)
    any_of = chosen.choice
    target, drafter = (cpp.CppModel(model_of(TINY, seed), "float32", 2) for seed in (0, 1))
    cache, its_cache = target.new_cache(3, 64), drafter.new_cache(3, 64)
    library, spare = cpp.library(), torch.zeros(1 << 16)
    at = spare.data_ptr()

    def numbers(most: int = 4) -> list[int]:
        return [
            any_of(HOSTILE) if chosen.random() < 0.4 else chosen.randint(0, 3) for _ in range(chosen.randint(0, most))
        ]

    def small() -> int:
        return any_of(HOSTILE) if chosen.random() < 0.3 else chosen.randint(0, 3)

    def params() -> SamplingParams:
        return SamplingParams(temperature=any_of([0.0, 1.0]), top_k=any_of([0, 3, 10**12]), top_p=any_of([1.0, 0.7]))

    def raw_step() -> Any:
        return target._engine.step(
            target.view(cache), numbers(), numbers(), numbers(2), numbers(2), numbers(2), numbers(), numbers(2),
            numbers(1), any_of([0, at]), any_of([0, at]), any_of([0, at]), 0,
        )  # fmt: skip

    def good_step() -> Any:
        tokens = [chosen.randint(0, 39) for _ in range(chosen.randint(1, 5))]
        return target.step(
            cache, [tokens], rows=[small()], parents=any_of([None, [numbers(5)]]), taps=tuple(numbers(1))
        )

    def drawn() -> Any:
        method: Any = any_of([target.draft_chain, target.generate_plain])
        count = any_of([small(), chosen.randint(0, 60)])
        return method(
            cache, chosen.randint(0, 2), numbers(), min(count, 4096), params(), sample=small(), position=small()
        )

    def speculated() -> Any:
        caches = any_of([(cache, its_cache), (cache, cache)])
        return target.speculate(
            caches[0], chosen.randint(0, 2), numbers(), drafter, caches[1], chosen.randint(0, 2), numbers(),
            min(small(), 64), params(), own=any_of([True, False]), sample=small(), position=small(),
            steps=min(small(), 8),
        )  # fmt: skip

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
        return library.choose(
            any_of(["avx2", "portable", "", "magic"]), any_of([0, logits.data_ptr()]), any_of([-1, 0, 40]),
            ways, samples, numbers(2)[:2],
        )  # fmt: skip

    def packed() -> Any:
        kind, outputs, inputs = any_of([0, 1, 2, 3, 4, 5, -1]), min(small(), 64), min(small(), 64)
        shape = library.Shape(kind=kind, outputs=outputs, inputs=inputs, wide=True, pair=any_of([True, False]),
                              scale_group=small(), zeros=any_of([True, False]), factor=False, bias=False)  # fmt: skip
        matrix = library.Packed(library.Arena(shape.bytes), shape)
        any_of([matrix.fill, lambda *a: matrix.fill_levels(a[0], a[1], a[2], at, at)])(
            small(), small(), any_of([0, at]), 0
        )
        matrix.set_bias(at)

    def viewed() -> Any:
        pointers = [[any_of([0, at])] * chosen.randint(0, 2) for _ in range(4)]
        view = library.View(small(), small(), small(), small(), small(), *pointers)
        target._engine.step(view, [1], [0], [0], [1], [0], [], [0], [], 0, at, 0, 0)

    results = refusals = 0
    for _ in range(calls):
        try:
            any_of([raw_step, good_step, drawn, speculated, verified, chose, packed, viewed])()
            results += 1
        except (ValueError, TypeError, IndexError, OverflowError, MemoryError, RuntimeError, UserError):
            refusals += 1
    print(results, refusals)


if __name__ == "__main__":
    fuzz(int(sys.argv[1]))
