"""The program: its port, its end, and a restart after it was killed."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial

import httpx
import pytest

from common.errors import UserError
from common.options import parse_options
from tests.support.beside import beside
from tests.support.serving import Program, events_of, eventually, in_thread

LONG = {"prompt": "import os", "max_tokens": 1000, "ignore_eos": True, "stream": True}


def test_a_port_that_is_taken_is_refused_before_anything_is_loaded() -> None:
    listen = beside(7, "serving.run").listen
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is in use: .* another --port"):
            listen("127.0.0.1", port)
    with listen("127.0.0.1", port):
        pass
    with pytest.raises(UserError, match="no such address"):
        listen("no.such.host.invalid", 8000)


def test_small_parts_are_sent_at_once() -> None:
    """asyncio turns Nagle's algorithm off for sockets that say they are TCP; with it every answer takes 40 ms more."""
    with beside(7, "serving.run").listen("127.0.0.1", 0) as taken:
        assert taken.proto == socket.IPPROTO_TCP


def test_a_privileged_port_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As root every port can be had, so the system's answer is replaced."""

    def bind(self: socket.socket, address: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("socket.socket.bind", bind)
    with pytest.raises(UserError, match="port 80 needs privileges: give a --port from 1024 on"):
        beside(7, "serving.run").listen("127.0.0.1", 80)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "70000"], "--port"),
        (["--temperature", "1"], "--temperature is not an option of the server: each request says that"),
        (["--prompt", "a"], "--prompt is not an option of the server"),
        (["--show"], "--show is not an option of the server: the server prints no text"),
        (["--kv", "off"], "--kv off"),
        (["--timeout", "0"], "--timeout"),
    ],
)
def test_options_that_a_server_does_not_have(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_options(beside(7, "serving.options").ServeOptions, arguments, "serve.py")


def test_a_request_that_runs_is_finished_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """After SIGTERM new requests are refused; the one that runs has its time, and the server ends with it."""
    with in_thread(model="stdlib-1m", shutdown_timeout=60) as served:
        served.slow(monkeypatch)
        with served.client() as idle, served.client() as client:
            assert idle.get("/health").status_code == 200
            with client.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 300}) as response:
                parts = response.iter_text()
                next(parts)
                served.server.loop.call_soon_threadsafe(served.server.stop)
                eventually(lambda: served.service.closing)
                text = "".join(parts)
            assert '"finish_reason":"length"' in text
            assert text.endswith("data: [DONE]\n\n")
            eventually(lambda: not reachable(served.url))


def test_a_program_that_is_killed_serves_again_and_ends_in_time() -> None:
    """kill -9 under load: clients get connection errors. Then SIGTERM: running requests get an error."""
    with Program("--model", "stdlib-1m") as program:
        url, port = program.url, int(program.url.rpartition(":")[2])
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is in use"):
            beside(7, "serving.run").run(["--port", str(port)])
        lost = started(url, program)
        os.kill(program.process.pid, signal.SIGKILL)
        assert [type(answer()) for answer in lost] == [httpx.RemoteProtocolError] * 4
    with Program("--model", "stdlib-1m", "--shutdown-timeout", "0.5", port=port) as program:
        assert program.url == url
        running, began = started(url, program), time.monotonic()
        os.kill(program.process.pid, signal.SIGTERM)
        for answer in running:
            found = answer()
            assert isinstance(found, httpx.Response)
            last = events_of(found.text)[-1] if found.status_code == 200 else found.json()  # some still waited
            assert last["error"]["type"] == "server_error"
        assert program.end() == 0
        assert time.monotonic() - began < 0.5 + 5 + 20  # on a machine that has other work
        assert program.said[-1] == "ended"


def started(url: str, program: Program) -> list[Callable[[], object]]:
    """Start four requests that take long; return how to wait for what came of each."""
    found = list[object]()

    def ask() -> None:
        try:
            found.append(httpx.post(f"{url}/v1/completions", json={**LONG, "n": 32}, timeout=120))
        except httpx.HTTPError as error:
            found.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    eventually(
        lambda: metric(url, "vllm:generation_tokens_total") > 0 and metric(url, "vllm:num_requests_waiting") > 80
    )

    def answer(at: int) -> object:
        threads[at].join()
        return found[at]

    return [partial(answer, at) for at in range(4)]


def reachable(url: str) -> bool:
    try:
        httpx.get(f"{url}/health", timeout=60)
    except httpx.ConnectError:
        return False
    except httpx.TransportError:  # it took the connection, and ends
        return True
    return True


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return float(next(line for line in lines if line.startswith(name + "{")).split()[-1])
