"""Every Triton kernel, interpreted on the CPU, against its reference; and mutants, which the checks must detect."""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common import philox
from common.errors import UserError
from phase5 import GreedySource, KeyedSampler, KeyedSource, SamplingParams
from phase5.kernels import TORCH, Kernels, reference, registry
from phase5.kv_cache import CacheShape, StaticCache
from phase5.model import Linear
from phase5.packing import PackedLinear
from phase5.transfers import Staged
from tests.support.beside import beside

check, attention_cases, layers, token_cases = (
    beside(5, f"checks.{name}") for name in ("check", "attention", "layers", "tokens")
)
CPU = torch.device("cpu")
HOT = SamplingParams(temperature=1.0)
if importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl

    from phase5.kernels.triton import noise
    from phase5.kernels.triton.support import dot

    @triton.jit
    def product(a, b, out, OURS: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        x, y = tl.load(a + at), tl.load(b + at)
        if OURS:
            tl.store(out + at, dot(x, y, tl.zeros((16, 16), tl.float32), True))
        else:
            tl.store(out + at, tl.dot(x, y))

    @triton.jit
    def reach(x, out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.arange(0, BLOCK)
        tl.store(out + at, tl.load(x + at, mask=at < n, other=0.0), mask=at < n)

    @triton.jit
    def known_answer(out):  # type: ignore[no-untyped-def]
        """Counter and key all ones, from Random123's known-answer tests."""
        full = tl.full((1,), 0xFFFFFFFF, tl.uint32)
        a, b, c, d = noise.words(full, full, full, full, full, full)
        at = out + tl.arange(0, 1)
        tl.store(at, a.to(tl.int64))
        tl.store(at + 1, b.to(tl.int64))
        tl.store(at + 2, c.to(tl.int64))
        tl.store(at + 3, d.to(tl.int64))

    @triton.jit
    def draws(keys, positions, single, many, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        r = tl.program_id(0)
        position = tl.load(positions + r)
        tl.store(single + r, noise.chance(keys + 2 * r, position, 2))
        tl.store(many + r * BLOCK + tl.arange(0, BLOCK), noise.gumbel(keys + 2 * r, 0, position, 0, BLOCK))


# All of their cases take long in numpy.
SLOWER = (
    "linear",
    "gated_linear",
    "kv_append",
    "rope_append",
    "decode_attention",
    "flash_prefill",
    "sample",
    "probabilities",
    "verify_greedy",
)
SLOWEST = ("sample", "probabilities", "decode_attention", "gated_linear")


@pytest.fixture(scope="module")
def ops(interpreted: None) -> dict[str, Callable[..., Any]]:
    return registry.operations("triton")


@pytest.fixture
def small_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the largest vocabulary have two blocks and a rest, where a real one has dozens."""
    monkeypatch.setattr(token_cases, "VOCABULARIES", (*token_cases.VOCABULARIES[:-1], 2 * 4096 + 57))


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.inference_mode():
        yield


def test_there_is_a_kernel_for_every_op(ops: dict[str, Callable[..., Any]]) -> None:
    assert set(ops) == set(Kernels._fields)


@pytest.mark.parametrize(
    "op", [pytest.param(op, marks=pytest.mark.slow) if op in SLOWER else op for op in Kernels._fields]
)
def test_interpreted_it_is_right(
    op: str, ops: dict[str, Callable[..., Any]], guarded: None, small_vocabulary: None
) -> None:
    assert len(check.check(op, ops[op], CPU, full=False)) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("op", ["verify_sample"])
def test_interpreted_it_is_right_with_a_large_vocabulary(
    op: str, ops: dict[str, Callable[..., Any]], guarded: None
) -> None:
    assert len(check.check(op, ops[op], CPU, full=False)) >= 5


@pytest.mark.parametrize(
    "op",
    [pytest.param(op, marks=pytest.mark.slow) if op in SLOWEST else op for op in SLOWER],
)
def test_interpreted_it_is_right_in_16_bits(
    op: str, ops: dict[str, Callable[..., Any]], guarded: None, small_vocabulary: None
) -> None:
    assert len(check.check(op, ops[op], CPU, full=False, dtypes=(torch.bfloat16,))) >= 5


@pytest.mark.gpu
@pytest.mark.parametrize("backend", registry.FOR_CARDS)
@pytest.mark.parametrize("op", Kernels._fields)
def test_on_a_card_it_is_right(op: str, backend: Any) -> None:
    device = torch.device("cuda")
    reason = registry.why_not(backend, device)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    function = registry.operations(backend).get(op)
    if function is None:
        pytest.skip(f"{backend} has no {op}")
    assert len(check.check(op, function, device)) >= 5


@pytest.mark.parametrize("op", Kernels._fields)
def test_the_reference_passes_its_own_checks(op: str) -> None:
    """Except for equal bits: torch's products may sum in another order for more rows."""
    assert check.check(op, getattr(TORCH, op), CPU, full=False, invariance=False)


def test_a_kernel_that_leaves_its_tensors_is_caught(guarded: None) -> None:
    """Masked accesses may point anywhere."""
    reach[(1,)](torch.zeros(8), torch.zeros(8), 8, BLOCK=16)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="1 of 9 writes are outside"):
        reach[(1,)](torch.zeros(9), torch.zeros(8), 9, BLOCK=16)


def short_tail(layer: nn.Module, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Off by one: skip the last input of every row."""
    x = x.clone()
    x[..., -1:] = 0
    return reference.linear(layer, x, start, stop)


def last_of_equals(draft_tokens: Tensor, scores: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    """Wrong ties: take the last of equal scores."""
    choices = scores.shape[-1] - 1 - scores.flip(-1).argmax(-1)
    accepted = reference.verify_prefix(draft_tokens, choices, widths)
    return accepted, choices.gather(1, accepted[:, None])[:, 0]


def by_masks(
    change: int, fit: Callable[[Tensor], Tensor], query: Tensor, metadata: Any, layer: int, ranges: Any
) -> Any:
    masks = [None if mask is None else fit(mask) for mask in metadata.masks(ranges, query)]
    other = dataclasses.replace(metadata, counts=[count + change for count in metadata.counts])
    return reference.decode_attention(query, other, layer, dataclasses.replace(ranges, masks=masks))


def blind_to_the_last(*arguments: Any) -> Any:
    """Off by one: skip the newest key."""
    return by_masks(-1, lambda mask: mask[:, :-1], *arguments)


def one_too_many(*arguments: Any) -> Any:
    """Off by one: read one key too many, which is uninitialised."""
    return by_masks(1, lambda mask: nn.functional.pad(mask, (0, 1)), *arguments)


def writes_padding(metadata: Any, layer: int, keys: Tensor, values: Tensor) -> None:
    whole = dataclasses.replace(metadata, counts=[keys.shape[1]] * len(metadata.counts))
    reference.kv_append(whole, layer, keys, values)


def another_order_for_more(layer: nn.Module, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Right, but the bits of a row depend on the batch size."""
    whole = reference.linear(layer, x, start, stop)
    return whole if x.shape[0] == 1 else whole * (1 + 1e-7 * x.shape[0])


def with_keys(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def wrong(logits: Tensor, rows: Any) -> Tensor:
        return TORCH.sample(logits, dataclasses.replace(rows, keys=Staged(change(rows.keys.tensor))))

    return wrong


def with_params(change: Callable[[Any], Any], op: str = "sample") -> Callable[..., Tensor]:
    def wrong(logits: Tensor, rows: Any, **more: Any) -> Tensor:
        own = change(rows.params) if rows.params else rows.params
        return getattr(TORCH, op)(logits, dataclasses.replace(rows, params=own), **more)  # type: ignore[no-any-return]

    return wrong


other_noise = with_keys(lambda keys: keys + torch.tensor([1, 0]))
seed_of_the_first = with_keys(lambda keys: torch.cat((keys[:1, :1].expand(len(keys), 1), keys[:, 1:]), 1))
# Wrong stride: every row reads the parameters of row 0.
parameters_of_the_first = with_params(lambda params: params[:1] * len(params))
greedy_if_any_is = with_params(lambda params: [min(params, key=lambda each: each.temperature)] * len(params))


def filters_of_the_first(name: str) -> Callable[..., Tensor]:
    """Wrong stride of one parameter."""
    return with_params(lambda all: [dataclasses.replace(each, **{name: getattr(all[0], name)}) for each in all])


def the_first_place(
    probs: Tensor, keys: Tensor, positions: Tensor, source: Any, purpose: Any, first: int = 0, **more: Any
) -> Tensor:
    return TORCH.draw(probs, keys, positions, source, purpose, 0, **more)


def draws_with_sample_noise(
    probs: Tensor, keys: Tensor, positions: Tensor, source: Any, purpose: Any, *rest: Any, **more: Any
) -> Tensor:
    return TORCH.draw(probs, keys, positions, source, philox.Purpose.SAMPLE, *rest, **more)


def the_row_before(weight: Tensor, tokens: Tensor, draft: Tensor | None = None) -> Tensor:
    return TORCH.embed(weight, tokens, None if draft is None else draft.roll(1, 0))


def forgets_the_window(at: Tensor, counts: Tensor, W: int, windows: Tensor) -> Any:
    return TORCH.advance(at, counts, W, windows.clamp(min=2**20))


def sees_too_far(at: Tensor, counts: Tensor, W: int, windows: Tensor) -> Any:
    after, positions, end, lo = TORCH.advance(at, counts, W, windows)
    return after, positions, end[:, -1:].expand(-1, W), lo


def verdict_by_the_first_seed(
    tokens: Tensor, draft: Any, target: Tensor, widths: Tensor, keys: Tensor, *rest: Any
) -> Any:
    keys = torch.cat((keys[:1, :1].expand(len(keys), 1), keys[:, 1:]), 1)
    return TORCH.verify_sample(tokens, draft, target, widths, keys, *rest)


@pytest.mark.parametrize(
    ("op", "wrong", "why"),
    [
        ("linear", short_tail, "rounding"),
        ("linear", another_order_for_more, "the bits depend"),
        ("verify_greedy", last_of_equals, "expected"),
        ("decode_attention", blind_to_the_last, "rounding"),
        ("decode_attention", one_too_many, "NaN|rounding"),
        ("kv_append", writes_padding, "NaN|expected"),
        ("sample", other_noise, "expected"),
        ("sample", parameters_of_the_first, "different requests.*expected"),
        *(
            ("sample", filters_of_the_first(name), "different requests.*expected")
            for name in ("temperature", "top_k", "top_p", "min_p", "presence_penalty", "repetition_penalty")
        ),
        ("sample", greedy_if_any_is, "different requests.*expected"),
        ("sample", seed_of_the_first, "different requests.*expected"),
        ("probabilities", with_params(lambda params: params[:1] * len(params), "probabilities"), "rounding"),
        ("draw", the_first_place, "expected"),
        ("draw", draws_with_sample_noise, "expected"),
        ("embed", the_row_before, "rounding"),
        ("advance", forgets_the_window, "expected"),
        ("advance", sees_too_far, "expected"),
        ("verify_sample", verdict_by_the_first_seed, r"seeds \(0, -1, .*expected"),
        ("rms_norm", lambda x, weight, eps: TORCH.rms_norm(x[..., :-1], weight[:-1], eps), "expected"),
        ("rope", lambda x, cos, sin: TORCH.rope(x, cos, -sin), "rounding"),
    ],
)
def test_a_wrong_kernel_is_found_out(op: str, wrong: Callable[..., Any], why: str) -> None:
    with pytest.raises(check.WrongKernel, match=why):
        check.check(op, wrong, CPU, full=False)


def test_the_interpreters_product_of_bfloat16_is_wrong_and_ours_is_not(interpreted: None) -> None:
    """The interpreter's bug that `dot` avoids; if this test fails, the bug is fixed and `dot` can be removed."""
    torch.manual_seed(0)
    for dtype, off in ((torch.bfloat16, 100.0), (torch.float16, None)):
        a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype)
        right, theirs, ours = a.float() @ b.float(), torch.empty(16, 16), torch.empty(16, 16)
        product[(1,)](a, b, theirs, OURS=False)
        product[(1,)](a, b, ours, OURS=True)
        torch.testing.assert_close(ours, right, atol=1e-5, rtol=1e-5)
        if off is None:
            torch.testing.assert_close(theirs, right, atol=1e-5, rtol=1e-5)
        else:
            assert float((theirs - right).abs().max()) > off * float(right.abs().max())


def test_random_numbers_have_the_same_bits(interpreted: None) -> None:
    out = torch.zeros(4, dtype=torch.int64)
    known_answer[(1,)](out)
    assert out.tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    samples, positions = torch.tensor([0, 3, 2**31]), torch.tensor([0, 70000, 2**32 - 1])
    for values in ([0] * 3, [-1] * 3, [2**63 - 5] * 3, [-1, 2**40, 7]):
        seeds, single, many = torch.tensor(values), torch.empty(3), torch.empty(3, 64)
        draws[(3,)](torch.stack((seeds, samples), 1), positions, single, many, BLOCK=64)
        assert torch.equal(single, philox.uniforms(seeds, samples, positions, philox.Purpose.ACCEPT, 1)[:, 0])
        torch.testing.assert_close(many, philox.gumbel(seeds, samples, positions, 0, 64), atol=1e-6, rtol=1e-6)


def test_of_equal_logits_at_an_edge_the_first_stay(ops: dict[str, Callable[..., Any]]) -> None:
    """Of eight equal tokens, top_p = 0.5 keeps the first four."""
    drawn = set()
    for position in range(16):
        params = SamplingParams(temperature=1.0, top_p=0.5)
        rows = token_cases.metadata_of(CPU, [params], [(1, 0)], [position])
        drawn |= set(ops["sample"](torch.zeros(1, 8), rows).tolist())
    assert drawn == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ops: ops["linear"](Linear(4, 4), torch.zeros(1, 5)), "x has 5 features; expected 4"),
        (
            lambda ops: ops["linear"](Linear(4, 4), torch.zeros(1, 4).half()),
            "matrix is torch.float32; expected torch.float16",
        ),
        (lambda ops: ops["linear"](Linear(4, 4), torch.zeros(1, 4), 2, 9), r"outputs 2 .. 9 .* some of 0 .. 4"),
        (lambda ops: ops["linear"](Linear(4, 4), torch.zeros(1, 4).double()), "float64; expected float32"),
        (lambda ops: ops["gated_linear"](Linear(4, 3), torch.zeros(1, 4)), "3 outputs; expected two halves"),
        (lambda ops: ops["rms_norm"](torch.zeros(1, 4), torch.ones(5), 1e-5), r"shape \[5\]; expected \[4\]"),
        (lambda ops: ops["rope"](torch.zeros(1, 2, 3, 8), torch.ones(3, 1, 8), torch.ones(3, 1, 8)), "cos has shape"),
        (lambda ops: ops["rms_norm"](torch.zeros(1, 4, device="meta"), torch.ones(4), 1e-5), "weight is on cpu"),
        (
            lambda ops: ops["verify_greedy"](torch.zeros(1, 1).long(), torch.zeros(1, 3, 5), torch.ones(1).long()),
            "expected",
        ),
        (
            lambda ops: ops["verify_greedy"](torch.zeros(1, 1).int(), torch.zeros(1, 2, 5), torch.ones(1).long()),
            "draft_tokens is torch.int32",
        ),
        (
            lambda ops: ops["sample"](
                torch.zeros(1, 3), token_cases.metadata_of(CPU, [HOT], [(0, 0)], [0], source=object())
            ),
            "a source of type object",
        ),
        (
            lambda ops: ops["sample"](torch.zeros(2, 3), token_cases.metadata_of(CPU, [HOT], [(0, 0)], [0])),
            "1 parameters; expected 2",
        ),
        (
            lambda ops: ops["probabilities"](
                torch.zeros(3, 3), token_cases.metadata_of(CPU, [HOT] * 2, [(0, 0)] * 2, [0] * 2)
            ),
            "3 rows for 2 sequences; expected as many for each",
        ),
        (
            lambda ops: ops["draw"](
                torch.zeros(1, 3), torch.zeros(1, 2).long(), torch.zeros(1).long(), GreedySource(), 1
            ),
            "a greedy source; expected a keyed one",
        ),
        (
            lambda ops: ops["embed"](torch.zeros(3, 4), torch.zeros(2, 1).int(), torch.zeros(1, 1).long()),
            r"draft has shape \[1, 1\]; expected \[2, 1\]",
        ),
        (
            lambda ops: ops["advance"](torch.zeros(3, 2).int(), torch.zeros(2), 1, torch.zeros(1).int()),
            "counts is torch.float32; expected torch.int32",
        ),
        (lambda ops: ops["linear"](PackedLinear.__new__(PackedLinear), torch.zeros(1, 4)), "in another format"),
    ],
)
def test_wrong_arguments_are_named(
    call: Callable[[Any], Any], message: str, ops: dict[str, Callable[..., Any]]
) -> None:
    with pytest.raises(UserError, match=f"triton .*{message}"):
        call(ops)


