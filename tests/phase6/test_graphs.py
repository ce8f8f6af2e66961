"""A captured step gives phase 5's decisions, for every kind of decoding; what a graph cannot hold is noticed.

The launches of the emulator of CUDA are recorded and replayed (tests/support/graphed.py has the proof). Device memory
is closed to the host, so a wrong access is a fault: every proof runs in a process of its own.
"""

from __future__ import annotations

import importlib.util
import itertools
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
from phase6.device_step import Bucket, check_bucket
from phase6.graph_steps import rows_of_bucket
from phase6.graphs import why_not_options
from phase6.kernels.cuda import library
from phase6.kv_cache import CacheShape, PagedCache
from tests.support.forked import run

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "int8": {"dtype": "bfloat16", "quant": "int8"},
    "int4": {"dtype": "bfloat16", "quant": "int4", "quant_group": 32},
    "int8 cache": {"dtype": "bfloat16", "kv_dtype": "int8"},
}
DECODING: dict[str, dict[str, Any]] = {
    "plain": {},
    "sampled": {"temperature": 0.7},
    "greedy": {"k": 3},
    "coupled": {"k": 2, "temperature": 0.7, "policy": "coupled"},
    "rejection": {"k": 2, "temperature": 0.7, "top_p": 0.9},
}
SPECULATIVE = {"k": 2, "temperature": 0.7}
MUTANTS: list[tuple[str, str, dict[str, Any], str]] = [  # what is wrong, the part of the proof, options, what is said
    ("length by value", "tokens", {}, "decisions differ"),
    ("length by value", "arguments", {}, "frozen arguments differ"),
    ("temperature by value", "arguments", SPECULATIVE, "frozen arguments differ"),
    ("an allocation", "arguments", SPECULATIVE, "an allocation of device memory while a step was recorded"),
    ("an allocation that grows", "arguments", {}, "frozen arguments differ"),
    ("item", "arguments", {}, "the host reads device memory: aten.item"),
    ("tolist", "arguments", {}, "Segmentation fault"),
    ("a copy to the device", "arguments", {}, "a copy from the host within a step: aten.lift_fresh"),
    ("lanes that are not live", "shrinking", {}, "Segmentation fault"),
    ("the draft's cache not advanced", "tokens", SPECULATIVE, "decisions differ"),
    ("state in the graph's memory", "tokens", {}, "decisions differ"),
    ("a second copy to the host", "tokens", {}, "copies to the host in"),
    ("another block table", "tokens", {}, "decisions differ"),
]

QUICK = ("tolist", "an allocation that grows", "lanes that are not live")


