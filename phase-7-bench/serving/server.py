"""The routes: reads requests, writes answers and streams, and turns whatever fails into OpenAI's error objects.

Nothing leaves a handler uncaught: uvicorn would answer by closing the connection, on which the client's next request
may be under way. A client that leaves is noticed at once, streamed to or not, and its samples are aborted.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import sys
import traceback
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from .chat_template import special_tokens, tokenizer_config
from .openapi import document
from .protocol import ApiError, ChatRequest, CompletionRequest, DetokenizeRequest, Model, TokenizeRequest, parse
from .service import Job, Service

Handler = Callable[[Service, Request], Awaitable[Response]]
BODY_SECONDS = 30.0  # in which a request's body must arrive
PAGE = Path(__file__).parent / "page.html"
ENCODE = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, check_circular=False).encode
DONE = b"data: [DONE]\n\n"
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]


def make_app(service: Service) -> Starlette:
    """Return the application; its requests are served by the service until that is closed."""
    routes: list[tuple[str, str, Handler]] = [
        ("POST", "/v1/completions", partial(generate, CompletionRequest)),
        ("POST", "/v1/chat/completions", partial(generate, ChatRequest)),
        ("GET", "/v1/models", models),
        ("GET", "/v1/models/{name:path}", model),
        ("POST", "/tokenize", tokenize),
        ("POST", "/detokenize", detokenize),
        ("GET", "/tokenizer_info", tokenizer_info),
        ("GET", "/health", health),
        ("GET", "/metrics", metrics),
        ("GET", "/openapi.json", openapi),
        ("GET", "/", page),
    ]
    return Starlette(
        routes=[Route(path, guarded(service, handler), methods=[method]) for method, path, handler in routes],
        exception_handlers={HTTPException: _unrouted},
    )


def guarded(service: Service, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    """Check the key, and turn errors into answers."""
    key = service.options.api_key.encode()

    async def endpoint(request: Request) -> Response:
        try:
            if key and request.url.path not in ("/", "/health") and not _knows(key, request):
                raise ApiError(401, "the API key is missing or wrong: send `Authorization: Bearer KEY`", None,
                               "invalid_api_key")  # fmt: skip
            return await handler(service, request)
        except ApiError as error:
            return failed(error)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            return failed(unexpected(error))

    return endpoint


def _knows(key: bytes, request: Request) -> bool:
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), key)


def failed(error: ApiError) -> Response:
    headers = {} if error.retry_s is None else {"retry-after": str(error.retry_s)}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error.body, error.status, headers)


def unexpected(error: Exception) -> ApiError:
    """A fault of the server: the reason goes to its log, not to the client."""
    traceback.print_exception(error, file=sys.stderr)
    return ApiError(500, f"the server failed ({type(error).__name__}); its log says why")


async def _unrouted(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = "there is no such path" if error.status_code == 404 else f"{request.method} is not served there"
    response = failed(ApiError(error.status_code, f"{request.url.path}: {what}"))
    response.headers.update(error.headers or {})
    return response


async def read(request: Request, kind: type[Model], limit: int) -> Any:
    """Return the request in the body. ApiError if it is too large, too slow, or wrong."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON: send `Content-Type: application/json`")
    body, told = bytearray(), request.headers.get("content-length", "0")
    if told.isdecimal() and int(told) > limit:
        raise ApiError(413, f"the body has {told} bytes, and at most {limit} are taken")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise ApiError(413, f"the body has more than {limit} bytes")
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s") from None
    return parse(kind, bytes(body))


async def generate(kind: type[Model], service: Service, request: Request) -> Response:
    return Answer(service, await service.job(await read(request, kind, service.options.max_body)))


