"""Which GPU kernels have been checked on a GPU: verified.json lists them, by the hash of their sources.

A changed kernel is another kernel, so `--kernels auto` uses one only if the file lists exactly its sources. `make gpu`
checks the kernels on the GPU and writes the list (checks/ledger.py).

    python -c "from engine.kernels import ledger; print(ledger.entry('triton', 'rope'))"
"""

from __future__ import annotations

import hashlib
import importlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from common.errors import UserError

BOOK = Path(__file__).with_name("verified.json")
Entry = dict[str, Any]


@lru_cache(maxsize=64)
def fingerprint(backend: str, op: str) -> str:
    """Return the sha256 of the files that the backend's SOURCES name for the op, by name and content."""
    sources: dict[str, tuple[str, ...]] = importlib.import_module(f".{backend}", __package__).SOURCES
    digest = hashlib.sha256(f"{backend} {op}".encode())
    for file in (Path(__file__).parent / backend / name for name in sources[op]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def read(book: Path | None = None) -> dict[str, Entry]:
    """Return the entries by hash; none without a file. UserError for a damaged file."""
    file = book or BOOK
    if not file.exists():
        return {}
    try:
        entries: dict[str, Entry] = json.loads(file.read_text(encoding="utf-8"))
        good = isinstance(entries, dict) and all(isinstance(e["device"], str) and e["checks"] for e in entries.values())
    except (ValueError, TypeError, KeyError):
        good = False
    if not good:
        raise UserError(f"{file} is damaged: take it from the repository again, or write it anew with `make gpu`")
    return entries


def entry(backend: str, op: str, book: Path | None = None) -> Entry | None:
    """Return the entry of a kernel with its present sources; None if these were never checked on a GPU."""
    found = read(book)
    return found.get(fingerprint(backend, op)) if found else None
