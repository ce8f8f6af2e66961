"""The commands of CONTRIBUTING.md, one after the other, in a scratch clone with its own environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from common.phases import ROOT, phases

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CHECKS = "Run the checks"
SECTIONS = {section.split("\n")[0]: re.findall(r"^    (.+)$", section, re.MULTILINE) for section in TEXT.split("\n## ")}

# Replaces the editor: writes the text of CONTRIBUTING.md, or any text if CONTRIBUTING.md gives none.
EDITOR = f"""#!{sys.executable}
import pathlib, re, sys
for path in map(pathlib.Path, sys.argv[1:]):
    text = path.read_text() if path.exists() else ""
    if path.name == "pyproject.toml":
        (phase,) = pathlib.Path().glob("phase-8-*")
        lists = re.search(r"packages = \\[.*?\\]", text, re.DOTALL).group()
        last = max(re.findall(r'"(phase\\d)', lists))
        copies = [name.replace(last, "phase8") for name in re.findall(rf'"{{last}}[^"]*"', lists)]
        text = text.replace(lists, lists[:-1].rstrip().rstrip(",") + ", " + ", ".join(copies) + "]")
        text = re.sub(r"(\\[tool.setuptools.package-dir\\]\\n)", rf'\\1phase8 = "{{phase}}/engine"\\n', text)
    else:
        text = "# edited\\n" + text
    path.write_text(text)
"""


@pytest.fixture
def run(clone: Path, make_environment: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that runs commands in the clone as one bash script, which ends at the first failure."""
    environment = clone / ".venv"
    make_environment(environment)
    for tool in ("pytest", "mypy"):  # their packages are found, but their scripts start the other environment's Python
        (environment / "bin" / tool).write_text(f'#!/bin/sh\nexec "{environment}/bin/python" -m {tool} "$@"\n')
        (environment / "bin" / tool).chmod(0o755)
    (environment / "bin/ruff").symlink_to(Path(sysconfig.get_path("scripts"), "ruff"))
    if (ROOT / ".venv/torch-index").exists():
        shutil.copy(ROOT / ".venv/torch-index", environment)
    editor = clone.parent / "editor"
    editor.write_text(EDITOR)
    editor.chmod(0o755)
    for name in [name for name in os.environ if "MAKE" in name or name in ("TORCH_INDEX", "PYTHON", "PYTHONPATH")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("EDITOR", str(editor))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # everything that `make install` needs is installed already
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip inverts this one: no isolation

    def script(commands: list[str]) -> str:
        bash = ["bash", "-euxo", "pipefail", "-c", "\n".join(commands)]
        done = subprocess.run(bash, cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
        return done.stdout

    return script


@pytest.mark.slow
def test_every_command_for_phases_works(run: Callable[..., str], clone: Path) -> None:
    out = run([command for title, commands in SECTIONS.items() if title != CHECKS for command in commands])
    assert f"lab drift: {len(phases()) + 1} phases differ as their READMEs say" in out, "the clone's own lab saw them"
    for path, changed in (("context.py", phases(clone)), ("example.py", phases(clone)[1:])):
        assert all((phase.folder / "engine" / path).read_text().startswith("# edited\n") for phase in changed)
    status = ["git", "status", "--porcelain"]
    assert subprocess.run(status, cwd=clone, capture_output=True, text=True, check=True).stdout == ""


@pytest.mark.slow
def test_the_checks_run(run: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run all of it again, and then the checks; pytest collects every test but runs none."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "--collect-only")
    out = run([command for commands in SECTIONS.values() for command in commands])
    assert "test_every_command_for_phases_works" in out
