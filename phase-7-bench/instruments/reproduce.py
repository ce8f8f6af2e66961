"""Runs a saved sweep or bench again, with its own options, and says what differs beyond noise.

lab reproduce sweeps/2026-11-30-09-00-00
lab reproduce phase-2-specdec/results --output /tmp/again
"""

from __future__ import annotations

import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.lab import compare_results
from common.lab.arguments import Parser
from common.options import run_main
from common.results import read_manifest, read_rows

from .sweep import saved, sweep

FORGOTTEN = ("--output", "--resume")


def arguments_of(invocation: dict[str, Any]) -> list[str]:
    """Return the command line of a bench, without the options that name its folder."""
    words = iter(invocation["environment"]["argv"][1:])
    found = []
    for word in words:
        name, equals, _ = word.partition("=")
        if name == "--output" and not equals:
            next(words, None)
        if name not in FORGOTTEN:
            found.append(word)
    return found


def again(folder: Path, output: Path) -> int:
    """Measure again what a folder holds; return the exit status. UserError if it does not say how."""
    manifest = read_manifest(folder)
    if any(row.synthetic for row in read_rows(folder)):
        raise UserError(f"{folder} holds rows of a dry run, which measured nothing")
    if "grid" in manifest["invocations"][-1]["options"]:
        return sweep(saved(folder, output=output, resume=False))
    bench = folder.resolve().parent / "bench.py"
    if not bench.is_file():
        raise UserError(f"{folder} is no sweep, and there is no bench.py beside it: its command cannot be run again")
    status = 0
    for number, invocation in enumerate(manifest["invocations"]):
        more = ["--resume"] if number else []
        command = [sys.executable, str(bench), *arguments_of(invocation), "--output", str(output), *more]
        status = max(status, subprocess.run(command, stdout=subprocess.DEVNULL).returncode)
    return status


def run(arguments: list[str]) -> int:
    parser = Parser("lab reproduce", "Run a saved sweep or bench again, and compare.")
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="folder that a sweep or a bench wrote")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where to; by default a dated folder beside it")
    parser.add_argument("--anyway", action="store_true", help="compare although the machines differ")
    given = parser.parse_args(arguments)
    stamp = datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
    output = given.output or given.folder.resolve().with_name(f"{given.folder.resolve().name}-again-{stamp}")
    if status := again(given.folder, output):
        print(f"note: the second run ended with status {status}; what it measured is compared", file=sys.stderr)
    anyway = ["--anyway"] if given.anyway else []
    return max(status, compare_results.run([str(given.folder), str(output), *anyway]))


if __name__ == "__main__":
    run_main(run, sys.argv[1:])
