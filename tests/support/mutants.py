"""Mutants: sources with one piece replaced, which a test must reject.

`mutated` makes a mutant within the process, for a proof to run on. `Mutant` describes one for `make mutants`, which
runs the quick tests of its subject on a copy of the repository (mutation.py); the lists are in tests/mutants/.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterable
from dataclasses import dataclass


def replaced(source: str, where: str, changes: Iterable[tuple[str, str]]) -> str:
    """Return the source with these pieces replaced. A missing piece fails, so no mutant becomes stale."""
    for old, new in changes:
        assert old in source, f"no longer in {where}: {old}"
        source = source.replace(old, new)
    return source


def mutated(module: types.ModuleType, *changes: tuple[str, str], **names: object) -> types.ModuleType:
    """Return the module with pieces of its source replaced, and then some of its names."""
    source = replaced(inspect.getsource(module), module.__name__, changes)
    mutant = types.ModuleType(module.__name__)
    mutant.__package__ = module.__package__
    sys.modules[module.__name__] = mutant  # dataclasses look up their module
    try:
        exec(compile(source, module.__file__ or "mutant", "exec"), mutant.__dict__)
    finally:
        sys.modules[module.__name__] = module
    mutant.__dict__.update(names)
    return mutant


@dataclass(frozen=True)
class Mutant:
    """One replacement; `old` occurs once in the file."""

    file: str  # from the root of the repository
    old: str
    new: str
    tests: tuple[str, ...]  # arguments of pytest
    equivalent: str = ""  # why it is equivalent to the original; by default some test must fail

    @property
    def name(self) -> str:
        return f"{self.file}: {' '.join(self.old.split())} -> {' '.join(self.new.split())}"


def mutants(file: str, tests: tuple[str, ...], *changes: tuple[str, str] | tuple[str, str, str]) -> list[Mutant]:
    """Return the mutants of one file from (old, new), or (old, new, why it is equivalent)."""
    return [Mutant(file, change[0], change[1], tests, "".join(change[2:])) for change in changes]
