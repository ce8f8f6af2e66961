"""A client for OpenAI-compatible servers: ours, vLLM, SGLang, llama-server, transformers serve.

It retries what is safe to repeat, counts tokens by the server's `usage`, and notes when each part of a stream came.
What a server does not tell is None, and never a guess.

http.client takes about half of the CPU time of httpx. That counts where client and server share cores.

    with Client("http://127.0.0.1:8000") as client:
        for chunk in client.stream("import os", max_tokens=16):
            print(chunk.text, end="", flush=True)
        print(client.complete("import os", max_tokens=16).completion_tokens)
"""

from __future__ import annotations

import json
import random
import select
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from common.errors import UserError

from .received import Json, ServerError, error_of, events, parsed, parts, told_wait, tolerant

Prompt = str | Sequence[int] | Sequence[Json]  # a text, token ids, or the messages of a chat
BUSY = (429, 503)  # the server did not begin, and says so


@dataclass(frozen=True)
class Chunk:
    """One event of a stream."""

    text: str
    at: float  # seconds since the request was sent
    tokens: int | None  # that it brings, if the server tells (`continuous_usage_stats` or token ids)
    finish_reason: str | None = None
    index: int = 0  # of the sample
    body: Json = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """A whole answer. Times in seconds since the request was sent."""

    text: str  # of the first sample
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    total_s: float
    first_s: float | None  # to the first text; None if the answer was not streamed
    chunks: list[Chunk]
    body: Json  # of an answer in one piece, else of the last event

    @property
    def speculation(self) -> Json | None:
        """vLLM's figures of acceptance, if the server tells them."""
        metrics = self.body.get("metrics")
        found = metrics.get("speculative_decoding") if isinstance(metrics, dict) else None
        return found if isinstance(found, dict) else None


