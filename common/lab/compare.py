"""Two phases file by file, in reading order: added files, changed ones, removed ones.

New files come in the order of the later phase's README. Notebooks, READMEs and results are left out.

    python -c "from common.lab.compare import *; from common.phases import phases; print(compare(*phases()[:2]))"
"""

from __future__ import annotations

import difflib
import hashlib
import io
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError
from common.lab.snapshots import BENCH, OWN, SIGNS, Change, difference, read_list
from common.phases import Phase

LEFT_OUT = tuple(name for name in OWN if name not in BENCH)


@dataclass(frozen=True)
class FileDiff:
    """One file in both phases, as lines with their line ends; no lines if absent."""

    change: Change
    old: list[str]
    new: list[str]
    binary: bool = False  # each side is then one line that describes its content

    def matcher(self) -> difflib.SequenceMatcher[str]:
        return difflib.SequenceMatcher(None, self.old, self.new, autojunk=False)

    def counts(self) -> tuple[int, int]:
        """Count lines added and lines removed."""
        kept = sum(block.size for block in self.matcher().get_matching_blocks())
        return len(self.new) - kept, len(self.old) - kept


def _lines(content: bytes, binary: bool) -> list[str]:
    if binary and content:
        return [f"(binary, {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()[:12]})\n"]
    return io.StringIO(content.decode("utf-8", errors="replace"), newline="\n").readlines()


def _file_diff(old: Path, new: Path, change: Change) -> FileDiff:
    before, after = ((f / change.path).read_bytes() if (f / change.path).is_file() else b"" for f in (old, new))
    binary = b"\0" in before + after
    return FileDiff(change, _lines(before, binary), _lines(after, binary), binary)


def compare(old: Phase, new: Phase, part: str | None = None) -> list[FileDiff]:
    """Return the files in which two phases differ (or those of one part of the later one's list), in reading order.

    Raises UserError for a part that the list does not have.
    """
    later = max(old, new, key=lambda phase: phase.number)
    listing = read_list(later)
    if part is not None and part not in listing.parts:
        has = f"its parts are {', '.join(listing.parts)}" if listing.parts else "it has no parts"
        raise UserError(f"the list in {later.folder.name}/README.md has no part {part!r}; {has}")
    listed = {change.path: change for change in listing.changes}
    order = list(listed)
    found = []
    for path, sign in difference(old.folder, new.folder, LEFT_OUT).items():
        entry = listed.get(path) or listed.get(f"{path.split('/')[0]}/") or Change(sign, path)
        if part is None or entry.part == part:
            found.append(_file_diff(old.folder, new.folder, replace(entry, sign=sign, path=path)))

    def reading_order(diff: FileDiff) -> tuple[int, int]:
        path = diff.change.path
        return SIGNS.index(diff.change.sign), order.index(path) if path in listed else len(order)

    return sorted(found, key=reading_order)
