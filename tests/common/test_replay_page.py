"""The page of `lab replay` in a headless browser: stepping, clock, lanes, questions, and every number on it.

The numbers are computed here a second time, from the recordings alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from decimal import ROUND_HALF_UP, Decimal
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from common.lab import replay
from common.lab.cli import main
from tests.support.browser import Browser, find_browser
from tests.support.recordings import Line, longer, read, with_texts

CHROMIUM = find_browser()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome here")
STORIES: list[list[Path]] = [
    [replay.STORIES / name for name in each["runs"]]
    for each in json.loads((replay.STORIES / "stories.json").read_text(encoding="utf-8"))
]
WIN = STORIES[0]
PARTS = ("prefill", "draft", "verify", "accept", "kv")
QUIET = "player.quiz.switch.checked = false"
OPEN = "document.getElementById('arithmetic').open = true"
# All numbers in a part of the page: name, full value, format, shown text; the last of a name wins.
NUMBERS = """(root => [...root.querySelectorAll('[data-n]')].map(
    e => [e.dataset.n, Number(e.dataset.value), e.dataset.format, e.textContent]))"""
# Texts that hold a digit outside of numbers and of texts of models and authors.
LOOSE = """(() => {
    const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node; (node = walk.nextNode());) {
        const text = node.data.replace(/(min\\(1,|max\\(0,)/g, '');
        const known = node.parentElement.closest('[data-n], [data-text], script, style, noscript');
        if (/[0-9]/.test(text) && !known) found.push(text);
    }
    return found;
})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM) as running:
        yield running


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("replay") / "stories.html"
    assert main(["replay", "--stories", "-o", str(file)]) == 0
    return file


class Lane:
    """A recording of one sequence, with its clock."""

    def __init__(self, path: Path) -> None:
        self.header, *self.steps, self.footer = read(path)
        self.ends, now = list[float](), 0.0
        for step in self.steps:
            now += step["end_ms"] - step["start_ms"]
            self.ends.append(now)
        self.total, self.prompt = now, self.header["prompts"][0]
        self.counts = [len(step["emitted"]) for step in self.steps]
        self.drafted = any(step["proposed"] for step in self.steps)

    def texts(self) -> list[str]:
        return [token["string"] for step in self.steps for token in emitted(step)]

    def figures(self, t: float) -> dict[str, float]:
        """Return the numbers beside a lane at time t."""
        done = sum(end <= t + 1e-3 for end in self.ends)
        tokens, now = sum(self.counts[:done]), min(t, self.total)
        found = {"tokens": tokens, "elapsed": now}
        return found | ({"rate": 1000 * tokens / now, "perForward": tokens / done} if done else {})

    def numbers(self, at: int) -> dict[str, float]:
        """Return all numbers that the panel of a step may show."""
        step, before = self.steps[at], self.steps[at - 1] if at else None
        duration = step["end_ms"] - step["start_ms"]
        found: dict[str, float] = {"step": at + 1, "steps": len(self.steps), "context": self.header["context"]}
        parts = {part: step[f"{part}_ms"] or 0.0 for part in PARTS}
        found |= {"duration": duration, **parts, "other": duration - sum(parts.values())}
        found |= {"window": step["window_start"], "emitted": len(step["emitted"]), "path.length": len(step["path"])}
        seen = step["position"] - step["window_start"] + len(step["proposed"])
        jumped = before is not None and before["window_start"] != step["window_start"]
        kept = 0 if jumped else step["cache_before"] or 0
        ended = at == len(self.steps) - 1 and step["cache_after"] == 0
        after = seen if ended or step["cache_after"] is None else step["cache_after"]
        found |= {"cache.kept": kept, "cache.new": after - kept, "cache.rolled": seen - after, "computed": seen}
        found["cacheBefore"] = step["cache_before"]
        depths = list[int]()
        for i, each in enumerate(step["proposed"]):
            depths.append(1 if each["parent"] < 0 else depths[each["parent"]] + 1)
            found |= {f"number.{i}": i + 1, f"parent.{i}": each["parent"] + 1}
            found |= {f"p.{i}": each["target_prob"], f"q.{i}": each["draft_prob"]}
            found |= {f"u.{i}": each["uniform"], f"chance.{i}": each["chance"]}
        end = step["path"][-1] if step["path"] else -1
        rejected = [each for each in step["proposed"] if each["parent"] == end and each["accepted"] is False]
        if rejected:
            last = rejected[-1]
            found |= {"u": last["uniform"], "chance": last["chance"], "p": last["target_prob"], "q": last["draft_prob"]}
        found |= {"proposed": len(depths), "depth": max(depths, default=0), "next.prob": step["next"]["prob"]}
        found |= {f"top.{i}": each["prob"] for i, each in enumerate(step["target_top"])}
        if step["residual"]:
            found["mass"] = step["residual"]["mass"]
            for i, each in enumerate(step["residual"]["top"]):
                p, q = each["target_prob"], each["draft_prob"]
                found |= {f"residual.p.{i}": p, f"residual.q.{i}": q, f"residual.left.{i}": max(0.0, p - q)}
                found[f"residual.prob.{i}"] = each["prob"]
        return found


