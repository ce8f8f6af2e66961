"""Read a file of `generate.py --record`, and recompute its arithmetic without the model.

    python -m common.recording run.jsonl

`recording.schema.json` beside this file describes every field.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError

SCHEMA = Path(__file__).with_name("recording.schema.json")
SCHEMA_VERSION = 2  # 2: context, end_ms, window_start; prefill_ms is no part of verify_ms
Line = dict[str, Any]


@dataclass(frozen=True)
class Recording:
    """The lines of a recording. An interrupted run has a footer; without a footer the recorder itself was cut off."""

    header: Line
    steps: list[Line]
    footer: Line | None

    def of_sequence(self, number: int) -> list[Line]:
        return [step for step in self.steps if step["sequence"] == number]

    def tokens(self, number: int) -> list[int]:
        """Return the output of a sequence."""
        return [token for step in self.of_sequence(number) for token in step["emitted"]]


def read_recording(path: Path) -> Recording:
    """Read a recording. UserError, naming the line, for a file that does not follow the schema."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from None
    lines: dict[str, list[Line]] = {"header": [], "step": [], "footer": []}
    for number, text in enumerate(content.splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError:
            if number > 1 and number == content.count("\n") + 1:  # every whole line ends in a newline
                raise UserError(f"{path}: the recording was cut off in line {number}; record the run again") from None
            line = None
        kind = line.get("type") if isinstance(line, dict) else None
        if not isinstance(kind, str) or kind not in lines or (kind == "header") != (number == 1) or lines["footer"]:
            raise UserError(f"{path}, line {number}: expected a header, then steps, then a footer, as --record writes")
        if kind == "header" and (version := line.get("schema_version")) != SCHEMA_VERSION:
            raise UserError(f"{path}: schema_version is {version}, and {SCHEMA_VERSION} is read here")
        lines[kind].append(line)
    if not lines["header"]:
        raise UserError(f"{path}: the file is empty; expected a recording, as --record writes")
    return Recording(lines["header"][0], lines["step"], lines["footer"][0] if lines["footer"] else None)


def contradictions(recording: Recording) -> Iterator[str]:
    """Yield every contradiction in a recording; nothing if it is right."""
    sequences = recording.header["sequences"]
    for number, of in enumerate(sequences):
        steps = recording.of_sequence(number)
        position, cache = (
            len(recording.header["prompts"][of["prompt"]]["tokens"]),
            steps[0]["cache_before"] if steps else 0,
        )
        before: Line | None = None
        for step in steps:
            where = f"step {step['step']} of sequence {number}"
            if step["position"] != position:
                yield f"{where}: position {step['position']}, after {position} tokens"
            if step["cache_before"] != cache:
                yield f"{where}: {step['cache_before']} tokens were cached before it, {cache} after the step before"
            position, cache = position + len(step["emitted"]), step["cache_after"]
            yield from (f"{where}: {wrong}" for wrong in _of_time_and_window(step, before))
            before = step
            for wrong in (*_of_tokens(step, step is steps[-1]), *_of_candidates(step), *_of_residual(step)):
                yield f"{where}: {wrong}"
    starts = [step["start_ms"] for step in recording.steps]
    if starts != sorted(starts):
        yield "a step began before the one ahead of it"
    if recording.footer is not None:
        yield from _of_totals(recording, recording.footer)


def kept(step: Line, before: Line | None) -> int:
    """Return how many cached tokens a step goes on from: none without a cache, and none after the window has jumped."""
    jumped = before is not None and step["window_start"] != before["window_start"]
    return 0 if jumped else step["cache_before"] or 0


def _of_time_and_window(step: Line, before: Line | None) -> Iterator[str]:
    """Check the parts of a round against its duration, the rounds' order, and the cache and the window."""
    parts = sum(step[name] or 0 for name in ("draft_ms", "prefill_ms", "verify_ms", "accept_ms", "kv_ms"))
    if parts > step["end_ms"] - step["start_ms"] + 1e-6:
        yield f"parts of {parts} ms in a round from {step['start_ms']} to {step['end_ms']}"
    if before is not None and step["start_ms"] < before["end_ms"]:
        yield f"it began at {step['start_ms']}, before the end of the step before ({before['end_ms']})"
    seen = step["position"] - step["window_start"]
    if not kept(step, before) < seen or not (step["cache_after"] or 0) <= seen + len(step["proposed"]):
        yield f"{kept(step, before)} and {step['cache_after']} tokens in the cache, {seen} in the window"
    if before is not None and step["window_start"] < before["window_start"]:
        yield f"the window went back to {step['window_start']}"


def _of_tokens(step: Line, last: bool) -> Iterator[str]:
    """Check that the emitted tokens are the path and the next token, and that the origin matches the path."""
    proposed, path, comparison = step["proposed"], step["path"], step["comparison"]
    gained = [*(proposed[node]["token"] for node in path), step["next"]["token"]]
    if step["emitted"] != gained[: len(step["emitted"])] or (len(step["emitted"]) < len(gained) and not last):
        yield f"emitted {step['emitted']}, accepted {gained}"
    if [proposed[node]["parent"] for node in path] != [-1, *path][: len(path)]:
        yield f"path {path} is none in the tree"
    if [node for node, each in enumerate(proposed) if each["accepted"]] != sorted(path):
        yield f"path {path} is not what was accepted"
    end = path[-1] if path else -1
    rejected = any(each["parent"] == end for each in proposed)
    origin = "plain" if not proposed else "bonus" if not rejected else "plain"
    if rejected and comparison in ("uniform", "certain"):
        origin = "residual"
    if step["next"]["origin"] != origin or (comparison is None) != (not proposed):
        yield f"next is from {step['next']['origin']}, should be {origin}; comparison {comparison}"


def _of_candidates(step: Line) -> Iterator[str]:
    """Check that chances follow from the probabilities, and accepted tokens from chances and uniforms."""
    proposed, path, comparison = step["proposed"], step["path"], step["comparison"]
    following = {above: proposed[node]["token"] for above, node in zip([-1, *path], path, strict=False)}
    following[path[-1] if path else -1] = step["next"]["token"]
    settled = set[int]()  # nodes with an accepted child
    for node, each in enumerate(proposed):
        tried = each["parent"] in (-1, *path) and each["parent"] not in settled
        if each["accepted"] is True:
            settled.add(each["parent"])
        if comparison == "own_draw" and each["parent"] in following:
            tried = True  # the target's sample is compared with all children
        if (each["accepted"] is not None, each["chance"] is not None) != (tried, tried):
            yield f"candidate {node}: tried {tried}, accepted {each['accepted']}, chance {each['chance']}"
        if (each["uniform"] is not None) != (tried and comparison == "uniform"):
            yield f"candidate {node}: uniform {each['uniform']} by comparison {comparison}"
        if not tried or each["chance"] is None:
            continue
        accepted = each["chance"] > 0.5
        if comparison in ("uniform", "certain"):
            ratio = min(1.0, each["target_prob"] / each["draft_prob"]) if each["draft_prob"] else math.nan
            if not math.isclose(each["chance"], ratio, rel_tol=1e-6, abs_tol=1e-9):
                yield f"candidate {node}: chance {each['chance']}, min(1, target / draft) is {ratio}"
        if comparison == "uniform" and each["uniform"] is not None:
            accepted = each["uniform"] < each["chance"]
        if comparison == "own_draw":
            accepted = each["token"] == following[each["parent"]]
            if each["chance"] != each["target_prob"]:
                yield f"candidate {node}: chance {each['chance']}, target_prob {each['target_prob']}"
        if each["accepted"] != accepted:
            yield f"candidate {node}: accepted {each['accepted']}, should be {accepted}"


def _of_residual(step: Line) -> Iterator[str]:
    """Check that the residual follows from both distributions, as far as their likeliest tokens are listed."""
    target = {each["token"]: each["prob"] for each in step["target_top"]}
    rest, following = step["residual"], step["next"]
    listed = target
    if (rest is not None) != (following["origin"] == "residual"):
        yield f"next is from {following['origin']}, residual {rest}"
    if rest is not None:
        listed = {each["token"]: each["prob"] for each in rest["top"]}
        for each in rest["top"]:
            left = (
                max(0.0, each["target_prob"] - each["draft_prob"]) / rest["mass"]
                if rest["mass"]
                else each["target_prob"]
            )
            if not math.isclose(each["prob"], left, rel_tol=1e-5, abs_tol=1e-7):
                yield f"residual of token {each['token']} is {each['prob']}, computed {left}"
        end = step["path"][-1] if step["path"] else -1
        rejected = [each for each in step["proposed"] if each["parent"] == end]
        if len(rejected) == 1 and rejected[0]["draft_prob"] == 1.0:  # only this token is removed
            (one,) = rejected
            if not math.isclose(rest["mass"], 1 - one["target_prob"], rel_tol=1e-4, abs_tol=1e-6):
                yield f"mass {rest['mass']} without a token of {one['target_prob']}"
            left_over = [token for token in target if token != one["token"]]
            if rest["mass"] and list(listed)[: len(left_over)] != left_over:
                yield f"residual {list(listed)}, target without the rejected token {left_over}"
        if len(rejected) == 1:
            for each in rest["top"]:
                if each["token"] in target and each["target_prob"] != target[each["token"]]:
                    yield f"target_prob of token {each['token']} in residual and target_top differ"
    if following["token"] in listed and following["prob"] != listed[following["token"]]:
        yield f"next has probability {following['prob']}, listed {listed[following['token']]}"
    if following["prob"] <= 0:
        yield f"next was impossible: {following}"


def _of_totals(recording: Recording, footer: Line) -> Iterator[str]:
    sums: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for step in recording.steps:
        counts = {"new_tokens": len(step["emitted"]), "steps": 1, "target_forwards": 1, **step["counted"]}
        for name, count in counts.items():
            sums[step["sequence"]][name] += count
    for end in footer["sequences"]:
        for name in ("new_tokens", "steps", "target_forwards", "proposed", "accepted"):
            if end[name] != (total := sums[end["sequence"]][name]):
                yield f"footer: {name} of sequence {end['sequence']} is {end[name]}, its steps sum to {total}"


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        raise UserError("expected one file that generate.py --record wrote: python -m common.recording run.jsonl")
    recording = read_recording(Path(arguments[0]))
    wrong = list(contradictions(recording))
    for each in wrong:
        print(each)
    ended = "" if recording.footer else ", no footer: it was cut off"
    print(f"{len(recording.steps)} steps of {len(recording.header['sequences'])} sequences, {len(wrong)} wrong{ended}")
    return 1 if wrong else 0


if __name__ == "__main__":
    from common.options import run_main

    run_main(main, sys.argv[1:])
