"""`lab complete` and `lab chat`: ask any OpenAI-compatible server from a terminal.

lab complete --prompt "class Stack:" --max-tokens 64
lab chat --url http://127.0.0.1:8000
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from common.errors import UserError
from common.options import parse_options

from .client import Client, Prompt


class TalkOptions(BaseSettings):
    """Continue a text, or chat, with a model behind an OpenAI-compatible server."""

    model_config = SettingsConfigDict(env_prefix="SPECDEC_TALK_", extra="forbid", protected_namespaces=())

    prompt: list[str] = Field(default=[], description="text to continue; repeatable; read from stdin if absent")
    chat: bool = Field(default=False, description="a conversation: one line of stdin is one message")
    system: str = Field(default="", description="of a chat: the system message")
    url: str = Field(default="http://127.0.0.1:8000", description="of the server")
    model: str = Field(default="", description="its name there; empty: the first that the server lists")
    key: str = Field(default="", description="API key")
    max_tokens: int = Field(default=128, ge=1, description="new tokens at most")
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="0 is greedy")
    seed: int | None = Field(default=None, description="the same seed gives the same text, where the server can")
    stop: list[str] = Field(default=[], description="end before this text; repeatable")
    timeout: float = Field(default=120, gt=0, description="seconds to wait for the next part")
    config: Path | None = Field(default=None, description="YAML file with these options")

    def params(self) -> dict[str, Any]:
        found: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        found |= {"stop": self.stop} if self.stop else {}
        return found | ({} if self.seed is None else {"seed": self.seed})


def run(arguments: list[str]) -> int:
    options = parse_options(TalkOptions, arguments, program="lab complete")
    with Client(options.url, options.model or None, options.key or None, options.timeout) as client:
        if options.chat:
            return chat(client, options)
        prompts = options.prompt or [sys.stdin.read()]
        if not all(prompts):
            raise UserError("the prompt is empty: give --prompt TEXT, or text on stdin")
        for prompt in prompts:
            answer(client, prompt, options)
    return 0


def chat(client: Client, options: TalkOptions) -> int:
    """Answer line by line, until the input ends; the conversation so far goes along."""
    messages = [{"role": "system", "content": options.system}] if options.system else []
    for line in said(options):
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": answer(client, messages, options)})
    return 0


def said(options: TalkOptions) -> Iterator[str]:
    yield from options.prompt
    if options.prompt:
        return
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def answer(client: Client, prompt: Prompt, options: TalkOptions) -> str:
    """Print an answer while it comes, and one line about it on stderr; return its text."""
    began, text, body = time.perf_counter(), "", dict[str, Any]()
    for chunk in client.stream(prompt, **options.params()):
        print(chunk.text, end="", flush=True)
        text, body = text + chunk.text, chunk.body
    print()
    seconds, tokens = time.perf_counter() - began, (body.get("usage") or {}).get("completion_tokens")
    rate = f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s" if tokens else f"{seconds:.2f} s"
    found = (body.get("metrics") or {}).get("speculative_decoding")
    accepted = f", {found['draft_acceptance_rate']:.0%} of the draft tokens accepted" if found else ""
    print(rate + accepted, file=sys.stderr)
    return text
