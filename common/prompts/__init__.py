"""The prompt suites: the fixed inputs that every figure of the lab is measured on.

`code` is cut from held-out files of the standard library and keeps the true continuation beside each prompt, so that
acceptance can be measured on forced text. `prose` is for real language models.

    python -c "from common.prompts import load_prompts; print(load_prompts('code', 'test')[0].text)"
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from common.errors import UserError

Half = Literal["calibrate", "test"]

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Prompt:
    """One prompt. `continuation` is the text that truly follows, without a gap; "" where there is none."""

    id: str
    kind: str
    half: Half
    text: str
    continuation: str
    file: str


def suite_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.jsonl"))


def load_prompts(suite: str, half: Half | None = None) -> list[Prompt]:
    """The prompts of one suite, or of one half of it, in file order (which is shuffled: any first N is a mix).

    Whatever is tuned on `calibrate` is claimed on `test`. Raises UserError for an unknown suite or half.
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
