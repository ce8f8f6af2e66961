"""Every CUDA kernel, emulated on the CPU, against its reference; and wrong kernels, which the checks must detect.

On a GPU the same checks run for all backends: see test_triton_kernels.py.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common import philox
from common.errors import UserError
from phase5 import KeyedSource, SamplingParams
from phase5.kernels import TORCH, Kernels, registry
from phase5.kernels.cuda import library
from phase5.kv_cache import CacheShape, StaticCache
from phase5.packing import PackedLinear
from tests.support.beside import beside

check, attention_cases, layers, token_cases = (
    beside(5, f"checks.{name}") for name in ("check", "attention", "layers", "tokens")
)
EMULATOR = Path(str(check.__file__)).with_name("emulator.h")
CPU = library.CPU
SLOWER = ("decode_attention", "flash_prefill")  # all of their cases take seconds
Ops = dict[str, Callable[..., Any]]


@pytest.fixture(scope="module")
def ops(emulate: Callable[[pytest.MonkeyPatch], None]) -> Iterator[Ops]:
    with pytest.MonkeyPatch.context() as patch:
        emulate(patch)
        yield registry.operations("cuda")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def test_there_is_a_kernel_for_every_op(ops: Ops) -> None:
    assert set(ops) == set(Kernels._fields)


@pytest.mark.parametrize(
    "op", [pytest.param(op, marks=pytest.mark.slow) if op in SLOWER else op for op in Kernels._fields]
)
def test_emulated_it_is_right(op: str, ops: Ops) -> None:
    assert len(check.check(op, ops[op], CPU, full=False)) >= 5


@pytest.mark.parametrize("op", SLOWER)
def test_emulated_it_is_right_in_bfloat16(op: str, ops: Ops) -> None:
    assert len(check.check(op, ops[op], CPU, full=False, dtypes=(torch.bfloat16,))) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("op", Kernels._fields)
def test_emulated_it_is_right_at_large_sizes(op: str, ops: Ops) -> None:
    if op in ("linear", "gated_linear"):
        assert check.check(op, ops[op], CPU, full=True, dtypes=(torch.bfloat16,))
    else:
        assert check.check(op, ops[op], CPU, full=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_unconstrained_product_is_right_too(dtype: torch.dtype, ops: Ops) -> None:
    tried: list[Any] = [layers.plain(CPU, dtype, 123, 48, True), layers.plain(CPU, dtype, 33, 123, False)]
    tried += [layers.quantised(CPU, format, 33, 256, False, factor=True) for format in layers.FORMATS]
    for layer in tried:
        for rows in (1, 5):
            x = check.poisoned(CPU, dtype, rows, int(layer.in_features))
            check.near(
                f"{layer}", ops["linear"](layer, x, invariant=False), TORCH.linear(layer, x), check.WITHIN[dtype]
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_up_to_64_tokens_of_a_text_have_the_same_bits_and_more_are_torchs(dtype: torch.dtype, ops: Ops) -> None:
    for layer in (
        layers.plain(CPU, dtype, 48, 160, True),
        layers.quantised(CPU, layers.FORMATS[0], 48, 160, False),
    ):
        for rows in (33, 64, 65):
            x = check.poisoned(CPU, dtype, rows, 160)
            together = ops["linear"](layer, x)
            check.near(f"{rows} rows", together, TORCH.linear(layer, x), check.WITHIN[dtype])
            if rows <= 64:
                check.same_bits(f"{rows} rows", ops["linear"](layer, x[rows - 1 :]), together[rows - 1 :])
        x = check.poisoned(
            CPU, dtype, 7, 13, 160
        )  # [sequences, tokens, features]: more than 64 rows, but not of one sequence
        check.same_bits("7 texts", ops["linear"](layer, x[6:, 12:].clone()), ops["linear"](layer, x)[6:, 12:])


def test_of_a_matrix_with_few_outputs_the_inputs_are_shared_by_blocks(ops: Ops) -> None:
    from phase5.kernels.cuda.kernels import parts_of
    from phase5.kernels.matrix import matrix_of

    layer = layers.plain(CPU, torch.bfloat16, 32, 4096, True)
    assert parts_of(matrix_of("linear", layer, 0, None), 32) > 1
    x = check.poisoned(CPU, torch.bfloat16, 16, 4096)
    together = ops["linear"](layer, x)
    check.near("parts", together, TORCH.linear(layer, x), check.WITHIN[torch.bfloat16])
    check.same_bits("parts", ops["linear"](layer, x[:1].clone()), together[:1])


def test_parts_of_another_size_change_the_last_bits_alone(ops: Ops) -> None:
    of = attention_cases.Setting("static", torch.bfloat16, torch.bfloat16, 8, 2, 64)
    asked = attention_cases.asked(CPU, of, [700], attention_cases.chain(2))
    wanted = TORCH.decode_attention(*asked)
    check.near("free", ops["decode_attention"](*asked, part=None), wanted, check.WITHIN[torch.bfloat16])
    for part in (64, 256, 1024):
        found = ops["decode_attention"](*asked, part=part)
        check.near(f"parts of {part}", found, wanted, check.WITHIN[torch.bfloat16])
    with pytest.raises(UserError, match="parts of 100 positions"):
        ops["decode_attention"](*asked, part=100)


def test_parts_that_no_query_reaches_change_no_bit(ops: Ops) -> None:
    """The grid has parts for the longest row that a cache can hold: here 12, of which a row of 30 tokens uses one."""
    of, found = attention_cases.Setting("static", torch.bfloat16, torch.bfloat16, 8, 2, 64), list[Tensor]()
    for dtype in (torch.bfloat16, torch.float32):
        of = of._replace(stored=dtype, computed=dtype)
        for longest in (0, 3000):
            query, metadata, layer, _ = attention_cases.asked(CPU, of, [30, longest], attention_cases.chain(2))
            metadata, layer, ranges = attention_cases.seen(metadata.cache, [0], attention_cases.chain(2), None, CPU)
            found.append(ops["decode_attention"](query[:1], metadata, layer, ranges))
        check.same_bits(f"{dtype}", *found[-2:])


def test_random_numbers_have_the_same_bits(ops: Ops) -> None:
    """A token whose ratio equals the uniform number is rejected; with the next larger ratio it is accepted."""
    R = 40
    samples, positions = torch.arange(R) * 3, torch.arange(R) * 100 + 5
    for values in ([0], [-1], [2**40 + 7], [0, -1, 2**40 + 7]):
        seeds = torch.tensor(values)[torch.arange(R) % len(values)]
        keys = torch.stack((seeds, samples), 1)
        chance = philox.uniforms(seeds, samples, positions, philox.Purpose.ACCEPT, 1)[:, 0]
        above = torch.from_numpy(np.nextafter(chance.numpy(), np.float32(2)))
        for ratio, accepted in ((chance, 0), (above, 1)):
            target = torch.stack((ratio, 1 - ratio), 1)[:, None].expand(R, 2, 2).contiguous()
            tokens, widths = torch.zeros(R, 1, dtype=torch.long), torch.ones(R, dtype=torch.long)
            verdict = ops["verify_sample"](tokens, None, target, widths, keys, positions, KeyedSource())
            assert (verdict.accepted == accepted).all()


@pytest.mark.parametrize("draws", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_sampling_follows_the_distribution(draws: int, ops: Ops) -> None:
    """Also with filters, alone and row by row different: every draw gives the reference's token."""
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 1.0, -1.0, 3.0]]).expand(draws, 7).contiguous()
    filters: tuple[dict[str, Any], ...] = ({}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2})
    for several in (*((each,) for each in filters), (*filters, {"temperature": 0.0})):
        ways = [SamplingParams(**{"temperature": 1.3, **each}) for each in several]
        params = [ways[row % len(ways)] for row in range(draws)]
        keys = [(5 + row % len(ways), row) for row in range(draws)]
        rows = token_cases.metadata_of(CPU, params, keys, [9] * draws)
        found, wanted = ops["sample"](logits, rows), TORCH.sample(logits, rows)
        assert int((found != wanted).sum()) <= 1  # where the last bit of a logarithm matters
        assert len(set(found.tolist())) > 1


