"""The manifest of a run of `make gpu`: machine, commit, duration of each part, and the files that each part left.

`make gpu` runs this module last. It reads `parts.tsv` (name, exit status and seconds of every part) and writes
`manifest.json` beside it, so that results copied from a rented GPU describe their origin.

    python -m common.gpu_manifest gpu-results
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from common.device import resolve_device
from common.environment import environment
from common.errors import UserError
from common.options import run_main
from common.terminal import print_table

LIMIT_SECONDS = 600  # the limit of a whole `make gpu`
OWN = ("manifest.json", "parts.tsv")


def read_parts(path: Path) -> list[dict[str, Any]]:
    """Read name, exit status and seconds of every part. UserError if the file is missing or damaged."""
    try:
        lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
        return [{"name": name, "status": int(status), "seconds": int(seconds)} for name, status, seconds in lines]
    except (OSError, ValueError):
        raise UserError(f"{path}: missing or damaged; expected what `make gpu` writes there") from None


def manifest(folder: Path) -> dict[str, Any]:
    """Return the document to write. `synthetic`: the results contain rows of a dry run, which measured nothing."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in OWN]
    rows = [json.loads(line) for path in files if path.name == "results.jsonl" for line in path.open(encoding="utf-8")]
    parts = read_parts(folder / "parts.tsv")
    return {
        "environment": environment(resolve_device("auto"), "as each row says", torch.get_num_threads(), {}),
        "seconds": sum(part["seconds"] for part in parts),
        "parts": parts,
        "rows": len(rows),
        "synthetic": any(row.get("synthetic") for row in rows),
        "files": {
            str(path.relative_to(folder)): {
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path in files
        },
    }


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        raise UserError("expected one folder: the one that `make gpu` wrote into")
    folder = Path(arguments[0])
    document = manifest(folder)
    (folder / "manifest.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8", newline="\n")
    cells = [[part["name"], "failed" if part["status"] else "done", part["seconds"]] for part in document["parts"]]
    where = document["environment"]
    title = f"make gpu on {where['device_name']}: {document['rows']} rows in {document['seconds']} s"
    print_table(title + (", synthetic" if document["synthetic"] else ""), ["part", "", "seconds"], cells)
    if document["seconds"] > LIMIT_SECONDS:
        print(f"note: {document['seconds']} s is over the limit of {LIMIT_SECONDS} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