@pytest.fixture(scope="module")
def folder(make_checkpoint: Callable[..., Path]) -> str:
    narrow = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    return str(make_checkpoint("llama", num_hidden_layers=1, **narrow))


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the emulator that records be the device, or skip."""
    if importlib.util.find_spec("pybind11") is None:
        pytest.skip("pybind11 is not installed")
    header = Path(phase6.__file__).resolve().parents[1] / "recorder" / "emulator.h"
    monkeypatch.setenv("SPECDEC_CUDA_EMULATOR", str(header))
    if (reason := library.why_not(CPU)) is not None:
        pytest.skip(reason)


def proof(*arguments: str) -> Any:
    folders = os.pathsep.join([str(ROOT), *sys.path])
    command = [sys.executable, "-m", "tests.support.graphed", *arguments]
    return run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1"})


def cases() -> list[Any]:
    """Return every kind of decoding in every format and cache; three of them are quick."""
    quick = {("float32", "rejection", "paged"), ("int8 cache", "coupled", "static"), ("int4", "plain", "paged")}
    every = itertools.product(FORMATS, DECODING, ("paged", "static"))
    return [pytest.param(*case, marks=[] if case in quick else pytest.mark.slow) for case in every]


@pytest.mark.parametrize(("kind", "how", "kv"), cases())
@pytest.mark.usefixtures("emulator")
def test_replays_decide_what_phase_5_decides(kind: str, how: str, kv: str, folder: str) -> None:
    done = proof(folder, json.dumps({"kv": kv, **FORMATS[kind], **DECODING[how]}), "all")
    assert done.stdout == "proved\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", list(DECODING))
@pytest.mark.usefixtures("emulator")
def test_forty_prompts_that_come_and_go(how: str, folder: str) -> None:
    done = proof(folder, json.dumps({"kv": "paged", **DECODING[how]}), "many")
    assert done.stdout == "proved\n", done.stderr


@pytest.mark.usefixtures("emulator")
def test_sequences_of_several_policies_share_a_graph(folder: str) -> None:
    done = proof(folder, json.dumps({"kv": "paged", "k": 2, "max_tokens": 24}), "mixed")
    assert done.stdout == "proved\n", done.stderr


@pytest.mark.usefixtures("emulator")
def test_another_drafter_beside_the_draft_model_keeps_its_graphs(folder: str) -> None:
    done = proof(folder, json.dumps({"kv": "paged", "k": 2, "max_tokens": 24}), "drafters")
    assert done.stdout == "proved\n", done.stderr


@pytest.mark.parametrize("part", ["known", "dead"])
@pytest.mark.usefixtures("emulator")
def test_what_a_text_leaves_behind(part: str, folder: str) -> None:
    done = proof(folder, json.dumps({"kv": "paged", "k": 2}), part)
    assert done.stdout == "proved\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen3", "mistral"])
@pytest.mark.usefixtures("emulator")
def test_other_families(family: str, make_checkpoint: Callable[..., Path]) -> None:
    done = proof(str(make_checkpoint(family)), json.dumps({"dtype": "bfloat16", "k": 3}), "all")
    assert done.stdout == "proved\n", done.stderr


@pytest.mark.parametrize(
    ("mutant", "part", "options", "said"),
    [
        pytest.param(*each, id=f"{each[0]}, {each[1]}", marks=[] if each[0] in QUICK else pytest.mark.slow)
        for each in MUTANTS
    ],
)
@pytest.mark.usefixtures("emulator")
def test_what_a_graph_cannot_hold_is_noticed(
    mutant: str, part: str, options: dict[str, Any], said: str, folder: str
) -> None:
    done = proof(folder, json.dumps({"kv": "paged", **options}), part, mutant)
    assert done.returncode != 0
    assert said in done.stderr
    if mutant == "tolist":
        assert "device_step.py" in done.stderr  # which says where
        assert "in step" in done.stderr


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"kv": "dynamic"}, "--kv dynamic moves its memory"),
    ({"presence_penalty": 1.0}, "penalties count tokens on the host"),
    ({"draft": "auto", "tree": "static"}, "--tree static builds trees on the host"),
    ({"draft": "auto", "drafter": "ngram"}, "--drafter ngram drafts on the host"),
    ({"draft": "auto", "controller": "cost"}, "--controller cost decides on the host"),
    ({"draft": "auto", "policy": "typical"}, "--policy typical asks the host"),
    ({"record": Path("run.jsonl")}, "--record keeps the logits of every step"),
]


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=[said.split(" ")[0] for _, said in REFUSED])
@pytest.mark.usefixtures("emulator")
def test_on_is_an_error_where_it_cannot_be(number: int) -> None:
    options, said = REFUSED[number]
    chosen = {"model": "stdlib-10m", "device": "cpu", "kernels": "cuda", "cuda_graph": "on", "draft": "none", **options}
    with pytest.raises(UserError, match=f"--cuda-graph on cannot be: {said}"):
        phase6.LLM(phase6.Options(**chosen))
    why = why_not_options(phase6.Options(**{**chosen, "cuda_graph": "auto"}))
    assert why is not None
    assert why.startswith(said)


def test_on_is_an_error_without_a_card() -> None:
    with pytest.raises(UserError, match="graphs need an NVIDIA GPU, and this is cpu"):
        phase6.LLM(phase6.Options(device="cpu", cuda_graph="on"))


@pytest.mark.usefixtures("emulator")
def test_torch_is_not_captured() -> None:
    with pytest.raises(UserError, match="torch computes the models, and a graph holds kernels of --kernels cuda or"):
        phase6.LLM(phase6.Options(device="cpu", kernels="torch", cuda_graph="on"))


@pytest.mark.about("engine/graph_steps.py, rows_of_bucket")
def test_buckets_fit_the_cache() -> None:
    cache = PagedCache(CacheShape(1, 1, 4), 3, 6, torch.float32, torch.float32, CPU, 2)
    assert [rows_of_bucket(n, 6) for n in range(1, 7)] == [1, 2, 4, 4, 6, 6]
    check_bucket(cache, Bucket(3, 31, True))
    with pytest.raises(UserError, match="a bucket of 4 rows is larger than the cache, which has 3"):
        check_bucket(cache, Bucket(4, 1, True))
    with pytest.raises(UserError, match="a step of 32 draft tokens is larger than 31, the most"):
        check_bucket(cache, Bucket(1, 32, True))
