"""Compiles C++ and CUDA when a kernel is first needed, and caches objects and libraries.

The name of every object and library contains a hash of its inputs: the source and its headers, the compiler's version,
the flags, the machine's architecture. A stale file is therefore never loaded, and sources that two phases share are
compiled once. A build runs in its own folder, under a lock. The finished file is renamed into the cache, with a
checksum beside it, so a file that a killed build or a full disk left incomplete is built again.

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
import stat
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from filelock import FileLock

from common.errors import UserError
from common.flags import flag

INCLUDE = re.compile(rb'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
SHOWN = 40  # lines of a compiler's message
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
COMPILERS = threading.Semaphore(CORES)  # compilers that run at a time, of all builds together


class BuildError(UserError):
    """A compiler is missing, failed or was killed; the message contains its output."""


def why_not() -> str | None:
    """Return why compiling is forbidden, or None."""
    if flag("SPECDEC_FORCE_PY"):
        return f"SPECDEC_FORCE_PY={os.environ['SPECDEC_FORCE_PY']} forbids compiled kernels"
    return None


def python_flags() -> list[str]:
    """Return the include flags of Python and pybind11. BuildError without pybind11."""
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
    include: Sequence[Path] = (),
    cpu_seconds: float = 0,
) -> Path:
    """Return the shared library of the sources; compile only what is not in the cache.

    flags are used for every source and for linking; own_flags[file name] for that source alone, after them; link_flags
    for linking alone. include: folders searched for headers; a header counts by name and content, wherever it lies.
    cpu_seconds > 0: the approximate cost of compiling; a note on stderr then says how long it takes. BuildError if a
    command fails.
    """
    program = shutil.which(compiler)
    if program is None:
        raise BuildError(f"no compiler {compiler!r} on the PATH; install it, or choose --kernels torch")
    own = {file: list(theirs) for file, theirs in (own_flags or {}).items()}
    common = [version(program), *flags]
    key = fingerprint(sources, [*common, "own", repr(sorted(own.items())), "link", *link_flags], include)
    folder = cache_folder(cache)
    library = folder / f"{name}-{key}{sysconfig.get_config_var('EXT_SUFFIX') or '.so'}"
    if is_whole(library):
        return library
    with FileLock(folder / f"{name}.lock"):
        if is_whole(library):  # another process built it while this one waited
            return library
        for left in folder.glob(f"{name}.building-*"):  # of killed builds: they no longer hold the lock
            shutil.rmtree(left, ignore_errors=True)
        if cpu_seconds > 0:
            about = max(1, round(cpu_seconds / CORES))
            print(f"note: compiling {name} for this machine, once: about {about} s on {CORES} cores", file=sys.stderr)
        work = Path(tempfile.mkdtemp(prefix=f"{name}.building-", dir=folder))

        def compiled(source: Path) -> Path:
            mine = own.get(source.name, [])
            target = folder / f"{source.stem}-{fingerprint([source], [*common, *mine], include)}.o"
            if not is_whole(target):
                made = work / target.name
                options = [flag for flag in flags if flag not in ("-shared", "--shared")]
                searched = [f"-I{place}" for place in include]
                execute([program, *options, *searched, *mine, "-c", str(source), "-o", str(made)])
                keep(made, target)
            return target

        try:
            with ThreadPoolExecutor(CORES) as pool:
                objects = list(pool.map(compiled, sources))
            shared = [] if "-shared" in flags else ["-shared"]
            execute([program, *flags, *shared, *map(str, objects), *link_flags, "-o", str(work / "library")])
            keep(work / "library", library)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return library


def keep(made: Path, target: Path) -> None:
    """Move a finished file into the cache, after its checksum: a file without a checksum counts as incomplete."""
    total = made.with_name(made.name + ".sum")
    total.write_text(checksum(made), encoding="ascii")
    os.replace(total, sum_file(target))
    os.replace(made, target)


def execute(command: list[str]) -> None:
    """Run a compiler that writes the file after `-o`. BuildError with its message if it fails or writes nothing."""
    with COMPILERS:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    made = Path(command[command.index("-o") + 1])
    if done.returncode == 0 and made.is_file() and made.stat().st_size > 0:
        return
    source = next((part for part in command if part.endswith((".cpp", ".cu", ".cc"))), "the library")
    if done.returncode == 0:
        how = f"ended with status 0 and did not write {made.name}"
    elif done.returncode < 0:
        names = {each.value: each.name for each in signal.Signals}  # real-time signals have none
        how = f"was killed ({names.get(-done.returncode, f'signal {-done.returncode}')})"
    else:
        how = f"failed (status {done.returncode})"
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    said = "\n".join(lines[:SHOWN]) + (f"\n... and {len(lines) - SHOWN} more lines" if len(lines) > SHOWN else "")
    raise BuildError(f"{Path(command[0]).name} {how} on {Path(source).name}: {' '.join(command)}\n{said}".rstrip())


@lru_cache
def version(program: str) -> str:
    """Return the output of `--version`. BuildError if the compiler cannot be run."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"the compiler {program} cannot be run: {error}") from None
    return done.stdout + done.stderr


