"""The client: against our server, and against servers that answer badly or not at all."""

from __future__ import annotations

import json
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from common.errors import UserError
from tests.support.beside import beside
from tests.support.serving import Served, eventually

clients: Any = beside(7, "serving.client")
talk: Any = beside(7, "serving.talk")
PROMPT = "from pathlib import"


def test_answers_and_streams(server: Served) -> None:
    with clients.Client(server.url + "/v1") as client:
        client.wait(5)
        assert client.models() == [client.model] == ["stdlib-1m"]
        whole = client.complete(PROMPT, max_tokens=12, temperature=0)
        parts = client.streamed(PROMPT, max_tokens=12, temperature=0)
        assert whole.text == parts.text
        assert whole.completion_tokens == parts.completion_tokens == sum(chunk.tokens for chunk in parts.chunks) == 12
        assert whole.finish_reason == parts.finish_reason == "length"
        assert whole.prompt_tokens == parts.prompt_tokens
        assert 0 < parts.first_s <= parts.total_s
        assert whole.first_s is None
        assert client.complete(server.service.tokenizer.encode(PROMPT), max_tokens=12, temperature=0).text == whole.text
        chat = client.streamed([{"role": "user", "content": "os"}], max_tokens=4, temperature=0)
        assert chat.text == client.complete([{"role": "user", "content": "os"}], max_tokens=4, temperature=0).text
        with pytest.raises(clients.ServerError, match=r"\(400\): n: ") as caught:
            client.complete(PROMPT, n=0)
        assert caught.value.status == 400
        with pytest.raises(clients.ServerError, match="max_tokens") as caught:
            client.streamed(PROMPT, max_tokens=5000)
        assert caught.value.code == "context_length_exceeded"


def test_speculation_is_read(drafting: Served) -> None:
    with clients.Client(drafting.url) as client:
        for reply in (client.complete(PROMPT, max_tokens=20), client.streamed(PROMPT, max_tokens=20)):
            assert reply.speculation["num_spec_steps"] > 0
        assert client.complete(PROMPT, max_tokens=4, k=0).speculation is None


def test_a_stream_that_is_left_is_aborted(server: Served) -> None:
    with clients.Client(server.url) as client:
        stream = client.stream(PROMPT, max_tokens=1000, ignore_eos=True)
        next(stream)
        stream.close()
        eventually(server.rests)


Script = Callable[[BaseHTTPRequestHandler, int], None]


@contextmanager
def scripted(script: Script) -> Iterator[tuple[str, list[str]]]:
    """A server that answers request number i by script(handler, i); yields its address, and the paths asked for."""
    asked = list[str]()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.body = self.rfile.read(int(self.headers.get("content-length", 0)))
            asked.append(self.path)
            script(self, len(asked) - 1)

        do_GET = do_POST = answer

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_address[1]}", asked
        listening.shutdown()


