"""Recordings made of other recordings: longer ones, and ones whose tokens have other texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, lines: list[Line]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def longer(path: Path, tokens: int, output: Path) -> Path:
    """Repeat the steps of a recording of one sequence until it has so many tokens, without a cache."""
    header, *steps, footer = read(path)
    header["context"], made, position = 10**9, list[Line](), len(header["prompts"][0]["tokens"])
    end, totals = 0.0, {"new_tokens": 0, "steps": 0, "target_forwards": 0, "proposed": 0, "accepted": 0}
    whole = [step for step in steps if len(step["emitted"]) == len(step["path"]) + 1]
    while totals["new_tokens"] < tokens:
        step = {**whole[len(made) % len(whole)]}
        step |= {"step": len(made), "position": position, "window_start": 0}
        step |= {"cache_before": None, "cache_after": None, "prefill_ms": None}
        step["start_ms"], step["end_ms"] = end, end + step["end_ms"] - step["start_ms"]
        end = step["end_ms"]
        position += len(step["emitted"])
        counts = {"new_tokens": len(step["emitted"]), "steps": 1, "target_forwards": 1, **step["counted"]}
        totals = {name: total + counts[name] for name, total in totals.items()}
        made.append(step)
    footer["sequences"][0] |= totals
    return write(output, [header, *made, footer])


def with_texts(path: Path, texts: list[str], output: Path) -> Path:
    """Give the tokens of a recording other texts, in turns."""

    def change(value: Any) -> Any:
        if isinstance(value, dict):
            changed = {key: change(each) for key, each in value.items()}
            if "string" in value:
                changed["string"] = texts[value["token"] % len(texts)]
            return changed
        return [change(each) for each in value] if isinstance(value, list) else value

    lines = [change(line) for line in read(path)]
    prompt = lines[0]["prompts"][0]
    prompt["strings"] = [texts[token % len(texts)] for token in prompt["tokens"]]
    return write(output, lines)
