"""The processes of a split model: how they start, what they refuse, and how they end if one of them is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import phase6
from common.errors import UserError
from common.phases import ROOT
from common.prompts import load_prompts
from phase6.parallel import start
from tests.support.ranks import logits_of, same_bits
from tests.support.served import WHY_NOT_CPP

pytestmark = pytest.mark.skipif(WHY_NOT_CPP is not None, reason=str(WHY_NOT_CPP))

GENERATE = ROOT / "phase-6-gpu-streams-graphs" / "generate.py"
SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
LONG = ("--n", "2000", "--temperature", "1", "--batch-size", "1")  # one sample after the other; each ends early
PROMPTS = [[5, 6, 7, *range(20, 60)], [9, 8], list(range(100, 119))]


@pytest.fixture(scope="module")
def folder(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("llama", **SHAPE)


def options(folder: Path, **more: Any) -> Any:
    chosen: dict[str, Any] = {"model": str(folder), "dtype": "float32", "device": "cpu", "threads": 1, "draft": "none"}
    return phase6.Options(**(chosen | more))


def command(folder: Path | str, *more: str) -> list[str]:
    return [str(GENERATE), "--model", str(folder), "--prompt", "def read(path):", "--dtype", "float32", *more]


def run(arguments: list[str], program: list[str] | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(
        [*(program or [sys.executable]), *arguments], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("how", [{"tensor_parallel": 2}, {"pipeline_parallel": 2}], ids=["gather", "layers"])
def test_two_processes_have_the_bits_of_one(folder: Path, how: dict[str, int]) -> None:
    """A second LLM of the same process has a group of its own; both end with their LLMs."""
    draft = {"draft": str(folder), "draft_quant": "int8", "policy": "coupled"}
    params = phase6.SamplingParams(max_new_tokens=8, ignore_eos=True, temperature=1.0, seed=3)
    one, several = phase6.LLM(options(folder, **draft)), phase6.LLM(options(folder, **draft, **how))
    (tokens, logits), (theirs, their_logits) = (logits_of(llm, PROMPTS, params) for llm in (one, several))
    assert theirs == tokens
    assert same_bits(logits, their_logits)
    assert several.group is not None
    (child,) = several.group.lifeline.children
    several.group.close()
    assert child.poll() == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["gather", "layers"])
def test_torchrun_starts_the_processes(folder: Path, mode: str) -> None:
    option = "--tensor-parallel" if mode == "gather" else "--pipeline-parallel"
    arguments = command(folder, "--draft", "none", "--max-tokens", "8", "--json")
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2"]
    one, several = run(arguments), run([*arguments, option, "2"], torchrun)
    assert several.returncode == 0, several.stderr
    documents = [json.loads(done.stdout)["completions"][0] for done in (one, several)]
    assert documents[0]["tokens"] == documents[1]["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, {"dtype": "bfloat16"}, {"quant": "int8"}], ids=["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    "split",
    [{"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"tensor_parallel": 2, "tensor_mode": "reduce"}],
    ids=["gather", "layers", "reduce"],
)
def test_fifty_prompts(split: dict[str, Any], how: dict[str, Any]) -> None:
    """Plain, speculative and batched: the same tokens and logits. Partial sums: the same greedy tokens in float32."""
    chosen: dict[str, Any] = {"model": "stdlib-10m", "dtype": "float32", "device": "cpu", "threads": 1, **how}
    texts = [prompt.text for prompt in load_prompts("code", "test")[:50]]
    params = phase6.SamplingParams(max_new_tokens=16, ignore_eos=True)
    for draft, drafter in (("none", "model"), ("auto", "model"), ("auto", "eagle"), ("auto", "medusa")):
        chosen |= {"draft": draft, "drafter": drafter}
        one, several = (phase6.LLM(phase6.Options(**chosen, **more)) for more in ({}, split))
        encoded = one.encoder.encode(texts)
        for batch in (encoded[:10], *([each] for each in encoded[10:])) if draft == "none" else [encoded]:
            (tokens, logits), (theirs, their_logits) = (logits_of(llm, list(batch), params) for llm in (one, several))
            if split.get("tensor_mode") != "reduce":
                assert theirs == tokens
                assert same_bits(logits, their_logits)
            elif not how:
                assert theirs == tokens
                for mine, other in zip(logits, their_logits, strict=True):
                    assert (mine - other).abs().max() < 1e-4 * mine.abs().max()
        assert several.group is not None
        several.group.close()


class Victims:
    """A program of two ranks that decodes for a long time."""

    def __init__(self, *arguments: str) -> None:
        self.program = subprocess.Popen(
            [sys.executable, *command("stdlib-1m", "--max-tokens", "100000", "--draft", "none", *LONG, *arguments)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
        )
        ranks = list[psutil.Process]()
        while not ranks and self.program.poll() is None:
            ranks = [child for child in psutil.Process(self.program.pid).children() if is_rank(child)]
            time.sleep(0.02)
        (self.child,) = ranks

    def wait_for_text(self) -> None:
        assert self.program.stdout is not None
        while not (written := self.program.stdout.read(1)).strip():
            assert written, "the program has ended"

    def kill(self, rank: int) -> tuple[float, str]:
        """Kill a rank; return how long the other one lived, in seconds, and what was written to stderr."""
        os.kill(self.child.pid if rank else self.program.pid, signal.SIGKILL)
        seconds, last = 0.0, time.monotonic()
        both = [psutil.Process(self.program.pid), self.child]
        while any(alive(each) for each in both):
            assert seconds < 60, "a rank is still there"
            time.sleep(0.02)
            now = time.monotonic()
            seconds, last = seconds + min(now - last, 0.2), now  # a machine that was suspended does not count
        _, errors = self.program.communicate()
        return seconds, errors.decode()


def is_rank(process: psutil.Process) -> bool:
    """Return True for a rank that the program has started; a compiler's or a linker's process lives for a moment."""
    try:
        return any("parallel.worker import main" in argument for argument in process.cmdline())
    except psutil.Error:
        return False


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def check_end(victims: Victims, rank: int) -> None:
    seconds, errors = victims.kill(rank)
    assert seconds < 10
    lines = [line for line in errors.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, errors
    assert lines[0].startswith(f"error: rank {rank} "), errors
    assert str(victims.child.pid if rank else victims.program.pid) in lines[0]
    assert victims.program.returncode == (1 if rank else -signal.SIGKILL)


@pytest.mark.parametrize("rank", [0, 1])
def test_if_a_rank_is_killed_the_other_names_it_and_ends(rank: int) -> None:
    victims = Victims(*(("--tensor-parallel", "2") if rank else ("--pipeline-parallel", "2")))
    victims.wait_for_text()
    check_end(victims, rank)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
def test_a_rank_that_is_killed_at_a_random_moment(number: int) -> None:
    """While it imports torch, loads, or decodes."""
    victims = Victims("--tensor-parallel" if number % 4 < 2 else "--pipeline-parallel", "2")
    if number % 5:
        victims.wait_for_text()
    time.sleep(random.Random(number).uniform(0, 2))
    check_end(victims, number % 2)


def test_a_rank_that_cannot_load_its_part_ends_all_with_its_reason(make_checkpoint: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    broken = make_checkpoint("llama", **SHAPE)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][-1] = float("nan")  # a row of the last rank
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    done = run(command(broken, "--quant", "int8", "--tensor-parallel", "2", "--draft", "none"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: rank 1: ")
    assert "no finite numbers" in line


def test_interrupted_the_ranks_end_in_order() -> None:
    """Ctrl-C reaches all processes of a terminal; rank 0 finishes its step, and the others end with it."""
    victims = Victims("--tensor-parallel", "2")
    victims.wait_for_text()
    victims.child.send_signal(signal.SIGINT)
    victims.program.send_signal(signal.SIGINT)
    _, errors = victims.program.communicate(timeout=120)
    assert victims.program.returncode == 130, errors
    assert b"interrupted" in errors
    assert b"error" not in errors
    assert not alive(victims.child)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"tensor_parallel": 3}, "3 does not divide its 4 heads; --tensor-parallel can be 2, 4"),
        ({"pipeline_parallel": 3}, "3 does not divide its 2 layers; --pipeline-parallel can be 2"),
        ({"tensor_parallel": 2, "model": "fake"}, "the fake model has no matrices to split"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_a_process_starts(
    folder: Path, how: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        start.check(options(folder, **how))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"tensor_parallel": 2, "pipeline_parallel": 2}, "does not go with --pipeline-parallel"),
        ({"tensor_parallel": 2, "drafter": "eagle", "draft_parallel": True}, "splits a draft model, .* eagle has none"),
        ({"pipeline_parallel": 2, "compile": True}, "--compile applies to torch"),
        ({"pipeline_parallel": 2, "kv": "dynamic"}, "every process keeps a cache"),
        ({"tensor_mode": "reduce", "pipeline_parallel": 2}, "--tensor-mode reduce is for --tensor-parallel"),
        ({"micro_batches": 2, "tensor_parallel": 2}, "--micro-batches is for --pipeline-parallel"),
        ({"draft_parallel": True}, "--draft-parallel is for --tensor-parallel or"),
        ({"tensor_parallel": 2, "beams": 2}, "does not go with --beams: torch computes whole texts"),
    ],
)
def test_options_that_do_not_go_together(folder: Path, how: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        options(folder, **how)


def test_kernels_that_cannot_be_split_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"only the C\+\+ kernels split a model"):
        phase6.LLM(options(folder, tensor_parallel=2, kernels="torch"))


def test_another_number_of_processes_than_the_options_want(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": 4, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    for ranks in (1, 2):
        with pytest.raises(UserError, match=r"4 processes were started .* give --tensor-parallel 4"):
            start.check(options(folder, tensor_parallel=ranks))


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


def test_a_port_that_is_taken(folder: Path, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", str(taken))
    with pytest.raises(UserError, match=f"port {taken} .*cannot be used"):
        start.start(options(folder, tensor_parallel=2))
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=f"port {taken} .*cannot be used"):
        start.start(options(folder, tensor_parallel=2))


def test_ranks_with_other_options_or_files_are_refused(folder: Path, make_checkpoint: Callable[..., Path]) -> None:
    place = start.Place(1, 2, 2, "127.0.0.1", 1)
    mine = start.hello(options(folder, tensor_parallel=2), place)
    assert start.differs(mine, start.hello(options(folder, tensor_parallel=2, prompt=["x"]), place)) is None
    wrong = start.differs(mine, start.hello(options(folder, tensor_parallel=2, quant="int8"), place))
    assert wrong is not None
    assert wrong.startswith("rank 1 has --quant int8, and rank 0 none")
    theirs = start.hello(options(make_checkpoint("llama", **SHAPE, tie_word_embeddings=True)), place)
    wrong = start.differs(mine, theirs | {"options": mine["options"], "checkpoints": {str(folder): "0"}})
    assert wrong is not None
    assert "another checkpoint" in wrong
    assert "hash 0" in wrong
    assert theirs["checkpoints"] != mine["checkpoints"]
    assert torch.__version__ == mine["torch"]