def emitted(step: Line) -> list[Line]:
    tokens = [step["proposed"][node] for node in step["path"]] + [step["next"]]
    return tokens[: len(step["emitted"])]


def fixed(value: float, digits: int) -> str:
    """Round as JavaScript does, where Python rounds an exact half to the even digit."""
    return f"{Decimal(value).quantize(Decimal(10) ** -digits, ROUND_HALF_UP):,f}"


def shown(value: float, how: str) -> str:
    """Write a number as the page does."""
    if how.startswith("prob"):
        digits = int(how[4:] or 2)
        if value == 0:
            return "0"
        if value >= 0.1:
            return fixed(value, digits)
        if value >= 0.001:
            return f"{value:#.{digits}g}"
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e-")
        return f"{mantissa}e\u2212{int(exponent)}"
    if how == "ms":
        return fixed(value, 0 if value >= 100 else 1 if value >= 10 else 2)
    if how == "rate":
        return fixed(value, 0 if value >= 100 else 1)
    return {"count": fixed(value, 0), "ratio": fixed(value, 2), "percent": fixed(100 * value, 0) + "%"}[how]


def check(numbers: list[list[Any]], expected: dict[str, float]) -> set[str]:
    """Compare numbers of the page with computed ones, and their texts with their values. Returns their names."""
    for name, value, how, text in numbers:
        assert name in expected, f"{name} is on the page ({text}) and not computed here"
        assert math.isclose(value, expected[name], rel_tol=2e-6, abs_tol=2e-4 if how == "ms" else 2e-7), name
        assert text == shown(value, how), name
    return {name for name, *_ in numbers}


@pytest.mark.parametrize("story", range(3), ids=["win", "loss", "jump"])
def test_every_number_of_every_step_follows_from_the_recording(browser: Browser, page: Path, story: int) -> None:
    browser.open(page)
    browser.run(f"player.load({story}); {QUIET}; {OPEN}; 0")
    lanes = [Lane(path) for path in STORIES[story]]
    longest, met = max(lane.total for lane in lanes), set[str]()
    for chosen, lane in enumerate(lanes):
        found = browser.run(f"""(() => {{
            player.choose(player.views[{chosen}]); player.seek(0); const found = [];
            for (const step of player.chosen.lane.steps) {{
                player.forward(); player.panel.fill();
                const numbers = {NUMBERS}, part = id => numbers(document.getElementById(id));
                found.push([player.t, part('step'), part('player'),
                    ...player.views.map(view => {NUMBERS}(view.element)), {LOOSE}]);
            }}
            return found;
        }})()""")
        assert len(found) == len(lane.steps)
        for at, (t, panel, clock, upper, lower, loose) in enumerate(found):
            assert math.isclose(t, lane.ends[at], rel_tol=1e-6)
            met |= check(panel, lane.numbers(at))
            assert {"step", "duration", "verify", "next.prob", "cache.new"} <= {name for name, *_ in panel}
            check(clock, {"now": t, "longest": longest})
            for figures, each in ((upper, lanes[0]), (lower, lanes[1])):
                assert check(figures, each.figures(t)) == set(each.figures(t))
            assert loose == []
    wanted = [
        {"u", "chance", "p", "q", "mass", "residual.prob.0", "u.0"},
        {"parent.8", "mass"},
        {"cacheBefore", "window"},
    ]
    assert wanted[story] <= met
    assert "cache.rolled" in met


def test_the_words_of_a_step(browser: Browser, page: Path) -> None:
    """A sentence for each way in which a step can end."""
    browser.open(page)
    said = browser.run(f"""[0, 1, 2].flatMap(story => {{
        player.load(story); {QUIET};
        return player.views.flatMap(view => {{
            player.choose(view); player.seek(0);
            return view.lane.steps.map(() => (player.forward(), document.getElementById('sentence').textContent));
        }});
    }})""")
    steps = [step for story in STORIES for path in story for step in Lane(path).steps]
    assert len(said) == len(steps)
    for words, step in zip(said, steps, strict=True):
        if not step["proposed"]:
            assert "No draft: one pass of the target gave one token" in words
        elif len(step["emitted"]) <= len(step["path"]):
            assert "the text ended after" in words
        elif step["next"]["origin"] == "bonus":
            assert "Accepted all" in words
        elif step["comparison"] == "uniform":
            assert re.search(r"Rejected .+: u = [\d.e\u2212]+ \u2265 [\d.e\u2212]+ = min\(1, .+ / .+\)\.", words)
            assert "was drawn from the residual" in words
        else:
            assert "Rejected" in words
            assert "greedily, the target\u2019s likeliest token is" in words
    assert sum("the window jumped to position 256" in words for words in said) == 2


