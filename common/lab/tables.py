"""`lab tables`: fill in the measured numbers of the READMEs, computed from the committed rows, and the table of tests.

A README marks the source of a number or a table; this command fills the space between the marks.

    <!-- table: speed; columns: variant (K), speedup (x plain); where: temperature=1; versus: plain -->
    | K | x plain |
    ...
    <!-- end -->
    It is <!-- value: speed; column: speedup; where: variant=cost, temperature=1 -->1.52 [1.47, 1.58]<!-- end -->

The first word is a section of `results/results.jsonl` beside the README (`from: FOLDER` names another folder). Columns
are those of common/tables.py, with headings. `where` selects cells and variants (`a|b`: one or the other), and `versus`
compares with another baseline than each row's own. `<!-- tests: engine -->` in CONTRIBUTING.md is filled by tested.py.
The line numbers of docs/glossary.md are those of the code that it quotes (glossary.py).

    lab tables           # rewrite every README
    lab tables --check   # exit status 1 if a README differs from the rows
"""

from __future__ import annotations

import re
import sys
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.lab.arguments import Parser
from common.lab.glossary import numbered
from common.lab.tested import table
from common.phases import ROOT, phases
from common.results import ROWS, Row, read_rows
from common.tables import derive, text_of
from common.terminal import cell_text, print_table

MARK = re.compile(r"<!-- (table|value|tests): ([^>]*?) -->(.*?)<!-- end -->", re.DOTALL)
UNMEASURED = "(not measured yet)"
FIELDS = ("columns", "column", "where", "versus", "from")


def parse_mark(text: str, where: str) -> tuple[str, dict[str, str]]:
    """Return the section and the fields of a mark. Raises UserError for an unknown field."""
    section, *rest = [part.strip() for part in text.split(";")]
    fields = {}
    for part in rest:
        name, _, value = part.partition(":")
        if name.strip() not in FIELDS:
            raise UserError(f"{where}: unknown field {name.strip()!r} in a mark; the fields are {', '.join(FIELDS)}")
        fields[name.strip()] = value.strip()
    return section, fields


def parse_columns(text: str) -> list[tuple[str, str]]:
    """Parse column names with their headings, from `variant (K), speedup (x plain), tokens_per_s`."""
    found = []
    for part in re.split(r",\s*(?![^(]*\))", text):
        match = re.fullmatch(r"(\w+)(?: \((.*)\))?", part.strip())
        if not match:
            raise UserError(f"a column is written `name` or `name (heading)`, got {part.strip()!r}")
        found.append((match[1], match[2] or match[1].replace("_", " ")))
    return found


def _matches(value: object, wanted: str) -> bool:
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    return shown in wanted.split("|") or str(value) in wanted.split("|")


def select(lines: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Return the lines whose columns have the values of `name=value, name=a|b`."""
    conditions = [part.strip().partition("=")[::2] for part in where.split(", ") if part.strip()]
    return [line for line in lines if all(_matches(line.get(name), value) for name, value in conditions)]


@cache
def _rows(folder: Path) -> list[Row]:
    return read_rows(folder)


def lines_of(readme: Path, section: str, fields: dict[str, str]) -> list[dict[str, Any]]:
    """Return the derived lines that a mark selects; none if its section has no rows yet.

    Raises UserError if the section has rows and none is selected.
    """
    folder = readme.parent / fields.get("from", "results")
    rows = [row for row in _rows(folder) if row.section == section] if (folder / ROWS).is_file() else []
    if not rows:
        return []
    lines = select(derive(rows, fields.get("versus")), fields.get("where", ""))
    if not lines:
        raise UserError(f"{readme}: {folder} has no row of section {section!r} where {fields.get('where', 'any')}")
    if any(line.get("synthetic") for line in lines):
        raise UserError(f"{readme}: {folder} holds rows of a dry run; a README quotes measurements only")
    return lines


def render(readme: Path, kind: str, mark: str) -> str:
    """Return the text between a mark and its end."""
    if kind == "tests":
        return f"\n{table(readme.parent)}\n"
    section, fields = parse_mark(mark, str(readme))
    lines = lines_of(readme, section, fields)
    if not lines:
        return UNMEASURED if kind == "value" else f"\n{UNMEASURED}\n"
    if kind == "value":
        if len(lines) != 1:
            raise UserError(f"{readme}: the mark `{mark}` selects {len(lines)} lines, expected one")
        return cell_text(text_of(lines[0], fields["column"]))
    columns = parse_columns(fields["columns"])
    out = StringIO()
    print_table("", [head for _, head in columns], [[text_of(line, c) for c, _ in columns] for line in lines], file=out)
    return "\n" + out.getvalue().strip() + "\n"


def rewrite(readme: Path) -> str:
    """Return the README with every marked number recomputed."""
    if readme.name == "glossary.md":
        return numbered(readme)
    text = readme.read_text(encoding="utf-8")
    return MARK.sub(lambda m: f"<!-- {m[1]}: {m[2]} -->{render(readme, m[1], m[2])}<!-- end -->", text)


def readmes(root: Path = ROOT) -> list[Path]:
    """List the files with marks: the READMEs of the root and of every phase, CONTRIBUTING.md, and the glossary."""
    ours = [root / "README.md", root / "CONTRIBUTING.md", root / "docs" / "glossary.md"]
    return [*ours, *(phase.folder / "README.md" for phase in phases(root))]


def run(arguments: list[str]) -> int:
    parser = Parser(
        "lab tables", "Fill the measured numbers of the READMEs, and the table of tests in CONTRIBUTING.md."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a README differs")
    options = parser.parse_args(arguments)
    differing = []
    for readme in readmes():
        text = rewrite(readme)
        if text != readme.read_text(encoding="utf-8"):
            differing.append(readme.relative_to(ROOT))
            if not options.check:
                readme.write_text(text, encoding="utf-8", newline="\n")
    for name in differing:
        print(f"{name}: {'differs from its sources; `lab tables` rewrites it' if options.check else 'rewritten'}")
    if not differing:
        print("every table has what its sources say", file=sys.stderr)
    return 1 if options.check and differing else 0
