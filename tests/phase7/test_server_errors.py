"""Bad input, limits and faults: OpenAI's error object with the right status, and the next request is served."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.support.serving import Served, events_of, eventually, in_thread

BAD: dict[str, tuple[dict[str, Any], int, str | None]] = {
    "no prompt": ({}, 400, "prompt"),
    "empty text": ({"prompt": ""}, 400, "prompt"),
    "empty list": ({"prompt": []}, 400, "prompt"),
    "empty ids": ({"prompt": [[1], []]}, 400, "prompt"),
    "mixed prompts": ({"prompt": ["a", [1]]}, 400, "prompt"),
    "unknown token": ({"prompt": [4096]}, 400, "prompt"),
    "negative token": ({"prompt": [-1]}, 400, "prompt"),
    "text as a number": ({"prompt": "a", "temperature": "hot"}, 400, "temperature"),
    "a number in quotes": ({"prompt": "a", "max_tokens": "5"}, 400, "max_tokens"),
    "negative temperature": ({"prompt": "a", "temperature": -1}, 400, "temperature"),
    "n = 0": ({"prompt": "a", "n": 0}, 400, "n"),
    "n of a million": ({"prompt": "a", "n": 10**6}, 400, "n"),
    "more samples than are served": ({"prompt": ["a"] * 65}, 400, None),
    "no tokens": ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    "max_tokens past the context": ({"prompt": "a", "max_tokens": 1024}, 400, "max_tokens"),
    "a prompt past the context": ({"prompt": [1] * 1024}, 400, "prompt"),
    "a long text": ({"prompt": "import os\n" * 50_000}, 400, "prompt"),
    "1,000 stop strings": ({"prompt": "a", "stop": ["x"] * 1000}, 400, "stop"),
    "an empty stop string": ({"prompt": "a", "stop": [""]}, 400, "stop"),
    "a seed of 80 bits": ({"prompt": "a", "seed": 2**80}, 400, "seed"),
    "logit_bias": ({"prompt": "a", "logit_bias": {"99999": 1}}, 400, "logit_bias"),
    "top_logprobs without logprobs": ({"prompt": "a", "logprobs": -1}, 400, "logprobs"),
    "best_of": ({"prompt": "a", "best_of": 3}, 400, "best_of"),
    "suffix": ({"prompt": "a", "suffix": "b"}, 400, "suffix"),
    "stream_options without a stream": ({"prompt": "a", "stream": False, "stream_options": {}}, 400, "stream_options"),
    "another model": ({"prompt": "a", "model": "gpt-5"}, 404, "model"),
    "a drafter that is not there": ({"prompt": "a", "drafter": "eagle"}, 400, "drafter"),
    "drafts where nothing drafts": ({"prompt": "a", "k": 3}, 400, "k"),
    "an unknown policy": ({"prompt": "a", "policy": "hope"}, 400, "policy"),
    "a lossy policy": ({"prompt": "a", "policy": "typical", "lossless": True}, 400, "lossless"),
}


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    found: dict[str, Any] = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_refused(server: Served, name: str) -> None:
    body, status, param = BAD[name]
    with server.client() as client:
        for stream in (False, True):
            found = error(client.post("/v1/completions", json=({"stream": True} if stream else {}) | body), status)
            assert found["param"] == param
            assert found["type"] == "invalid_request_error"
            assert "\n" not in found["message"]
    assert server.rests()


def test_bad_chats_are_refused(server: Served) -> None:
    path, good = "/v1/chat/completions", [{"role": "user", "content": "a"}]
    with server.client() as client:
        for body, param in (
            ({"messages": []}, "messages"),
            ({"messages": [{"content": "a"}]}, "messages"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
            ({"messages": good, "tools": [{"type": "function"}]}, "tools"),
            ({"messages": good, "response_format": {"type": "json_object"}}, "response_format"),
            ({"messages": good, "top_logprobs": 2}, "top_logprobs"),
            ({"messages": [{"role": "user", "content": "word " * 2000}]}, "messages"),
        ):
            assert error(client.post(path, json=body), 400)["param"] == param


def test_what_is_no_request(server: Served) -> None:
    kind = {"content-type": "application/json"}
    with server.client() as client:
        for content in (b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt": "\xed\xa0\x80"}', b"[" * 10_000):
            error(client.post("/v1/completions", content=content, headers=kind), 400)
        error(client.post("/v1/completions", content=b'{"prompt": "a"}'), 415)
        error(client.post("/v1/completions", data={"prompt": "a"}), 415)
        error(client.get("/v1/completions"), 405)
        error(client.post("/v1/models"), 405)
        error(client.get("/v1/nothing"), 404)
        assert error(client.get("/v1/models/gpt-5"), 404)["code"] == "model_not_found"
        error(client.post("/detokenize", json={"tokens": [4096]}), 400)
        error(client.post("/tokenize", json={"prompt": 5}), 400)


def test_a_body_that_is_too_large(server: Served) -> None:
    with server.client() as client:
        found = error(client.post("/v1/completions", json={"prompt": "x" * 10 * 2**20}), 413)
        assert "bytes" in found["message"]
    assert server.post(prompt="a", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_unknown_fields_and_nulls_are_ignored(server: Served) -> None:
    body = {"prompt": "import os", "max_tokens": 4, "temperature": 0}
    wanted = server.post(**body)["choices"]
    nothing = {"stop": None, "n": None, "seed": None, "top_p": None, "stream": None, "logit_bias": None, "k": None}
    assert server.post(**body, user="me", foo={"bar": 1}, **nothing)["choices"] == wanted


def test_a_fault_of_the_server_leaves_the_connection_usable(
    server: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An uncaught error would make uvicorn close the connection on which the next request may be under way."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret detail")

    with server.client() as client:
        with monkeypatch.context() as patch:
            patch.setattr(server.service, "job", fail)
            found = error(client.post("/v1/completions", json={"prompt": "a"}), 500)
            patch.setattr(server.service.metrics, "text", fail)
            error(client.get("/metrics"), 500)
        assert found["type"] == "server_error"
        assert "secret" not in found["message"]
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
    assert "secret detail" in capsys.readouterr().err


def test_an_error_within_a_stream_is_an_event(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine fails after some tokens: the client has the tokens, the reason, and the end."""
    engine, steps = server.engine, [0]
    step = engine.step

    def fail_later() -> Any:
        steps[0] += 1
        if steps[0] == 3:
            monkeypatch.setattr(engine, "step", step)
            raise RuntimeError("the card is on fire")
        return step()

    monkeypatch.setattr(engine, "step", fail_later)
    with server.client() as client:
        response = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 800, "stream": True})
        assert response.status_code == 200
        *before, last = events_of(response.text)
        assert before
        assert all("choices" in event for event in before)
        assert last["error"]["type"] == "server_error"
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
    eventually(server.rests)


