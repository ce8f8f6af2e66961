"""`--deterministic`: equal bits in every process, batch and number of threads, also where K follows the clock."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import phase6
from common.errors import UserError
from phase6.determinism import deterministic, why_not_reproducible
from tests.support.forked import run
from tests.support.served import CONTEXT, WHY_NOT_CPP

ROOT = Path(__file__).resolve().parents[2]
CLOCKS = (("1", "4", "0", "2"), ("3", "0", "0", "1", "4"))  # K of each step, in two runs on different machines
SAMPLED = {"temperature": 1.0, "controller": "cost", "seed": 5}
cpp = pytest.mark.skipif(WHY_NOT_CPP is not None, reason=f"no C++ backend here: {WHY_NOT_CPP}")


@pytest.fixture(scope="module")
def folder(make_checkpoint: Callable[..., Path]) -> str:
    return str(make_checkpoint("llama", max_position_embeddings=CONTEXT))


def decoded(folder: str, threads: int, rows: int, options: dict[str, Any], widths: tuple[str, ...] = ()) -> Any:
    command = ["-m", "tests.support.determined", folder, str(threads), str(rows), json.dumps(options), *widths]
    folders = os.pathsep.join([str(ROOT), *sys.path])
    done = run([sys.executable, *command], cwd=ROOT, env={**os.environ, "PYTHONPATH": folders})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@cpp
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_are_equal_in_every_process_batch_and_number_of_threads(dtype: str, folder: str) -> None:
    options = {"dtype": dtype, "k": 3, "draft_quant": "int8", "temperature": 1.0}
    first = decoded(folder, 1, 3, options)
    assert sum(map(len, first["logits"])) == sum(map(len, first["tokens"])) > 24
    assert decoded(folder, 2, 1, options) == first
    assert decoded(folder, 2, 2, options) == first


@cpp
def test_where_k_follows_the_clock_tokens_do_not(folder: str) -> None:
    """Under `rejection` they do: the regression is `--controller cost --temperature 1`, three texts in three runs."""
    lax = [decoded(folder, 1, 1, {**SAMPLED, "deterministic": False}, clock)["tokens"] for clock in CLOCKS]
    assert lax[0] != lax[1]
    strict = [decoded(folder, 1, 1, SAMPLED, clock) for clock in CLOCKS]
    assert strict[0] == strict[1]
    plain = decoded(folder, 1, 1, {"temperature": 1.0, "seed": 5, "draft": "none"})
    assert strict[0]["tokens"] == plain["tokens"]


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ({"deterministic": True, "temperature": 1.0, "controller": "cost"}, "coupled"),
        ({"deterministic": True, "temperature": 1.0}, "rejection"),
        ({"deterministic": True, "controller": "cost"}, "longest_prefix"),
        ({"temperature": 1.0, "controller": "cost"}, "rejection"),
    ],
)
def test_auto_is_coupled_where_k_follows_the_clock(options: dict[str, Any], policy: str) -> None:
    assert phase6.Options(**options).policy_name == policy


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kernels": "torch"}, "torch computes the models"),
        ({"amp": True, "dtype": "float32"}, "torch computes the models"),
        ({"kv": "off"}, "torch computes the models"),
        ({"beams": 2, "draft": "none"}, "torch computes --beams"),
        ({"temperature": 1.0, "controller": "cost", "policy": "rejection"}, "under --policy rejection tokens depend"),
        ({"temperature": 1.0, "controller": "cost", "policy": "typical"}, "under --policy typical tokens depend"),
    ],
)
def test_what_cannot_be_is_an_error(options: dict[str, Any], said: str, folder: str) -> None:
    chosen = {"model": folder, "draft": folder, "device": "cpu", **options}
    with pytest.raises(UserError, match=f"--deterministic cannot be: {said}"):
        phase6.LLM(phase6.Options(**chosen, deterministic=True))
    llm = phase6.LLM(phase6.Options(**chosen))
    assert (why_not_reproducible(llm) or "").startswith(said)


@cpp
def test_greedy_tokens_may_follow_the_clock(folder: str) -> None:
    """At temperature 0 every policy that is lossless gives the target's own tokens, whatever K is."""
    chosen: dict[str, Any] = {
        "model": folder,
        "draft": folder,
        "device": "cpu",
        "controller": "cost",
        "policy": "rejection",
    }
    llm = phase6.LLM(phase6.Options(**chosen, temperature=0.0, deterministic=True))
    assert why_not_reproducible(llm) is None


def test_an_operation_without_a_deterministic_form_is_an_error() -> None:
    said = "put_ does not have a deterministic implementation"
    with pytest.raises(UserError, match=f"--deterministic: {said}"), deterministic(wanted=True):
        raise RuntimeError(f"{said}, but you set ...")
    with deterministic(wanted=True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
