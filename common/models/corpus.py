"""The training text: the Python source of the standard library that runs this file.

Every machine with Python has this text, so anyone can retrain the embedded models without a download. A file is
held out or trained on by a hash of its path relative to the library's folder. So the split is the same on every machine
and does not change when other files are added or removed.

    python -m common.models.corpus          # counts files and bytes of both halves
"""

from __future__ import annotations

import hashlib
import sysconfig
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.errors import UserError

Split = Literal["train", "heldout"]

HELDOUT_ONE_IN = 20  # one file in twenty is never trained on
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus: its path relative to the library folder (posix), and its text."""

    path: str
    text: str


def split_of(path: str) -> Split:
    """Return the half of a file, from its relative posix path alone."""
    digest = hashlib.sha256(path.encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % HELDOUT_ONE_IN == 0 else "train"


def stdlib_folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def read_corpus(split: Split, folder: Path | None = None) -> list[SourceFile]:
    """Read all `.py` files of one half, sorted by path.

    Files that Python itself cannot decode (the library has a few as test data) are left out.
    """
    root = folder or stdlib_folder()
    files = []
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts) or split_of(relative.as_posix()) != split:
            continue
        try:
            with tokenize.open(file) as handle:  # obeys the coding cookie
                text = handle.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        if text.strip():
            files.append(SourceFile(relative.as_posix(), text))
    return files


def read_files(paths: Iterable[Path]) -> list[SourceFile]:
    """Read a corpus of the user's own files, in the given order. Raises UserError for a file that is not UTF-8 text."""
    files = []
    for path in paths:
        try:
            files.append(SourceFile(path.as_posix(), path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from None
    return files


def fingerprint(files: Iterable[SourceFile]) -> str:
    """Return a short hash of paths and texts, which identifies the text of a measurement."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.path}\0{file.text}\0".encode())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    for half in ("train", "heldout"):
        corpus = read_corpus(half)
        size = sum(len(file.text.encode()) for file in corpus)
        print(f"{half:8} {len(corpus):5} files  {size / 1e6:7.2f} MB  {fingerprint(corpus)}")
