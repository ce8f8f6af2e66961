"""Shared by the tests of the tools: git without this machine's settings, scratch repositories, environments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.lab import check
from common.lab.cli import main
from common.phases import ROOT
from tests.support import forked


@pytest.fixture
def plain_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make git behave as in a fresh account, also inside a hook, whose GIT_DIR names the repository of the commit."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "A Tester")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "tester@example.org")


@pytest.fixture
def clone(tmp_path: Path, plain_git: None) -> Path:
    """Make a repository with one commit: the files of this work tree, without ignored ones."""
    folder = tmp_path / "clone"
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    for path in filter(None, listed):
        if (ROOT / path).is_file():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, folder / path)
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "Everything"]):
        subprocess.run(["git", "-c", "core.compression=0", *arguments], cwd=folder, check=True)
    return folder


@pytest.fixture
def make_environment() -> Callable[[Path], None]:
    """Return a function that makes a virtual environment with this one's dependencies, but not this repository."""

    def make(folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        find = [str(folder / "bin/python"), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        site = Path(subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip())
        # Folders that a .pth file names are searched, but the .pth files in them (our editable install) are not read.
        dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (site / "dependencies.pth").write_text("\n".join(dependencies), encoding="utf-8")

    return make


@pytest.fixture
def forked_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `lab check` run its tests in a process that need not import torch and pytest again."""
    monkeypatch.setattr(check, "subprocess", SimpleNamespace(Popen=forked.start, PIPE=subprocess.PIPE))


class Scratch:
    """A repository in a temporary folder, which is the current folder."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.capsys = capsys
        self.git("init", "--quiet")
        for phase in ("phase-1-first", "phase-2-second", "phase-3-third"):
            self.write({f"{phase}/engine/__init__.py": '"""A phase."""\n', f"{phase}/engine/code.py": self.text()})
        self.commit("Three phases")

    @staticmethod
    def text(changes: Mapping[int, str] | None = None) -> str:
        """Return twelve lines, some of them changed; the last one has no newline at its end."""
        return "\n".join((changes or {}).get(n, f"line {n}") for n in range(1, 13))

    def git(self, *arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=self.folder, capture_output=True, text=True, check=True).stdout

    def write(self, files: Mapping[str, str | bytes | None]) -> None:
        """Write files; None removes one."""
        for path, content in files.items():
            file = self.folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                file.unlink()
            else:
                file.write_bytes(content if isinstance(content, bytes) else content.encode())

    def commit(self, message: str, files: Mapping[str, str | bytes | None] | None = None) -> str:
        self.write(files or {})
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", message)
        return self.git("rev-parse", "HEAD").strip()

    def port(self, *arguments: str) -> tuple[int, str]:
        status = main(["port", *arguments])
        return status, self.capsys.readouterr().out

    def read(self, path: str) -> str:
        return (self.folder / path).read_bytes().decode()

    def status(self) -> str:
        return self.git("status", "--porcelain")

    @property
    def under_way(self) -> bool:
        return (self.folder / ".git" / "lab-port.json").exists()


@pytest.fixture
def scratch(
    tmp_path: Path, plain_git: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Scratch:
    monkeypatch.chdir(tmp_path)
    return Scratch(tmp_path, capsys)
