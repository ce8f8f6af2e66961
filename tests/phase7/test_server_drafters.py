"""Requests that name their drafter: side by side in one server, each with the tokens and figures that it has alone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from common.errors import UserError
from tests.phase7.test_server_metrics import read
from tests.support.beside import beside
from tests.support.serving import Json, Served, in_thread

TEXT = "def add(a, b):\n    return a + b\n\n\ndef add(a, b, c):\n    return a"
LOADED = ["model", "eagle", "ngram"]


@pytest.fixture(scope="module")
def several() -> Iterator[Served]:
    """stdlib-10m with its draft model, its EAGLE head and the lookup, which is always there."""
    with in_thread(model="stdlib-10m", more_drafters=["eagle"], batch_size=8) as served:
        yield served


def asked(drafter: str | None, **more: Any) -> Json:
    named = {} if drafter is None else {"drafter": drafter}
    return {"prompt": TEXT, "max_tokens": 32, "ignore_eos": True, "return_token_ids": True, **named, **more}


def figures(answer: Json) -> tuple[list[int], Json | None]:
    return answer["choices"][0]["token_ids"], answer["metrics"]["speculative_decoding"]


def test_drafters_are_listed(several: Served, server: Served) -> None:
    for served, names in ((several, LOADED), (server, ["ngram"])):
        with served.client() as client:
            assert client.get("/v1/models").json()["data"][0]["drafters"] == names


def test_each_request_drafts_with_its_own(several: Served) -> None:
    """Greedy and coupled tokens are plain decoding's, those of rejection its own; the counters are the sum."""
    ways: list[Json] = [{"temperature": 0}, {"seed": 5}, {"seed": 6, "policy": "rejection", "k": 3}]
    requests = [asked(name, **way) for way in ways for name in (None, *LOADED, "none")]
    before = read(several)
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(lambda request: several.post(**request), requests))
    after = read(several)
    found = [each for each in (figures(answer)[1] for answer in answers) if each is not None]
    for name, of_request in (
        ("drafts", "num_spec_steps"),
        ("draft_tokens", "num_draft_tokens"),
        ("accepted_tokens", "num_accepted_draft_tokens"),
    ):
        counter = f"vllm:spec_decode_num_{name}_total"
        assert after[counter] - before.get(counter, 0) == sum(each[of_request] for each in found) > 0

    alone = [figures(several.post(**request)) for request in requests]
    assert [figures(answer) for answer in answers] == alone
    for way in range(3):
        default, model, eagle, ngram, none = alone[5 * way : 5 * way + 5]
        assert default == model
        assert none[1] is None
        drafted = [each[1] for each in (model, eagle, ngram)]
        assert all(each is not None and each["num_draft_tokens"] > 0 for each in drafted)
        assert drafted[0] != drafted[1] != drafted[2] != drafted[0]
        if way < 2:
            assert model[0] == eagle[0] == ngram[0] == none[0]


def test_a_model_without_a_draft_model_looks_up(server: Served) -> None:
    """Only if the request asks for it: nothing drafts by default."""
    plain, drafted = server.post(**asked(None, temperature=0)), server.post(**asked("ngram", temperature=0, k=2))
    assert figures(plain) == (figures(drafted)[0], None)
    found = figures(drafted)[1]
    assert found is not None
    assert found["num_draft_tokens"] > 0
    assert found["num_spec_tokens"] == 2


def test_a_drafter_that_is_not_loaded_is_refused(several: Served, server: Served) -> None:
    for served, name, message in (
        (several, "medusa", "drafter: medusa is not loaded on this server; loaded: none, model, eagle, ngram"),
        (server, "model", "drafter: model is not loaded on this server; loaded: none, ngram"),
        (several, "hope", "drafter: input should be 'none'"),
    ):
        with served.client() as client:
            response = client.post("/v1/completions", json=asked(name))
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == "drafter"
        assert error["message"].startswith(message)
    with server.client() as client:
        error = client.post("/v1/completions", json=asked(None, k=3)).json()["error"]
    assert error["message"] == "k: nothing drafts here unless the request names a drafter: none, ngram"


def test_further_drafters_that_cannot_be_are_an_error_at_the_start() -> None:
    options, service = beside(7, "serving.options").ServeOptions, beside(7, "serving.service").Service
    with pytest.raises(ValueError, match="--draft none drafts nothing: leave it out, or leave out --more-drafters"):
        options(draft="none", more_drafters=["eagle"])
    assert options(draft="none").other_drafters == []
    for twice in ({"drafter": "eagle", "more_drafters": ["eagle"]}, {"more_drafters": ["eagle", "medusa", "eagle"]}):
        with pytest.raises(ValueError, match="--more-drafters eagle: this drafter is named twice"):
            options(**twice)
    assert options(more_drafters=["ngram", "eagle"]).other_drafters == ["ngram", "eagle"]
    with pytest.raises(UserError, match="there is no draft model for the drafter model: name one with --draft"):
        service(options(model="stdlib-1m", drafter="ngram", more_drafters=["model"], device="cpu", threads=1))
    heads: Json = {"model": "stdlib-10m", "heads": "stdlib-10m-eagle", "device": "cpu", "threads": 1}
    with pytest.raises(
        UserError, match="stdlib-10m-eagle holds eagle heads, and the drafter medusa needs medusa heads"
    ):
        service(options(**heads, more_drafters=["eagle", "medusa"]))