class Client:
    """Talks to one server. Not for several threads at once: each has its own."""

    def __init__(
        self, url: str, model: str | None = None, key: str | None = None, timeout: float = 120.0, retries: int = 3
    ) -> None:
        """model: its name in requests, by default the first that the server lists. timeout: seconds without a byte.

        retries: of a request that did not reach the server, or that it refused because it is busy; and of a GET.
        UserError for what is no address.
        """
        self.url, self.timeout, self.retries, self._model = url.rstrip("/").removesuffix("/v1"), timeout, retries, model
        address = urlsplit(self.url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise UserError(f"{url} is no address of a server; one is http://127.0.0.1:8000")
        made = HTTPSConnection if address.scheme == "https" else HTTPConnection
        self._http, self._path = made(address.hostname, address.port, timeout=min(timeout, 10.0)), address.path
        self._headers = {"content-type": "application/json"}
        if key is not None:
            self._headers["authorization"] = f"Bearer {key}"
        self._usage = True  # the server takes `stream_options`

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def healthy(self) -> bool:
        """Return True if the server answers that it takes requests. It is asked once."""
        try:
            self._send("GET", "/health", attempts=1).read()
        except (ServerError, OSError, HTTPException):
            return False
        return True

    def wait(self, seconds: float) -> None:
        """Wait until the server is healthy. ServerError if that takes longer."""
        end = time.monotonic() + seconds
        while not self.healthy():
            if time.monotonic() > end:
                raise ServerError(f"{self.url} did not become healthy within {seconds:g} s")
            time.sleep(0.05)

    def models(self) -> list[str]:
        """Return the names of the models; some servers list none."""
        data = self._ask("GET", "/v1/models").get("data") or []
        return [str(each["id"]) for each in data if isinstance(each, dict) and "id" in each]

    @property
    def model(self) -> str | None:
        if self._model is None:
            self._model = next(iter(self.models()), None)
        return self._model

    def complete(self, prompt: Prompt, **params: Any) -> Reply:
        """Return the answer to a prompt in one piece. params: fields of the request. ServerError if it is refused."""
        began = time.perf_counter()
        body = self._ask("POST", *self._request(prompt, params))
        choice = next(iter(body.get("choices") or []), None)
        if not isinstance(choice, dict):
            raise ServerError(f"{self.url} answered without a choice: {str(body)[:200]}")
        message = choice.get("message")
        text = (message if isinstance(message, dict) else choice).get("content" if message else "text") or ""
        return self._reply(text, choice.get("finish_reason"), time.perf_counter() - began, [], body)

    def stream(self, prompt: Prompt, **params: Any) -> Iterator[Chunk]:
        """Yield the parts of the answer as they come; the last one has the usage in its body.

        ServerError if the request is refused, or if an error ends the stream. Leaving early closes the connection.
        """
        path, request = self._request(prompt, params)
        request["stream"] = True
        if self._usage:
            request["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        began, told, ended = time.perf_counter(), 0, False
        try:
            response = self._send("POST", path, request)
        except ServerError as error:
            if not (self._usage and error.status in (400, 422) and "stream_options" in str(error)):
                raise
            self._usage = False  # this server does not know them
            yield from self.stream(prompt, **params)
            return
        try:
            for data in events(response):
                if data == b"[DONE]":
                    self._rest(response)
                    return
                body = parsed(data, self.url)
                if body.get("error") is not None:
                    raise error_of(body, None, self.url)
                at = time.perf_counter() - began
                usage = body.get("usage") or {}
                total = usage.get("completion_tokens") if isinstance(usage, dict) else None
                tokens = None if total is None else total - told
                told = told if total is None else total
                for text, reason, index in parts(body, self.url):
                    ended |= reason is not None
                    yield Chunk(text, at, tokens, reason, index, body)
                    tokens = None if tokens is None else 0
            if not ended:  # some servers end without [DONE]
                raise ServerError(f"{self.url}: the stream ended without [DONE] or a reason")
        except (OSError, HTTPException) as error:
            raise ServerError(f"{self.url}: the stream broke off: {self._why(error)}") from None
        finally:
            if not response.isclosed():  # what was not read would come before the next answer
                response.close()
                self._http.close()

    def streamed(self, prompt: Prompt, **params: Any) -> Reply:
        """Read a stream to its end."""
        began = time.perf_counter()
        chunks = list(self.stream(prompt, **params))
        total = time.perf_counter() - began
        text = "".join(chunk.text for chunk in chunks if chunk.index == 0)
        reason = next((chunk.finish_reason for chunk in reversed(chunks) if chunk.finish_reason), None)
        return self._reply(text, reason, total, chunks, chunks[-1].body if chunks else {})

    def _reply(self, text: str, reason: str | None, total: float, chunks: list[Chunk], body: Json) -> Reply:
        usage = body.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        first = next((chunk.at for chunk in chunks if chunk.text), None)
        counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
        return Reply(text, reason, *counts, total, first, chunks, body)

    def _request(self, prompt: Prompt, params: Json) -> tuple[str, Json]:
        body = {"model": self.model, **params}
        if body["model"] is None:
            del body["model"]
        if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
            return "/v1/completions", {**body, "prompt": prompt if isinstance(prompt, str) else list(prompt)}
        return "/v1/chat/completions", {**body, "messages": list(prompt)}

    def _ask(self, method: str, path: str, body: Json | None = None) -> Json:
        """Return an answer in one piece."""
        response = self._send(method, path, body)
        try:
            return parsed(response.read(), self.url)
        except (OSError, HTTPException) as error:
            self._http.close()
            raise ServerError(f"{self.url}: the answer broke off: {self._why(error)}") from None

    def _send(self, method: str, path: str, body: Json | None = None, attempts: int | None = None) -> HTTPResponse:
        """Send a request, again if that is safe; return a successful response, whose body is still to be read."""
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(left := attempts or self.retries + 1):
            last = attempt == left - 1
            try:
                self._connect()
            except OSError as error:  # nothing was sent
                if last:
                    raise ServerError(f"{self.url} cannot be reached: {self._why(error)}") from None
            else:
                try:
                    self._http.request(method, self._path + path, data, self._headers)
                    response = self._http.getresponse()
                    if 200 <= response.status < 300:
                        return response
                    fault = response.read()
                except (OSError, HTTPException) as error:  # a POST may be under way
                    self._http.close()
                    if last or method != "GET":
                        raise ServerError(f"{self.url}: the connection failed: {self._why(error)}") from None
                else:
                    if last or response.status not in BUSY:
                        raise error_of(tolerant(fault), response.status, self.url)
                    time.sleep(told_wait(response))
            time.sleep(0.1 * 2**attempt * random.uniform(0.5, 1.5))
        raise AssertionError("the last attempt returns or raises")

    def _connect(self) -> None:
        """Connect, unless the last connection can serve: an idle one that can be read was closed by the server."""
        try:
            if self._http.sock is not None and select.select([self._http.sock], [], [], 0)[0]:
                self._http.close()
        except ValueError:  # select takes no more than 1024 files
            self._http.close()
        if self._http.sock is None:
            self._http.connect()
        self._http.sock.settimeout(self.timeout)

    def _rest(self, response: HTTPResponse) -> None:
        """Read what follows the last event, nothing as a rule, so that the connection can be used again."""
        if self._http.sock is not None:
            self._http.sock.settimeout(1.0)
            with suppress(OSError, HTTPException):
                response.read()

    def _why(self, error: Exception) -> str:
        return (
            f"nothing came for {self.timeout:g} s"
            if isinstance(error, TimeoutError)
            else str(error) or type(error).__name__
        )
