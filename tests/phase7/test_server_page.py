"""The page at `/` in a browser: it streams, colours tokens by their origin, stops, and tells what went wrong."""

from __future__ import annotations

import pytest

from tests.support.browser import Browser, find_browser
from tests.support.serving import Served, eventually

CHROMIUM = find_browser()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def value(name: str, text: str) -> str:
    return f"document.getElementById({name!r}).value = {text!r}"


def test_the_page_needs_nothing_from_elsewhere(server: Served) -> None:
    with server.client() as client:
        text = client.get("/").text
    assert "http://" not in text
    assert "https://" not in text
    assert "src=" not in text


def test_tokens_arrive_with_their_colours(drafting: Served) -> None:
    assert CHROMIUM is not None
    wanted = drafting.post(prompt="class Stack:", max_tokens=120, seed=2, temperature=0.5)
    with Browser(CHROMIUM) as page:
        page.open(drafting.url)
        page.until("document.getElementById('model').textContent === 'stdlib-10m'")
        drafters = "[...document.getElementById('drafter').options].map(each => each.value)"
        assert page.run(drafters) == ["", "none", "model", "ngram"]
        for name, text in {"prompt": "class Stack:", "tokens": "120", "seed": "2", "temperature": "0.5"}.items():
            page.run(value(name, text))
        page.run("document.getElementById('go').click()")
        page.until("document.body.dataset.done === 'yes'")
        assert page.run("document.getElementById('error').textContent") == ""
        text = page.run("document.getElementById('output').textContent")
        assert text == "class Stack:" + wanted["choices"][0]["text"]
        kinds = page.run("[...document.querySelectorAll('#output span')].map(each => each.className)")
        assert {"prompt", "accepted", "corrected", "bonus"} <= set(kinds)
        colour = "kind => getComputedStyle(document.querySelector('#output .' + kind)).color"
        colours = page.run(f"['accepted', 'corrected', 'bonus'].map({colour})")
        assert len(set(colours)) == 3
        shown = {
            name: page.run(f"document.getElementById({name!r}).textContent")
            for name in ("count", "rate", "drafted", "acceptance")
        }
        found = wanted["metrics"]["speculative_decoding"]
        assert shown["count"] == "120"
        assert shown["drafted"] == str(found["num_draft_tokens"])
        assert abs(int(shown["acceptance"].removesuffix("%")) - 100 * found["draft_acceptance_rate"]) <= 0.5
        assert int(shown["rate"]) > 0

        # Without a drafter no token has an origin; Stop ends a long request, and the engine frees its blocks.
        page.run(value("drafter", "none") + ";" + value("tokens", "1000") + ";" + value("temperature", "2"))
        page.run("delete document.body.dataset.done; document.getElementById('go').click()")
        page.until("+document.getElementById('count').textContent > 3")
        page.run("document.getElementById('stop').click()")
        page.until("document.body.dataset.done === 'yes'")
        assert page.run("[...document.querySelectorAll('#output span')].map(each => each.className)") == [
            "prompt",
            "target",
        ]
        eventually(drafting.rests)

        page.run(value("tokens", "5000") + "; document.getElementById('form').noValidate = true")
        page.run("delete document.body.dataset.done; document.getElementById('go').click()")
        page.until("document.body.dataset.done === 'yes'")
        assert "context of 1024" in page.run("document.getElementById('error').textContent")
