"""Compiles C++ and CUDA when it is first needed, and keeps the library for the next time.

A library's file is named by a hash of all that decides what is in it: the sources and the headers they include, the
compiler's version, the flags, the machine's architecture. So nothing stale can be loaded, and there is nothing to
clean. A build goes into a folder of its own under a lock; the finished library is renamed into its place, with its
checksum beside it: one that a killed build or a full disk left half written is never loaded, but built again.

    from engine.kernels import build
    library = build.build("hello", [Path("hello.cpp")], compiler="g++", flags=["-O2", "-shared", "-fPIC"])
    module = build.load(library, "hello")
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from filelock import FileLock

from common.errors import UserError

INCLUDE = re.compile(rb'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
SHOWN = 40  # lines of a compiler's message


class BuildError(UserError):
    """A compiler that is missing, failed or was killed; the message holds what it said."""


def why_not() -> str | None:
    """Why nothing may be compiled, or None."""
    if os.environ.get("SPECDEC_FORCE_PY", "").lower() not in ("", "0", "false"):
        return f"SPECDEC_FORCE_PY={os.environ['SPECDEC_FORCE_PY']} forbids compiled kernels"
    return None


def extension_name(part: str, folder: Path | None = None) -> str:
    """A module name of this phase's own, so that the libraries of two phases can live in one process."""
    package = Path(__file__).resolve().parents[1]
    owner = folder or (package.parent if package.name == "engine" else package)  # installed, a phase is its package
    return re.sub(r"\W", "_", f"{owner.name}_{part}")


def python_flags() -> list[str]:
    """Where the headers of Python and pybind11 lie. BuildError without pybind11."""
    try:
        import pybind11
    except ImportError:
        raise BuildError("compiled kernels need pybind11: pip install pybind11") from None
    return [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]


def build(
    name: str,
    sources: Sequence[Path],
    *,
    compiler: str,
    flags: Sequence[str],
    cache: Path | None = None,
    own_flags: Mapping[str, Sequence[str]] | None = None,
    link_flags: Sequence[str] = (),
) -> Path:
    """The shared library made of the sources; compiled only where it is not in the cache.

    flags go to the compilation of every source and to linking; own_flags[file name] to that source alone, after them;
    link_flags to linking alone. BuildError says what failed.
    """
    program = shutil.which(compiler)
    if program is None:
        raise BuildError(f"no compiler {compiler!r} on the PATH; install it, or choose --kernels torch")
    own = {file: list(theirs) for file, theirs in (own_flags or {}).items()}
    key = fingerprint(sources, [version(program), *flags, "own", repr(sorted(own.items())), "link", *link_flags])
    folder = cache_folder(cache)
    library = folder / f"{name}-{key}{sysconfig.get_config_var('EXT_SUFFIX') or '.so'}"
    if is_whole(library):
        return library
    with FileLock(folder / f"{name}.lock"):
        if is_whole(library):  # another process built it while this one waited
            return library
        for left in folder.glob(f"{name}.building-*"):  # by builds that were killed: their lock is free, and ours now
            shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f"{name}.building-", dir=folder))
        try:
            made = compile_all(program, list(sources), work, list(flags), own, list(link_flags))
            # The checksum comes first: a library without one is never taken for whole.
            (work / "sum").write_text(checksum(made), encoding="ascii")
            os.replace(work / "sum", sum_file(library))
            os.replace(made, library)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return library