def say(handler: BaseHTTPRequestHandler, status: int, body: object, **headers: str) -> None:
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in {"content-length": str(len(data)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


GOOD = {"choices": [{"text": "yes", "finish_reason": "length"}]}


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Do not wait between attempts; return how long it would have been."""
    found = list[float]()
    monkeypatch.setattr(clients.time, "sleep", found.append)
    return found


def test_a_busy_server_is_asked_again(naps: list[float]) -> None:
    """After the time that it names, and a growing one with jitter."""

    def script(handler: BaseHTTPRequestHandler, at: int) -> None:
        say(handler, *((429, {}) if at == 0 else (503, "later") if at == 1 else (200, GOOD)), retry_after="7")

    with scripted(script) as (url, asked), clients.Client(url, "m") as client:
        reply = client.complete("a")
        assert reply.text == "yes"
        assert reply.completion_tokens is None
        assert len(asked) == 3
    assert naps[::2] == [7.0, 7.0]
    assert 0.05 <= naps[1] <= 0.15
    assert 0.1 <= naps[3] <= 0.3


def test_what_the_server_may_have_begun_is_not_repeated(naps: list[float]) -> None:
    """A POST whose connection breaks, or that failed with 500; a GET is asked again."""

    def cut(handler: BaseHTTPRequestHandler, at: int) -> None:
        if handler.command == "GET" and at:
            say(handler, 200, {"data": [{"id": "m"}]})
        else:
            handler.close_connection = True

    with scripted(cut) as (url, asked), clients.Client(url, "m") as client:
        assert client.models() == ["m"]
        assert len(asked) == 2
        with pytest.raises(clients.ServerError, match="the connection failed"):
            client.complete("a")
        assert len(asked) == 3
    with scripted(lambda handler, at: say(handler, 500, {"error": {"message": "oh"}})) as (url, asked):
        with clients.Client(url, "m") as client, pytest.raises(clients.ServerError, match=r"\(500\): oh"):
            client.complete("a")
        assert len(asked) == 1


def test_nobody_listens(naps: list[float]) -> None:
    with scripted(lambda handler, at: None) as (url, _):
        pass
    with clients.Client(url, "m", retries=2) as client:
        assert not client.healthy()
        with pytest.raises(clients.ServerError, match="cannot be reached"):
            client.complete("a")
        assert len(naps) == 2
        with pytest.raises(clients.ServerError, match="did not become healthy within 0 s"):
            client.wait(0)


def events(*bodies: object, end: str = "data: [DONE]\n\n") -> str:
    return "".join(f"data: {body if isinstance(body, str) else json.dumps(body)}\n\n" for body in bodies) + end


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        ("<html>proxy</html>", "not JSON"),
        ([1], "no JSON object"),
        ({"choices": []}, "without a choice"),
        ({"detail": "no"}, "without a choice"),
    ],
)
def test_what_is_no_answer(answer: object, match: str) -> None:
    with (
        scripted(lambda handler, at: say(handler, 200, answer)) as (url, _),
        clients.Client(url, "m") as client,
        pytest.raises(clients.ServerError, match=match),
    ):
        client.complete("a")


def test_streams_of_other_servers() -> None:
    """Without usage, with comments and a role alone, with null content; an error, or a break, in the middle."""
    part = {"choices": [{"delta": {"content": "ye"}, "index": 0}]}
    sent = [
        ": ping\n\n" + events({"choices": [{"delta": {"role": "assistant", "content": None}}]}, part,
                              {"choices": [{"delta": {"content": "s"}, "finish_reason": "stop"}], "usage": None}),
        events(part, {"error": {"message": "too hot"}}),
        events(part, "{broken"),
    ]  # fmt: skip

    def script(handler: BaseHTTPRequestHandler, at: int) -> None:
        say(handler, 200, sent[at])

    with scripted(script) as (url, _), clients.Client(url, "m") as client:
        reply = client.streamed([{"role": "user", "content": "a"}])
        assert (reply.text, reply.finish_reason, reply.completion_tokens) == ("yes", "stop", None)
        assert all(chunk.tokens is None for chunk in reply.chunks)
        with pytest.raises(clients.ServerError, match="too hot"):
            client.streamed("a")
        with pytest.raises(clients.ServerError, match="not JSON"):
            client.streamed("a")


def test_a_stream_that_ends_too_soon() -> None:
    """A finish reason is as good as [DONE]; without both, the text may be a part."""
    part, last = {"choices": [{"text": "a"}]}, {"choices": [{"text": "b", "finish_reason": "stop"}]}
    sent = [events(part, last, end=""), events(part, end=""), events({"choices": 5})]
    with (
        scripted(lambda handler, at: say(handler, 200, sent[at])) as (url, _),
        clients.Client(url, "m") as client,
    ):
        assert client.streamed("a").text == "ab"
        with pytest.raises(clients.ServerError, match="ended without"):
            client.streamed("a")
        with pytest.raises(clients.ServerError, match="broken event"):
            client.streamed("a")


def test_a_connection_serves_several_requests_until_the_server_closes_it() -> None:
    addresses = list[Any]()

    def script(handler: BaseHTTPRequestHandler, at: int) -> None:
        addresses.append(handler.client_address)
        say(handler, 200, events({"choices": [{"text": "a"}]}) if at < 2 else GOOD)
        handler.close_connection = at == 2  # without saying so

    with scripted(script) as (url, _), clients.Client(url, "m") as client:
        assert client.streamed("a").text == client.streamed("a").text == "a"
        assert client.complete("a").text == "yes"
        assert len(set(addresses)) == 1
        eventually(lambda: bool(select.select([client._http.sock], [], [], 0)[0]))
        assert client.complete("a").text == "yes"
    assert len(set(addresses)) == 2


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "localhost", "ftp://a", "http://"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UserError, match="no address of a server"):
        clients.Client(url)


def test_a_server_that_does_not_know_stream_options() -> None:
    seen = list[dict[str, Any]]()

    def script(handler: Any, at: int) -> None:
        seen.append(json.loads(handler.body))
        known = "stream_options" in seen[-1]
        say(
            handler,
            *(
                (422, {"detail": "unexpected field stream_options"})
                if known
                else (200, events({"choices": [{"text": "b"}]}))
            ),
        )

    with scripted(script) as (url, _), clients.Client(url, "m") as client:
        assert client.streamed("a").text == client.streamed("a").text == "b"
    assert ["stream_options" in each for each in seen] == [True, False, False]


def test_an_empty_list_of_models() -> None:
    def script(handler: Any, at: int) -> None:
        if handler.command == "POST":
            assert "model" not in json.loads(handler.body)
        say(handler, 200, GOOD if handler.command == "POST" else {"data": []})

    with scripted(script) as (url, _), clients.Client(url) as client:
        assert client.complete("a").text == "yes"


def test_completions_and_chats_in_a_terminal(
    server: Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = server.post(prompt=PROMPT, max_tokens=8, temperature=0)["choices"][0]["text"]
    assert talk.run(["--url", server.url, "--prompt", PROMPT, "--max-tokens", "8", "--temperature", "0"]) == 0
    said = capsys.readouterr()
    assert said.out == wanted + "\n"
    assert said.err.startswith("8 tokens in ")
    lines = iter(["os\n", "\n", "re\n", ""])
    monkeypatch.setattr("sys.stdin.readline", lambda: next(lines), raising=False)
    assert talk.run(["--url", server.url, "--chat", "--system", "code", "--max-tokens", "4", "--temperature", "0"]) == 0
    answers = capsys.readouterr().out
    first = server.post(
        "/v1/chat/completions", max_tokens=4, temperature=0,
        messages=[{"role": "system", "content": "code"}, {"role": "user", "content": "os"}],
    )["choices"][0]["message"]["content"]  # fmt: skip
    assert answers.startswith(first + "\n")
    assert len(answers) > len(first) + 2
