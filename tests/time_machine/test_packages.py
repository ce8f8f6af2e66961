"""The phases as packages: side by side in one process, and in a wheel that works without this repository."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from common.phases import ROOT, Phase, phases

# Prints, as JSON, where each package named on the command line comes from.
WHERE = "import importlib, json, sys; print(json.dumps([importlib.import_module(m).__file__ for m in sys.argv[1:]]))"


def test_engines_import_their_own_modules_relatively(phase: Phase) -> None:
    for file in sorted(phase.folder.glob("engine/**/*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            else:
                continue
            wrong = [name for name in names if re.match(r"(engine|phase\d+)\b", name)]
            assert not wrong, (
                f"{file}:{node.lineno}: {wrong[0]} may be another phase's; write `from .module import ...`"
            )


def test_all_phases_live_in_one_process() -> None:
    engines = {phase.package: phase.folder / "engine" for phase in phases()}
    llms = {importlib.import_module(package).LLM for package in engines}
    assert len(llms) == len(engines)
    for name, module in list(sys.modules.items()):
        package = name.split(".")[0]
        if package in engines:
            assert Path(module.__file__ or "").is_relative_to(engines[package]), name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, because setuptools leaves a build folder, and would reuse an old one."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    for folder in (ROOT / "common", *(phase.folder for phase in phases())):
        shutil.copytree(folder, source / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--wheel-dir", target, source], capture_output=True, text=True, cwd=source)
    assert done.returncode == 0, done.stderr
    (built,) = target.glob("*.whl")
    return built


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    folders = {"common": ROOT / "common"} | {phase.package: phase.folder / "engine" for phase in phases()}
    expected = {
        f"{package}/{file.relative_to(folder).as_posix()}"
        for package, folder in folders.items()
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected, "see packages, package-data in pyproject"
    assert {"common/models/stdlib-10m/model.safetensors", "common/models/stdlib-1m/model.safetensors"} <= expected


@pytest.mark.slow
def test_the_demo_works_from_the_wheel_alone(
    wheel: Path, tmp_path: Path, make_environment: Callable[[Path], None]
) -> None:
    make_environment(tmp_path / "env")
    python = str(tmp_path / "env/bin/python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)

    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SPECDEC_"))}
    packages = ["common", *(phase.package for phase in phases())]
    where = subprocess.run([python, "-c", WHERE, *packages], capture_output=True, cwd=tmp_path, env=plain, check=True)
    for file in json.loads(where.stdout):
        assert Path(file).is_relative_to(tmp_path / "env")
    demo = [str(tmp_path / "env/bin/lab"), "demo", "--prompts", "1", "--max-tokens", "8", "--rounds", "2"]
    done = subprocess.run([*demo, "--output", "out"], capture_output=True, text=True, cwd=tmp_path, env=plain)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert [row["phase"] for row in rows] == [*(phase.number for phase in phases()), None]
    assert (tmp_path / "out/demo.png").stat().st_size > 10_000
    for phase in phases():
        assert re.search(rf"^\| +{phase.number} \|.* yes +\|$", done.stdout, re.MULTILINE), done.stdout
