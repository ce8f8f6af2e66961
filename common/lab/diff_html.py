"""The page that `lab diff --html` writes: side by side, syntax-coloured, light or dark like the reader's system.

The page is one file without scripts: nothing is downloaded, so it can be mailed, archived and read offline.

    lab diff 1 2 --html diff.html
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import zip_longest

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename
from pygments.lexers.special import TextLexer
from pygments.util import ClassNotFound

from common.lab.compare import FileDiff

CONTEXT = 3  # unchanged lines shown around a change
FOLDED = 5  # fewer hidden lines than this are not folded
OPEN = 1500  # with more changed lines the files of a page start closed

CSS = """
:root { color-scheme: light dark; --page: #fff; --text: #1f2328; --faint: #656d76; --line: #d8dee4; --head: #f6f8fa;
        --add: #dafbe1; --remove: #ffebe9; --void: #f6f8fa; --link: #0550ae; }
@media (prefers-color-scheme: dark) {
:root { --page: #0d1117; --text: #e6edf3; --faint: #8b949e; --line: #30363d; --head: #161b22;
        --add: #12301c; --remove: #3a1a1d; --void: #161b22; --link: #79c0ff; }
}
body { margin: 0 auto; padding: 1rem; max-width: 110rem; background: var(--page); color: var(--text);
       font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; }
a { color: var(--link); text-decoration: none; }
nav td { padding: 0 1.2rem 0 0; }
.path, .code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.count { color: var(--faint); text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.file { margin-top: 2rem; border: 1px solid var(--line); border-radius: 6px; }
.file > summary { position: sticky; top: 0; display: flex; gap: 1rem; padding: .5rem .8rem; cursor: pointer;
                  background: var(--head); border-bottom: 1px solid var(--line); border-radius: 6px; }
.file > summary .path { font-weight: 600; white-space: nowrap; }
.file > summary .count { margin-left: auto; }
.code { width: 100%; border-collapse: collapse; table-layout: fixed; font-size: 12.5px; line-height: 1.45; }
.code td { padding: 0 .6rem; vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
.code .number { color: var(--faint); text-align: right; user-select: none; white-space: nowrap; }
.code .add { background: var(--add); }
.code .remove { background: var(--remove); }
.one td.add:not(.number), .one td.remove:not(.number) { background: none; }
.code .void { background: var(--void); }
.fold > summary { padding: .1rem .8rem; color: var(--faint); background: var(--head); font-size: 13px; cursor: pointer }
@media (max-width: 50rem) { /* a phone: the old line above the new one, and unchanged ones once */
body { padding: .5rem; }
nav table, nav tbody { display: block; }
nav tr { display: flex; flex-wrap: wrap; column-gap: .6rem; padding-bottom: .3rem; }
nav td { padding: 0; overflow-wrap: anywhere; }
nav td:nth-child(5) { flex: 1 0 100%; order: 1; padding-left: 1.2rem; }
.file > summary { position: static; flex-wrap: wrap; }
.file > summary .path { white-space: normal; overflow-wrap: anywhere; }
.code, .code tbody { display: block; }
.code colgroup, .code .void, .two td.same:nth-child(-n+2) { display: none; }
.code tr { display: grid; grid-template-columns: 4rem 1fr; }
}
"""

Row = tuple[str, int | None, int | None]  # kind, line of the old file, line of the new one (from 0)


def style_sheet() -> str:
    light = HtmlFormatter(style="friendly").get_token_style_defs(".code")
    dark = HtmlFormatter(style="github-dark").get_token_style_defs(".code")
    return "\n".join(
        [
            CSS.strip(),
            *("@media not all and (prefers-color-scheme: dark) {", *light, "}"),
            *("@media (prefers-color-scheme: dark) {", *dark, "}"),
        ]
    )


def coloured(path: str, lines: list[str]) -> list[str]:
    """Return the lines as HTML, highlighted as one text because a string can span lines."""
    try:
        lexer = get_lexer_for_filename(path, stripnl=False, ensurenl=True)
    except ClassNotFound:
        lexer = TextLexer(stripnl=False, ensurenl=True)
    html: str = highlight("".join(lines), lexer, HtmlFormatter(nowrap=True))
    return html.split("\n")[: len(lines)]


def runs(diff: FileDiff) -> Iterator[tuple[bool, list[Row]]]:
    """Yield the rows of a file from top to bottom, in runs: folded or shown."""
    for tag, i1, i2, j1, j2 in diff.matcher().get_opcodes():
        rows: list[Row] = [(tag, i, j) for i, j in zip_longest(range(i1, i2), range(j1, j2))]
        head = 0 if i1 == j1 == 0 else CONTEXT
        tail = 0 if i2 == len(diff.old) and j2 == len(diff.new) else CONTEXT
        if tag != "equal" or len(rows) < head + tail + FOLDED:
            yield False, rows
            continue
        yield False, rows[:head]
        yield True, rows[head : len(rows) - tail]
        yield False, rows[len(rows) - tail :]


def cells(kind: str, line: int | None, code: list[str]) -> str:
    if line is None:
        return '<td class="void"></td><td class="void"></td>'
    sign = {"add": "+", "remove": "&minus;"}.get(kind, " ")
    return f'<td class="number {kind}">{line + 1} {sign}</td><td class="{kind}">{code[line]}</td>'


def file_html(diff: FileDiff, number: int, opened: bool) -> str:
    """Return the HTML of one file: two columns if both phases have it, else one."""
    change = diff.change
    old, new = coloured(change.path, diff.old), coloured(change.path, diff.new)
    sides = [side for side in ("old", "new") if side != {"+": "old", "-": "new"}.get(change.sign)]
    columns = '<col style="width: 4.5rem"><col>' * len(sides)
    body = []
    for folded, rows in runs(diff):
        if not rows:
            continue
        lines = []
        for tag, i, j in rows:
            before = cells("same" if tag == "equal" else "remove", i, old) if "old" in sides else ""
            after = cells("same" if tag == "equal" else "add", j, new) if "new" in sides else ""
            lines.append(f"<tr>{before}{after}</tr>")
        table = (
            f'<table class="code {"one" if len(sides) == 1 else "two"}"><colgroup>{columns}</colgroup>\n'
            + "\n".join(lines)
            + "\n</table>"
        )
        fold = f'<details class="fold"><summary>{len(rows)} unchanged lines</summary>\n{table}\n</details>'
        body.append(fold if folded else table)
    added, removed = diff.counts()
    return (
        f'<details class="file" id="file-{number}"{" open" if opened else ""}><summary>'
        f'<span class="path">{change.sign} {escape(change.path)}</span><span>{escape(change.words)}</span>'
        f'<span class="count">+{added} &minus;{removed}</span>'
        '<a href="#top">top</a></summary>\n' + "\n".join(body) + "\n</details>"
    )


def contents(diffs: list[FileDiff]) -> str:
    """Return the table of contents."""
    rows = []
    for number, diff in enumerate(diffs):
        change = diff.change
        added, removed = diff.counts()
        rows.append(
            f'<tr><td>{change.sign}</td><td><a class="path" href="#file-{number}">{escape(change.path)}</a></td>'
            f'<td class="count">+{added}</td><td class="count">&minus;{removed}</td>'
            f'<td>{escape(change.words)}</td><td class="count">{escape(change.part)}</td></tr>'
        )
    return "<nav><table>\n" + "\n".join(rows) + "\n</table></nav>"


def page(title: str, diffs: list[FileDiff]) -> str:
    """Return the whole page."""
    opened = sum(sum(diff.counts()) for diff in diffs) <= OPEN
    files = "\n".join(file_html(diff, number, opened) for number, diff in enumerate(diffs))
    return (
        '<!DOCTYPE html>\n<html lang="en" id="top">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style_sheet()}\n</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{contents(diffs)}\n{files}\n</body>\n</html>\n"
    )