@pytest.fixture(scope="module")
def strict() -> Iterator[Served]:
    """One row, one place in the queue, and a key."""
    how = {"batch_size": 1, "max_queue": 1, "api_key": "sesame", "max_new_tokens": 900}
    with in_thread(model="stdlib-1m", served_name="mine", **how) as served:
        yield served


KEY = {"authorization": "Bearer sesame"}


def test_a_key_is_needed(strict: Served) -> None:
    with strict.client() as client:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "sesame"},
            {"authorization": "Basic x"},
        ):
            for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/metrics")):
                response = client.request(method, path, headers=headers)
                assert error(response, 401)["code"] == "invalid_api_key"
        assert client.get("/health").status_code == client.get("/").status_code == 200
        assert client.get("/v1/models", headers=KEY).json()["data"][0]["id"] == "mine"


def test_limits_of_tokens_and_time(strict: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with strict.client(headers=KEY) as client:
        assert (
            error(client.post("/v1/completions", json={"prompt": "a", "max_tokens": 901}), 400)["param"] == "max_tokens"
        )
        strict.slow(monkeypatch)
        little = strict.service.options.model_copy(update={"timeout": 0.5})
        monkeypatch.setattr(strict.service, "options", little)
        asked = {"prompt": "a", "max_tokens": 900, "ignore_eos": True}
        assert "0.5 s" in error(client.post("/v1/completions", json=asked), 504)["message"]
        response = client.post("/v1/completions", json={**asked, "stream": True})
        assert events_of(response.text)[-1]["error"]["type"] == "server_error"
    eventually(strict.rests)


def test_a_full_queue_says_when_to_come_again(strict: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    step, refused = strict.engine.step, threading.Event()
    monkeypatch.setattr(strict.engine, "step", lambda: refused.wait(60) and step())  # nothing ends before
    asked = {"prompt": "a", "max_tokens": 8, "ignore_eos": True, "stream": True}
    with strict.client(headers=KEY) as client, ThreadPoolExecutor(2) as pool:
        running = [pool.submit(strict.client(headers=KEY).post, "/v1/completions", json=asked) for _ in range(2)]
        eventually(lambda: strict.service.samples == 2)
        response = client.post("/v1/completions", json=asked)
        refused.set()
        assert error(response, 429)["type"] == "rate_limit_error"
        assert int(response.headers["retry-after"]) >= 1
        assert [each.result().status_code for each in running] == [200, 200]
        eventually(strict.rests)
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200


def test_garbage_on_the_wire(server: Served) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for sent in (b"\x00\xff" * 100, b"GET\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=60) as raw:
            raw.sendall(sent)
            assert raw.recv(100).startswith(b"HTTP/1.1 400")
    assert json.loads(json.dumps(server.post(prompt="a", max_tokens=1)["usage"]))["completion_tokens"] == 1
