"""The prompt suites: the fixed inputs of every figure of the lab.

`code` is cut from held-out files of the standard library and has the true continuation of each prompt, so that
acceptance can be measured on forced text. `prose` is for real language models.

    python -c "from common.prompts import load_prompts; print(load_prompts('code', 'test')[0].text)"
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from common.errors import UserError

Half = Literal["calibrate", "test"]

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Prompt:
    """One prompt. `continuation` is the true text that follows immediately; "" if unknown."""

    id: str
    kind: str
    half: Half
    text: str
    continuation: str
    file: str


def suite_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.jsonl"))


def load_prompts(suite: str, half: Half | None = None) -> list[Prompt]:
    """Load the prompts of one suite, or of one half of it, in file order (shuffled: any first N is a mix).

    What is tuned on `calibrate` is claimed on `test`. Raises UserError for an unknown suite or half.
    """
    if suite not in suite_names():
        raise UserError(f"no prompt suite {suite!r}; the suites are {', '.join(suite_names())}")
    if half is not None and half not in get_args(Half):
        raise UserError(f"no half {half!r} in the prompt suites; the halves are {', '.join(get_args(Half))}")
    with (FOLDER / f"{suite}.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    prompts = [
        Prompt(row["id"], row["kind"], row["half"], row["prompt"], row.get("continuation", ""), row.get("file", ""))
        for row in rows
    ]
    return [prompt for prompt in prompts if half is None or prompt.half == half]


def prompt_of_file(path: Path) -> Prompt:
    """Read a file whose whole text is one prompt. Raises UserError for an empty file or one that is not text."""
    text = _text_of(path)
    if not text:
        raise UserError(f"{path} is empty; expected the text of a prompt")
    return Prompt(path.name, "own", "test", text, "", str(path))


def read_prompts(path: Path) -> list[Prompt]:
    """Read a JSONL file: an object a line with `prompt`, and optionally `id` and `continuation`.

    Raises UserError for an empty file, and names a line that is not such an object.
    """
    prompts = []
    for number, line in enumerate(_text_of(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: invalid JSON ({error}); expected {EXPECTED}") from None
        row = row if isinstance(row, dict) else {}
        text, name, rest = row.get("prompt"), row.get("id", f"line-{number}"), row.get("continuation", "")
        if not (isinstance(text, str) and text and isinstance(name, str) and isinstance(rest, str)):
            raise UserError(f"{path}, line {number}: expected {EXPECTED}")
        prompts.append(Prompt(name, "own", "test", text, rest, str(path)))
    if not prompts:
        raise UserError(f"{path} holds no prompt; expected {EXPECTED} on every line")
    if len({prompt.id for prompt in prompts}) < len(prompts):
        raise UserError(f"{path}: an id occurs twice; every prompt needs its own")
    return prompts


EXPECTED = '{"prompt": "text"} with, if wanted, "id" and "continuation"'


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error})") from None


def hash_of(prompts: Sequence[Prompt]) -> str:
    """Return the SHA-256 of the texts of prompts, with their continuations."""
    texts = [[prompt.text, prompt.continuation] for prompt in prompts]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()
