"""Clients that leave, that do not read, and that never finish a request: they take nothing from the others."""

from __future__ import annotations

import json
import socket
import time
from contextlib import ExitStack

import httpx
import pytest

from tests.support.serving import Served, eventually

LONG = {"prompt": "import os", "max_tokens": 1000, "ignore_eos": True}


def request(body: dict[str, object]) -> bytes:
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: "
    return f"{head}{len(data)}\r\n\r\n".encode() + data


def address(server: Served) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_the_blocks(server: Served, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """Whether tokens have come or the answer is awaited in one piece."""
    server.slow(monkeypatch)
    with socket.create_connection(address(server)) as raw:
        raw.sendall(request({**LONG, "stream": stream}))
        eventually(lambda: bool(server.engine.scheduler.running))
        number = next(iter(server.engine.requests))
        if stream:
            assert raw.recv(1)
    eventually(lambda: number not in server.engine.requests)
    eventually(server.rests)


def test_who_leaves_the_queue_loses_the_place(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows run; the fifth waits, and leaves before its turn. All samples of a request end together."""
    server.slow(monkeypatch)
    with ExitStack() as stack:
        running = [stack.enter_context(socket.create_connection(address(server))) for _ in range(2)]
        for raw in running:
            raw.sendall(request({**LONG, "n": 2, "stream": True}))
        eventually(lambda: len(server.engine.scheduler.running) == 4)
        with socket.create_connection(address(server)) as waiting:
            waiting.sendall(request(LONG))
            eventually(lambda: len(server.engine.scheduler.waiting) == 1)
        eventually(lambda: not server.engine.scheduler.waiting)
        running[0].close()
        eventually(lambda: len(server.engine.scheduler.running) <= 2)
    eventually(server.rests)


def test_a_slow_reader_holds_nobody_up(server: Served) -> None:
    """One client reads nothing; the engine finishes its request, and others are served meanwhile."""
    wanted = server.post(**{**LONG, "temperature": 0, "max_tokens": 64})["choices"]
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        raw.connect(address(server))
        raw.sendall(request({**LONG, "max_tokens": 300, "stream": True, "n": 4, "logprobs": 20}))
        eventually(lambda: bool(server.engine.scheduler.running))
        assert server.post(**{**LONG, "temperature": 0, "max_tokens": 64})["choices"] == wanted
        eventually(lambda: not server.engine.busy)
        raw.settimeout(60)
        received = b""
        while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            part = raw.recv(2**16)
            assert part, received[-100:]
            received += part
    eventually(server.rests)


def test_half_open_connections(server: Served) -> None:
    with ExitStack() as stack:
        for sent in (b"", b"POST /v1/compl", request(LONG)[:-5], b"GET / HTTP/1.1\r\n"):
            for _ in range(8):
                raw = stack.enter_context(socket.create_connection(address(server)))
                raw.sendall(sent)
        began = time.monotonic()
        assert server.post(prompt="a", max_tokens=2)["usage"]["completion_tokens"] == 2
        assert time.monotonic() - began < 20  # seconds, even on a machine that has other work
    eventually(server.rests)


def test_a_client_that_is_done_with_reading(server: Served) -> None:
    """httpx leaves a stream after a few events; the next request on a new connection is served."""
    with httpx.Client(base_url=server.url) as client:
        for _ in range(5):
            with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
                next(response.iter_lines())
            assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
    eventually(server.rests)
