"""The just-in-time builder: what is cached, what is rebuilt, and its error messages."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phase5.kernels import build

FLAGS = ["-O1", "-fPIC"]
MODULE = """
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include "answer.h"
static PyObject* answer(PyObject*, PyObject*) { return PyLong_FromLong(ANSWER); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "tiny", "", -1, methods, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit_tiny() { return PyModule_Create(&module); }
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.h").write_text("#define ANSWER 41\n")
    file = folder / "answer.cpp"
    file.write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n')
    return file


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    """Write a g++ that logs every call to a file."""
    script = tmp_path / "counting-g++"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] || echo "$@" >> {tmp_path}/calls\nexec g++ "$@"\n')
    script.chmod(0o755)
    return script


def calls(compiler: Path) -> int:
    file = compiler.parent / "calls"
    return len(file.read_text().splitlines()) if file.exists() else 0


def answer_of(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).answer())


def test_a_library_is_compiled_once(source: Path, compiler: Path, tmp_path: Path) -> None:
    first = build.build("answer", [source], compiler=str(compiler), flags=FLAGS, cache=tmp_path / "cache")
    assert answer_of(first) == 41
    made = calls(compiler)
    assert made == 2  # compile, link
    assert build.build("answer", [source], compiler=str(compiler), flags=FLAGS, cache=tmp_path / "cache") == first
    assert calls(compiler) == made