def fingerprint(sources: Sequence[Path], others: Sequence[str], include: Sequence[Path] = ()) -> str:
    """Hash the sources, the headers that they include in quotes, pybind11's version, the machine, and `others`."""
    digest = hashlib.sha256()
    try:
        import pybind11

        others = [*others, pybind11.__version__]
    except ImportError:
        pass
    for part in (platform.machine(), sysconfig.get_config_var("SOABI") or "", *others):
        digest.update(part.encode() + b"\0")
    for file in with_headers(sources, include):
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\0".encode() + content)
    return digest.hexdigest()[:20]


def with_headers(sources: Sequence[Path], include: Sequence[Path] = ()) -> list[Path]:
    """Return the sources and every file that they include in quotes, each once. BuildError for a missing source.

    A header is searched beside the file that includes it, then in the folders of `include`. A header found nowhere
    belongs to the compiler.
    """
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
            places = [folder / name.decode() for folder in (file.parent, *include)]
            waiting += [header.resolve() for header in places if header.is_file()][:1]
    return found


def sum_file(library: Path) -> Path:
    return library.with_name(library.name + ".sha256")


def checksum(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def is_whole(file: Path) -> bool:
    """Return True if the file matches its checksum and is not shorter than its ELF header says.

    The loader maps a library without checking its length: access to a missing page is a SIGBUS, not an error.
    """
    try:
        if sum_file(file).read_text(encoding="ascii") != checksum(file):
            return False
        with file.open("rb") as opened:
            header = opened.read(64)
    except (OSError, UnicodeDecodeError):
        return False
    if header[:6] != b"\x7fELF\x02\x01":  # not 64-bit little-endian ELF: the loader of such systems checks the length
        return True
    if len(header) < 64:
        return False
    sections = int.from_bytes(header[40:48], "little")  # offset of the section headers, which linkers write last
    size, count = (int.from_bytes(header[at : at + 2], "little") for at in (58, 60))
    return file.stat().st_size >= sections + size * count


def cache_folder(asked: Path | None = None) -> Path:
    """Return the folder of the libraries: `asked`, SPECDEC_BUILD_DIR, or the user's cache.

    A library is code, so the user must own the folder, and nobody else may write to it. If the user's cache cannot be
    used, a temporary folder replaces it, with a note. BuildError if SPECDEC_BUILD_DIR is writable for others.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    named = os.environ.get("SPECDEC_BUILD_DIR")
    wanted = asked or Path(named or home / "llm-inference-lab" / "kernels")
    wrong = why_unusable(wanted)
    if wrong is None:
        return wanted
    if named and asked is None and "others" in wrong:
        raise BuildError(
            f"SPECDEC_BUILD_DIR={named} is {wrong}: a library planted there would be run; "
            f"use `chmod go-w` on a folder of your own whose content you trust, or name another"
        )
    instead = own_temporary()
    print(f"note: compiled kernels cannot be kept in {wanted} ({wrong}), and go to {instead}", file=sys.stderr)
    return instead


def why_unusable(folder: Path) -> str | None:
    """Create the folder if it is absent, and return why libraries cannot be kept there, or None.

    The check writes a file: a file system that is mounted read-only fails only on a write.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
        status = folder.stat()
    except OSError:
        return "not writable"
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        return "writable for others"
    return None


def own_temporary() -> Path:
    """Return a temporary folder that only this user can write to."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"llm-inference-lab-kernels-{user}"
    if not folder.is_symlink() and why_unusable(folder) is None:
        return folder
    return Path(tempfile.mkdtemp(prefix="llm-inference-lab-kernels-"))


def load(path: Path, name: str) -> ModuleType:
    """Import the extension module `name` from a library, once: phases with equal sources share the module.

    BuildError if it does not load.
    """
    full = f"{path.name.partition('.')[0]}.{name}"  # the part before the dot names the content
    if full in sys.modules:
        return sys.modules[full]
    loader = importlib.machinery.ExtensionFileLoader(full, str(path))
    spec = importlib.util.spec_from_file_location(full, path, loader=loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise BuildError(f"the library {path} does not load: {error}") from None
    sys.modules[full] = module
    return module


def load_built(name: str, make: Callable[[], Path]) -> ModuleType:
    """Load the module `name` from the library that `make` builds; rebuild the library once if it does not load."""
    library = make()
    try:
        return load(library, name)
    except BuildError:
        sum_file(library).unlink(missing_ok=True)
        return load(make(), name)
