"""Which kernels for graphics cards have been checked on one: by the hash of their source, in verified.json.

A card is not always at hand, and a kernel that was changed is another kernel. So `--kernels auto` takes one only where
this file lists its very source. `make gpu` runs the checks of check.py on the card and writes the list:

    python -m engine.kernels.ledger --write
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.options import run_main

BOOK = Path(__file__).with_name("verified.json")
SUFFIXES = {"triton": (".py",), "cuda": (".cu", ".cuh", ".h", ".cpp", ".py")}
Entry = dict[str, Any]


@lru_cache(maxsize=64)
def fingerprint(backend: str, op: str) -> str:
    """sha256 over the files that make a kernel, by name and content.

    A backend's SOURCES names them for every op; without it, all in its folder (folders in it, such as a ladder, not).
    """
    folder = Path(__file__).parent / backend
    sources: dict[str, tuple[str, ...]] = {}
    if importlib.util.find_spec(f".{backend}", __package__) is not None:
        sources = getattr(importlib.import_module(f".{backend}", __package__), "SOURCES", {})
    files = [folder / name for name in sources.get(op, ())]
    files = files or [file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES[backend]]
    digest = hashlib.sha256(f"{backend} {op}".encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def read(book: Path | None = None) -> dict[str, Entry]:
    """The entries by hash; none where there is no file. UserError where it is damaged."""
    file = book or BOOK
    if not file.exists():
        return {}
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        good = isinstance(entries, dict) and all(isinstance(e["device"], str) and e["checks"] for e in entries.values())
    except (ValueError, TypeError, KeyError):
        good = False
    if not good:
        raise UserError(f"{file} is damaged: take it from the repository again, or write it anew with `make gpu`")
    known: dict[str, Entry] = entries
    return known


def entry(backend: str, op: str, book: Path | None = None) -> Entry | None:
    """What is known of a kernel as its source is now; None if it was never checked on a card."""
    found = read(book)
    return found.get(fingerprint(backend, op)) if found else None


def record(backend: str, op: str, device: str, checks: list[str], book: Path | None = None) -> None:
    """List a kernel that has passed its checks; what was said of other versions of it goes."""
    if not checks:
        raise ValueError("a kernel that passed no check is not listed")
    kept = {h: e for h, e in read(book).items() if (e["backend"], e["op"]) != (backend, op)}
    kept[fingerprint(backend, op)] = {
        "backend": backend,
        "op": op,
        "device": device,
        "torch": torch.__version__,
        "checks": checks,
    }
    ordered = dict(sorted(kept.items(), key=lambda item: (item[1]["backend"], item[1]["op"])))
    (book or BOOK).write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8", newline="\n")


def main(arguments: list[str]) -> int:
    """Check every kernel that can run on the card here; --write lists those that pass, --list only says which are."""
    from . import check, registry

    if arguments not in ([], ["--write"], ["--list"]):
        raise UserError("expected nothing, --write or --list")
    if arguments == ["--list"]:
        for known in read().values():
            now = fingerprint(known["backend"], known["op"]) in read()
            print(f"{known['backend']} {known['op']}: {known['device']}{'' if now else ', another version of it'}")
        return 0
    if not torch.cuda.is_available():
        raise UserError("the checks that are listed are made on a graphics card, and this machine has none")
    device, failed = torch.device("cuda"), 0
    for backend in registry.FOR_CARDS:
        reason = registry.why_not(backend, device)  # type: ignore[arg-type]
        if reason is not None:
            print(f"{backend}: {reason}", file=sys.stderr)
            continue
        for op, function in registry.operations(backend).items():  # type: ignore[arg-type]
            try:
                passed = check.check(op, function, device)
            except (check.WrongKernel, UserError, RuntimeError) as problem:
                failed += 1
                print(f"{backend} {op}: {problem}")
                continue
            print(f"{backend} {op}: {len(passed)} checks passed")
            if arguments:
                record(backend, op, torch.cuda.get_device_name(device), passed)
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
