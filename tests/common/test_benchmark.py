"""Timing in turns, refusing wrong results, the options of a bench, and its output."""

from __future__ import annotations

import json
import mmap
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.benchmark import (
    BenchOptions,
    WrongResult,
    interleave,
    median,
    print_document,
    print_table,
    progress,
    refuse_if_different,
    seconds,
)
from common.errors import UserError
from common.options import parse_options


def _recorder(calls: list[str]) -> dict[str, Callable[[], str]]:
    def variant(name: str) -> Callable[[], str]:
        def run() -> str:
            calls.append(name)
            return f"{name}{len(calls)}"

        return run

    return {name: variant(name) for name in "ABC"}


def test_variants_take_turns_and_the_order_changes() -> None:
    calls: list[str] = []
    runs = interleave(_recorder(calls), repeats=3, warmup=1)
    warm, rounds = calls[:3], calls[3:]
    assert sorted(warm) == ["A", "B", "C"]
    assert rounds == ["A", "B", "C", "B", "C", "A", "C", "A", "B"]
    # Warm-up runs are not in the result, and entry i of every list is from round i.
    assert [run.value for run in runs["A"]] == ["A4", "A9", "A11"]
    assert [run.value for run in runs["C"]] == ["C6", "C8", "C10"]


def test_every_run_is_reported_warm_ups_too() -> None:
    reported: list[str] = []
    interleave(_recorder([]), repeats=2, warmup=2, on_run=reported.append)
    assert Counter(reported) == {"A": 4, "B": 4, "C": 4}


def test_timed_seconds_and_memory_are_those_of_the_run() -> None:
    def allocate() -> int:
        # Mapped, not allocated: the allocator may return pages that are already resident.
        with mmap.mmap(-1, 64 * 2**20) as block:
            for page in range(0, len(block), mmap.PAGESIZE):
                block[page] = 1
            return len(block)

    runs = interleave({"sleep": lambda: time.sleep(0.05), "allocate": allocate}, repeats=2, warmup=0)
    assert all(0.05 <= time_ < 25 for time_ in seconds(runs["sleep"]))  # seconds, even on a busy machine
    assert runs["allocate"][0].value == 64 * 2**20
    for run in runs["sleep"] + runs["allocate"]:
        if "peak_rss" not in run.memory:
            pytest.skip("this system cannot restart the peak of a process's memory")
    # The second sleep comes after an allocation, whose peak must not be counted as its own.
    assert runs["allocate"][1].memory["peak_rss"] > runs["sleep"][1].memory["peak_rss"] + 48


def test_median_of_an_even_number_is_the_mean_of_the_middle() -> None:
    assert median([9.0, 1.0, 3.0, 2.0]) == 2.5


def test_refuses_to_time_different_tokens_and_names_the_first_position() -> None:
    refuse_if_different("phase 2", [5, 6, 7], [5, 6, 7])
    with pytest.raises(WrongResult, match=r"phase 2 gives token 8 at position 1, expected 6"):
        refuse_if_different("phase 2", [5, 6, 7], [5, 8, 9])
    with pytest.raises(WrongResult, match=r"gives 2 tokens, expected 3 .*position 2"):
        refuse_if_different("phase 2", [5, 6, 7], [5, 6])
    with pytest.raises(WrongResult, match=r"gives 1 tokens, expected 0 .*position 0"):
        refuse_if_different("phase 2", [], [5])


def test_table_is_aligned_uncut_and_plain_outside_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    long = "w" * 150
    print_table("Speed [bold]", ["name", "tokens/s", "ratio"], [["a", 9.5, "1.2 [1.1, 1.3]"], [long, 1234.56, None]])
    title, _, header, rule, first, second = capsys.readouterr().out.splitlines()
    assert title == "Speed [bold]"
    assert set(rule) == {"|", "-"}
    assert "\x1b" not in header
    assert len({len(line) for line in (header, rule, first, second)}) == 1
    name, speed, ratio = first.strip("|").split("|")
    assert (name.strip(), speed, ratio) == ("a", "    9.500 ", " 1.2 [1.1, 1.3] ")
    assert second.startswith(f"| {long} |     1235 |")
    assert second.endswith("              - |")


def test_the_last_line_is_one_json_document_and_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("timing", total=2) as step:
        print_table("T", ["a"], [[1]])
        step("first")
        step("second")
    print_document({"rows": [1, "a\nb", None], "mean": np.float32(0.5)})
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1]) == {"rows": [1, "a\nb", None], "mean": 0.5}
    assert "timing" not in out
    assert "timing: second" in err
    assert "2/2" in err


def test_a_document_with_nan_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="JSON"):
        print_document({"loss": float("nan")})
    assert capsys.readouterr().out == ""


def test_options_come_from_flags_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_ROUNDS", "7")
    monkeypatch.setenv("SPECDEC_DTYPE", "bfloat16")
    options = parse_options(BenchOptions, ["--quick", "--output", "out", "--dtype", "float32"], "bench.py")
    assert (options.quick, options.output, options.dtype) == (True, Path("out"), "float32")
    assert (options.rounds, options.resume, options.dry_run) == (7, False, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume needs --output"),
        (["--rounds", "0"], "--rounds"),
        (["--precision", "0"], "--precision.*greater than 0"),
        (["--budget", "0"], "--budget.*greater than 0"),
        (["--threads", "0"], "--threads"),
        (["--device", "tpu"], "--device"),
    ],
)
def test_bad_options_are_one_clear_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        parse_options(BenchOptions, arguments, "bench.py")
    assert "\n" not in str(raised.value)


def test_the_users_own_prompts_take_the_place_of_the_suite(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("Once upon a time")
    lines.write_text('{"prompt": "one"}\n\n{"prompt": "two", "id": "x", "continuation": " three"}\n')
    options = parse_options(BenchOptions, ["--prompt-file", str(text), "--prompts-from", str(lines)], "bench.py")
    assert [(p.id, p.text, p.continuation) for p in options.own_prompts] == [
        ("a.txt", "Once upon a time", ""),
        ("line-1", "one", ""),
        ("x", "two", " three"),
    ]
    calibrate, test = ({p.id for p in options.load_prompts(half)} for half in ("calibrate", "test"))
    assert not calibrate & test
    assert len(calibrate | test) == 3
    only = parse_options(BenchOptions, ["--prompt-file", str(text)], "bench.py")
    assert only.load_prompts("calibrate") == only.load_prompts("test") != []
    assert only.prompts_sha256() != parse_options(BenchOptions, [], "bench.py").prompts_sha256()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompt"),
        (b"\n\n", "holds no prompt"),
        (b'{"prompt": "a"}\n{"prompt": \n', "line 2: invalid JSON"),
        (b'{"prompt": "a"}\n["b"]\n', 'line 2: expected {"prompt"'),
        (b'{"prompt": ""}\n', "line 1: expected"),
        (b'{"prompt": 5}\n', "line 1: expected"),
        (b'{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}\n', "an id occurs twice"),
        (b"\xff\xfe", "cannot be read as text"),
    ],
)
def test_a_bad_prompt_file_is_one_line_that_names_the_place(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    options = parse_options(BenchOptions, ["--prompts-from", str(path)], "bench.py")
    with pytest.raises(UserError, match=message) as raised:
        options.load_prompts()
    assert "\n" not in str(raised.value)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="is empty"):
        parse_options(BenchOptions, ["--prompt-file", str(tmp_path / "empty.txt")], "bench.py").load_prompts()
