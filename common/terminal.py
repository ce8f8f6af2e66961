"""Output of a bench or a demo: a table for people, one JSON document for programs, and progress on stderr.

python -c "from common.terminal import *; print_table('Speed', ['phase', 'tokens/s'], [[1, 20.5], [2, 41]])"
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich import box
from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from common.results import to_plain

MIN_WIDTH = 120


def cell_text(value: object) -> str:
    """Format a table cell: about four digits of a float, `-` for nothing, yes and no for truth values."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:.{0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3}f}"


def _is_numeric(cells: Sequence[str]) -> bool:
    """Return whether all cells but empty ones begin like numbers (`1.5`, `-3`, `1.52 [1.48, 1.55]`, `2.1x`)."""
    filled = [cell for cell in cells if cell not in ("", "-")]
    return bool(filled) and all(re.match(r"[-+]?\.?\d[\d.,e+-]*(x|%|ms|s)?( |$)", cell) for cell in filled)


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], file: TextIO | None = None
) -> None:
    """Print a table (on stdout, or in `file`): numbers right-aligned, never cut, at least 120 characters of room.

    If stdout is not a terminal the table is plain Markdown, ready to be pasted into a README.
    """
    console = Console(file=file or sys.stdout, highlight=False, markup=False)
    cells = [[cell_text(value) for value in row] for row in rows]
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else box.MARKDOWN, pad_edge=not console.is_terminal)
    for index, column in enumerate(columns):
        justify: JustifyMethod = "right" if _is_numeric([row[index] for row in cells]) else "left"
        table.add_column(Text(column), justify=justify, no_wrap=True)
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    needed = console.measure(table, options=console.options.update(width=10_000)).maximum
    console.width = max(MIN_WIDTH, console.width, needed)
    with console.capture() as captured:
        console.print(table)
    console.print(Text(title, style="bold"), end="\n\n")
    # rich pads the table with lines of spaces
    print("\n".join(line.rstrip() for line in captured.get().splitlines() if line.strip()), file=console.file)


def print_document(document: dict[str, Any]) -> None:
    """Print one JSON document on one line; a program's last output, so that `... | tail -1` returns it.

    Raises ValueError for NaN and infinity, which are not JSON.
    """
    print(json.dumps(document, default=to_plain, allow_nan=False), flush=True)


@contextmanager
def progress(title: str, total: int | None) -> Iterator[Callable[[str], None]]:
    """Show progress on stderr over `total` steps (None: unknown); call the given function after each step.

    The function's argument names the finished step.

    with progress("timing", total=12) as step:
        interleave(variants, repeats=5, on_run=step)
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)

        def step(what: str) -> None:
            bar.update(task, advance=1, description=f"{title}: {what}")

        yield step
