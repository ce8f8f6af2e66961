"""Cut the `code` suite from the held-out files of the standard library that runs this script.

The suite has two hundred prompts of ten kinds in two halves. The halves come from different files, and no two prompts
share text with each other or with each other's continuation, so the prompts of one half tell nothing of the other. The
result depends on the library's text, the tokenizer and the seed alone; `manifest.json` records which text it was.

    python -m common.prompts.make_code_prompts
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from tokenizers import Tokenizer

from common.errors import UserError
from common.models.corpus import SourceFile, fingerprint, read_corpus
from common.prompts import FOLDER, Half
from common.prompts.copies import copied_windows, windows
from common.prompts.places import Place, find_places

TOKENIZER = FOLDER.parent / "models" / "stdlib-10m" / "tokenizer.json"
QUOTAS = {  # prompts per half, the rarest kinds first; missing prompts of a kind are replaced by FILLERS
    "argument_parsing": 7,
    "regular_expression": 10,
    "data_table": 3,
    "imports": 15,
    "docstring": 15,
    "error_handling": 5,
    "comment": 6,
    "class_body": 14,
    "unit_test": 16,
    "function_body": 9,
}
FILLERS = ("function_body", "class_body", "unit_test")
SEED = 235  # of those tried, the one that splits files with arguments or expressions most evenly
PER_HALF = sum(QUOTAS.values())
PER_FILE = 8
SHORTEST, LONGEST = 16, 200  # tokens of a prompt
LENGTHS = 26, 380  # the range of the sampled length; the nearest possible one is used
CONTINUATION = (1200, 1600)  # characters
LEAST_CONTINUATION = 256  # tokens
_NOT_CODE = re.compile(r"copyright|licen[sc]e", re.IGNORECASE)


@dataclass(frozen=True)
class Cut:
    """A prompt in its file: text[start:end] is the prompt, text[end:stop] the continuation."""

    place: Place
    end: int
    stop: int


def half_of(path: str, seed: int) -> Half:
    digest = hashlib.sha256(f"prompts {seed} {path}".encode()).digest()
    return "test" if digest[0] % 2 else "calibrate"


def cut(place: Place, text: str, tokenizer: Tokenizer, seed: int) -> Cut | None:
    """Cut a prompt of random length at a place, or return None if no cut is long enough with enough text after it.

    The end is token-safe: the prompt's tokens followed by the continuation's are the tokens of the whole text, as a
    model would see them in the file.
    """
    begin = text[place.start : place.start + 12 * LONGEST]
    encoding = tokenizer.encode(begin)
    ids, offsets = encoding.ids, encoding.offsets
    ends = {}  # number of tokens -> end of the prompt
    for tokens in range(SHORTEST, min(LONGEST, len(ids) - 1) + 1):
        end = place.start + offsets[tokens][0]
        at_word = text[end].isspace() and not text[end - 1].isspace()
        if place.earliest <= end <= place.latest and (at_word or text[end - 1] == "("):
            ends[tokens] = end
    generator = random.Random(f"{seed} {place.kind} {place.file} {place.start}")
    wanted = math.exp(generator.uniform(math.log(LENGTHS[0]), math.log(LENGTHS[1])))
    for tokens in sorted(ends, key=lambda tokens: abs(tokens - wanted)):
        end = ends[tokens]
        if tokenizer.encode(text[place.start : end]).ids != ids[:tokens]:
            continue
        stop = text.rfind("\n", end + CONTINUATION[0], end + CONTINUATION[1])
        follows = text[end:stop]
        if stop < 0 or len(tokenizer.encode(follows).ids) < LEAST_CONTINUATION:
            return None
        return None if _NOT_CODE.search(text[place.start : end]) else Cut(place, end, stop)
    return None


class Selection:
    """The cuts chosen for one half: spread over the files, without overlaps.

    `used` holds the windows of text that may not occur (again); chosen windows are added.
    """

    def __init__(self, files: list[SourceFile], used: set[str], tokenizer: Tokenizer, seed: int) -> None:
        self.files = {file.path: file.text for file in files}
        self.used, self.tokenizer, self.seed = used, tokenizer, seed
        self.cuts: list[Cut] = []
        self.per_file: Counter[str] = Counter()
        order = random.Random(seed)
        self.places: dict[str, dict[str, list[Place]]] = {kind: {} for kind in QUOTAS}
        for file in files:
            found = find_places(file)
            order.shuffle(found)
            for place in found:
                self.places[place.kind].setdefault(file.path, []).append(place)

    def fill(self, kind: str, wanted: int) -> int:
        """Add up to `wanted` prompts of one kind; return how many were found."""
        return next((number for number in range(wanted) if not self._add_one(kind)), wanted)

    def _add_one(self, kind: str) -> bool:
        """Add a prompt from the least used file that has a place left; unsuitable places are dropped."""
        places = self.places[kind]
        for path in sorted(places, key=lambda path: (self.per_file[path], path)):
            while places[path] and self.per_file[path] < PER_FILE:
                found = cut(places[path].pop(), self.files[path], self.tokenizer, self.seed)
                if found and not self._overlaps(found) and self.used.isdisjoint(self._windows(found)):
                    self.used.update(self._windows(found))
                    self.cuts.append(found)
                    self.per_file[path] += 1
                    return True
        return False

    def _overlaps(self, new: Cut) -> bool:
        return any(
            old.place.file == new.place.file and old.place.start < new.stop and new.place.start < old.stop
            for old in self.cuts
        )

    def _windows(self, cut: Cut) -> set[str]:
        return set(windows(self.files[cut.place.file][cut.place.start : cut.stop]))


def choose(files: list[SourceFile], used: set[str], tokenizer: Tokenizer, seed: int) -> list[Cut]:
    """Choose PER_HALF cuts from the files of one half. Raises UserError if the files do not have as many."""
    written = [file for file in files if not file.path.startswith("encodings/")]  # generated tables
    selection = Selection(written, used, tokenizer, seed)
    missing = sum(quota - selection.fill(kind, quota) for kind, quota in QUOTAS.items())
    for kind in FILLERS * PER_HALF:
        if missing:
            missing -= selection.fill(kind, 1)
    if missing:
        raise UserError(f"the held-out files give {missing} prompts too few for one half")
    return selection.cuts


def make_rows(files: list[SourceFile], copied: set[str], tokenizer: Tokenizer, seed: int) -> list[dict[str, str]]:
    """Return the lines of `code.jsonl`, shuffled, so that any first N is a mix of kinds and halves."""
    used = set(copied)
    rows = []
    for half in get_args(Half):
        mine = [file for file in files if half_of(file.path, seed) == half]
        texts = {file.path: file.text for file in mine}
        for found in choose(mine, used, tokenizer, seed):
            place, text = found.place, texts[found.place.file]
            prompt, continuation = text[place.start : found.end], text[found.end : found.stop]
            rows.append(
                {"kind": place.kind, "half": half, "file": place.file, "prompt": prompt, "continuation": continuation}
            )
    random.Random(seed).shuffle(rows)
    return [{"id": f"code-{number:03}", **row} for number, row in enumerate(rows)]


def write_suite(folder: Path, seed: int) -> None:
    """Write `code.jsonl`, and `manifest.json`, which names its source text, into a folder."""
    heldout, train = read_corpus("heldout"), read_corpus("train")
    rows = make_rows(heldout, copied_windows(heldout, train), Tokenizer.from_file(str(TOKENIZER)), seed)
    manifest = {
        "python": platform.python_version(),
        "heldout": fingerprint(heldout),
        "train": fingerprint(train),
        "seed": seed,
        "prompts": len(rows),
    }
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "code.jsonl").write_text(lines, encoding="utf-8", newline="\n")
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="cut the code suite from the held-out files")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write code.jsonl and manifest.json into")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    write_suite(args.out, args.seed)


if __name__ == "__main__":
    main()
