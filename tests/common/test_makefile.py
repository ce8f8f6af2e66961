"""How `make` installs: its calls, their order, and that a second call does nothing; Python is a stub."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
URL = "https://example.org/whl/cpu"

# Runs `-c` for real, makes a .venv that contains only a copy of itself, and records the requests to pip.
STUB = f"""#!/bin/sh
case "$1 $2" in
    -c*) exec "{sys.executable}" "$@" ;;
    -V*) echo Python 3.12.0 ;;
    "-m venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python && echo venv >> log ;;
    "-m pip") shift 2 && echo "pip $*" >> log ;;
    "-m jupyterlab") shift 2 && echo "jupyterlab $*" >> log ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Make a folder with spaces in its name and the files that the install reads, and a stub of Python on the path."""
    folder = tmp_path / "a clone"
    (folder / "bin").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "bin" / "stub-python").write_text(STUB)
    (folder / "bin" / "stub-python").chmod(0o755)
    return folder


def _make(clone: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run make; return its output and its calls."""
    log = clone / "log"
    log.unlink(missing_ok=True)
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TORCH_INDEX", "PYTHON") and "MAKE" not in name
    }
    path = f"{clone / 'bin'}:{os.environ['PATH']}"
    run = subprocess.run(
        ["make", *arguments], cwd=clone, env=clean | {"PATH": path}, capture_output=True, text=True, timeout=300
    )
    return run, log.read_text().splitlines() if log.exists() else []


def test_install_happens_once_and_again_when_the_pins_change(clone: Path) -> None:
    run, calls = _make(clone, "install", "PYTHON=stub-python")
    assert run.returncode == 0, run.stderr
    assert calls == ["venv", "pip install -q -c .venv/constraints.txt -e .[dev]"]
    assert len(run.stdout.splitlines()) == 1
    assert (clone / ".venv/constraints.txt").read_text() == (clone / "constraints.txt").read_text()

    assert _make(clone, "install")[1] == []
    os.utime(clone / "pyproject.toml")  # a checkout touches files without changing them
    assert _make(clone, "install")[1] == []
    with (clone / "constraints.txt").open("a") as file:
        file.write("zipp==3.0\n")
    assert _make(clone, "install")[1] == calls[1:]
    assert _make(clone, "install")[1] == []


def test_another_torch_build_is_remembered_and_its_pin_left_out(clone: Path) -> None:
    _make(clone, "install", "PYTHON=stub-python")
    switch = ["pip uninstall -qq -y torch", f"pip install -q --index-url {URL} torch"]
    install = "pip install -q -c .venv/constraints.txt -e .[dev]"
    assert _make(clone, "install", f"TORCH_INDEX={URL}")[1] == [*switch, install]
    pins = (clone / ".venv/constraints.txt").read_text()
    assert "\ntorch==" not in pins
    assert "\nnumpy==" in pins
    assert _make(clone, "install")[1] == []
    os.remove(clone / next((clone / ".venv").glob("installed-*")))
    assert _make(clone, "install")[1] == [switch[1], install]
    assert _make(clone, "install", "TORCH_INDEX=")[1] == [switch[0], install]  # back to the pinned one


def test_a_failed_install_is_tried_again(clone: Path) -> None:
    _make(clone, "install", "PYTHON=stub-python")
    stub = clone / ".venv/bin/python"
    stub.write_text(STUB.replace("shift 2", "exit 1"))
    (clone / "constraints.txt").write_text("")
    assert _make(clone, "install")[0].returncode != 0
    stub.write_text(STUB)
    run, calls = _make(clone, "install")
    assert run.returncode == 0
    assert calls


def test_no_python_in_range_is_one_clear_line(clone: Path) -> None:
    (clone / "bin" / "old-python").write_text("#!/bin/sh\nexit 1\n")
    (clone / "bin" / "old-python").chmod(0o755)
    for name in ("old-python", "no-such-python"):
        run, calls = _make(clone, "install", f"PYTHON={name}")
        assert run.returncode != 0
        assert calls == []
        first = run.stderr.splitlines()[0]
        assert first.startswith("error: no Python 3.11 to 3.13")
        assert name in first
        assert "make PYTHON=" in first


def test_help_is_the_default_and_installs_nothing(clone: Path) -> None:
    run, calls = _make(clone)
    assert run.returncode == 0
    assert calls == []
    for target in ("demo", "notebook", "test", "test-all", "gpu", "lint", "clean"):
        assert f"\n  {target} " in run.stdout


