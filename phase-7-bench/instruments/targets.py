"""What a load is sent to: the engine in this process, or a server that speaks OpenAI's protocol.

Both yield the tokens of a request as they come, to any number of threads. A request that fails raises UserError.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from serving.client import Client
from serving.received import ServerError

import engine
from common.errors import UserError


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

    def stream(self, ask: Ask) -> Iterator[Chunk]: ...

    def close(self) -> None: ...


class LocalTarget:
    """The engine of this phase, in a thread of its own."""

    def __init__(self, options: engine.Options) -> None:
        self.llm = engine.LLM(options)
        self.name, self.where = self.llm.loaded.checkpoint.name, "local engine"
        self.engine = engine.AsyncLLMEngine(engine.LLMEngine(self.llm))

    def stream(self, ask: Ask) -> Iterator[Chunk]:
        params = engine.SamplingParams(
            max_new_tokens=ask.max_tokens, temperature=ask.temperature, seed=ask.seed, ignore_eos=ask.ignore_eos
        )
        stats = None
        for output in self.engine.stream(ask.prompt, params):
            stats = output.stats or stats
            yield Chunk(len(output.tokens), output.text)
        if stats is not None:
            yield Chunk(0, "", stats.new_tokens, stats.prompt_tokens)

    def close(self) -> None:
        self.engine.close()


class UrlTarget:
    """A server with OpenAI's completions at `url`/v1/completions, such as this phase's, vLLM's or llama.cpp's."""

    def __init__(self, url: str, model: str | None, timeout: float) -> None:
        """Ask for the list of models. UserError for a server that is down, or is none of this kind."""
        self.timeout, self.warned = timeout, False
        client = Client(url, model, timeout=timeout, retries=0)  # a refusal is a result
        self.where = client.url
        try:
            names = client.models()
        except ServerError as error:
            raise UserError(
                f"--target {self.where}: no OpenAI-compatible server answers /v1/models there ({error}); start one, or "
                "give its address, such as http://127.0.0.1:8000"
            ) from None
        self.name = model or next(iter(names), "")
        self.idle = [client]  # connected, and without a request

    def stream(self, ask: Ask) -> Iterator[Chunk]:
        client = self.idle.pop() if self.idle else Client(self.where, self.name, timeout=self.timeout, retries=0)
        how: dict[str, Any] = {"ignore_eos": True} if ask.ignore_eos else {}
        told = False
        try:
            for chunk in client.stream(
                ask.prompt, max_tokens=ask.max_tokens, temperature=ask.temperature, seed=ask.seed, **how
            ):
                usage = chunk.body.get("usage") or {}
                told |= chunk.tokens is not None
                tokens = int(bool(chunk.text)) if chunk.tokens is None else chunk.tokens
                if not chunk.body.get("choices"):
                    tokens = 0  # the usage of all of them
                yield Chunk(tokens, chunk.text, usage.get("completion_tokens"), usage.get("prompt_tokens"))
        finally:
            self.idle.append(client)
        if not told and not self.warned:
            self.warned = True
            print(f"note: {self.where} reports no usage: each chunk counts as one token", file=sys.stderr)

    def close(self) -> None:
        for client in self.idle:
            client.close()
