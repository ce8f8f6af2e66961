"""The README's claims about speed, with room for a noisy machine; and the cold start."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

import phase1
from common.benchmark import Timed, interleave, seconds
from common.peers import TransformersPeer
from common.phases import ROOT
from common.statistics import ratio

CPU = torch.device("cpu")
LIMIT = 4.5  # seconds of a cold start: 3, and half as much again beside other tests


def at_most(slow: list[Timed[Any]], fast: list[Timed[Any]]) -> float:
    """Return the upper end of the interval of slow / fast."""
    pairs = zip(seconds(slow), seconds(fast), strict=True)
    found = ratio({"": [math.log(one / other) for one, other in pairs]}).rounds
    assert found is not None
    return found.high


def test_cold_start() -> None:
    """From the start of the process to the first token, in one of three runs."""
    best = until_output("phase-1-baseline/generate.py", "--prompt", "import ", "--max-tokens", "8")
    # On a slow machine, or beside other work, torch alone takes longer.
    assert best < LIMIT or best < 2 * until_output("-c", "import torch; print(1)")


def until_output(*arguments: str) -> float:
    """Return the seconds from the start of Python to its first output, the least of three runs."""
    best = float("inf")
    for _ in range(3):  # the first run may still read Python's files from disk
        start = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            assert process.stdout.read(1)
            best = min(best, time.perf_counter() - start)
            process.communicate()
        if best < LIMIT:
            break
    return best


@pytest.mark.slow
def test_faster_than_transformers_without_a_cache() -> None:
    loaded = phase1.load("stdlib-10m", torch.float32, CPU)
    peer = TransformersPeer(loaded.checkpoint.folder, torch.float32, CPU)
    prompt = list(range(100, 116))
    params = phase1.SamplingParams(max_new_tokens=64)

    def ours() -> list[int]:
        return phase1.generate(loaded.model, [prompt], params, loaded.ending)[0].tokens

    def theirs() -> list[int]:
        return peer.generate([prompt], 64, use_cache=False)[0]

    assert ours() == theirs()
    timed = interleave({"ours": ours, "theirs": theirs}, repeats=9)
    assert at_most(timed["theirs"], timed["ours"]) > 1.3


@pytest.mark.slow
def test_a_ragged_batch_of_eight_pays() -> None:
    loaded = phase1.load("stdlib-10m", torch.float32, CPU)
    prompts = [list(range(1, 1 + length)) for length in (8, 10, 12, 14, 16, 18, 20, 24)]
    params = phase1.SamplingParams(max_new_tokens=32, ignore_eos=True)

    def batch() -> None:
        phase1.generate(loaded.model, prompts, params)

    def single() -> None:
        for prompt in prompts:
            phase1.generate(loaded.model, [prompt], params)

    timed = interleave({"batch": batch, "single": single}, repeats=5)
    assert at_most(timed["single"], timed["batch"]) > 1.0
