"""Import what lies beside a phase's engine: its checks, its ladder, its training, its programs.

There `engine` is the name of the engine's package. Tests have the same package as `phase5`, and a second copy would
have classes of its own. So for the time of the import `engine.model` is the module `phase5.model`, under another name.

    check = beside(5, "checks.check")
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from common.phases import phases

# Packages that several phases have under one name.
BESIDE = ("benchmarks", "checks", "instruments", "ladder", "training")
_imported: dict[int, dict[str, ModuleType]] = {}  # of each phase, what was imported from beside its engine


class _Engine(MetaPathFinder, Loader):
    """Finds `engine` and all below it: the modules of a phase's package."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.partition(".")[0] == "engine" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.package + spec.name.removeprefix("engine"))
        self.specs[spec.name] = module.__spec__
        # The import system sets an attribute of the parent to each module that it finds here. It must not do so to one
        # that was imported with its parent, which may have a function of that name by now.
        for name, loaded in list(sys.modules.items()):
            if name.startswith(f"{self.package}."):
                sys.modules.setdefault(f"engine{name.removeprefix(self.package)}", loaded)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """The import system has just given the module the new spec; it gets its own one back."""
        assert module.__spec__ is not None
        module.__spec__ = self.specs.pop(module.__spec__.name)


def forget(names: Sequence[str]) -> dict[str, ModuleType]:
    """Take the modules of these packages out of sys.modules."""
    found = [name for name in sys.modules if name.partition(".")[0] in names]
    return {name: sys.modules.pop(name) for name in found}


def beside(number: int, name: str) -> ModuleType:
    """Import a module by the name that it has in the folder of a phase; the same one when asked again."""
    phase = next(phase for phase in phases() if phase.number == number)
    engine, names = _Engine(phase.package), ("engine", *BESIDE, name.partition(".")[0])
    others = forget(names)
    sys.modules.update(_imported.get(number, {}))
    sys.path.insert(0, str(phase.folder))
    sys.meta_path.insert(0, engine)
    try:
        return importlib.import_module(name)
    finally:
        sys.meta_path.remove(engine)
        sys.path.remove(str(phase.folder))
        kept = forget(names)
        _imported[number] = {key: module for key, module in kept.items() if key.partition(".")[0] != "engine"}
        sys.modules.update(others)
