"""Stepwise help for the function that fails first: a hint, then a comparison, and only then the solution.

The exercise folder records the help given for each function.

    lab check 2 my-phase-2 --hint
"""

from __future__ import annotations

import ast
import difflib
import json
import textwrap
from pathlib import Path

from rich.console import Console
from rich.syntax import Syntax
from rich.text import Text

from common.errors import UserError
from common.lab.exercise import Exercise
from common.lab.stubs import Stub, definitions, function_text, stubs_in
from common.phases import EXERCISE_FILE

LADDER = ("hint", "diff", "solution")
STYLES = {"+": "green", "-": "red", "@": "cyan"}


class Coach:
    """Gives one step of help after the previous one was given. UserError if there is no exercise."""

    def __init__(self, work: Exercise, folder: Path) -> None:
        self.work, self.folder = work, folder
        try:
            notes = json.loads((folder / EXERCISE_FILE).read_text(encoding="utf-8"))
            self.notes, self.helped = notes, dict(notes["helped"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{folder}: its {EXERCISE_FILE} is missing or damaged; help is for folders that lab start made"
            ) from None

    def next_help(self, stub: Stub) -> str:
        """Return the next step of help."""
        given = self.helped.get(str(stub))
        return LADDER[min(LADDER.index(given) + 1, len(LADDER) - 1)] if given in LADDER else LADDER[0]

    def give(self, step: str, stub: Stub, console: Console) -> None:
        """Print one step of help. Raises UserError if the one before it has not been given."""
        if LADDER.index(step) > LADDER.index(self.next_help(stub)):
            raise UserError(f"--{step} for {stub} comes after --{self.next_help(stub)}; ask for that first")
        if step == "hint":
            hint = self.work.hint(stub) or "the README has no hint for it; its docstring describes it"
            console.print(Text.assemble((f"Hint for {stub}: ", "bold"), hint))
        elif step == "diff":
            self.compare(stub, console)
        else:
            console.print(Text(f"The shipped {stub}:", "bold"))
            console.print(Syntax(self._solution(stub), "python", background_color="default"))
        if LADDER.index(step) >= LADDER.index(self.helped.get(str(stub), step)):
            self.helped[str(stub)] = step
            notes = {**self.notes, "helped": self.helped}
            (self.folder / EXERCISE_FILE).write_text(json.dumps(notes) + "\n", encoding="utf-8")

    def compare(self, stub: Stub, console: Console) -> None:
        """Print the differences between the learner's function and the shipped one."""
        text = (self.folder / stub.file).read_text(encoding="utf-8")
        own = function_text(text, stub.name)
        if own is None or str(stub) in map(str, stubs_in(stub.file, text)):
            console.print(f"{stub} is not written yet: there is nothing to compare. Try it, or ask for --solution.")
            return
        shipped = function_text(self.work.shipped[stub.file], stub.name) or ""
        if own == shipped:
            console.print(f"{stub}: as shipped")
            return
        names = f"yours: {stub}", "shipped"
        lines = difflib.unified_diff(own.splitlines(), shipped.splitlines(), *names, n=99, lineterm="")
        for line in lines:
            console.print(Text(line, STYLES.get(line[:1], "")))

    def _solution(self, stub: Stub) -> str:
        """Return the shipped function, with the private helpers that it uses and that the exercise does not give."""
        source = self.work.shipped[stub.file]
        given = {name for name, _ in definitions(ast.parse(self.work.sources[stub.file]))}
        wanted, parts = [stub.name], list[str]()
        for name in wanted:
            text = textwrap.dedent(function_text(source, name) or "")
            parts.append(text)
            named = {n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)}
            named |= {n.attr for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Attribute)}
            helpers = [n for n, _ in definitions(ast.parse(source)) if n not in given and n.rpartition(".")[2] in named]
            wanted += [helper for helper in helpers if helper not in wanted]
        return "\n\n".join(parts)