def compile_all(
    program: str, sources: list[Path], work: Path, flags: list[str], own: Mapping[str, list[str]], link: list[str]
) -> Path:
    """Every source to an object, several at a time, and all of them to a library in the folder `work`."""
    objects = [work / f"{number}-{source.stem}.o" for number, source in enumerate(sources)]
    compiled = [flag for flag in flags if flag not in ("-shared", "--shared")]
    jobs = [
        [program, *compiled, *own.get(source.name, []), "-c", str(source), "-o", str(target)]
        for source, target in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        list(pool.map(execute, jobs))
    made = work / "library"
    execute(
        [program, *flags, *(["-shared"] if "-shared" not in flags else []), *map(str, objects), *link, "-o", str(made)]
    )
    return made


def execute(command: list[str]) -> None:
    """Run a compiler. BuildError with its message where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return
    source = next((part for part in command if part.endswith((".cpp", ".cu", ".cc"))), "the library")
    if done.returncode < 0:
        how = f"was killed ({signal.Signals(-done.returncode).name})"
    else:
        how = f"failed (status {done.returncode})"
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    said = "\n".join(lines[:SHOWN]) + (f"\n... and {len(lines) - SHOWN} more lines" if len(lines) > SHOWN else "")
    raise BuildError(f"{Path(command[0]).name} {how} on {Path(source).name}: {' '.join(command)}\n{said}".rstrip())


@lru_cache
def version(program: str) -> str:
    """What the compiler says of itself."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"the compiler {program} cannot be run: {error}") from None
    return done.stdout + done.stderr


def fingerprint(sources: Sequence[Path], others: Sequence[str]) -> str:
    """A hash of the sources, of all headers they include by name, and of what else decides the library."""
    digest = hashlib.sha256()
    try:
        import pybind11

        others = [*others, pybind11.__version__]
    except ImportError:
        pass
    for part in (platform.machine(), sysconfig.get_config_var("SOABI") or "", *others):
        digest.update(part.encode() + b"\0")
    for file in with_headers(sources):
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\0".encode() + content)
    return digest.hexdigest()[:20]


def with_headers(sources: Sequence[Path]) -> list[Path]:
    """The sources, and every file that one of them includes in quotes, each once. BuildError for a source not there."""
    found: list[Path] = []
    waiting = [source.resolve() for source in sources]
    while waiting:
        file = waiting.pop(0)
        if file in found:
            continue
        if not file.is_file():
            raise BuildError(f"no source file {file}")
        found.append(file)
        for name in INCLUDE.findall(file.read_bytes()):
            header = (file.parent / name.decode()).resolve()
            if header.is_file():
                waiting.append(header)
    return found


def sum_file(library: Path) -> Path:
    return library.with_name(library.name + ".sha256")


def checksum(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def is_whole(library: Path) -> bool:
    """Whether the library is there, as it was when it was finished."""
    try:
        return sum_file(library).read_text(encoding="ascii") == checksum(library)
    except (OSError, UnicodeDecodeError):
        return False


def cache_folder(asked: Path | None = None) -> Path:
    """Where libraries are kept: `asked`, SPECDEC_BUILD_DIR, or the user's cache. A temporary one, said aloud, where
    that cannot be written."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    wanted = asked or Path(os.environ.get("SPECDEC_BUILD_DIR") or home / "llm-inference-lab" / "kernels")
    if can_write(wanted):
        return wanted
    instead = own_temporary()
    print(f"note: compiled kernels cannot be kept in {wanted} (not writable), and go to {instead}", file=sys.stderr)
    return instead


def can_write(folder: Path) -> bool:
    """Tried, not asked: a file system that is mounted read-only says so only when it is written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def own_temporary() -> Path:
    """A folder for temporary libraries that nobody else can have put one into."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"llm-inference-lab-kernels-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if not folder.is_symlink() and status.st_uid == user and status.st_mode & 0o077 == 0:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="llm-inference-lab-kernels-"))


def load(path: Path, name: str) -> ModuleType:
    """Import the extension module `name` from a library. BuildError where it does not load."""
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise BuildError(f"the library {path} does not load: {error}") from None
    return module


def build_and_load(
    name: str,
    sources: Sequence[Path],
    *,
    compiler: str,
    flags: Sequence[str],
    cache: Path | None = None,
    own_flags: Mapping[str, Sequence[str]] | None = None,
    link_flags: Sequence[str] = (),
) -> ModuleType:
    """build, then load; a library from the cache that does not load is built once more."""

    def make() -> Path:
        return build(
            name, sources, compiler=compiler, flags=flags, cache=cache, own_flags=own_flags, link_flags=link_flags
        )

    library = make()
    try:
        return load(library, name)
    except BuildError:
        sum_file(library).unlink(missing_ok=True)
        return load(make(), name)
