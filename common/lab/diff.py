"""`lab diff`: the differences of two phases, in the terminal, as a table or as a page.

Printed to a pipe or a file, the difference is input for `git apply`.

    lab diff 1 2
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from common.errors import UserError
from common.lab.arguments import Parser
from common.lab.compare import FileDiff, compare
from common.lab.diff_html import page
from common.lab.snapshots import find_phase
from common.phases import ROOT, Phase, phases
from common.terminal import print_table

STYLES = {"+": "green", "-": "red", "@": "cyan"}


def unified(diff: FileDiff, old: Phase, new: Phase) -> Iterator[str]:
    """Yield the lines of a unified diff, without line ends; each hunk's head names its function or class."""
    change = diff.change
    hunks = list(diff.matcher().get_grouped_opcodes())
    if diff.binary or not hunks:  # no hunks: an empty file was added or removed
        yield " -> ".join(line.strip() for line in diff.old + diff.new) if diff.binary else "(an empty file)"
        return
    yield f"--- {'/dev/null' if change.sign == '+' else f'{old.folder.name}/{change.path}'}"
    yield f"+++ {'/dev/null' if change.sign == '-' else f'{new.folder.name}/{change.path}'}"
    for hunk in hunks:
        (_, i1, _, j1, _), (_, _, i2, _, j2) = hunk[0], hunk[-1]
        ranges = [f"{start + (end > start)},{end - start}" for start, end in ((i1, i2), (j1, j2))]
        inside = next((line for line in reversed(diff.old[:i1]) if re.match(r" *(async def|def|class) ", line)), "")
        yield f"@@ -{ranges[0]} +{ranges[1]} @@ {inside.strip()}".rstrip()
        for tag, a, b, c, d in hunk:
            kept = [(" ", line) for line in diff.old[a:b]]
            changed = [("-", line) for line in diff.old[a:b]] + [("+", line) for line in diff.new[c:d]]
            for sign, line in kept if tag == "equal" else changed:
                yield sign + line.removesuffix("\n")
                if not line.endswith("\n"):
                    yield "\\ No newline at end of file"


def print_diff(diffs: list[FileDiff], old: Phase, new: Phase) -> None:
    """Print on stdout: coloured in a terminal, else unchanged (rich would expand tabs)."""
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)

    def show(line: str, style: str) -> None:
        if console.is_terminal:
            console.print(Text(line, style))
        else:
            print(line)

    for diff in diffs:
        change = diff.change
        show(f"{change.sign} {change.path}  {change.words}".rstrip(), "bold reverse")
        for number, line in enumerate(unified(diff, old, new)):
            show(line, "bold" if number < 2 else STYLES.get(line[:1], ""))


def print_stat(diffs: list[FileDiff], title: str) -> None:
    """Print one line per file: lines added and removed."""
    rows = [(f"{diff.change.sign} {diff.change.path}", *diff.counts(), diff.change.words) for diff in diffs]
    total = (f"{len(rows)} files", sum(row[1] for row in rows), sum(row[2] for row in rows), "")
    print_table(title, ["file", "+ lines", "- lines", "what"], [*rows, total])


def write_page(file: Path, title: str, diffs: list[FileDiff]) -> None:
    try:
        file.write_text(page(title, diffs), encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"--html {file}: cannot be written ({error.strerror})") from None
    print(f"wrote {file}: {len(diffs)} files")


def run(arguments: list[str], root: Path = ROOT) -> int:
    parser = Parser("lab diff", "Show how two phases differ, without notebooks, READMEs and results.")
    parser.add_argument("first", metavar="A", type=int, help="the number of a phase")
    parser.add_argument("second", metavar="B", type=int, nargs="?", help="another; without it: A and the one before A")
    parser.add_argument("--part", metavar="NAME", help="only this part of the list in the later phase's README")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--stat", action="store_true", help="a table of the files, with their lines added and removed")
    form.add_argument("--html", metavar="FILE", type=Path, help="write one page, side by side, that needs no network")
    options = parser.parse_args(arguments)

    found = phases(root)
    old = new = find_phase(found, options.first)
    if options.second is not None:
        new = find_phase(found, options.second)
        if old == new:
            raise UserError(f"phase {old.number} does not differ from itself; name two phases")
    elif new == found[0]:
        raise UserError(f"phase {new.number} is the first: there is none before it to compare it with")
    else:
        old = found[found.index(new) - 1]
    diffs = compare(old, new, options.part)
    title = f"Phase {old.number} ({old.name}) to phase {new.number} ({new.name})"
    if options.stat:
        print_stat(diffs, title)
    elif options.html:
        write_page(options.html, title, diffs)
    else:
        print_diff(diffs, old, new)
    return 0
