"""The git operations of `lab port`, on the repository around a folder.

All operations use the `git` program and its index: files are read and written as blobs, so that modes, missing last
newlines and all bytes are preserved.

    python -c "from pathlib import Path; from common.lab.repository import Repository; print(Repository(Path()).top)"
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from common.errors import UserError


@dataclass(frozen=True)
class Entry:
    """A file in git: its mode (`100644`, `100755`, ...) and the id of its content."""

    mode: str
    blob: str


@dataclass(frozen=True)
class Change:
    """A file before and after; None if absent."""

    before: Entry | None
    after: Entry | None


@dataclass(frozen=True)
class Conflict:
    """Three versions of a file that do not merge, and the text that is shown."""

    base: Entry | None
    ours: Entry
    theirs: Entry
    marked: Entry


def _fields(output: bytes) -> Iterator[str]:
    """Split the output of git's `-z`; a name that is not UTF-8 survives the round trip to git."""
    return (part.decode(errors="surrogateescape") for part in output.split(b"\0") if part)


class Repository:
    """A git repository. Paths are relative to the top of the work tree, with forward slashes."""

    def __init__(self, folder: Path) -> None:
        self.top = folder
        status, output, message = self._run("rev-parse", "--show-toplevel")
        if status:
            raise UserError(f"{folder} is in no git work tree ({message}); run this inside a clone of the lab")
        self.top = Path(output.decode(errors="surrogateescape").removesuffix("\n"))

    def _run(self, *arguments: str, stdin: bytes = b"") -> tuple[int, bytes, str]:
        command = ["git", "--literal-pathspecs", *arguments]
        try:
            done = subprocess.run(command, cwd=self.top, input=stdin, capture_output=True)
        except FileNotFoundError:
            raise UserError("git is not installed, or not on the PATH: install it (https://git-scm.com)") from None
        return done.returncode, done.stdout, " ".join(done.stderr.decode(errors="replace").split())

    def git(self, *arguments: str, stdin: bytes = b"") -> bytes:
        """Return the output of a git command. Raises UserError with git's own message on failure."""
        status, output, message = self._run(*arguments, stdin=stdin)
        if status:
            raise UserError(f"git {arguments[0]} failed ({message})")
        return output

    def succeeds(self, *arguments: str) -> bool:
        return self._run(*arguments)[0] == 0

    def text(self, *arguments: str) -> str:
        return self.git(*arguments).decode(errors="replace").strip()

    def commit(self, name: str) -> str:
        """Return the full id of a commit. Raises UserError for an unknown name."""
        status, output, _ = self._run("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        if status:
            raise UserError(f"there is no commit {name!r} here: give an id from `git log`, or HEAD")
        return output.decode().strip()

    def unsaved(self) -> list[str]:
        """List files that differ from HEAD, as in `git status`, and files of the phases that git does not track."""
        lines = _fields(self.git("status", "--porcelain", "-z", "--untracked-files=all", "--no-renames"))
        return [line[3:] for line in lines if not line.startswith("??") or line.startswith("?? phase-")]

    def changes(self, commit: str) -> dict[str, Change]:
        """Return the changes of a commit with at most one parent. A renamed file is one deleted and one added."""
        parts = _fields(self.git("diff-tree", "-r", "-z", "--root", "--no-commit-id", commit))
        found = {}
        for header, path in zip(parts, parts, strict=True):
            modes_and_blobs = header.removeprefix(":").split(" ")
            before, after = (
                None if mode == "000000" else Entry(mode, blob)
                for mode, blob in zip(modes_and_blobs[:2], modes_and_blobs[2:4], strict=True)
            )
            found[path] = Change(before, after)
        return found

    def entries(self, tree: str) -> dict[str, Entry]:
        """Return all files of a tree, such as `HEAD:phase-1-baseline`."""
        found = {}
        for line in _fields(self.git("ls-tree", "-r", "-z", tree)):
            header, path = line.split("\t", 1)
            mode, _, blob = header.split(" ")
            found[path] = Entry(mode, blob)
        return found

    def renames(self, old: str, new: str) -> dict[str, str]:
        """Return old path -> new path of the files that two trees name differently, at least half of them alike."""
        parts = _fields(self.git("diff-tree", "-r", "-z", "-M", "--diff-filter=R", "--name-status", old, new))
        return {before: after for _, before, after in zip(parts, parts, parts, strict=True)}

    def stage(self, path: str) -> Entry | None:
        """Stage the file of the work tree; a missing one as deleted."""
        if not (self.top / path).exists():
            self.put(path, None)
            return None
        self.git("add", "--force", "--", path)
        mode, blob, _ = self.text("ls-files", "--stage", "--", path).split("\t")[0].split(" ")
        return Entry(mode, blob)

    def put(self, path: str, entry: Entry | None) -> None:
        """Write a file, or remove it, in the index and in the work tree."""
        if entry is None:
            self.git("rm", "--quiet", "--force", "--ignore-unmatch", "--", path)
            return
        self.git("update-index", "--add", "--cacheinfo", f"{entry.mode},{entry.blob},{path}")
        self.git("checkout-index", "--force", "--", path)

    def put_conflict(self, path: str, conflict: Conflict) -> None:
        """Write the marked text to the work tree, and the three versions to the index, which git refuses to commit."""
        self.put(path, conflict.marked)
        stages = (conflict.base, conflict.ours, conflict.theirs)
        lines = [f"0 {'0' * len(conflict.ours.blob)}\t{path}\0"]  # removes the marked text from the index
        lines += [f"{entry.mode} {entry.blob} {n}\t{path}\0" for n, entry in enumerate(stages, start=1) if entry]
        self.git("update-index", "-z", "--index-info", stdin="".join(lines).encode(errors="surrogateescape"))

    def merge(self, base: Entry | None, ours: Entry, theirs: Entry, labels: list[str]) -> Entry | Conflict:
        """Merge three ways. Conflicts get the labels (of ours, base, theirs) as marks; of binary files ours is kept."""
        mode = theirs.mode if base and ours.mode == base.mode else ours.mode
        with TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("ours", "base", "theirs")]
            for file, entry in zip(files, (ours, base, theirs), strict=True):
                file.write_bytes(self.git("cat-file", "blob", entry.blob) if entry else b"")
            options = [part for label in labels for part in ("-L", label)]
            status, merged, _ = self._run("merge-file", "-p", "--diff3", *options, *map(str, files))
        if status > 127:  # git's status for binary files; up to 127 it counts conflicts
            return Conflict(base, ours, theirs, marked=ours)
        result = Entry(mode, self.git("hash-object", "-w", "--stdin", stdin=merged).decode().strip())
        return Conflict(base, ours, theirs, marked=result) if status else result
