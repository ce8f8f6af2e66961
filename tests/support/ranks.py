"""The ranks of a split model as threads of one process, with queues in place of torch.distributed.

llm, ranks = split(Options(model=str(folder), tensor_parallel=2))
llm.generate(["a text"]); end(llm, ranks)
"""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from contextlib import suppress
from typing import Any, Never, cast

import pytest
import torch
from torch import Tensor

import phase6
from phase6.parallel import start, worker
from phase6.parallel.group import Group
from phase6.parallel.shard import Mode


class Done:
    def wait(self) -> None:
        pass


class Arriving:
    """A receive that is under way."""

    def __init__(self, source: queue.Queue[Tensor], to: Tensor, failed: threading.Event) -> None:
        self.source, self.to, self.failed = source, to, failed

    def wait(self) -> None:
        for _ in range(600):
            with suppress(queue.Empty):
                self.to.copy_(self.source.get(timeout=1))
                return
            assert not self.failed.is_set(), "another rank has failed"
        raise TimeoutError("another rank sends nothing")


class Link:
    """The part of a process group that ranks use; `wires` belong to all ranks, and so does `failed`."""

    def __init__(self, rank: int, wires: dict[tuple[int, int], queue.Queue[Tensor]], failed: threading.Event) -> None:
        self.rank, self.wires, self.failed = rank, wires, failed

    def send(self, tensors: list[Tensor], target: int, tag: int) -> Done:
        self.wires[self.rank, target].put(tensors[0].clone())
        return Done()

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor]) -> Done:
        ((*rows,), (mine,)) = outputs[0], inputs
        others = [rank for rank in range(len(rows)) if rank != self.rank]
        for other in others:
            self.send([mine], other, 0)
        rows[self.rank].copy_(mine)
        for other in others:
            self.recv([rows[other]], other, 0).wait()
        return Done()

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> Arriving:
        return Arriving(self.wires[source, self.rank], tensors[0], self.failed)


class Lifeline:
    """Reports an error, instead of ending the process."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def end(self, error: str, broken: bool) -> Never:
        self.errors.append(error)
        raise SystemExit(error)

    def close(self) -> None:
        pass


def groups(mode: Mode, ranks: int) -> list[Group]:
    wires = defaultdict[tuple[int, int], queue.Queue[Tensor]](queue.Queue)
    for source in range(ranks):
        for target in range(ranks):
            wires[source, target]  # made now: threads only read the map
    failed = threading.Event()
    links: list[Any] = [Link(rank, wires, failed) for rank in range(ranks)]
    ends: list[Any] = [Lifeline() for _ in range(ranks)]
    return [Group(mode, rank, ranks, ranks, links[rank], ends[rank]) for rank in range(ranks)]


def split(options: Any) -> tuple[Any, list[threading.Thread]]:
    """Return an LLM of rank 0, and the threads of the other ranks."""
    made, threads = groups(*start.wanted(options)), list[threading.Thread]()

    def begin(options: Any) -> Group:
        start.check(options)
        for group in made[1:]:
            threads.append(threading.Thread(target=follow, args=(group, options), daemon=True))
            threads[-1].start()
        return made[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phase6.parallel.lead.start", begin)
        llm = phase6.LLM(options)
    return llm, threads


def follow(group: Group, options: Any) -> None:
    """Serve rank 0. If that fails, whoever waits for this rank fails too."""
    try:
        worker.serve(group, options)
    except BaseException:
        cast(Link, group.link).failed.set()
        raise


def end(llm: Any, threads: list[threading.Thread]) -> None:
    llm.group.close()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def logits_of(
    llm: Any, prompts: list[list[int]], params: Any, policy: Any = None
) -> tuple[list[list[int]], list[Tensor]]:
    """Decode token ids; return the tokens of each, and the logits of every step."""
    made = [phase6.Sequence(prompt, params, llm.loaded.ending) for prompt in prompts]
    found = [step.output.logits.clone() for step in llm.run(made, multi_step=False)]
    return [sequence.tokens for sequence in made], found


def same_bits(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
