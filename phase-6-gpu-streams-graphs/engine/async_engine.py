"""An engine in a thread of its own: other threads, and tasks of asyncio, send it requests through a queue.

with AsyncLLMEngine(LLMEngine(LLM(Options()))) as engine:
    for output in engine.stream("from pathlib import"):
        print(output.text, end="")

Only this thread touches models and caches. When a request comes or goes, a call into C++ that makes several steps
returns after the present one.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from common.errors import UserError

from .llm_engine import LLMEngine, Output
from .sampling import SamplingParams

Item = Output | Exception  # an error refuses or ends the request


class Refused(UserError):
    """The engine did not take the request; others are not concerned."""


@dataclass(eq=False)
class Ticket:
    """A request from outside the engine's thread."""

    prompt: str | list[int]
    params: SamplingParams | None
    how: dict[str, Any]  # the other arguments of add_request
    put: Callable[[Item], None]  # takes the items in order
    loop: asyncio.AbstractEventLoop | None  # in whose thread `put` is called; None: in the engine's
    left: int  # samples that have not ended


class AsyncLLMEngine:
    """Owns an engine; every method may be called from any thread."""

    def __init__(self, engine: LLMEngine, watch: Callable[[list[Output]], None] = lambda outputs: None) -> None:
        """watch: called in the engine's thread with the outputs of every step, those that nobody waits for as well."""
        self.engine, self._watch = engine, watch
        self._mail: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}  # by the number of the request
        self._lock, self._closed = threading.RLock(), False
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> AsyncLLMEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stream(self, prompt: str | list[int], params: SamplingParams | None = None, **how: Any) -> Iterator[Output]:
        """Yield the outputs of a request; leaving the loop early aborts it. `how`: as in LLMEngine.add_request.

        Raises Refused, or the error that ended the request.
        """
        arrived: queue.SimpleQueue[Item] = queue.SimpleQueue()
        ticket = self._submit(prompt, params, how, arrived.put, None)
        try:
            while ticket.left:
                yield self._checked(ticket, arrived.get())
        finally:
            self._abandon(ticket)

    async def generate(
        self, prompt: str | list[int], params: SamplingParams | None = None, **how: Any
    ) -> AsyncGenerator[Output]:
        """Do the same for a task of asyncio; if the task is cancelled, the request is aborted."""
        arrived = asyncio.Queue[Item]()
        ticket = self._submit(prompt, params, how, arrived.put_nowait, asyncio.get_running_loop())
        try:
            while ticket.left:
                yield self._checked(ticket, await arrived.get())
        finally:
            self._abandon(ticket)

    def _checked(self, ticket: Ticket, item: Item) -> Output:
        if isinstance(item, Exception):
            ticket.left = 0
            raise item
        if item.error is not None:
            raise item.error
        ticket.left -= item.finish_reason is not None
        return item

    def close(self) -> None:
        """End all requests and the thread; readers get an error."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._send(self.engine.close)
        self._thread.join()
        self.engine.hurry(False)  # the models may serve another engine

    def _submit(
        self,
        prompt: str | list[int],
        params: SamplingParams | None,
        how: dict[str, Any],
        put: Callable[[Item], None],
        loop: asyncio.AbstractEventLoop | None,
    ) -> Ticket:
        ticket = Ticket(prompt, params, how, put, loop, max(1, how.get("n", 1)))
        with self._lock:
            if self._closed:
                raise UserError("the engine is closed")
            self._send(lambda: self._add(ticket))
        return ticket

    def _abandon(self, ticket: Ticket) -> None:
        with self._lock:
            if ticket.left and not self._closed:
                self._send(lambda: self._abort(ticket))

    def _send(self, work: Callable[[], None]) -> None:
        """Hand work to the engine's thread, which does it before its next step; the present one is to end soon."""
        self._mail.put(work)
        self.engine.hurry(True)

    def _add(self, ticket: Ticket) -> None:
        try:
            number = self.engine.add_request(ticket.prompt, ticket.params, **ticket.how)
        except Exception as error:  # only this request is concerned
            _deliver([(ticket, Refused(str(error)) if isinstance(error, UserError) else error)])
        else:
            self._tickets[number] = ticket

    def _abort(self, ticket: Ticket) -> None:
        for number in [number for number, other in self._tickets.items() if other is ticket]:
            del self._tickets[number]
            self.engine.abort(number)

    def _serve(self) -> None:
        while not self.engine.closed:
            self.engine.hurry(False)  # before the mail is read: work that comes later ends the next call
            while not self.engine.closed and not (self._mail.empty() and self.engine.busy):
                self._mail.get()()
            if not self.engine.closed:
                self._step()
        while not self._mail.empty():  # what came just before the end
            self._mail.get()()
        message = "the engine was closed before the request ended"
        _deliver((ticket, UserError(message)) for ticket in self._tickets.values())

    def _step(self) -> None:
        try:
            outputs = self.engine.step()
        except Exception as error:  # not of one request: nobody can go on
            for number in self._tickets:
                self.engine.abort(number)
            _deliver((ticket, error) for ticket in self._tickets.values())
            self._tickets = {}
            return
        self._watch(outputs)
        _deliver((self._tickets[output.request], output) for output in outputs if output.request in self._tickets)
        for output in outputs:
            if output.request not in self.engine.requests:
                self._tickets.pop(output.request, None)


def _deliver(items: Iterable[tuple[Ticket, Item]]) -> None:
    """Give items to those who wait for them; a loop gets all of its items in one call, because a call wakes it."""
    calls: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Item]]] = {}
    for ticket, item in items:
        if ticket.loop is None:
            ticket.put(item)
        else:
            calls.setdefault(ticket.loop, []).append((ticket, item))
    for loop, mine in calls.items():
        if not loop.is_closed():  # else nobody waits
            loop.call_soon_threadsafe(_put, mine)


def _put(items: list[tuple[Ticket, Item]]) -> None:
    for ticket, item in items:
        ticket.put(item)
