"""What the READMEs print: links lead somewhere, and commands are valid; in the slow tests they run, in this order."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.lab.cli import COMMANDS
from common.options import parse_options
from common.phases import ROOT, Phase, phases
from common.results import read_manifest

READMES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(phase.folder / "README.md" for phase in phases())]
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(
    r"^    (?P<environment>(?:[A-Z_]+=\S+ )*)(?:\.venv/bin/)?(?P<command>(?:python(?! -c)|lab|torchrun) [^#\n\\]+)",
    re.MULTILINE,
)
# Commands that no test can run as printed, with the reason.
NOT_RUN = {
    "--model gpt2": "downloads a model",
    "--model Qwen/": "downloads a model",
    "--device cuda": "needs a GPU",
    "FILE": "names a file of the reader's",
    "FOLDER": "names a folder of the reader's",
    "bench.py": "is a measurement, which tests of the benches make small",
    "train_heads.py": "trains for an hour",
    "lab sweep": "is a measurement",
    "lab recommend": "is a measurement",
    "lab latency": "is a measurement",
    "lab bench": "is a measurement",
    "lab report": "names a folder of the reader's",
    "lab reproduce": "names a folder of the reader's",
    "lab serve": "runs until it is stopped",
    "lab complete": "needs a server",
    "lab chat": "needs a server",
}


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to a text's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(file: Path) -> list[tuple[str, list[str]]]:
    """Return the commands of a README in the order printed: environment, words."""
    text = file.read_text(encoding="utf-8")
    return [(match["environment"].strip(), shlex.split(match["command"])) for match in COMMAND.finditer(text)]


@pytest.mark.parametrize("file", READMES, ids=name_of)
def test_links_lead_somewhere(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    for link in LINK.findall(text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = file.parent / path if path else file
        assert target.exists(), f"{name_of(file)}: {link} is not there"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{name_of(file)}: {link} has no such heading"


@pytest.mark.parametrize("phase", phases(), ids=lambda phase: f"phase{phase.number}")
def test_the_committed_rows_are_measured_by_a_command_of_the_readme(phase: Phase) -> None:
    """What the bench was given is printed, and a command that resumes gives all of it: with less it is refused."""
    text = " ".join((phase.folder / "README.md").read_text(encoding="utf-8").split())
    found = re.findall(r"python (bench\.py[^`#]*?)(?=`| python | lab )", text)
    printed = [set(given(each.split())) for each in found]
    last = read_manifest(phase.folder / "results")["invocations"][-1]["environment"]["argv"]
    wanted = {each for each in given(last) if each != ("--resume", "")}
    assert any(wanted <= each for each in printed), f"no command gives {wanted}"
    for each in printed:
        assert ("--resume", "") not in each or wanted <= each, f"it resumes without {wanted - each}"


def given(argv: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the options of a bench's command, each with its value, but for those that may change from run to run."""
    for word, after in zip(argv, [*argv[1:], ""], strict=True):
        value = "" if after.startswith("--") else after
        if word.startswith("--") and word not in ("--output", "--only"):
            yield word, value


def test_anchors_are_those_of_github() -> None:
    assert anchors("# A\n### What's `new`, in 2?\n") == {"a", "whats-new-in-2"}


@pytest.mark.parametrize("file", READMES, ids=name_of)
def test_commands_are_valid(file: Path) -> None:
    for _, words in commands(file):
        program, rest = next(
            ((word, words[at + 1 :]) for at, word in enumerate(words) if word.endswith(".py")), ("", [])
        )
        if words[0] == "lab":
            assert words[1] in COMMANDS, f"{name_of(file)}: lab has no command {words[1]}"
        elif program:
            script = file.parent / program
            assert script.is_file(), f"{name_of(file)}: {program} is not there"
            if script.name == "generate.py":
                phase = next(phase for phase in phases() if phase.folder == script.parent)
                parse_options(importlib.import_module(f"{phase.package}.options").Options, rest, program="generate.py")


@pytest.mark.slow
@pytest.mark.parametrize("phase", phases(), ids=lambda phase: f"phase{phase.number}")
def test_commands_run_as_printed(phase: Phase, tmp_path: Path) -> None:
    folder = tmp_path / phase.folder.name
    shutil.copytree(phase.folder, folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for other in phases():
        if other != phase:
            (tmp_path / other.folder.name).symlink_to(other.folder)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for given, words in commands(phase.folder / "README.md"):
        line = " ".join(words)
        if any(part in line for part in NOT_RUN):
            continue
        environment = dict(pair.split("=", 1) for pair in given.split())
        done = subprocess.run(
            words,
            cwd=ROOT if words[0] == "lab" else folder,
            env={**os.environ, **environment, "PATH": path, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
