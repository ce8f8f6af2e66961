"""Reads what OpenAI-compatible servers send: events of a stream, bodies, errors.

Raises ServerError for what is broken.

    for data in events(response):
        for text, reason, index in parts(parsed(data, url), url): ...
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.client import HTTPResponse
from typing import Any

from common.errors import UserError

Json = dict[str, Any]


class ServerError(UserError):
    """The server refused a request, or answered what is no answer."""

    def __init__(self, message: str, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def events(response: HTTPResponse) -> Iterator[bytes]:
    """Yield the data of the events of a stream, as they come; comments and other fields are left out."""
    rest = b""
    while block := response.read1():
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def parts(body: Json, url: str) -> list[tuple[str, str | None, int]]:
    """Return text, finish reason and sample of the choices of an event; of one without choices an empty text."""
    try:
        return [
            ((choice.get("delta") or choice).get("content" if "delta" in choice else "text") or "",
             choice.get("finish_reason"), choice.get("index", 0))
            for choice in body.get("choices") or []
        ] or [("", None, 0)]  # fmt: skip
    except (AttributeError, TypeError):
        raise ServerError(f"{url} sent a broken event: {str(body)[:80]}") from None


def parsed(data: bytes, url: str) -> Json:
    """Return the JSON object that a server sent."""
    try:
        found = json.loads(data)
    except ValueError:
        raise ServerError(f"{url} answered what is not JSON: {_shown(data)}") from None
    if not isinstance(found, dict):
        raise ServerError(f"{url} answered what is no JSON object: {_shown(data)}")
    return found


def _shown(data: bytes) -> str:
    return " ".join(data[:200].decode(errors="replace").split())


def tolerant(data: bytes) -> Json:
    """Return the body of an error, whatever it is."""
    try:
        found = json.loads(data)
    except ValueError:
        return {"error": _shown(data)}
    return found if isinstance(found, dict) else {"error": _shown(data)}


def error_of(body: Json, status: int | None, url: str) -> ServerError:
    """Make the error of a body: OpenAI's error object, or FastAPI's `detail`."""
    fault = body.get("error", body.get("detail"))
    message, code = fault, None
    if isinstance(fault, dict):
        message, code = fault.get("message"), fault.get("code")
    told = f" ({status})" if status is not None else ""
    return ServerError(f"{url}{told}: {message or 'no reason given'}", status, code)


def told_wait(response: HTTPResponse) -> float:
    """Return the seconds of Retry-After, at most 30."""
    try:
        return min(30.0, max(0.0, float(response.headers.get("retry-after") or 0)))
    except ValueError:
        return 0.0
