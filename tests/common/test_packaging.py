"""pyproject.toml lists the folders' packages (tests/time_machine/test_packages.py checks the wheel itself)."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from common.phases import phases

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _packages(folder: Path, name: str) -> dict[str, Path]:
    """Return the package in a folder and all packages below it, by their dotted names."""
    inner = (init.parent for init in folder.rglob("__init__.py"))
    return {".".join([name, *path.relative_to(folder).parts]): path for path in inner}


def test_every_package_is_listed() -> None:
    expected = _packages(ROOT / "common", "common")
    for phase in phases(ROOT):
        expected |= _packages(phase.folder / "engine", phase.package)
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(expected)


def test_every_phase_is_mapped_to_its_engine() -> None:
    expected = {phase.package: f"{phase.folder.name}/engine" for phase in phases(ROOT)}
    assert PROJECT["tool"]["setuptools"]["package-dir"] == expected


def test_every_dependency_is_pinned_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(pin.name): str(pin.specifier) for pin in map(Requirement, filter(_is_pin, lines))}
    extras = PROJECT["project"]["optional-dependencies"]
    for text in PROJECT["project"]["dependencies"] + extras["dev"] + extras["notebook"]:
        wanted = Requirement(text)
        pin = pins[canonicalize_name(wanted.name)]
        assert pin.startswith("==")
        assert wanted.specifier.contains(pin.removeprefix("==")), f"{text}, but constraints.txt has {pin}"
    assert "+" not in pins[canonicalize_name("torch")], "a build such as +cpu would tie everyone to that build"


def _is_pin(line: str) -> bool:
    return bool(line) and not line.startswith("#")
