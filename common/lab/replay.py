"""`lab replay`: a page that replays recorded runs on one wall clock, down to the arithmetic of every step.

The page is one HTML file with its data, styles and scripts inside: nothing is downloaded. Python only shortens the
recordings; the scripts in replay_page/ compute all that is shown from them.

    python generate.py --prompt "class Stack:" --temperature 0.8 --record draft.jsonl
    python generate.py --prompt "class Stack:" --temperature 0.8 --draft none --record plain.jsonl
    lab replay plain.jsonl draft.jsonl -o replay.html
    lab replay --stories
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.lab.arguments import Parser
from common.recording import Line, Recording, contradictions, kept, read_recording

LIMIT = 10_000  # tokens of a lane, prompt included
PAGE = Path(__file__).with_name("replay_page")
STORIES = Path(__file__).with_name("stories")
SCRIPTS = ("data.js", "words.js", "drawings.js", "lanes.js", "step.js", "prediction.js", "main.js")
# The options that a reader needs to know what was run; of each, the value that says nothing.
SHOWN = {"temperature": None, "k": None, "policy": "auto", "drafter": "model", "controller": "fixed", "tree": "off"}
SHOWN |= {"kv": "off", "kernels": None, "quant": "none", "seed": None}


@dataclass(frozen=True)
class Lane:
    """A recording as the page shows it."""

    prompt: list[int]
    plain: bool
    data: dict[str, Any]


def read_lane(path: Path, sequence: int) -> Lane:
    """Read a recording that can be replayed. UserError if it is cut off, too long, lacks a field, or is wrong."""
    recording = read_recording(path)
    if recording.footer is None:
        raise UserError(f"{path}: the recording was cut off: it has no footer; record the run again")
    try:
        if not 0 <= sequence < len(recording.header["sequences"]):
            raise UserError(f"--sequence {sequence}: {path} has {len(recording.header['sequences'])}, from 0 on")
        prompt = prompt_of(recording, sequence)["tokens"]
        tokens = len(prompt) + len(recording.tokens(sequence))
        if tokens > LIMIT:
            raise UserError(f"{path}: {tokens:,} tokens; a lane has at most {LIMIT:,}, prompt included")
        if not recording.of_sequence(sequence):
            raise UserError(
                f"{path}: sequence {sequence} has no step to replay; record a run with --max-tokens 1 or more"
            )
        wrong = next(contradictions(recording), None)
        data = lane_data(recording, sequence)
        json.dumps(data, allow_nan=False)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{path}: a field is missing or of another type ({error!r}); expected what --record writes"
        ) from None
    if wrong:
        raise UserError(f"{path} contradicts itself: {wrong} (python -m common.recording FILE lists everything)")
    return Lane(prompt, recording.header["draft"] is None, data)


def prompt_of(recording: Recording, sequence: int) -> Line:
    prompt: Line = recording.header["prompts"][recording.header["sequences"][sequence]["prompt"]]
    return prompt


class Strings:
    """The texts of tokens, each once: `number` gives the place of a token's text in `texts`."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.numbers: dict[tuple[int, str], int] = {}

    def number(self, token: int, text: str) -> int:
        if (token, text) not in self.numbers:
            self.numbers[token, text] = len(self.texts)
            self.texts.append(text)
        return self.numbers[token, text]

    def of(self, each: Line) -> int:
        return self.number(each["token"], each["string"])


def short(value: float | None) -> float | None:
    """Round to seven digits: float32 has no more, and a page of 2,000 tokens stays small."""
    return None if value is None else float(f"{value:.7g}")


def lane_data(recording: Recording, sequence: int) -> dict[str, Any]:
    """Return what the page knows of one lane: the header's words, and an array for every step."""
    header, strings = recording.header, Strings()
    settings, environment = header["settings"], header["environment"]
    steps = recording.of_sequence(sequence)
    rounds = {step["step"]: (step["start_ms"], step["end_ms"]) for step in recording.steps}
    clock = dict[int, float]()  # start of each round without the time between rounds, in which recording happens
    now = 0.0
    for number, (start, end) in sorted(rounds.items()):
        clock[number] = now
        now += end - start
    assert recording.footer is not None
    end = recording.footer["sequences"][sequence]
    prompt = prompt_of(recording, sequence)
    return {
        "model": header["model"],
        "draft": header["draft"],
        "phase": header["phase"],
        "context": header["context"],
        "together": len(header["sequences"]),
        "settings": {name: settings[name] for name, usual in SHOWN.items() if settings.get(name, usual) != usual},
        "environment": {name: environment.get(name) for name in ("commit", "cpu", "threads", "dtype", "device_name")},
        "finish": end["finish_reason"],
        "prompt": [strings.number(*pair) for pair in zip(prompt["tokens"], prompt["strings"], strict=True)],
        "steps": [
            step_data(step, before, clock[step["step"]], strings)
            for before, step in zip([None, *steps], steps, strict=False)
        ],
        "strings": strings.texts,
    }


