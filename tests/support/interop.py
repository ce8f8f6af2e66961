"""Installs programs that others wrote, each into an environment of its own, and runs the tests that use them.

    python -m tests.support.interop          # what `make interop` runs

Their dependencies do not fit beside ours, nor beside each other's. An environment sees the packages of this Python and
holds what differs, so torch is not installed again. A program that cannot be installed is reported by name with pip's
reason, and its tests are skipped with that reason.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath

import pytest

from common.phases import ROOT

FOLDER = Path(os.environ.get("INTEROP", ROOT / ".venv" / "interop")).absolute()
PACKAGES = Path(sysconfig.get_path("purelib"))


@dataclass(frozen=True)
class Program:
    """What one environment holds: packages, and scripts that a project ships in its source archive alone."""

    name: str
    packages: tuple[str, ...]
    archive: str = ""
    scripts: tuple[str, ...] = ()


VLLM = ".buildkite/performance-benchmarks/scripts/convert-results-json-to-markdown.py"
PROGRAMS = (
    # Only what `transformers serve` needs beside our packages: transformers[serving] names torch and openai too.
    Program("transformers", ("fastapi==0.165.0", "accelerate==1.15.0")),
    Program("lm-eval", ("lm-eval[api]==0.4.13",)),
    Program("litellm", ("litellm==1.110.2",)),
    Program("guidellm", ("guidellm==0.8.1",)),
    Program("aiperf", ("aiperf==0.13.0",)),
    Program("ray", ("ray==2.60.0",)),
    Program("vllm", ("setuptools>=77", "setuptools-rust", "setuptools-scm", "tabulate"), "vllm==0.33.0", (VLLM,)),
    Program(
        "llama.cpp",
        ("scikit-build-core", "tabulate", "GitPython"),
        "llama-cpp-python==0.3.36",
        ("vendor/llama.cpp/scripts/compare-llama-bench.py",),
    ),
)
TESTS = ("tests/phase7/test_interop.py", "tests/phase7/test_other_readers.py")


def python(name: str) -> Path:
    """Return the Python of an environment; skip the test, with the reason, if the program is not there."""
    folder = FOLDER / name
    if not (folder / "installed").exists():
        failed = folder / "failed"
        pytest.skip(f"{name}: {failed.read_text('utf-8') if failed.exists() else '`make interop` installs it'}")
    return folder / "bin" / "python"


def install(program: Program) -> str:
    """Make an environment; return one line about it. Nothing is done twice, unless it failed."""
    folder = FOLDER / program.name
    stamp, wanted = folder / "installed", repr((program, PACKAGES))
    what = ", ".join((*program.packages, *filter(None, [program.archive])))
    if stamp.exists() and stamp.read_text("utf-8") == wanted:
        return f"{program.name}: {what}"
    try:
        venv.create(folder, with_pip=True, clear=True, symlinks=True)
        inside = folder / PACKAGES.relative_to(sys.prefix)
        (inside / "shared.pth").write_text(f"{PACKAGES}\n", "utf-8")
        # pip must keep our torch: another would be the build for CUDA.
        (folder / "constraints.txt").write_text(f"torch=={version('torch').partition('+')[0]}\n", "utf-8")
        _pip(folder, "install", "-c", str(folder / "constraints.txt"), *program.packages)
        if program.archive:
            _extract(folder, program)
    except subprocess.CalledProcessError as error:
        lines = [line.strip() for line in (error.stderr or "").splitlines() if line.lower().startswith("error")]
        reason = f"pip cannot install {what}: {(lines or [f'status {error.returncode}'])[-1][:300]}"
        (folder / "failed").write_text(reason, "utf-8")
        return f"{program.name}: {reason}"
    stamp.write_text(wanted, "utf-8")
    return f"{program.name}: {what}"


def _extract(folder: Path, program: Program) -> None:
    """Download a source archive and keep the scripts; nothing is compiled. pip asks setup.py for the version only."""
    name, _, number = program.archive.partition("==")
    with tempfile.TemporaryDirectory() as loaded:
        how = ("--no-deps", "--no-build-isolation", "--no-binary", name, "-d", loaded)
        _pip(folder, "download", *how, program.archive, VLLM_TARGET_DEVICE="empty", VLLM_VERSION_OVERRIDE=number)
        (archive,) = Path(loaded).glob("*.tar.gz")
        with tarfile.open(archive) as opened:
            for member in opened:
                if member.name.partition("/")[2] in program.scripts:
                    source = opened.extractfile(member)
                    assert source is not None
                    (folder / PurePosixPath(member.name).name).write_bytes(source.read())
    if missing := [script for script in program.scripts if not (folder / PurePosixPath(script).name).exists()]:
        raise subprocess.CalledProcessError(1, "extract", stderr=f"error: {archive.name} has no {missing[0]}")


def _pip(folder: Path, *arguments: str, **variables: str) -> None:
    command = [str(folder / "bin" / "python"), "-m", "pip", *arguments, "-q"]
    subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=True)


def main() -> int:
    """Install everything, run the tests, and say at the end again what could not be installed."""
    lines = []
    for program in PROGRAMS:
        lines.append(install(program))
        print(lines[-1], flush=True)
    options = ["-m", "pytest", "-p", "no:cacheprovider", "-vv", "-rs"]
    status = subprocess.run([sys.executable, *options, *TESTS], cwd=ROOT).returncode
    ray = FOLDER / "ray"
    if (ray / "installed").exists():  # the cells of a sweep run in the Python that has the package
        command = [str(ray / "bin" / "python"), *options, "tests/phase7/test_ray.py"]
        status = subprocess.run(command, cwd=ROOT).returncode or status
    missing = [
        line
        for program, line in zip(PROGRAMS, lines, strict=True)
        if not (FOLDER / program.name / "installed").exists()
    ]
    print("\n".join(["not installed:", *missing] if missing else ["all programs were installed"]))
    return status


if __name__ == "__main__":
    sys.exit(main())
