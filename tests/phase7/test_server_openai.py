"""The official `openai` client: completions, chats, streams, errors by type, concurrency and cancellation."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from tests.support.serving import Served, eventually, in_thread

PROMPT = "from pathlib import"
LONG: dict[str, Any] = {
    "model": "stdlib-1m",
    "prompt": "import os",
    "max_tokens": 1000,
    "extra_body": {"ignore_eos": True},
}


def client(server: Served, **more: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", **{"api_key": "none", "max_retries": 0, **more})


def test_completions_and_chats(server: Served) -> None:
    with client(server) as asked:
        how: dict[str, Any] = {"model": "stdlib-1m", "prompt": PROMPT, "max_tokens": 10, "temperature": 0}
        whole = asked.completions.create(**how, logprobs=2)
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 10
        assert whole.choices[0].logprobs is not None
        assert "".join(whole.choices[0].logprobs.tokens or []) == whole.choices[0].text
        parts = list(asked.completions.create(**how, stream=True, stream_options={"include_usage": True}))
        assert "".join(part.choices[0].text for part in parts[:-1]) == whole.choices[0].text
        assert parts[-1].usage == whole.usage
        messages: list[Any] = [{"role": "user", "content": "os"}]
        chat: dict[str, Any] = {"model": "stdlib-1m", "messages": messages, "max_tokens": 6, "temperature": 0}
        said = asked.chat.completions.create(**chat, logprobs=True, top_logprobs=1)
        stream = asked.chat.completions.create(**chat, stream=True)
        assert "".join(part.choices[0].delta.content or "" for part in stream) == said.choices[0].message.content
        assert [model.id for model in asked.models.list()] == ["stdlib-1m"]
        assert asked.models.retrieve("stdlib-1m").id == "stdlib-1m"


def test_errors_have_their_types(server: Served) -> None:
    with client(server) as asked:
        for kind, body in (
            (openai.BadRequestError, {"model": "stdlib-1m", "prompt": "a", "n": 0}),
            (openai.BadRequestError, {"model": "stdlib-1m", "prompt": "a", "max_tokens": 10**6}),
            (openai.NotFoundError, {"model": "gpt-5", "prompt": "a"}),
        ):
            with pytest.raises(kind) as caught:
                asked.completions.create(**body)
            assert caught.value.body is not None
        with pytest.raises(openai.NotFoundError):
            asked.models.retrieve("gpt-5")


@pytest.mark.slow
def test_keys_and_full_queues() -> None:
    """A full queue is asked again by the client itself, after Retry-After."""
    with in_thread(model="stdlib-1m", batch_size=1, max_queue=0, api_key="sesame") as served:
        with client(served) as asked, pytest.raises(openai.AuthenticationError):
            asked.models.list()

        async def both() -> list[Any]:
            async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="sesame", max_retries=8) as asked:
                return await asyncio.gather(*(asked.completions.create(**LONG) for _ in range(3)))

        answers = asyncio.run(both())
        assert [answer.usage.completion_tokens for answer in answers] == [1000] * 3
        with client(served, api_key="sesame") as asked, asked.completions.create(**LONG, stream=True) as stream:
            next(stream)
            with client(served, api_key="sesame") as other, pytest.raises(openai.RateLimitError):
                other.completions.create(**LONG)


def test_many_at_once_and_cancelled(server: Served) -> None:
    """Sixteen tasks; every other one is cancelled after its first part, and nothing of it is left."""

    async def one(asked: openai.AsyncOpenAI, at: int) -> str:
        how: dict[str, Any] = {"model": "stdlib-1m", "prompt": PROMPT, "seed": at, "max_tokens": 24}
        if at % 2:
            stream = await asked.completions.create(**{**LONG, "seed": at}, stream=True)
            async for _ in stream:
                break
            await stream.close()
            return ""
        text: str = (await asked.completions.create(**how)).choices[0].text
        return text

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as asked:
            return await asyncio.gather(*(one(asked, at) for at in range(16)))

    texts = asyncio.run(all_of_them())
    eventually(server.rests)
    wanted = [server.post(prompt=PROMPT, seed=at, max_tokens=24)["choices"][0]["text"] for at in range(0, 16, 2)]
    assert texts[::2] == wanted
