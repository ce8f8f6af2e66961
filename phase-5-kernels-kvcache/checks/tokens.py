"""The cases for what chooses tokens: `verify_prefix`, `verify_greedy`, `verify_sample`, `sample`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from engine.sampling import KeyedSampler, SamplingParams
from engine.verify import GreedySource, KeyedSource

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


def sample_verdicts(device: torch.device, full: bool, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    for V in VOCABULARIES:
        for one_hot in (False, True):
            for seed in (0, -1, 2**40 + 7):
                several = [3, 1, 0] if V > 1000 and not full else [3, 3, 2, 0, 3, 3, 1]
                for widths, K in ((several, 3), ([1], 1), ([], 2)):

                    def run(function: Function, V=V, one_hot=one_hot, seed=seed, widths=widths, K=K) -> list[Tensor]:  # type: ignore[no-untyped-def]
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
                            many,
                            many * 1000 + 17,
                            KeyedSource(seed),
                        )
                        return [verdict.accepted, verdict.next_tokens, verdict.ratios]

                    if full or (len(widths) != 1 and (seed == 0 or (V == 5 and len(widths)))):
                        name = f"vocabulary {V}, seed {seed}, widths {widths}{', one-hot' if one_hot else ''}"
                        yield Case(name, run)

    def certain(function: Function) -> list[Tensor]:
        target = torch.nn.functional.one_hot(torch.tensor([[4, 1, 7], [2, 2, 0]], device=device), 9).float()
        tokens, wide = torch.tensor([[4, 1], [2, 5]], device=device), torch.tensor([2, 2], device=device)
        keys = torch.zeros(2, dtype=torch.long, device=device)
        verdict = function(tokens, target[:, :2] * 0 + 1 / 9, target, wide, keys, keys, GreedySource())
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
                    order = [torch.randperm(V, generator=torch.Generator().manual_seed(row)) for row in range(R)]
                    logits = poisoned(device, dtype, R, V)
                    logits.copy_(torch.linspace(-6, 6, V)[torch.stack(order)])
                    numbers = list(range(R))
                    places = [100 * r for r in numbers]
                    prompts, outputs = [[0, 1 % V]] * R, [[2 % V]] * R
                    seeds = (3, -5) if full else (2**33 - 3,)
                    tokens = [
                        function(logits, params, KeyedSampler(seed), numbers, places, prompts, outputs)
                        for seed in seeds
                    ]
                    return [torch.tensor(tokens)]

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
                texts = [[0, 1]] * 6
                places = range(0, 400 if full else 10, 10)
                keys = [([number] * 6, [place + row for row in range(6)]) for number, place in enumerate(places)]
                drawn = [function(logits, params, KeyedSampler(7), *key, texts, texts) for key in keys]
                return [torch.tensor(drawn)]

            yield Case(f"equal logits, vocabulary {V}, {wanted or 'no filter'}", equal)

    def none(function: Function) -> list[Tensor]:
        logits = torch.zeros(0, 5, device=device)
        return [torch.tensor(function(logits, SamplingParams(temperature=1.0), KeyedSampler(0), [], [], [], []))]

    yield Case("no rows", none)


OPS: dict[str, Cases] = {
    "verify_prefix": prefix_cases,
    "verify_greedy": greedy_cases,
    "verify_sample": sample_verdicts,
    "sample": sample_cases,
}