def test_two_lanes_on_one_clock(browser: Browser, page: Path) -> None:
    browser.open(page)
    lanes = [Lane(path) for path in WIN]
    words = """player.views.map(view => [...view.text.querySelectorAll('.token')]
        .filter(e => !e.hidden).map(e => e.textContent))"""
    for t in (0.0, *(lane.total * share + 0.01 for lane in lanes for share in (0.3, 0.7, 1.0))):
        slide(browser, "clock", t)
        for lane, texts in zip(lanes, browser.run(words), strict=True):
            done = sum(end <= t + 1e-3 for end in lane.ends)
            expected = lane.texts()[: sum(lane.counts[:done])]
            assert [text.replace("\u21b5", "") for text in texts] == expected
    assert browser.run("document.querySelector('h2').textContent") == "Before you play: which lane ends first?"
    names = browser.run("player.views.map(view => view.lane.name)")
    assert names == ["Plain", "Speculative"]
    kinds = browser.run("[...player.views[1].text.querySelectorAll('.token')].map(e => e.classList[1])")
    assert kinds == [kind for step in lanes[1].steps for kind in kinds_of(step)]
    assert set(kinds) == {"accepted", "corrected", "bonus"}


def slide(browser: Browser, slider: str, value: float) -> None:
    browser.run(
        f"{{const slider = document.getElementById('{slider}'); slider.value = {value}; "
        "slider.dispatchEvent(new Event('input'))}; 0"
    )


def kinds_of(step: Line) -> list[str]:
    last = "bonus" if step["next"]["origin"] == "bonus" else "corrected" if step["proposed"] else "plain"
    return ([*["accepted"] * len(step["path"]), last])[: len(step["emitted"])]


def test_keys_and_questions(browser: Browser, page: Path) -> None:
    """An arrow asks first; a number answers, and the step is shown."""
    browser.open(page)
    steps, shown_steps = Lane(WIN[1]).steps, "player.chosen.shown"
    question = "document.getElementById('question').hidden ? '' : document.getElementById('question').textContent"
    browser.key("ArrowRight")
    assert browser.run(shown_steps) == 0
    assert "How many tokens will the target accept?" in browser.run(question)
    browser.key(str(len(steps[0]["path"])))
    assert browser.run(shown_steps) == 1
    assert f"Right: {len(steps[0]['path'])} accepted. 1 of 1 right so far." in browser.run(question)
    browser.key("ArrowRight")
    browser.key(str((len(steps[1]["path"]) + 1) % 5))
    assert f"Not so: {len(steps[1]['path'])} accepted. 1 of 2 right so far." in browser.run(question)
    browser.key("ArrowRight")
    browser.key("ArrowRight")  # shows it without an answer
    assert browser.run(shown_steps) == 3
    browser.key("ArrowLeft")
    assert browser.run(shown_steps) == 2
    browser.key("End")
    assert browser.run(shown_steps) == len(steps)
    browser.key("Home")
    assert browser.run(shown_steps) == 0
    browser.run("document.getElementById('speed').value = 1; 0")
    browser.key(" ")
    assert browser.run("player.playing")
    browser.run(
        "new Promise(resolve => { const look = () => player.playing ? setTimeout(look, 20) : resolve(); look(); })"
    )
    assert browser.run("player.t === player.longest")


