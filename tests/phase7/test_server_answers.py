"""Answers and streams: the engine's tokens, told in OpenAI's words."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch

import phase7
from tests.support.beside import beside
from tests.support.serving import Json, Served

PROMPT = "from pathlib import"
PROMPTS = [PROMPT, "class Stack:", "def read_config(path):", "import os", "for", "    return", "try:", "with open("]


@cache
def local(model: str) -> Any:
    return phase7.LLM(phase7.Options(model=model, device="cpu", dtype="float32", threads=1, draft="none"))


def alone(model: str, text: str, n: int = 1, **params: Any) -> list[Any]:
    """Return what generate.py gives: the completions of a prompt without drafts."""
    llm = local(model)
    llm.options = llm.options.model_copy(update={"n": n})
    found: list[Any] = llm.generate([text], phase7.SamplingParams(**params))
    return found


def check(body: Json, kind: str) -> Json:
    """Compare with the model of the OpenAPI document."""
    getattr(beside(7, "serving.protocol"), kind).model_validate(body)
    return body


def test_a_greedy_completion(server: Served) -> None:
    (wanted,) = alone("stdlib-1m", PROMPT, max_new_tokens=12)
    body = check(server.post(prompt=PROMPT, max_tokens=12, temperature=0), "CompletionResponse")
    assert body["choices"] == [{"index": 0, "text": wanted.text, "finish_reason": "length", "logprobs": None}]
    prompt = len(server.service.tokenizer.encode(PROMPT))
    assert body["usage"] == {"prompt_tokens": prompt, "completion_tokens": 12, "total_tokens": prompt + 12}
    assert body["model"] == "stdlib-1m"
    assert body["metrics"] == {"speculative_decoding": None}


@pytest.mark.parametrize("clients", [1, 8])
def test_seeded_tokens_are_those_of_generate(drafting: Served, clients: int) -> None:
    """Plain and with drafts, one after the other and together: byte for byte."""

    def ask(at: int) -> tuple[str, list[int]]:
        how = {} if at % 2 else {"k": 0}
        body = drafting.post(prompt=PROMPTS[at], max_tokens=24, temperature=1.0, seed=at, return_token_ids=True, **how)
        assert (body["metrics"]["speculative_decoding"] is not None) == bool(at % 2)
        return body["choices"][0]["text"], body["choices"][0]["token_ids"]

    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(ask, range(8)))
    wanted = [
        alone("stdlib-10m", text, max_new_tokens=24, temperature=1.0, seed=at)[0] for at, text in enumerate(PROMPTS)
    ]
    assert found == [(each.text, each.tokens) for each in wanted]


def test_parameters_reach_the_engine(server: Served) -> None:
    given: Json = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "presence_penalty": 0.5}
    given |= {"frequency_penalty": 0.25, "repetition_penalty": 1.1, "seed": -7}
    (wanted,) = alone("stdlib-1m", PROMPT, max_new_tokens=16, stop=("\n",), **given)
    body = server.post(prompt=PROMPT, max_tokens=16, stop=["\n"], **given)
    assert body["choices"][0]["text"] == wanted.text
    assert body["choices"][0]["finish_reason"] == ("stop" if wanted.finish_reason == "stop" else "length")


def test_without_a_seed_every_answer_is_another(server: Served) -> None:
    texts = {server.post(prompt=PROMPT, max_tokens=24)["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 3


def test_a_stream_is_the_answer_in_parts(server: Served) -> None:
    wanted = server.post(prompt=PROMPT, max_tokens=20, seed=3)
    events = server.events(prompt=PROMPT, max_tokens=20, seed=3, stream_options={"include_usage": True})
    choices = [event["choices"][0] for event in events[:-1]]
    assert "".join(choice["text"] for choice in choices) == wanted["choices"][0]["text"]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == wanted["usage"]
    assert len({event["id"] for event in events}) == 1


def test_usage_grows_with_the_stream(server: Served) -> None:
    events = server.events(
        prompt=PROMPT, max_tokens=20, temperature=0,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )  # fmt: skip
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 20
    assert not any("usage" in event for event in server.events(prompt=PROMPT, max_tokens=4))


def test_several_prompts_and_samples(server: Served) -> None:
    texts = [PROMPT, "class Stack:"]
    body = check(server.post(prompt=texts, max_tokens=8, n=2, temperature=1.0, seed=5), "CompletionResponse")
    wanted = [each for text in texts for each in alone("stdlib-1m", text, 2, max_new_tokens=8, temperature=1.0, seed=5)]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in body["choices"]] == [each.text for each in wanted]
    lengths = [len(server.service.tokenizer.encode(text)) for text in texts]
    assert body["usage"] == {"prompt_tokens": sum(lengths), "completion_tokens": 32, "total_tokens": sum(lengths) + 32}
    events = server.events(prompt=texts, max_tokens=8, n=2, temperature=1.0, seed=5)
    for at in range(4):
        parts = [event["choices"][0]["text"] for event in events if event["choices"][0]["index"] == at]
        assert "".join(parts) == body["choices"][at]["text"]


def test_token_ids_as_prompts(server: Served) -> None:
    ids = server.service.tokenizer.encode(PROMPT)
    wanted = server.post(prompt=PROMPT, max_tokens=6, temperature=0)["choices"][0]["text"]
    assert server.post(prompt=ids, max_tokens=6, temperature=0)["choices"][0]["text"] == wanted
    both = server.post(prompt=[ids, ids[:1]], max_tokens=6, temperature=0, return_token_ids=True)["choices"]
    assert both[0]["text"] == wanted
    assert [choice["prompt_token_ids"] for choice in both] == [ids, ids[:1]]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_prompt_and_output(server: Served, stream: bool) -> None:
    """They are those of one forward over the whole text, and the offsets are those of its characters."""
    request = {
        "prompt": PROMPT,
        "max_tokens": 5,
        "temperature": 0,
        "echo": True,
        "logprobs": 2,
        "return_token_ids": True,
    }
    if stream:
        choices = [event["choices"][0] for event in server.events(**request)]
    else:
        choices = check(server.post(**request), "CompletionResponse")["choices"]
    text = "".join(choice["text"] for choice in choices)
    tokens = choices[0]["prompt_token_ids"] + [token for choice in choices for token in choice["token_ids"]]
    found = {key: [each for choice in choices for each in choice["logprobs"][key]] for key in choices[0]["logprobs"]}
    assert text.startswith(PROMPT)
    assert "".join(found["tokens"]) == text
    assert [
        text[at : at + len(token)] for at, token in zip(found["text_offset"], found["tokens"], strict=True)
    ] == found["tokens"]

    model = phase7.load("stdlib-1m", torch.float32, torch.device("cpu")).model
    logits = phase7.target_forward(model, [tokens[:1]], [phase7.Tree.chain(tokens[1:])]).logits[0]
    wanted = logits.log_softmax(-1)
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    mine = wanted[range(len(tokens) - 1), tokens[1:]].tolist()
    assert found["token_logprobs"][1:] == pytest.approx(mine, abs=1e-4)
    for at, top in enumerate(found["top_logprobs"][1:]):
        best = [server.service.tokenizer.token_text(token) for token in wanted[at].topk(2).indices.tolist()]
        assert set(top) == {*best, found["tokens"][at + 1]}


def test_echo_without_a_new_token(server: Served) -> None:
    for more in ({}, {"logprobs": 1}):
        body = check(server.post(prompt=PROMPT, max_tokens=0, echo=True, **more), "CompletionResponse")
        assert body["choices"][0]["text"] == PROMPT
        assert body["usage"]["completion_tokens"] == 0
    assert "".join(body["choices"][0]["logprobs"]["tokens"]) == PROMPT


def test_a_chat(server: Served) -> None:
    messages = [{"role": "system", "content": "code"}, {"role": "user", "content": [{"type": "text", "text": "os"}]}]
    prompt = "system: code\nuser: os\n# "
    (wanted,) = alone("stdlib-1m", prompt, max_new_tokens=10)
    path, how = "/v1/chat/completions", {"messages": messages, "max_completion_tokens": 10, "temperature": 0}
    body = check(server.post(path, **how), "ChatResponse")
    assert body["choices"][0]["message"] == {"role": "assistant", "content": wanted.text}
    assert body["usage"]["prompt_tokens"] == len(server.service.tokenizer.encode(prompt))
    events = server.events(path, **how)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta["content"] for delta in deltas) == wanted.text
    assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}


def test_logprobs_of_a_chat(server: Served) -> None:
    body = server.post(
        "/v1/chat/completions", messages=[{"role": "user", "content": "os"}], max_tokens=4, temperature=0,
        logprobs=True, top_logprobs=2,
    )  # fmt: skip
    content = check(body, "ChatResponse")["choices"][0]["logprobs"]["content"]
    assert "".join(each["token"] for each in content) == body["choices"][0]["message"]["content"]
    for each in content:
        assert each["logprob"] == each["top_logprobs"][0]["logprob"]  # greedy
        assert bytes(each["bytes"]).decode() == each["token"]


def test_a_chat_may_fill_the_context(server: Served) -> None:
    """Without max_tokens a chat ends where the context does."""
    ids = [5] * 1016
    text = server.service.tokenizer.decode(ids)
    body = server.post("/v1/chat/completions", messages=[{"role": "u", "content": text}], ignore_eos=True)
    assert body["usage"]["total_tokens"] == 1024


@pytest.mark.about("serving/answers.py, origins")
def test_a_stream_says_where_tokens_come_from(drafting: Served) -> None:
    """The origins agree with the figures of the request."""
    events = drafting.events(
        prompt=PROMPT, max_tokens=40, temperature=0, return_token_origins=True, stream_options={"include_usage": True}
    )
    parts = [part for event in events[:-1] for part in event["choices"][0]["token_origins"]]
    assert "".join(part["text"] for part in parts) == "".join(event["choices"][0]["text"] for event in events[:-1])
    found = events[-1]["metrics"]["speculative_decoding"]
    origins = [part["origin"] for part in parts]
    assert origins.count("accepted") == found["num_accepted_draft_tokens"] > 0
    assert events[-2]["choices"][0]["num_draft_tokens"] == found["num_draft_tokens"]
    assert {"accepted", "bonus", "corrected"} >= set(origins) - {"target"}
    assert sum(found["acceptance_histogram"]) == found["num_spec_steps"]


def test_models_tokens_and_health(server: Served) -> None:
    with server.client() as client:
        assert client.get("/health").status_code == 200
        listed = check(client.get("/v1/models").json(), "ModelList")["data"]
        assert listed == [client.get("/v1/models/stdlib-1m").json()]
        assert listed[0]["max_model_len"] == 1024
        assert check(client.get("/tokenizer_info").json(), "TokenizerInfo")["eos_token"] == "<|endoftext|>"
    text = "naïve 日本 \U0001f40d\n"
    tokens = check(server.post("/tokenize", prompt=text, return_token_strs=True), "TokenizeResponse")
    assert tokens["tokens"] == server.service.tokenizer.encode(text)
    assert tokens["count"] == len(tokens["token_strs"]) == len(tokens["tokens"])
    assert check(server.post("/detokenize", tokens=tokens["tokens"]), "DetokenizeResponse") == {"prompt": text}
    assert server.post("/tokenize", prompt="")["tokens"] == []
    assert server.post("/tokenize", prompt=text, add_special_tokens=False)["tokens"] == tokens["tokens"]  # it adds none