def step_data(step: Line, before: Line | None, clock: float, strings: Strings) -> list[Any]:
    """Return a step as an array, in the order of FIELDS in data.js."""
    rest = step["residual"]
    return [
        step["step"],
        *(short(value) for value in (clock, step["end_ms"] - step["start_ms"])),
        *(short(step[name]) for name in ("draft_ms", "verify_ms", "accept_ms", "kv_ms", "prefill_ms")),
        step["position"],
        step["window_start"],
        kept(step, before),
        step["cache_before"],
        step["cache_after"],
        step["k"],
        step["comparison"],
        [
            [strings.of(each), each["parent"], short(each["draft_prob"]), short(each["target_prob"])]
            + ([] if each["accepted"] is None else [int(each["accepted"]), short(each["uniform"])])
            for each in step["proposed"]
        ],
        step["path"],
        [strings.of(step["next"]), step["next"]["origin"], short(step["next"]["prob"])],
        len(step["emitted"]),
        step["counted"]["proposed"],
        [[strings.of(each), short(each["prob"])] for each in step["target_top"]],
        rest
        and [
            short(rest["mass"]),
            [[strings.of(each), short(each["target_prob"]), short(each["draft_prob"])] for each in rest["top"]],
        ],
    ]


def story_data(paths: list[Path], sequence: int, title: str, words: str) -> dict[str, Any]:
    """Return one story: one lane, or two of the same prompt, with plain decoding first."""
    lanes = [read_lane(path, sequence) for path in paths]
    if lanes[0].prompt != lanes[-1].prompt:
        raise UserError(
            f"{paths[0]} and {paths[1]} have different prompts; two lanes need the same prompt and tokenizer"
        )
    lanes.sort(key=lambda lane: not lane.plain)  # stable
    return {"title": title, "words": words, "lanes": [lane.data for lane in lanes]}


def page(stories: list[dict[str, Any]], title: str) -> str:
    """Return the page as one text. `<` is escaped in its data, so that no text of a model can end the script."""
    data = json.dumps(stories, ensure_ascii=True, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    html = (PAGE / "page.html").read_text(encoding="utf-8")
    script = "\n".join((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    parts = {
        "TITLE": escape(title),
        "STYLE": (PAGE / "page.css").read_text(encoding="utf-8"),
        "SCRIPT": script,
        "DATA": data,
    }
    return re.sub("@@([A-Z]+)@@", lambda found: parts[found[1]], html)


def bundled() -> list[dict[str, Any]]:
    """Return the three stories that come with the lab."""
    listing = json.loads((STORIES / "stories.json").read_text(encoding="utf-8"))
    return [story_data([STORIES / name for name in each["runs"]], 0, each["title"], each["words"]) for each in listing]


def run(arguments: list[str]) -> int:
    parser = Parser(
        "lab replay",
        "Write a page that replays recorded runs (generate.py --record) step by step.",
        usage="lab replay RUN.jsonl [RUN2.jsonl] [-o FILE.html] | lab replay --stories [-o FILE.html]",
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN.jsonl", help="one recording, or two of one prompt")
    parser.add_argument("-o", "--output", type=Path, default=Path("replay.html"), help="the page (default replay.html)")
    parser.add_argument("--sequence", type=int, default=0, help="which sequence of a batch (default 0)")
    parser.add_argument("--stories", action="store_true", help="replay the three runs that come with the lab")
    given = parser.parse_args(arguments)
    if given.stories == bool(given.runs) or len(given.runs) > 2:
        raise UserError("give one or two recordings, as generate.py --record writes, or --stories")
    if given.stories:
        stories, title = bundled(), "Replay: a win, a loss, a jump"
    else:
        title = "Replay: " + ", ".join(path.stem for path in given.runs)
        stories = [story_data(given.runs, given.sequence, title, "")]
    given.output.write_text(page(stories, title), encoding="utf-8")
    print(f"{given.output}: {given.output.stat().st_size / 1e6:.2f} MB; open it in a browser")
    return 0