def test_what_if(browser: Browser, page: Path) -> None:
    """The sliders' speed-up is the one of `--explain`, from the recording's own costs and acceptances."""
    browser.open(page)
    hidden = "document.getElementById('whatif-body').hidden"
    assert browser.run(hidden)
    browser.run("document.querySelectorAll('#guess-answers button')[1].click(); player.seek(player.longest); 0")
    assert not browser.run(hidden)
    plain, lane = (Lane(path) for path in WIN)
    speed = [sum(each.counts) / each.total * 1000 for each in (plain, lane)]
    outcome = browser.run(f"{NUMBERS}(document.getElementById('guess-outcome'))")
    check(outcome, {"measured": speed[1] / speed[0], "rate.0": speed[0], "rate.1": speed[1]})
    assert browser.run("document.getElementById('guess-outcome').textContent").startswith("Right. Speculative made")

    def depth(step: Line) -> int:
        return len(step["emitted"] if len(step["emitted"]) <= len(step["path"]) else step["proposed"])

    depths = [depth(step) for step in lane.steps]
    accepted = [min(len(step["path"]), len(step["emitted"])) for step in lane.steps]
    timed = [(step, d) for step, d in zip(lane.steps, depths, strict=True) if d][1:]
    verify = median(step["verify_ms"] for step, _ in timed)
    rest = median(s["end_ms"] - s["start_ms"] - s["draft_ms"] - s["verify_ms"] - s["prefill_ms"] for s, _ in timed)
    draft = median(step["draft_ms"] / d for step, d in timed)
    step_ms = median(step["end_ms"] - step["start_ms"] for step in plain.steps[1:])

    def share(k: int) -> float:
        tried = [a >= k for a, d in zip(accepted, depths, strict=True) if d >= k]
        return sum(tried) / len(tried)

    def computed(k: int, cost: float) -> dict[str, float]:
        tokens = 1 + sum(share(j) for j in range(1, k + 1))
        price = (k * cost * step_ms + verify + rest) / step_ms
        found = {"k": k, "cost": cost, "tokens": tokens, "price": price, "speedup": tokens / price, "levels": k}
        return found | {"share": share(k), "verify": verify, "rest": rest, "draft": draft, "plain": step_ms}

    initial = round(draft / step_ms, 2)
    for k, cost in [(max(depths), initial), (1, initial), (2, 0.0), (3, 1.5)]:
        slide(browser, "k", k)
        slide(browser, "cost", cost)
        expected = {f"whatif.{name}": value for name, value in computed(k, cost).items()}
        curve = {f"speedup.{j}": computed(j, cost)["speedup"] for j in range(1, max(depths) + 1)} | {"one": 1.0}
        names = check(browser.run(f"{NUMBERS}(document.getElementById('whatif'))"), expected | curve)
        assert names == {*expected, *curve}
    assert "computed" in browser.run("document.getElementById('whatif-words').textContent")
    assert browser.run(LOOSE) == []


HOSTILE = ["</script><img src=http://x.invalid/a onerror=hacked=1>", "<!--", "\u202e", "&lt;b&gt;", "]]>", "'\"`${1}"]


def test_texts_of_a_model_stay_texts(browser: Browser, tmp_path: Path) -> None:
    runs = [with_texts(path, HOSTILE, tmp_path / path.name) for path in WIN]
    assert main(["replay", *map(str, runs), "-o", str(tmp_path / "page.html")]) == 0
    browser.open(tmp_path / "page.html")
    browser.run(f"{QUIET}; {OPEN}; player.seek(player.longest); player.panel.fill(); 0")
    assert browser.run("typeof hacked") == "undefined"
    assert browser.run("document.images.length") == 0
    assert browser.requests == [(tmp_path / "page.html").as_uri()]
    text = browser.run("player.views[1].text.textContent")
    assert HOSTILE[0] in text
    assert "\u202e" not in text
    assert "<U+202E>" in text


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_what_a_reader_meets(browser: Browser, page: Path, width: int, dark: bool, tmp_path: Path) -> None:
    """Nothing is wider than the window, every control and picture has a name, and the colours follow the system."""
    browser.open(page, width, 844, dark)
    browser.run(f"player.load(1); {QUIET}; {OPEN}; player.seek(player.longest); player.panel.fill(); 0")
    assert browser.run("document.documentElement.scrollWidth") <= width
    browser.call("Accessibility.enable")
    named = {"button", "slider", "checkbox", "combobox", "image", "img", "group", "toolbar", "region"}
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    found = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    found = [(role, name) for role, name in found if role.lower() in named]
    assert {"button", "slider", "checkbox"} <= {role for role, _ in found}
    assert [role for role, name in found if not name] == []
    browser.screenshot(tmp_path / "page.png", whole=False)
    assert (tmp_path / "page.png").stat().st_size > 20_000
    back = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back))) < 200) == dark


def test_a_step_of_a_long_run_is_fast(browser: Browser, tmp_path: Path) -> None:
    """Of several steps the fastest counts: the machine may be busy."""
    runs = [longer(path, 2000, tmp_path / path.name) for path in WIN]
    assert main(["replay", *map(str, runs), "-o", str(tmp_path / "page.html")]) == 0
    browser.open(tmp_path / "page.html")
    times = browser.run(f"""(() => {{
        {QUIET}; {OPEN}; player.seek(player.longest / 2);
        return Array.from({{length: 12}}, () => {{
            const before = performance.now();
            player.forward(); document.body.getBoundingClientRect();
            return performance.now() - before;
        }});
    }})()""")
    assert min(times) < 50
    assert all(later > 0 for _, later in pairwise(times))