class Answer(Response):
    """Runs a job while its client is there, and sends the answer, whole or as a stream."""

    def __init__(self, service: Service, job: Job) -> None:
        self.service, self.job, self.background = service, job, None
        self.started = False  # the status has been sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work, left = asyncio.create_task(self._answer(scope, receive, send)), asyncio.create_task(_left(receive))
        try:
            # Longer than the limit only if the client does not read.
            await asyncio.wait((work, left), timeout=2 * self.service.options.timeout,
                               return_when=asyncio.FIRST_COMPLETED)  # fmt: skip
        finally:
            work.cancel()
            left.cancel()
            await asyncio.gather(work, left, return_exceptions=True)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        job, choices = self.job, self.job.choices
        try:
            if job.form.request.stream:
                await self._stream(send)
            else:
                async with aclosing(self.service.outputs(job)) as outputs:
                    async for _ in outputs:
                        pass
                await JSONResponse(job.form.answer(choices, job.drafts))(scope, receive, send)
        except Exception as error:
            known = error if isinstance(error, ApiError) else unexpected(error)
            if not self.started:
                await failed(known)(scope, receive, send)
            else:
                await self._send(send, event(known.body), end=True)

    async def _stream(self, send: Send) -> None:
        """Send an event for every output. The status waits for the first one: the engine may refuse."""
        job, choices, data = self.job, self.job.choices, b""
        async with aclosing(self.service.outputs(job)) as outputs:
            async for choice, output in outputs:
                if (chunk := job.form.chunk(choice, output, choices)) is not None:
                    data += event(chunk)
                    if any(each.finish_reason is None for each in choices):  # the last event goes with the end
                        await self._send(send, data)
                        data = b""
        options = job.form.request.stream_options
        if options is not None and options.include_usage:
            data += event(job.form.last(choices, job.drafts))
        await self._send(send, data, end=True)

    async def _send(self, send: Send, data: bytes, end: bool = False) -> None:
        """Send events at once: a call of the system for each would take longer than to make them."""
        if not self.started:
            self.started = True
            await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        await send({"type": "http.response.body", "body": data + DONE if end else data, "more_body": not end})


def event(body: dict[str, Any]) -> bytes:
    return b"data: " + ENCODE(body).encode() + b"\n\n"


async def _left(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def models(service: Service, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [card(service)]})


async def model(service: Service, request: Request) -> Response:
    service.check_model(request.path_params["name"])
    return JSONResponse(card(service))


def card(service: Service) -> dict[str, Any]:
    made = {"id": service.model, "object": "model", "created": service.began, "owned_by": "llm-inference-lab"}
    return {**made, "max_model_len": service.context, "drafters": service.drafters}


async def tokenize(service: Service, request: Request) -> Response:
    asked: TokenizeRequest = await read(request, TokenizeRequest, service.options.max_body)
    service.check_model(asked.model)
    tokens = await service.tokens(asked.prompt, special=asked.add_special_tokens is not False)
    texts = [service.tokenizer.piece(token) for token in tokens] if asked.return_token_strs else None
    return JSONResponse({"count": len(tokens), "max_model_len": service.context, "tokens": tokens, "token_strs": texts})


async def detokenize(service: Service, request: Request) -> Response:
    asked: DetokenizeRequest = await read(request, DetokenizeRequest, service.options.max_body)
    service.check_model(asked.model)
    service.check_tokens(asked.tokens, "tokens")
    return JSONResponse({"prompt": service.tokenizer.decode(asked.tokens)})


async def tokenizer_info(service: Service, request: Request) -> Response:
    config = tokenizer_config(service.llm.loaded.checkpoint.folder)
    info = {"tokenizer_class": "PreTrainedTokenizerFast", **config, **special_tokens(config)}
    return JSONResponse({**info, "chat_template": service.template.source if service.template else None})


async def health(service: Service, request: Request) -> Response:
    if service.closing:
        raise ApiError(503, "the server is shutting down")
    return Response(status_code=200)


async def metrics(service: Service, request: Request) -> Response:
    return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def openapi(service: Service, request: Request) -> Response:
    return JSONResponse(document())


async def page(service: Service, request: Request) -> Response:
    return HTMLResponse(PAGE.read_text(encoding="utf-8"))
