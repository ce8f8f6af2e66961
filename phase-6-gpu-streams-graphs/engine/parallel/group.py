"""The processes that share a model, and how they exchange messages and numbers: over torch.distributed.

Rank 0 runs the scheduler and the loop. It tells the others what to compute; in between all exchange numbers. A sum is
an all-gather, after which each rank adds in the order of the ranks: for the few kilobytes of a step the latency counts,
and all ranks have the same bits.
"""

from __future__ import annotations

import ctypes
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from types import FrameType
from typing import TYPE_CHECKING, Any, Never, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from common.errors import UserError

from ..config import ModelConfig
from .lifeline import Lifeline
from .shard import Mode, Shard
from .traffic import Traffic

if TYPE_CHECKING:
    from ..load import LoadedModel

FRAME = 4096  # bytes of a message that are sent at once; a longer one has a second part
UNTAKEN = 64  # messages that another rank than 0 may have sent before the first of them is taken
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Work(Protocol):
    """A message that is under way."""

    def wait(self) -> object: ...


class Link(Protocol):
    """What is needed of a process group of torch.distributed."""

    def send(self, tensors: list[Tensor], target: int, tag: int) -> Work: ...

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> Work: ...

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor]) -> Work: ...


class Group:
    """Rank `rank` of `ranks`; `local` of them run on this machine."""

    def __init__(self, mode: Mode, rank: int, ranks: int, local: int, link: Link, lifeline: Lifeline) -> None:
        self.mode: Mode = mode
        self.rank, self.ranks, self.local = rank, ranks, local
        self.link, self.lifeline = link, lifeline
        self.traffic = Traffic()
        self.others = [other for other in range(ranks) if other != rank]
        self.shards = WeakKeyDictionary[nn.Module, Shard]()  # of the models that are split
        self.caches = count()  # numbers of their caches
        self.freed: list[int] = []  # caches that rank 0 needs no more
        self.ends: LoadedModel | None = None  # the target's embedding and output matrix, whole on rank 0 for drafters
        self._buffers: dict[tuple[int, int], Tensor] = {}
        self._under_way: list[tuple[Work, Tensor]] = []
        self.closed = False

    def shard(self, config: ModelConfig) -> Shard:
        """Return this rank's part of a model."""
        return Shard.of(self.mode, self.rank, self.ranks, config)

    def freed_later(self, cache: int) -> None:
        """Note that rank 0 has freed a cache; the others are told with the next one that is made."""
        self.freed.append(cache)

    def tell(self, message: object) -> None:
        """Send a message of rank 0 to all others, after the one before was taken. It returns before they read this."""
        self._finish_sends()
        began = time.perf_counter()
        for frame in framed(message):
            for other in self.others:
                self._send_soon(frame, other)
        self.traffic.note("plan", 0, began)

    def hear(self) -> object:
        """Return the next message of rank 0."""
        began = time.perf_counter()
        message = self._receive_message(0)
        self._finish_sends(UNTAKEN)
        self.traffic.note("plan", 0, began)
        return message

    def report(self, message: object) -> None:
        """Send a message to rank 0, which waits for it."""
        for frame in framed(message):
            self._send_soon(frame, 0)

    def reports(self) -> Iterator[tuple[int, Any]]:
        """Rank 0: yield every other rank with its message."""
        for other in self.others:
            yield other, self._receive_message(other)

    def _receive_message(self, source: int) -> object:
        first = torch.empty(FRAME, dtype=torch.uint8)
        self._receive(first, source)
        raw = first.numpy().tobytes()
        size = int.from_bytes(raw[:8], "little")
        body = raw[8:]
        if size > len(body):
            rest = torch.empty(size - len(body), dtype=torch.uint8)
            self._receive(rest, source)
            body += rest.numpy().tobytes()
        return pickle.loads(body[:size])

    def agree(self, error: str | None) -> None:
        """Wait for all ranks. UserError on every rank if one of them has an error, with the first one's."""
        if self.rank:
            self.report(error)
            found = self.hear()
        else:
            errors: dict[int, str | None] = {0: error} | dict(self.reports())
            found = next((f"rank {rank}: {text}" for rank, text in errors.items() if text is not None), None)
            found = error if error is not None else found
            self.tell(found)
        if found is not None:
            self.leave()
            raise UserError(str(found))

    def exchange(self, how: int, mine: int, out: int, size: int) -> None:
        """Exchange numbers within a step of C++, which gives addresses of float32; see How in model.h.

        It does not raise: other threads of this process wait for the step. If a rank is gone, the process ends.
        """
        try:
            if how == 0:
                gathered = self._tensor(out, size * self.ranks).view(self.ranks, size)
                self.gather(self._tensor(mine, size), gathered)
            else:
                numbers = self._tensor(mine, size)
                self.sum(numbers.view(torch.int32) if how == 2 else numbers)
        except BaseException as error:
            self.lost(error)

    def gather(self, mine: Tensor, gathered: Tensor) -> None:
        """Fill gathered [ranks, n] with the n numbers of each rank."""
        began = time.perf_counter()
        self.link.allgather([list(gathered)], [mine]).wait()
        self._count("all", mine.numel(), began)

    def sum(self, numbers: Tensor) -> None:
        """Add up the numbers of all ranks, in place."""
        gathered = numbers.new_empty(self.ranks, numbers.numel())
        self.gather(numbers, gathered)
        numbers.copy_(gathered[0])
        for other in gathered[1:]:
            numbers += other

    def send(self, tensor: Tensor, target: int) -> None:
        """Send a tensor. It returns before the other rank has read it."""
        began = time.perf_counter()
        self._send_soon(tensor, target)
        self.traffic.note(f"{self.rank} to {target}", tensor.numel(), began)

    def receive(self, tensor: Tensor, source: int) -> Tensor:
        """Fill a tensor with what a rank sends."""
        began = time.perf_counter()
        self._receive(tensor, source)
        self._count(f"{source} to {self.rank}", tensor.numel(), began)
        return tensor

    def _count(self, kind: str, floats: int, began: float) -> None:
        self.traffic.seconds += time.perf_counter() - began
        self.traffic.note(kind, floats, began)

    def _receive(self, tensor: Tensor, source: int) -> None:
        try:
            self.link.recv([tensor], source, 0).wait()
        except RuntimeError as error:
            self.lost(error)

    def _send_soon(self, tensor: Tensor, target: int) -> None:
        try:
            self._under_way.append((self.link.send([tensor], target, 0), tensor))
        except RuntimeError as error:
            self.lost(error)

    def _finish_sends(self, ahead: int = 0) -> None:
        """Wait until all but the last `ahead` of what was sent has been taken, and free it."""
        done = self._under_way[: max(0, len(self._under_way) - ahead)]
        try:
            for work, _ in done:
                work.wait()
        except RuntimeError as error:
            self.lost(error)
        del self._under_way[: len(done)]

    def lost(self, error: BaseException) -> Never:
        """End this process: a rank is gone, or this one cannot go on within a step of all."""
        self.lifeline.end(f"{type(error).__name__}: {error}", broken=isinstance(error, RuntimeError))

    def _tensor(self, address: int, size: int) -> Tensor:
        if (known := self._buffers.get((address, size))) is None:
            array = (ctypes.c_float * size).from_address(address)
            known = self._buffers[address, size] = torch.frombuffer(array, dtype=torch.float32)
        return known

    def close(self) -> None:
        """Rank 0: end the other ranks."""
        if not self.closed:
            self.tell(None)
            self.leave()

    def leave(self) -> None:
        """Leave the group; the other ranks do the same."""
        self._finish_sends()
        self.closed = True
        self.lifeline.close()


def framed(message: object) -> list[Tensor]:
    """Return a message in one or two tensors of bytes; the first has FRAME of them and begins with the size."""
    body = pickle.dumps(message)
    room = FRAME - 8
    first = len(body).to_bytes(8, "little") + body[:room].ljust(room, b"\0")
    return [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (first, body[room:]) if part]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C and other ends until all ranks have done the same."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = list[tuple[int, FrameType | None]]()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if callable(handler):
            signal.signal(number, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in before.items():
            if callable(handler):
                signal.signal(number, handler)
        for first, frame in came[:1]:
            handler = before[signal.Signals(first)]
            assert callable(handler)
            handler(first, frame)