def test_of_equal_logits_at_an_edge_the_first_stay(ops: Ops) -> None:
    for V, top_p in ((8, 0.5), (3000, 0.25), (5000, 0.999)):
        logits = torch.zeros(60, V)
        params = [SamplingParams(temperature=1.0, top_p=top_p)] * 60
        rows = token_cases.metadata_of(CPU, params, [(1, row) for row in range(60)], [0] * 60)
        found = ops["sample"](logits, rows).tolist()
        assert max(found) <= round(V * top_p) + 1
        assert len(set(found)) > 3


def test_scores_that_are_no_numbers_are_never_chosen(ops: Ops) -> None:
    scores = torch.full((1, 1, 300), float("nan"))
    scores[0, 0, 217] = -5
    accepted, following = ops["verify_greedy"](torch.zeros(1, 0, dtype=torch.long), scores, torch.zeros(1).long())
    assert (int(accepted), int(following)) == (0, 217)


def call_linear(ops: Ops, **changed: Any) -> None:
    arguments: dict[str, Any] = {
        "layer": layers.plain(CPU, torch.bfloat16, 8, 16, True),
        "x": torch.zeros(1, 16).bfloat16(),
    }
    ops["linear"](**{**arguments, **changed})


def call_norm(ops: Ops, **changed: Any) -> None:
    ops["rms_norm"](**{"x": torch.zeros(2, 8), "weight": torch.ones(8), "eps": 1e-5, **changed})


