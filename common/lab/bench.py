"""`lab bench`: every phase's bench at its quick size, and the time-machine table and picture.

The quick benches have two rounds and claim nothing: they show that every figure can be measured here. The time machine
(`lab demo`) runs all phases in turns, with intervals. `--readme` copies its rows and picture to the repository's
`results`, and fills the READMEs again.

    lab bench
    lab bench --phase 2 --phase 3 --output /tmp/bench
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.lab import tables
from common.lab.arguments import Parser
from common.phases import ROOT, Phase, phases
from common.results import read_rows
from common.terminal import print_document, print_table

MACHINE = "time-machine"
ROUNDS = ("--prompts", "8", "--rounds", "6")  # of the time machine: enough for intervals


def measure(name: str, command: list[str], output: Path) -> dict[str, Any]:
    """Run one program, which writes rows to `output`; return what became of it."""
    began = time.monotonic()
    with (output.parent / f"{name}.txt").open("w", encoding="utf-8") as out:
        status = subprocess.run([sys.executable, *command, "--output", str(output)], stdout=out, cwd=ROOT).returncode
    rows = read_rows(output) if (output / "results.jsonl").is_file() else []
    return {
        "name": name,
        "status": status,
        "seconds": time.monotonic() - began,
        "rows": len(rows),
        "left_out": sum(row.status != "ok" for row in rows),
    }


def chosen(numbers: list[int]) -> list[Phase]:
    """Return the phases that have a bench, or those of them that are asked for. UserError for others."""
    found = [phase for phase in phases() if (phase.folder / "bench.py").is_file()]
    known = [phase.number for phase in found]
    if wrong := [number for number in numbers if number not in known]:
        raise UserError(f"--phase {wrong[0]}: the phases with a bench are {', '.join(map(str, known))}")
    return [phase for phase in found if not numbers or phase.number in numbers]


def run(arguments: list[str]) -> int:
    parser = Parser("lab bench", "Run every phase's bench at its quick size, and all phases in turns.")
    parser.add_argument("--phase", type=int, action="append", default=[], metavar="N", help="only this one; repeatable")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="by default a dated folder in bench-results")
    parser.add_argument("--readme", action="store_true", help="renew the README's time machine, too")
    given = parser.parse_args(arguments)
    selected = chosen(given.phase)
    output = given.output or ROOT / "bench-results" / datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is not empty; give another --output")
    output.mkdir(parents=True, exist_ok=True)
    parts = []
    for phase in selected:
        print(f"{phase.folder.name} ...", file=sys.stderr, flush=True)
        command = [str(phase.folder / "bench.py"), "--quick", "--device", "cpu"]
        parts.append(measure(phase.folder.name, command, output / phase.folder.name))
    if not given.phase:
        print(f"{MACHINE} ...", file=sys.stderr, flush=True)
        parts.append(measure(MACHINE, ["-m", "common.lab.cli", "demo", *ROUNDS], output / MACHINE))
        print((output / f"{MACHINE}.txt").read_text(encoding="utf-8"))
    names = ("name", "status", "seconds", "rows", "left_out")
    print_table("Benches", names, [[part[name] for name in names] for part in parts])
    (output / "bench.json").write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")
    failed = any(part["status"] for part in parts)
    if given.readme and not failed and not given.phase:
        for file in (output / MACHINE).glob("[!.]*"):
            shutil.copy(file, ROOT / "results" / file.name)
        tables.run([])
    print_document({"output": str(output), "seconds": sum(part["seconds"] for part in parts), "parts": parts})
    return 1 if failed else 0
