"""`lab replay` without a browser: what it refuses, the size of its page, and the contrast of its colours."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.lab import replay
from common.lab.cli import main
from common.options import run_main
from common.recording import Recording
from tests.support.recordings import longer, read, write

WIN = [replay.STORIES / "win-plain.jsonl", replay.STORIES / "win-speculative.jsonl"]


def refused(tmp_path: Path, *runs: object) -> str:
    with pytest.raises(UserError) as refusal:
        main(["replay", *map(str, runs), "-o", str(tmp_path / "page.html")])
    assert not (tmp_path / "page.html").exists()
    return str(refusal.value)


def test_the_stories_are_recordings(check_recording: Callable[[Path], Recording]) -> None:
    """A win, a loss, and a cache that is dropped at a window jump; the two greedy lanes write the same text."""
    listing = json.loads((replay.STORIES / "stories.json").read_text(encoding="utf-8"))
    assert [len(each["runs"]) for each in listing] == [2, 2, 2]
    rates, tokens, dropped = [], [], []
    for each in listing:
        plain, speculative = (check_recording(replay.STORIES / name) for name in each["runs"])
        assert (plain.header["draft"], speculative.header["draft"]) == (None, "stdlib-1m")
        seconds = [sum(step["end_ms"] - step["start_ms"] for step in lane.steps) for lane in (plain, speculative)]
        counts = [len(lane.tokens(0)) for lane in (plain, speculative)]
        rates.append((counts[1] / seconds[1]) / (counts[0] / seconds[0]))
        tokens.append(plain.tokens(0) == speculative.tokens(0))
        dropped.append(any(0 < step["cache_after"] < step["cache_before"] for step in speculative.steps))
        assert sum((replay.STORIES / name).stat().st_size for name in each["runs"]) < 250_000
    assert rates[0] > 1.2
    assert rates[1] < 0.8
    assert tokens == [False, False, True]
    assert dropped == [False, False, True]


def test_a_page_of_2000_tokens(tmp_path: Path) -> None:
    runs = [longer(path, 2000, tmp_path / path.name) for path in WIN]
    assert main(["replay", *map(str, runs), "-o", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").stat().st_size < 2_000_000


def test_a_run_that_is_too_long(tmp_path: Path) -> None:
    header, step, *_, footer = read(WIN[0])
    step["emitted"] *= 100_000
    words = refused(tmp_path, write(tmp_path / "long.jsonl", [header, step, footer]))
    assert words.endswith("long.jsonl: 100,038 tokens; a lane has at most 10,000, prompt included")


def test_recordings_that_are_cut_off(tmp_path: Path) -> None:
    lines = read(WIN[1])
    assert "it has no footer" in refused(tmp_path, write(tmp_path / "run.jsonl", lines[:-1]))
    (tmp_path / "run.jsonl").write_text(WIN[1].read_text()[:5000])
    assert "run.jsonl: the recording was cut off in line 3" in refused(tmp_path, tmp_path / "run.jsonl")
    assert "no step to replay" in refused(tmp_path, write(tmp_path / "run.jsonl", [lines[0], lines[-1]]))


def test_what_follows_another_schema(tmp_path: Path) -> None:
    header, *rest = read(WIN[1])
    of_old = write(tmp_path / "run.jsonl", [{**header, "schema_version": 1}, *rest])
    assert "schema_version is 1, and 2 is read here" in refused(tmp_path, of_old)
    del header["schema_version"]
    assert "schema_version is None" in refused(tmp_path, write(tmp_path / "run.jsonl", [header, *rest]))
    header["schema_version"] = 2
    del rest[3]["end_ms"]
    assert "a field is missing or of another type (KeyError('end_ms'))" in refused(
        tmp_path, write(tmp_path / "run.jsonl", [header, *rest])
    )
    rest[3] = {**rest[2], "position": 7}
    assert "contradicts itself: step 2 of sequence 0: position 7" in refused(
        tmp_path, write(tmp_path / "run.jsonl", [header, *rest])
    )
    assert "line 1: expected a header" in refused(tmp_path, replay.STORIES / "stories.json")
    assert "cannot be read as text" in refused(tmp_path, tmp_path / "none.jsonl")


def spoiled(line: Any) -> Iterator[Any]:
    """Yield the line without one of its fields, and with a list in its place, for every field at any depth."""
    for key, value in line.items() if isinstance(line, dict) else enumerate(line[:1]):
        if isinstance(line, dict):
            yield {name: each for name, each in line.items() if name != key}
            yield {**line, key: []}
        if isinstance(value, dict | list):
            for inner in spoiled(value):
                yield {**line, key: inner} if isinstance(line, dict) else [inner, *line[1:]]


def test_a_missing_field_is_no_traceback(tmp_path: Path) -> None:
    """The page is written if it does not need the field."""
    whole = read(longer(WIN[1], 1, tmp_path / "run.jsonl"))
    broken = [[*whole[:at], line, *whole[at + 1 :]] for at in range(3) for line in spoiled(whole[at])]
    refusals = []
    for lines in (whole, *broken):
        try:
            replay.story_data([write(tmp_path / "run.jsonl", lines)], 0, "", "")
            refusals.append(False)
        except UserError:
            refusals.append(True)
    assert not refusals[0]
    assert len(broken) / 3 < sum(refusals) < len(broken)


def test_lanes_of_different_prompts(tmp_path: Path) -> None:
    assert "have different prompts" in refused(tmp_path, WIN[0], replay.STORIES / "loss-plain.jsonl")


@pytest.mark.parametrize("arguments", [[], ["--stories", str(WIN[0])], [str(WIN[0])] * 3])
def test_a_wrong_number_of_recordings(tmp_path: Path, arguments: list[str]) -> None:
    assert "give one or two recordings" in refused(tmp_path, *arguments)


def test_a_refusal_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run_main(main, ["replay", str(WIN[0]), "--sequence", "1"])
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: --sequence 1: {WIN[0]} has 1, from 0 on\n"


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_texts_have_enough_contrast(scheme: int) -> None:
    """WCAG 2.2, 1.4.3 and 1.4.11: 4.5 for text, 3 for what carries meaning beside text."""
    style = (replay.PAGE / "page.css").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", style.split("@media")[scheme]))
    for text, back in [("text", "page"), ("text", "card"), ("faint", "page"), ("faint", "card"), ("text", "track")]:
        assert contrast(colours[text], colours[back]) >= 4.5
    for kind in ("accepted", "corrected", "bonus"):
        assert contrast(colours[kind], colours[f"{kind}-back"]) >= 4.5
        assert contrast(colours[kind], colours["card"]) >= 3
    assert contrast(colours["focus"], colours["card"]) >= 4.5
    assert contrast(colours["kept"], colours["card"]) >= 2.5