def test_a_cache_that_is_too_small_is_not_written_past_its_end(ops: dict[str, Callable[..., Any]]) -> None:
    cache = StaticCache(CacheShape(1, 1, 8), 1, 4, torch.float32, torch.float32, CPU)
    x = torch.zeros(1, 5, 1, 8)
    with pytest.raises(UserError, match="row 0 of the cache is to hold 5 tokens; it has room for 4"):
        attention_cases.metadata_of(cache, [0], [5])
    with pytest.raises(UserError, match=r"counts \[4\]; expected numbers from 0 to 3, the new tokens"):
        ops["kv_append"](attention_cases.metadata_of(cache, [0], [4]), 0, x[:, :3], x[:, :3])


def test_a_query_that_sees_nothing_gives_zeros(ops: dict[str, Callable[..., Any]]) -> None:
    of = attention_cases.Setting("static", torch.float32, torch.float32, 4, 2, 8)
    asked = attention_cases.asked(CPU, of, [20], attention_cases.chain(2))
    asked.ranges.lo.tensor.copy_(torch.tensor([[0, 3]]))
    asked.ranges.end.tensor.copy_(torch.tensor([[0, 9]]))
    found = ops["decode_attention"](*asked)
    assert not found[0, 0].any()
    assert found[0, 1].all()


def test_the_unconstrained_product_is_right_too(ops: dict[str, Callable[..., Any]]) -> None:
    layer, x = layers.plain(CPU, torch.float32, 33, 123, True), check.poisoned(CPU, torch.float32, 2, 123)
    torch.testing.assert_close(
        ops["linear"](layer, x, invariant=False), reference.linear(layer, x), atol=1e-4, rtol=1e-5
    )


def test_keyed_decisions_are_keyed_randomness() -> None:
    """The kernels' test of a source."""
    assert isinstance(KeyedSource(), KeyedSampler)
