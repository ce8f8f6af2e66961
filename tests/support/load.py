"""Clients that load a server: some ask and check every token, some leave, read slowly, or send what is no request."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
PROMPTS = [
    "from pathlib import",
    "class Stack:",
    "def read_config(path):",
    "import os",
    "for",
    "try:",
    "with open(",
    "if",
]


@dataclass
class Load:
    """What came of a load: by kind, how often; and every answer by what was asked."""

    url: str
    model: str
    seed: int = 0
    longest: int = 48
    counts: Counter[str] = field(default_factory=Counter)
    tokens: dict[tuple[int, int, int], list[int]] = field(default_factory=dict)  # prompt, seed, length -> token ids
    wrong: list[str] = field(default_factory=list)

    def run(self, clients: int, seconds: float) -> None:
        asyncio.run(self._run(clients, seconds))

    async def _run(self, clients: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        await asyncio.gather(*(self._client(number, end) for number in range(clients)))

    async def _client(self, number: int, end: float) -> None:
        chance = random.Random(self.seed * 1000 + number)
        while time.monotonic() < end:
            kind = chance.choices(
                ["whole", "stream", "leaves", "slow", "garbage", "oversized", "half open"], [3, 6, 2, 1, 1, 0.2, 0.5]
            )[0]
            try:
                await asyncio.wait_for(self._act(kind, chance), 300)
                self.counts[kind] += 1
            except Exception as error:
                self.wrong.append(f"{kind}: {error!r}")

    async def _act(self, kind: str, chance: random.Random) -> None:
        host, port = self.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=2**24)
        try:
            if kind == "garbage":
                writer.write(
                    chance.choice([b"\x00\x01\x02\r\n\r\n", b"GET / HTTP/9\r\n\r\n", post(b"{bad"), post(b'{"n": 0}')])
                )
                assert (await reader.read(9)).startswith(b"HTTP/1.1 ")
            elif kind == "oversized":
                writer.write(head(9 * 2**20) + b"x" * 2**20)
                await self._read(reader, 413)
            elif kind == "half open":
                writer.write(post(b"{}")[: chance.randrange(60)])
                await asyncio.sleep(chance.uniform(0, 0.5))
            else:
                await self._ask(kind, chance, reader, writer)
        except ConnectionError:
            if kind not in ("garbage", "oversized", "half open"):
                raise
        finally:
            writer.close()

    async def _ask(self, kind: str, chance: random.Random, reader: Any, writer: Any) -> None:
        at, seed, length = (
            chance.randrange(len(PROMPTS)),
            chance.randrange(6),
            chance.choice([1, self.longest // 2, self.longest]),
        )
        body: Json = {"prompt": PROMPTS[at], "seed": seed, "max_tokens": length, "temperature": 1.0, "ignore_eos": True}
        body |= {"return_token_ids": True, "stream": kind != "whole"} | ({"k": 0} if chance.random() < 0.3 else {})
        writer.write(post(json.dumps(body).encode()))
        if kind == "leaves":
            await reader.read(chance.choice([1, 300, 2000]))
            return
        if kind == "slow":
            await asyncio.sleep(chance.uniform(0, 1))
        text = await self._read(reader, 200)
        if text is None:
            self.counts["refused"] += 1
            return
        if kind == "whole":
            tokens = json.loads(text)["choices"][0]["token_ids"]
        else:
            lines = [line[6:] for line in text.split("\n\n") if line.startswith("data: ")]
            assert lines[-1] == "[DONE]", text[-200:]
            events = [json.loads(line) for line in lines[:-1]]
            assert not any("error" in event for event in events), events[-1]
            tokens = [token for event in events for token in event["choices"][0]["token_ids"]]
        assert len(tokens) == length, (len(tokens), length)
        known = self.tokens.setdefault((at, seed, length), tokens)
        assert known == tokens, "another answer to the same request"

    async def _read(self, reader: Any, wanted: int) -> str | None:
        """Read an answer; None if the server was busy, and said so."""
        line = (await reader.readline()).decode()
        status = int(line.split()[1])
        headers = dict[str, str]()
        while (line := (await reader.readline()).decode().strip()) != "":
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        if "content-length" in headers:
            text: str = (await reader.readexactly(int(headers["content-length"]))).decode()
        else:
            text = ""
            while (size := int((await reader.readline()).decode(), 16)) > 0:
                text += (await reader.readexactly(size)).decode()
                await reader.readline()
        if status in (429, 503):
            assert "error" in json.loads(text)
            return None
        assert status == wanted, (status, text[:200])
        return text


def head(length: int) -> bytes:
    return (
        "POST /v1/completions HTTP/1.1\r\nHost: here\r\nConnection: close\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


def post(body: bytes) -> bytes:
    return head(len(body)) + body