@pytest.fixture
def lab(clone: Path) -> Path:
    """Make a clone with two phases, a test for a GPU, and a Python that records its calls."""
    for phase in ("phase-1-one", "phase-2-two"):
        (clone / phase).mkdir()
    (clone / "tests").mkdir()
    (clone / "tests" / "test_card.py").write_text("@pytest.mark.gpu\n")
    (clone / "tests" / "test_other.py").write_text("")
    stub = clone / "bin" / "gpu-python"
    stub.write_text('#!/bin/sh\necho "$*" >> log\ncase "$*" in *two*) exit $STATUS ;; esac\n')
    stub.chmod(0o755)
    return clone


def test_gpu_runs_tests_benches_and_manifest(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATUS", "0")
    run, calls = _make(lab, "gpu", "GPU_PYTHON=gpu-python", "OUT=out")
    assert run.returncode == 0, run.stderr
    assert calls == [
        "-m checks.ledger --write",
        "-m pytest -p no:cacheprovider -m gpu tests/phase6/test_gpu_graphs.py",
        "-m pytest -p no:cacheprovider -m gpu tests/test_card.py",
        "phase-2-two/bench.py --device cuda --rounds 3 --output out/phase-2-two",
        "phase-1-one/bench.py --device cuda --rounds 3 --output out/phase-1-one",
        "-m common.gpu_manifest out",
    ]
    parts = [line.split("\t")[:2] for line in (lab / "out/parts.tsv").read_text().splitlines()]
    assert parts == [[name, "0"] for name in ("ledger", "graphs", "tests", "phase-2-two", "phase-1-one")]


def test_gpu_runs_the_named_parts_alone(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATUS", "0")
    run, calls = _make(lab, "gpu", "GPU_PYTHON=gpu-python", "OUT=out", "PARTS=phase-1-one ledger")
    assert run.returncode == 0, run.stderr
    assert [call.split(" ")[0] for call in calls] == ["-m", "phase-1-one/bench.py", "-m"]


def test_gpu_goes_on_after_a_failure_and_then_fails(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATUS", "3")
    (lab / "phase-3-three").mkdir()
    run, calls = _make(lab, "gpu", "GPU_PYTHON=gpu-python", "OUT=out")
    assert run.returncode != 0
    benches = ["phase-3-three", "phase-2-two", "phase-1-one", "-m common.gpu_manifest out"]
    assert [call.split("/")[0] for call in calls[3:]] == benches
    assert "phase-2-two\t3\t" in (lab / "out/parts.tsv").read_text()


def test_gpu_dry_run_needs_no_card_and_leaves_results_alone(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATUS", "0")
    for folder in ("out/phase-1-one", "out/dry-run/phase-1-one"):
        (lab / folder).mkdir(parents=True)
        (lab / folder / "results.jsonl").write_text("{}\n")
    run, calls = _make(lab, "gpu", "GPU_PYTHON=gpu-python", "OUT=out", "DRY_RUN=1")
    assert run.returncode == 0, run.stderr
    assert calls[0] == "-m pytest -p no:cacheprovider -m not slow -k plain or grows tests/phase6/test_graphs.py"
    assert calls[3] == "phase-1-one/bench.py --device auto --dry-run --rounds 3 --output out/dry-run/phase-1-one"
    assert calls[-1] == "-m common.gpu_manifest out/dry-run"
    assert (lab / "out/phase-1-one/results.jsonl").exists()
    assert not (lab / "out/dry-run/phase-1-one/results.jsonl").exists()


def test_notebook_installs_jupyterlab_once_and_opens_the_phase(lab: Path) -> None:
    (lab / "phase-2-two" / "lesson.ipynb").write_text("{}")
    _make(lab, "install", "PYTHON=stub-python")
    opened = "jupyterlab phase-2-two/lesson.ipynb"
    assert _make(lab, "notebook", "N=2")[1] == ["pip install -q -c .venv/constraints.txt -e .[notebook]", opened]
    assert _make(lab, "notebook", "N=2")[1] == [opened]
    for arguments in ([], ["N=7"]):
        run, calls = _make(lab, "notebook", *arguments)
        assert run.returncode != 0
        assert "name a phase: make notebook N=2" in run.stderr
        assert calls == []