def test_a_header_and_a_flag_make_another_library(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = build.build("answer", [source], compiler="g++", flags=FLAGS, cache=cache)
    (source.parent / "answer.h").write_text("#define ANSWER 42\n")
    second = build.build("answer", [source], compiler="g++", flags=FLAGS, cache=cache)
    assert first != second
    assert answer_of(second) == 42
    own = build.build("answer", [source], compiler="g++", flags=FLAGS, cache=cache, own_flags={"answer.cpp": ["-O2"]})
    assert len({first, second, own}) == 3


def test_a_header_in_another_folder_counts_by_its_content(tmp_path: Path) -> None:
    """Such as the emulator of CUDA: where it lies decides nothing."""
    source = tmp_path / "asks.cpp"
    source.write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n')
    found = []
    for folder, number in (("one", 1), ("two", 2), ("three", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "answer.h").write_text(f"#define ANSWER {number}\n")
        include = [tmp_path / "empty", tmp_path / folder]
        library = build.build(
            "asks", [source], compiler="g++", flags=["-shared", "-fPIC"], include=include, cache=tmp_path / "cache"
        )
        found.append((library, ctypes.CDLL(str(library)).answer()))
    assert [number for _, number in found] == [1, 2, 2]
    assert found[0][0] != found[1][0] == found[2][0]


def test_sources_that_another_phase_shares_are_not_compiled_again(source: Path, compiler: Path, tmp_path: Path) -> None:
    cache, other = tmp_path / "cache", tmp_path / "phase-6"
    own = source.with_name("own.cpp")
    own.write_text("int own() { return 1; }\n")
    first = build.build("answer", [source, own], compiler=str(compiler), flags=FLAGS, cache=cache)
    shutil.copytree(source.parent, other)
    sources = [other / source.name, other / own.name]
    assert build.build("answer", sources, compiler=str(compiler), flags=FLAGS, cache=cache) == first
    assert calls(compiler) == 3  # two objects, one library
    sources[1].write_text("int own() { return 2; }\n")
    assert build.build("answer", sources, compiler=str(compiler), flags=FLAGS, cache=cache) != first
    assert calls(compiler) == 5  # what changed, and the library


def test_a_note_says_how_long_it_takes(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        build.build(
            "answer", [source], compiler="g++", flags=FLAGS, cache=tmp_path / "cache", cpu_seconds=7 * build.CORES
        )
    assert (
        capsys.readouterr().err == f"note: compiling answer for this machine, once: about 7 s on {build.CORES} cores\n"
    )


@pytest.mark.parametrize("damage", ["short", "short with its sum", "zeros", "no sum"])
def test_a_damaged_library_is_built_again(damage: str, source: Path, compiler: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    library = build.build("answer", [source], compiler=str(compiler), flags=FLAGS, cache=cache)
    whole = library.read_bytes()
    if damage == "no sum":
        build.sum_file(library).unlink()
    else:
        library.unlink()  # ctypes of another test may have the old file mapped
        library.write_bytes(whole[: len(whole) // 2] if "short" in damage else bytes(len(whole)))
    if damage == "short with its sum":
        build.sum_file(library).write_text(build.checksum(library))
    assert build.build("answer", [source], compiler=str(compiler), flags=FLAGS, cache=cache) == library
    assert calls(compiler) == 3  # the object is still cached
    assert answer_of(library) == 41


def test_a_library_that_does_not_load_is_built_again(tmp_path: Path) -> None:
    (tmp_path / "answer.h").write_text("#define ANSWER 7\n")
    file = tmp_path / "tiny.cpp"
    file.write_text(MODULE)
    flags = [*FLAGS, *build.python_flags()]
    library = build.build("tiny", [file], compiler="g++", flags=flags, cache=tmp_path / "cache")
    library.write_bytes(b"no library at all")
    build.sum_file(library).write_text(build.checksum(library))
    with pytest.raises(build.BuildError, match="does not load"):
        build.load(library, "tiny")

    def make() -> Path:
        return build.build("tiny", [file], compiler="g++", flags=flags, cache=tmp_path / "cache")

    module = build.load_built("tiny", make)
    assert module.answer() == 7
    assert build.load_built("tiny", make) is module


def test_the_compilers_message_is_in_the_error(tmp_path: Path) -> None:
    file = tmp_path / "wrong.cpp"
    file.write_text("int answer() { return nonsense; }\n")
    with pytest.raises(build.BuildError, match=r"failed \(status 1\) on wrong.cpp(.|\n)*nonsense"):
        build.build("wrong", [file], compiler="g++", flags=FLAGS, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("wrong*.so"))
    assert not list((tmp_path / "cache").glob("*.building-*"))


def test_missing_things_are_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(build.BuildError, match="no compiler 'no-such-compiler'"):
        build.build("answer", [source], compiler="no-such-compiler", flags=FLAGS, cache=tmp_path)
    with pytest.raises(build.BuildError, match=r"no source file .*absent\.cpp"):
        build.build("answer", [source.with_name("absent.cpp")], compiler="g++", flags=FLAGS, cache=tmp_path)


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ("kill -9 $$", r"was killed \(SIGKILL\)"),
        ("kill -40 $$", r"was killed \(signal 40\)"),
        ("exit 0", "ended with status 0 and did not write answer-"),
    ],
)
def test_a_compiler_that_dies_or_writes_nothing_is_said(ends: str, said: str, source: Path, tmp_path: Path) -> None:
    script = tmp_path / "dying"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{ends}\n')
    script.chmod(0o755)
    with pytest.raises(build.BuildError, match=said):
        build.build("answer", [source], compiler=str(script), flags=FLAGS, cache=tmp_path / "cache")


def child(source: Path, compiler: Path, cache: Path) -> subprocess.Popen[str]:
    code = (
        "import sys; from pathlib import Path; from phase5.kernels import build; print(build.build('answer',"
        f" [Path({str(source)!r})], compiler={str(compiler)!r}, flags={FLAGS!r}, cache=Path({str(cache)!r})))"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.slow
def test_a_killed_build_leaves_nothing_that_is_loaded(source: Path, tmp_path: Path) -> None:
    slow = tmp_path / "slow-g++"
    started = tmp_path / "started"
    slow.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec g++ --version\n'
        f'case "$*" in *-c*) ;; *) if [ ! -e {started} ]; then touch {started}; sleep 60; fi;; esac\nexec g++ "$@"\n'
    )
    slow.chmod(0o755)
    cache = tmp_path / "cache"
    victim = child(source, slow, cache)
    while not started.exists():
        time.sleep(0.05)
        assert victim.poll() is None
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    assert list(cache.glob("*.building-*"))
    assert not list(cache.glob("*.so"))
    library = build.build("answer", [source], compiler=str(slow), flags=FLAGS, cache=cache)
    assert answer_of(library) == 41
    assert not list(cache.glob("*.building-*"))


@pytest.mark.slow
def test_two_processes_build_once(source: Path, compiler: Path, tmp_path: Path) -> None:
    both = [child(source, compiler, tmp_path / "cache") for _ in range(2)]
    paths = [process.communicate(timeout=300)[0] for process in both]
    assert paths[0] == paths[1] != ""
    assert calls(compiler) == 2


def test_a_folder_that_cannot_be_written(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    library = build.build("answer", [source], compiler="g++", flags=FLAGS, cache=in_the_way / "cache")
    assert answer_of(library) == 41
    assert "not writable" in capsys.readouterr().err
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o700


def test_a_folder_that_others_can_write_to_is_not_used(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    shared = tmp_path / "llm-inference-lab" / "kernels"
    shared.mkdir(parents=True)
    shared.chmod(0o777)
    monkeypatch.setenv("SPECDEC_BUILD_DIR", str(shared))
    with pytest.raises(build.BuildError, match=r"SPECDEC_BUILD_DIR=.*kernels is writable for others: .* `chmod go-w`"):
        build.build("answer", [source], compiler="g++", flags=FLAGS)
    monkeypatch.delenv("SPECDEC_BUILD_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = build.build("answer", [source], compiler="g++", flags=FLAGS)
    assert answer_of(library) == 41
    assert library.parent != shared
    assert "(writable for others)" in capsys.readouterr().err


def test_a_temporary_folder_of_somebody_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    folder = build.own_temporary()
    assert build.own_temporary() == folder
    folder.chmod(0o777)
    assert build.own_temporary() not in (folder, build.own_temporary())


def test_the_folder_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECDEC_BUILD_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.cache_folder() == tmp_path / "xdg" / "llm-inference-lab" / "kernels"
    monkeypatch.setenv("SPECDEC_BUILD_DIR", str(tmp_path / "mine"))
    assert build.cache_folder() == tmp_path / "mine"


def test_force_py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECDEC_FORCE_PY", raising=False)
    assert build.why_not() is None
    monkeypatch.setenv("SPECDEC_FORCE_PY", "1")
    assert "SPECDEC_FORCE_PY" in str(build.why_not())