@pytest.mark.parametrize(
    ("call", "changed", "message"),
    [
        (call_linear, {"x": torch.zeros(1, 16)}, "matrix is torch.bfloat16; expected torch.float32"),
        (call_linear, {"x": torch.zeros(1, 9).bfloat16()}, "x has 9 features; expected 16"),
        (call_linear, {"x": torch.zeros(1, 16, dtype=torch.float64)}, "x is float64; expected float32, bfloat16 or"),
        (call_linear, {"start": 2, "stop": 9}, "outputs 2 .. 9 are asked for; expected some of 0 .. 8"),
        (call_linear, {"x": torch.zeros(1, 16, device="meta").bfloat16()}, "weight is on cpu; expected meta, as x"),
        (call_norm, {"weight": torch.ones(7)}, r"weight has shape \[7\]; expected \[8\]"),
        (call_norm, {"x": torch.zeros(2, 8).half()}, "weight is torch.float32; expected torch.float16"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[..., None], changed: dict[str, Any], message: str, ops: Ops) -> None:
    with pytest.raises(UserError, match=message):
        call(ops, **changed)


def test_a_layer_in_a_form_of_its_own_is_refused(ops: Ops) -> None:
    packed = PackedLinear.__new__(PackedLinear)
    with pytest.raises(UserError, match="a PackedLinear stores its matrix in another format; expected Linear or"):
        ops["linear"](packed, torch.zeros(1, 4))


def test_a_cache_that_is_too_small_is_not_written_past_its_end(ops: Ops) -> None:
    cache = StaticCache(CacheShape(1, 2, 8), 1, 4, torch.float32, torch.float32, CPU)
    new = torch.zeros(1, 5, 2, 8)
    with pytest.raises(UserError, match="is to hold 5 tokens; it has room for 4"):
        attention_cases.metadata_of(cache, [0], [5])
    metadata = attention_cases.metadata_of(cache, [0], [4])
    with pytest.raises(UserError, match=r"counts \[4\]; expected numbers from 0 to 3, the new tokens"):
        ops["kv_append"](metadata, 0, new[:, :3], new[:, :3])


def test_heads_that_are_too_wide_are_refused(ops: Ops) -> None:
    cache = StaticCache(CacheShape(1, 1, 512), 1, 4, torch.float32, torch.float32, CPU)
    metadata = attention_cases.metadata_of(cache, [0], [1])
    with pytest.raises(UserError, match="a head has 512 features; expected at most 256"):
        ops["decode_attention"](torch.zeros(1, 1, 1, 512), metadata, 0, metadata.ranges[None])


def test_a_query_that_sees_nothing_gives_zeros(ops: Ops) -> None:
    of = attention_cases.Setting("static", torch.bfloat16, torch.bfloat16, 4, 2, 16)
    asked = attention_cases.asked(CPU, of, [5], attention_cases.chain(2))
    asked.ranges.lo.tensor.copy_(torch.tensor([[0, 3]]))
    asked.ranges.end.tensor.copy_(torch.tensor([[0, 4]]))
    for op in ("decode_attention", "flash_prefill"):
        found = ops[op](*asked)
        assert not found[:, 0].any()
        assert found[:, 1].any()


def test_without_emulation_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECDEC_CUDA_EMULATOR", raising=False)
    reason = library.why_not(CPU)
    assert "needs an NVIDIA GPU, and this is cpu" in str(reason)
    monkeypatch.setenv("SPECDEC_CUDA_EMULATOR", "nowhere/emulator.h")
    assert "nowhere/emulator.h is no file of the name emulator.h" in str(library.why_not(CPU))
    monkeypatch.setenv("SPECDEC_FORCE_PY", "1")
    reason = library.why_not(CPU)
    assert "SPECDEC_FORCE_PY" in str(reason)


# Errors that the emulator must detect, each in its own program.
PROGRAM = """
#include "device.cuh"
#include <cstdio>
__global__ void kernel(float* all) {
    float* out = all + 64 * blockIdx.x;
    DYNAMIC_SHARED(memory);
    float* space = reinterpret_cast<float*>(memory);
%s
}
int main() {
    float out[128] = {};
    try {
        launch(kernel, dim3(2), 64, 256, 0, out);  // both ways through the threads
    } catch (const std::exception& problem) {
        std::printf("%%s", problem.what());
        return 0;
    }
    for (float x : out) std::printf("%%g ", x);
}
"""
WRONG = {
    "barriers that not all of a warp reach": (
        "if (threadIdx.x % 2) __syncthreads(); else __syncwarp(); out[threadIdx.x] = 1;",
        "wait at different barriers",
    ),
    "memory that nobody wrote": ("out[threadIdx.x] = space[threadIdx.x];", "nan"),
    "a missing barrier": ("space[threadIdx.x] = threadIdx.x; out[threadIdx.x] = space[63 - threadIdx.x];", "nan"),
    "one before which the first thread writes": (
        "if (threadIdx.x == 0) space[0] = 1; out[threadIdx.x] = space[0];",
        "nan",
    ),
}
RIGHT = "space[threadIdx.x] = threadIdx.x; __syncthreads(); out[threadIdx.x] = warp_sum(space[63 - threadIdx.x]);"


def run_program(folder: Path, body: str) -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to emulate CUDA with")
    source = folder / "program.cpp"
    source.write_text(PROGRAM % body, encoding="utf-8")
    flags = ["-std=c++17", "-O1", "-DEMULATED", *library.HALF, f"-I{library.FOLDER}", f"-I{EMULATOR.parent}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(folder / "program")], check=True)
    return subprocess.run([str(folder / "program")], check=True, capture_output=True, text=True).stdout


def test_the_emulator_runs_what_is_right(tmp_path: Path) -> None:
    first, second = sum(range(32, 64)), sum(range(32))
    assert run_program(tmp_path, RIGHT).split() == ([str(first)] * 32 + [str(second)] * 32) * 2


@pytest.mark.parametrize("name", WRONG)
def test_the_emulator_finds_out(name: str, tmp_path: Path) -> None:
    body, said = WRONG[name]
    assert said in run_program(tmp_path, body)


# Mutants of the kernels' sources, which the checks must detect.
MUTATIONS = [
    ("attend.cuh", "p0 + number < stop[i]", "p0 + number < stop[i] - 1", "decode_attention", "attention.cu"),
    ("attend.cuh", "0x7632 : 0x5410", "0x5410 : 0x7632", "decode_attention", "attention.cu"),
    ("attention.cu", "call.H + tile.h * tile.G", "call.H + tile.h", "decode_attention", "attention.cu"),
    ("linear.cuh", "run += WARPS * RUN", "run += WARPS * RUN + 1", "linear", "linear_16.cu"),
    ("choice.cuh", "its == value && at < index", "its == value && at > index", "verify_greedy", "prefix.cu"),
    ("sample.cu", "float(params[0])", "float(params[-r / each * 4])", "sample", "sample.cu"),
    ("sample.cu", "top_k = params[1]", "top_k = params[1 - r / each * 4]", "sample", "sample.cu"),
    ("sample.cu", "top_p = params[2]", "top_p = params[2 - r / each * 4]", "sample", "sample.cu"),
    ("sample.cu", "float(params[3])", "float(params[3 - r / each * 4])", "sample", "sample.cu"),
    ("sample.cu", "params += r / each * 4", "params += r * 4", "probabilities", "sample.cu"),
    ("sample.cu", "probs[r * out_stride + at]", "probs[r * V + at]", "probabilities", "sample.cu"),
    ("verify.cu", "+ first + n % each", "+ first", "draw", "verify.cu"),
    ("verify.cu", "keys[n / each]", "keys[n]", "draw", "verify.cu"),
    ("inputs.cu", "draft[n / T_ * K - 1 - id]", "draft[-1 - id]", "embed", "inputs.cu"),
    ("inputs.cu", "at[R + r] + at[2 * R + r]", "at[R + r]", "advance", "inputs.cu"),
    ("inputs.cu", "min(w + 1, count)", "count", "advance", "inputs.cu"),
    ("attention.cu", "blocks_of(ends[query / H], part_size)", "1", "decode_attention", "attention.cu"),
]


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_kernel_is_found_out(
    mutation: tuple[str, str, str, str, str], ops: Ops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, right, wrong, op, _ = mutation
    folder = tmp_path / "cuda"
    shutil.copytree(library.FOLDER, folder)
    text = (folder / file).read_text(encoding="utf-8")
    assert right in text
    (folder / file).write_text(text.replace(right, wrong), encoding="utf-8")
    monkeypatch.setattr(library, "FOLDER", folder)
    monkeypatch.setenv("SPECDEC_BUILD_DIR", str(tmp_path))
    sources = tuple(folder / source for source in library.SOURCES)
    wrong_library = library._build.__wrapped__("cuda", sources, library.emulator(), "")
    monkeypatch.setattr("phase5.kernels.cuda.kernels.library_of", lambda tensor: wrong_library)
    with pytest.raises(check.WrongKernel):
        check.check(op, ops[op], CPU, full=op not in ("verify_greedy", "sample"), dtypes=(torch.bfloat16,))


def test_whole_numbers_and_scales_of_an_int8_cache_are_the_references(ops: Ops) -> None:
    shape = CacheShape(1, 3, 40)
    made: list[list[Tensor]] = []
    for append in (ops["kv_append"], TORCH.kv_append):
        cache = StaticCache(shape, 1, 9, torch.int8, torch.bfloat16, CPU)
        for storage in (*cache.keys, *cache.values):
            storage.values.fill_(99)
        keys = check.poisoned(CPU, torch.bfloat16, 1, 9, 3, 40, seed=3)
        append(attention_cases.metadata_of(cache, [0], [9]), 0, keys, keys * 0)  # zeros too
        made.append(
            [part for s in (cache.keys[0], cache.values[0]) for part in (s.values, s.scales) if part is not None]
        )
    for mine, other in zip(*made, strict=True):
        assert torch.equal(mine, other)
