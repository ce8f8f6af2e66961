"""Check every kernel for graphics cards on the card at hand, and list those that pass in engine/kernels/verified.json.

`--kernels auto` takes the kernels that are listed (engine/kernels/ledger.py). `make gpu` writes the list:

    python -m checks.ledger --write
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from common.errors import UserError
from common.options import run_main
from engine.kernels import ledger, registry

from .check import WrongKernel, check


def record(backend: str, op: str, device: str, checks: list[str], book: Path | None = None) -> None:
    """List a kernel that has passed its checks; what was said of other versions of it goes."""
    if not checks:
        raise ValueError("a kernel that passed no check is not listed")
    kept = {h: e for h, e in ledger.read(book).items() if (e["backend"], e["op"]) != (backend, op)}
    kept[ledger.fingerprint(backend, op)] = {
        "backend": backend,
        "op": op,
        "device": device,
        "torch": torch.__version__,
        "checks": checks,
    }
    ordered = dict(sorted(kept.items(), key=lambda item: (item[1]["backend"], item[1]["op"])))
    (book or ledger.BOOK).write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8", newline="\n")


def main(arguments: list[str]) -> int:
    """Check every kernel that can run on the card here; --write lists those that pass, --list only says which are."""
    if arguments not in ([], ["--write"], ["--list"]):
        raise UserError("expected nothing, --write or --list")
    if arguments == ["--list"]:
        for known in ledger.read().values():
            now = ledger.fingerprint(known["backend"], known["op"]) in ledger.read()
            print(f"{known['backend']} {known['op']}: {known['device']}{'' if now else ', another version of it'}")
        return 0
    if not torch.cuda.is_available():
        raise UserError("the listed checks run on a GPU, and this machine has none")
    device, failed = torch.device("cuda"), 0
    for backend in registry.FOR_CARDS:
        reason = registry.why_not(backend, device)  # type: ignore[arg-type]
        if reason is not None:
            print(f"{backend}: {reason}", file=sys.stderr)
            continue
        for op, function in registry.operations(backend).items():  # type: ignore[arg-type]
            try:
                passed = check(op, function, device)
            except (WrongKernel, UserError, RuntimeError) as problem:
                failed += 1
                print(f"{backend} {op}: {problem}")
                continue
            print(f"{backend} {op}: {len(passed)} checks passed")
            if arguments:
                record(backend, op, torch.cuda.get_device_name(device), passed)
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
