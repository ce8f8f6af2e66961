"""A server of phase 7 in a thread of this process, or as a program of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.phases import ROOT, phases
from tests.support import forked
from tests.support.beside import beside

FOLDER = phases()[-1].folder
Json = dict[str, Any]


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    service: Any
    server: Any  # uvicorn's

    @property
    def engine(self) -> Any:
        return self.service.engine.engine

    def client(self, **more: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **more)

    def post(self, path: str = "/v1/completions", /, **body: Any) -> Json:
        """Send a request that must succeed, and return its answer."""
        with self.client() as client:
            response = client.post(path, json=body)
        assert response.status_code == 200, response.text
        found: Json = response.json()
        return found

    def events(self, path: str = "/v1/completions", /, **body: Any) -> list[Json]:
        """Stream a request, and return its events but for the last, which must be [DONE]."""
        with self.client() as client:
            response = client.post(path, json={**body, "stream": True})
        assert response.status_code == 200, response.text
        return events_of(response.text)

    def slow(self, patch: pytest.MonkeyPatch) -> None:
        """Let every call of the engine, of up to 64 steps, take at least 0.1 s."""
        step = self.engine.step

        def later() -> Any:
            time.sleep(0.1)
            return step()

        patch.setattr(self.engine, "step", later)

    def rests(self) -> bool:
        """Return True if no request waits or runs, and every block is free."""
        engine, blocks = self.engine, self.engine.target.manager.cache.blocks
        idle = not engine.busy and not engine.requests and not self.service.samples
        return idle and not engine.target.manager.rows and blocks.free == len(blocks.users)


def events_of(text: str) -> list[Json]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@contextmanager
def in_thread(**chosen: Any) -> Iterator[Served]:
    """Serve in a thread of this process, with one thread for the kernels."""
    run, options = beside(7, "serving.run"), beside(7, "serving.options")
    how = {"device": "cpu", "dtype": "float32", "threads": 1, "shutdown_timeout": 1, **chosen}
    service = run.Service(options.ServeOptions(**how))
    with run.listen("127.0.0.1", 0) as taken:
        server = run.Server(service)
        thread = threading.Thread(target=server.run, args=([taken],), daemon=True)
        thread.start()
        try:
            yield Served(f"http://127.0.0.1:{taken.getsockname()[1]}", service, server)
        finally:
            service.close()
            server.should_exit = True
            thread.join(timeout=120)
            assert not thread.is_alive()


class Program:
    """`python serve.py` in a process of its own."""

    def __init__(self, *arguments: str, port: int = 0, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, str(FOLDER / "serve.py"), "--port", str(port), "--threads", "1", *arguments]
        variables = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
        reading, writing = os.pipe()
        self.process = forked.start(command, env=variables, stderr=writing, text=True)
        os.close(writing)
        self._errors = os.fdopen(reading, encoding="utf-8")
        self.said = list[str]()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._errors:
            self.said.append(line.rstrip())

    @property
    def url(self) -> str:
        """Wait until the program serves, and return its address."""
        eventually(lambda: self.process.poll() is not None or any("serving" in line for line in self.said), 120)
        found = re.search(r"http://[\d.:]+", "\n".join(self.said))
        assert found, self.said
        return found[0]

    def end(self) -> int:
        """Wait for the end; return the exit status."""
        eventually(lambda: self.process.poll() is not None, 60)
        self._reader.join(timeout=60)
        return self.process.wait()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.end()


def eventually(met: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until a condition holds; fail if it does not."""
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, f"nothing happened in {seconds} s"
        time.sleep(0.005)


def template(folder: Path) -> Path:
    """Write a chat template, and return its file."""
    path = folder / "chat.jinja"
    path.write_text("{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}# ", "utf-8")
    return path
