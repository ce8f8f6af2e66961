"""What a load is sent to: the engine in this process, or a server that speaks OpenAI's protocol.

Both yield the tokens of a request as they come. A request that fails raises `Failed` with the reason.
"""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import httpx

import engine
from common.errors import UserError


class Failed(Exception):
    """A request had no proper answer."""


@dataclass(frozen=True)
class Chunk:
    """Tokens that came at once; the last one of a request may have none, and may say how many there were in all."""

    tokens: int
    text: str = ""
    total: int | None = None  # output tokens of the whole request, as the server counts them
    prompt: int | None = None


@dataclass(frozen=True)
class Ask:
    """One request."""

    prompt: str
    max_tokens: int
    temperature: float
    seed: int
    ignore_eos: bool = False


class Target(Protocol):
    name: str  # of the model
    where: str

    def stream(self, ask: Ask) -> AsyncIterator[Chunk]: ...

    async def close(self) -> None: ...


class LocalTarget:
    """The engine of this phase, in a thread of its own."""

    def __init__(self, options: engine.Options) -> None:
        self.llm = engine.LLM(options)
        self.name, self.where = self.llm.loaded.checkpoint.name, "local engine"
        self.engine = engine.AsyncLLMEngine(engine.LLMEngine(self.llm))

    async def stream(self, ask: Ask) -> AsyncIterator[Chunk]:
        params = engine.SamplingParams(
            max_new_tokens=ask.max_tokens, temperature=ask.temperature, seed=ask.seed, ignore_eos=ask.ignore_eos
        )
        stats = None
        try:
            async for output in self.engine.generate(ask.prompt, params):
                stats = output.stats or stats
                yield Chunk(len(output.tokens), output.text)
        except UserError as error:
            raise Failed(str(error)) from None
        if stats is not None:
            yield Chunk(0, "", stats.new_tokens, stats.prompt_tokens)

    async def close(self) -> None:
        self.engine.close()


class UrlTarget:
    """A server with OpenAI's completions at `url`/v1/completions, such as this phase's, vLLM's or llama.cpp's."""

    def __init__(self, url: str, model: str | None, timeout: float) -> None:
        self.where, self.timeout = url.rstrip("/").removesuffix("/v1"), timeout
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)  # an open loop has no limit
        self.client = httpx.AsyncClient(timeout=httpx.Timeout(timeout, connect=10), limits=limits)
        self.name, self.warned = model or "", False

    async def __aenter__(self) -> Self:
        """Ask for the list of models. UserError for a server that is down, or is none of this kind."""
        try:
            answer = await self.client.get(f"{self.where}/v1/models")
            answer.raise_for_status()
            self.name = self.name or str(answer.json()["data"][0]["id"])
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError, TypeError) as error:
            await self.close()
            what = str(error) or type(error).__name__
            raise UserError(
                f"--target {self.where}: no OpenAI-compatible server answers /v1/models there ({what}); start one, or "
                "give its address, such as http://127.0.0.1:8000"
            ) from None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def stream(self, ask: Ask) -> AsyncIterator[Chunk]:
        body: dict[str, Any] = {
            "model": self.name,
            "prompt": ask.prompt,
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "seed": ask.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if ask.ignore_eos:
            body["ignore_eos"] = True
        done, told = False, False
        try:
            async with self.client.stream("POST", f"{self.where}/v1/completions", json=body) as answer:
                if answer.status_code != 200:
                    text = (await answer.aread()).decode(errors="replace")
                    raise Failed(f"status {answer.status_code}: {' '.join(text.split())[:200]}")
                async for line in answer.aiter_lines():
                    if not line.startswith("data:"):
                        continue  # a comment, an empty line, or another field of the event
                    data = line.removeprefix("data:").strip()
                    if data == "[DONE]":
                        done = True
                        break
                    chunk = chunk_of(data)
                    told |= chunk.total is not None
                    yield chunk
        except httpx.TimeoutException:
            raise Failed(f"nothing came for {self.timeout:g} s") from None
        except httpx.HTTPError as error:
            raise Failed(f"the connection broke: {str(error) or type(error).__name__}") from None
        if not done:
            raise Failed("the stream ended without [DONE]")
        if not told and not self.warned:
            self.warned = True
            print(f"note: {self.where} reports no usage: each chunk counts as one token", file=sys.stderr)

    async def close(self) -> None:
        await self.client.aclose()


def chunk_of(data: str) -> Chunk:
    """Read one event. Raises Failed for one that is no completion."""
    try:
        event = json.loads(data)
        if "error" in event:
            raise Failed(f"the server reports: {str(event['error'])[:200]}")
        usage, choices = event.get("usage") or {}, event["choices"]
        text = "".join(choice["text"] for choice in choices)
        return Chunk(1 if text else 0, text, usage.get("completion_tokens"), usage.get("prompt_tokens"))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Failed(f"a broken event: {data[:80]!r}") from None
