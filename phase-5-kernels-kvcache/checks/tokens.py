"""The cases for what chooses tokens, and for what forms the next inputs from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from common.philox import Purpose
from engine.kernels.tokens import UNLIMITED, SamplingMetadata
from engine.sampling import SamplingParams
from engine.transfers import Upload
from engine.verify import GreedySource, KeyedSource, RandomSource

from .cases import Case, Cases, Function, poisoned

VOCABULARIES = (1, 5, 123, 50257)


def scores(device: torch.device, dtype: torch.dtype, rows: int, positions: int, V: int, seed: int = 0) -> Tensor:
    """Scores with ties: of whole numbers, many are the highest, and the first of them counts."""
    made = poisoned(device, torch.float32, rows, positions, V, seed=seed, scale=2).round_()
    return made.to(dtype)


def greedy_inputs(
    device: torch.device, dtype: torch.dtype, V: int, widths: list[int], K: int
) -> tuple[Tensor, Tensor, Tensor]:
    of_target = scores(device, dtype, len(widths), K + 1, V)
    draft = of_target.argmax(-1)[:, :K].clone()
    for row in range(len(widths)):  # row r is right in its first r tokens; where V is 1, in all
        draft[row, row:] = (draft[row, row:] + 1) % V
    return draft, of_target, torch.tensor(widths, dtype=torch.long, device=device)


def prefix_cases(device: torch.device, full: bool, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    for widths, K in (([4, 4, 4, 4, 2], 4), ([0, 1], 1), ([0], 0), ([], 3), ([16] * 17, 16)):

        def run(function: Function, widths=widths, K=K) -> list[Tensor]:  # type: ignore[no-untyped-def]
            draft, of_target, wide = greedy_inputs(device, torch.float32, 7, widths, K)
            return [function(draft, of_target.argmax(-1), wide)]

        yield Case(f"widths {widths} of {K}", run)


def greedy_cases(device: torch.device, full: bool, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    for dtype in dtypes:
        for V in VOCABULARIES:
            for widths, K in (([3, 3, 3, 3, 1], 3), ([0, 1], 1), ([0], 0), ([], 2)):

                def run(function: Function, V=V, widths=widths, K=K, dtype=dtype) -> list[Tensor]:  # type: ignore[no-untyped-def]
                    return list(function(*greedy_inputs(device, dtype, V, widths, K)))

                yield Case(f"{dtype}, vocabulary {V}, widths {widths} of {K}", run, dtype)

    def edges(function: Function) -> list[Tensor]:
        """Put the highest first, last, at the edges of blocks, and twice."""
        V, found = 50257, list[Tensor]()
        for places in ([0], [V - 1], [4095, 4096], [4096, V - 1], [2047, 8192]):
            of_target = torch.full((1, 2, V), -3.0, device=device)
            of_target[:, :, places] = 1.0
            draft = torch.tensor([[places[0]]], device=device)
            found += function(draft, of_target, torch.ones(1, dtype=torch.long, device=device))
        return found

    yield Case("ties across blocks", edges)


def distributions(device: torch.device, rows: int, positions: int, V: int, seed: int) -> Tensor:
    made = torch.randn(rows, positions, V, generator=torch.Generator().manual_seed(seed)) * 2
    probs = made.to(device).softmax(-1)
    if V > 5:
        probs[..., 1::3] = 0  # as filters leave it
        probs /= probs.sum(-1, keepdim=True)
    return probs


def metadata_of(
    device: torch.device,
    params: list[SamplingParams],
    keys: list[tuple[int, int]],
    positions: list[int],
    texts: list[tuple[list[int], list[int]]] | None = None,
    source: RandomSource | None = None,
) -> SamplingMetadata:
    return SamplingMetadata.of(Upload(device), params, source or KeyedSource(), keys, positions, texts)


def sample_verdicts(device: torch.device, full: bool, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    for V in VOCABULARIES:
        for one_hot in (False, True):
            for seeds in ((0,), (-1,), (2**40 + 7,), (0, -1, 2**40 + 7)):  # row after row, and again from the first
                several = [3, 1, 0] if V > 1000 and not full else [3, 3, 2, 0, 3, 3, 1]
                for widths, K in ((several, 3), ([1], 1), ([], 2)):

                    def run(function: Function, V=V, one_hot=one_hot, seeds=seeds, widths=widths, K=K) -> list[Tensor]:  # type: ignore[no-untyped-def]
                        R = len(widths)
                        target = distributions(device, R, K + 1, V, seed=1)
                        near = (target[:, :K] * 3 + distributions(device, R, K, V, seed=2)) / 4
                        draft = near.reshape(-1, V)
                        tokens = draft.argmax(-1).view(R, K) if one_hot else draft.cumsum(-1).gt(0.6).int().argmax(-1)
                        many = torch.arange(R, device=device)
                        verdict = function(
                            tokens.view(R, K),
                            None if one_hot else near,
                            target,
                            torch.tensor(widths, device=device, dtype=torch.long),
                            torch.stack((torch.tensor(seeds, device=device)[many % len(seeds)], many), 1),
                            many * 1000 + 17,
                            KeyedSource(),
                        )
                        return [verdict.accepted, verdict.next_tokens, verdict.ratios]

                    if full or (len(widths) != 1 and len(seeds) > 1):
                        name = f"vocabulary {V}, seeds {seeds}, widths {widths}{', one-hot' if one_hot else ''}"
                        yield Case(name, run)

    def certain(function: Function) -> list[Tensor]:
        target = torch.nn.functional.one_hot(torch.tensor([[4, 1, 7], [2, 2, 0]], device=device), 9).float()
        tokens, wide = torch.tensor([[4, 1], [2, 5]], device=device), torch.tensor([2, 2], device=device)
        keys, at = torch.zeros(2, 2, dtype=torch.long, device=device), torch.zeros_like(wide)
        verdict = function(tokens, target[:, :2] * 0 + 1 / 9, target, wide, keys, at, GreedySource())
        return [verdict.accepted, verdict.next_tokens, verdict.ratios]

    yield Case("nothing left to chance", certain)


FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.8},
    {"top_p": 1e-9},
    {"min_p": 0.1},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.02, "temperature": 0.7},
    {"top_p": 0.5, "temperature": 1.7, "presence_penalty": 1.0, "repetition_penalty": 1.3},
    {"temperature": 0.0},
]


def spread(device: torch.device, dtype: torch.dtype, R: int, V: int) -> Tensor:
    """Return logits [R, V] from -6 to 6 at equal distances, shuffled."""
    order = [torch.randperm(V, generator=torch.Generator().manual_seed(row)) for row in range(R)]
    return poisoned(device, dtype, R, V).copy_(torch.linspace(-6, 6, V)[torch.stack(order)])


def sample_cases(device: torch.device, full: bool, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    for dtype in dtypes:
        for V in VOCABULARIES:
            for number, wanted in enumerate(FILTERS):
                if (
                    V > 1000
                    and (dtype != torch.float32 or number not in (0, 6, 8))
                    and not (full and "top_p" not in wanted)
                ):
                    continue

                def run(function: Function, V=V, wanted=wanted, dtype=dtype) -> list[Tensor]:  # type: ignore[no-untyped-def]
                    params = SamplingParams(**{"temperature": 1.0, **wanted})
                    R = 4 if full else 1 if V > 1000 else 2
                    logits = spread(device, dtype, R, V)
                    places = [100 * r for r in range(R)]
                    texts = [([0, 1 % V], [2 % V])] * R
                    seeds = (3, -5) if full else (2**33 - 3,)
                    keys = ([(seed, row) for row in range(R)] for seed in seeds)
                    return [function(logits, metadata_of(device, [params] * R, each, places, texts)) for each in keys]

                yield Case(f"{dtype}, vocabulary {V}, {wanted or 'no filter'}", run, dtype)

    for V in (17, 300):
        ties: list[dict[str, Any]] = [
            {"top_k": 5},
            {"top_p": 0.83},
            {"top_k": 5, "top_p": 0.61},
            {"top_k": 9, "top_p": 0.41, "min_p": 0.05},
        ]
        for wanted in [*FILTERS, *ties] if full else ties:

            def equal(function: Function, V=V, wanted=wanted) -> list[Tensor]:  # type: ignore[no-untyped-def]
                """Logits of whole numbers, and all alike: at every edge many are equal, and the lower ids stay."""
                params = SamplingParams(**{"temperature": 1.0, **wanted})
                logits = scores(device, torch.float32, 6, 1, V)[:, 0]
                logits[4:] = 1.0
                texts = [([0, 1], [0, 1])] * 6
                places = range(0, 400 if full else 10, 10)
                keys = [([(7, number)] * 6, [place + row for row in range(6)]) for number, place in enumerate(places)]
                return [function(logits, metadata_of(device, [params] * 6, *key, texts)) for key in keys]

            yield Case(f"equal logits, vocabulary {V}, {wanted or 'no filter'}", equal)

    yield from request_cases(device, dtypes)

    def none(function: Function) -> list[Tensor]:
        logits = torch.zeros(0, 5, device=device)
        return [function(logits, metadata_of(device, [], [], []))]

    yield Case("no rows", none)


def request_cases(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    """Rows of different requests: each has its own parameters, seed, sample, position and text."""
    plain = [wanted for wanted in FILTERS if "presence_penalty" not in wanted]  # penalties make all rows float32
    penalised = [*FILTERS, *({"temperature": 0.3, name: 2.0} for name in ("presence_penalty", "repetition_penalty"))]
    for dtype in dtypes:
        for V, filters in ((17, plain), (300, penalised)):
            requests = [SamplingParams(**{"temperature": 1.0, **each}) for each in filters]

            def rows(function: Function, which: slice, begin: int, V=V, requests=requests, dtype=dtype) -> Tensor:  # type: ignore[no-untyped-def]
                R = len(requests)
                logits = scores(device, dtype, R, 1, V)[:, 0] if V == 17 else spread(device, dtype, R, V)
                keys = [((row % 5 - 2) * (2**33 - 3), row % 3) for row in range(R)]
                positions = [begin + 3 * (row % 4) for row in range(R)]
                texts = [([0, 1], output) for output in logits.float().topk(8).indices.tolist()]
                columns: Any = [each[which] for each in (requests, keys, positions, texts)]
                return function(logits[which], metadata_of(device, *columns))  # type: ignore[no-any-return]

            def together(function: Function, rows=rows) -> list[Tensor]:  # type: ignore[no-untyped-def]
                return [rows(function, slice(None), begin) for begin in (0, 2**31)]

            def alone(function: Function, rows=rows, requests=requests) -> list[Tensor]:  # type: ignore[no-untyped-def]
                each = [rows(function, slice(row, row + 1), 90) for row in range(len(requests))]
                return [torch.cat(each), rows(function, slice(None), 90)]

            yield Case(f"{dtype}, vocabulary {V}, different requests", together, dtype)
            if V == 17:
                yield Case(f"{dtype}, different requests, and each alone", alone, dtype, invariance=True)


def probability_cases(device: torch.device, full: bool, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    for dtype in dtypes:
        for V in VOCABULARIES if full else VOCABULARIES[:-1]:
            for each in (1, 3):

                def run(function: Function, V=V, each=each, dtype=dtype) -> list[Tensor]:  # type: ignore[no-untyped-def]
                    """Rows of several requests, written between those of others."""
                    params = [SamplingParams(**{"temperature": 1.0, **wanted}) for wanted in FILTERS]
                    N = len(params) * each
                    rows = metadata_of(device, params, [(0, 0)] * len(params), [0] * len(params), [([0], [2 % V])] * N)
                    out = torch.full((N, 2, V), -1.0, device=device)
                    function(spread(device, dtype, N, V), rows, out=out[:, 0])
                    return [out, function(spread(device, dtype, N, V), rows)]

                yield Case(f"{dtype}, vocabulary {V}, {each} rows of a request", run, dtype, slack=5)

    def equal(function: Function) -> list[Tensor]:
        logits, params = (
            scores(device, torch.float32, 6, 1, 300)[:, 0],
            SamplingParams(temperature=1.0, top_k=9, top_p=0.41),
        )
        return [function(logits, metadata_of(device, [params] * 6, [(0, 0)] * 6, [0] * 6))]

    yield Case("equal logits", equal)

    def none(function: Function) -> list[Tensor]:
        return [function(torch.zeros(0, 5, device=device), metadata_of(device, [], [], []))]

    yield Case("no rows", none)


def draw_cases(device: torch.device, full: bool, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    for V in VOCABULARIES if full else VOCABULARIES[:-1]:
        for purpose in (Purpose.SAMPLE, Purpose.DRAFT) if full or V > 100 else (Purpose.SAMPLE,):
            for each, first in ((1, 0), (3, 0), (1, 4)):

                def run(function: Function, V=V, purpose=purpose, each=each, first=first) -> list[Tensor]:  # type: ignore[no-untyped-def]
                    """Several seeds; far positions; of probabilities with gaps into memory with gaps."""
                    rows = metadata_of(
                        device, [SamplingParams()] * 3, [(3, 0), (-1, 1), (2**40 + 7, 2)], [0, 70000, 2**31]
                    )
                    probs = distributions(device, 3 * each, 2, V, seed=5)[:, 1]
                    probs[0] = 0
                    probs[0, V - 1] = 1
                    out = torch.full((3 * each, 2), -7, device=device)
                    arguments = *rows.keyed, KeyedSource(), purpose, first
                    function(probs, *arguments, out=out[:, 1])
                    return [out, function(probs, *arguments)]

                yield Case(f"vocabulary {V}, {purpose.name}, {each} rows of a sequence from {first} on", run)


def embed_cases(device: torch.device, full: bool, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    for dtype in dtypes:
        for D in (1, 33, 160):

            def run(function: Function, D=D, dtype=dtype) -> list[Tensor]:  # type: ignore[no-untyped-def]
                weight, draft = poisoned(device, dtype, 11, D), torch.tensor([[7, 2], [0, 10]], device=device)
                tokens = torch.tensor([[3, -1, -2], [10, 0, -2]], dtype=torch.int32, device=device)
                return [function(weight, tokens, draft), function(weight, tokens.clamp(min=0))]

            yield Case(f"{dtype}, {D} features", run, dtype)


def advance_cases(device: torch.device, full: bool, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    for W in (1, 3, 16):
        for counts in ([1, 0, 1], [W, 0, 1], *([[1] * 200] if full or W == 3 else []), []):

            def run(function: Function, W=W, counts=counts) -> list[Tensor]:  # type: ignore[no-untyped-def]
                R = len(counts)
                at = torch.tensor(
                    [[*range(R, 0, -1)], [7 * r for r in range(R)], [r % 3 for r in range(R)]], device=device
                )
                limits = torch.tensor([UNLIMITED, 5], device=device).int()
                return list(function(at.int(), torch.tensor(counts, device=device).int(), W, limits))

            yield Case(f"{len(counts)} rows of {W}, {counts[:3]}", run)


OPS: dict[str, Cases] = {
    "verify_prefix": prefix_cases,
    "verify_greedy": greedy_cases,
    "verify_sample": sample_verdicts,
    "sample": sample_cases,
    "probabilities": probability_cases,
    "draw": draw_cases,
    "embed": embed_cases,
    "advance": advance_cases,
}
