"""Sixty runs over phases, drafters, trees, caches, kernels, dtypes and seeds, whose tokens are saved as hashes.

A change that is not meant to affect the engine's output must give the same tokens before and after. The last bits of a
sum differ between processors, so the hashes are compared on the machine that saved them.

    python tests/support/saved_runs.py --save before.json     # before the change
    python tests/support/saved_runs.py --compare before.json  # after it
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [
    "from pathlib import",
    "def parse(self, text):\n    ",
    "class Reader:\n    def __init__(self, path",
    "for i in",
]
PHASES = {
    1: ["", "--top-p 0.9 --temperature 0.8", "--repetition-penalty 1.3", "--beams 3", "--n 3 --temperature 1"],
    2: [
        "--draft none", "--k 3", "--k 5 --temperature 1", "--temperature 0.7 --top-k 40",
        "--draft fake:0.7 --model fake", "--stop self --n 2 --temperature 1",
    ],
    3: [
        "--drafter ngram", "--drafter medusa --temperature 1", "--drafter eagle --temperature 1",
        "--drafter extrapolate",
        "--policy longest_prefix --temperature 1", "--policy coupled --temperature 1",
        "--policy typical --temperature 1",
        "--policy topk_agree --temperature 1", "--policy conf_threshold --temperature 1",
        "--tree static --temperature 1", "--tree dynamic --temperature 1", "--drafter medusa --tree static",
        "--drafter eagle --tree dynamic", "--controller adaptive --temperature 1",
        "--controller confidence --temperature 1", "--draft none --n 2 --temperature 1",
    ],
    4: [
        "--quant int8", "--quant int4 --temperature 1", "--amp --max-tokens 8",
        "--quant int4 --quant-asymmetric --draft none",
    ],
    5: [
        *(f"--kernels torch --kv {kind}" for kind in ("off", "dynamic", "static", "paged")),
        "--kernels torch --kv paged --kv-dtype int8 --draft none",
        *(f"--kernels torch --kv {kind} --temperature 1 --n 2" for kind in ("static", "paged")),
        *(f"--kernels torch --kv paged --drafter {name} --temperature 1" for name in ("ngram", "medusa", "eagle")),
        *(f"--kernels cpp --dtype {dtype} --temperature 1" for dtype in ("float32", "bfloat16", "float16")),
        *(f"--kernels cpp --drafter {name}" for name in ("ngram", "medusa", "eagle")),
        *(f"--kernels cpp --drafter {name} --temperature 1" for name in ("ngram", "medusa", "eagle")),
        "--kernels cpp --draft none", "--kernels cpp --draft none --temperature 1 --n 2", "--kernels cpp --quant int8",
        "--kernels cpp --quant int4 --temperature 1", "--kernels cpp --kv-dtype int8 --temperature 1",
        "--kernels cpp --tree static --temperature 1", "--kernels cpp --tree dynamic --drafter eagle",
        "--kernels cpp --policy coupled --temperature 1", "--kernels torch --policy coupled --temperature 1",
        "--kernels cpp --max-tokens 400 --model stdlib-1m --draft none",
    ],
}  # fmt: skip


def runs() -> list[tuple[int, str]]:
    return [(phase, options) for phase, each in PHASES.items() for options in each]


def tokens_of(phase: int, options: str) -> str:
    """Return the hash of the tokens of every completion."""
    (folder,) = ROOT.glob(f"phase-{phase}-*")
    own = [] if "--dtype" in options or "--amp" in options else ["--dtype", "float32"]
    count = [] if "--max-tokens" in options else ["--max-tokens", "24"]
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    command = [sys.executable, str(folder / "generate.py"), "--json", *prompts, *own, *count, *options.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"phase {phase} {options}: {done.stderr}")
    tokens = [completion["tokens"] for completion in json.loads(done.stdout)["completions"]]
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--save", type=Path)
    which.add_argument("--compare", type=Path)
    options = parser.parse_args()
    with ThreadPoolExecutor(2) as pool:
        hashes = dict(zip((f"{p} {o}" for p, o in runs()), pool.map(lambda run: tokens_of(*run), runs()), strict=True))
    if options.save:
        options.save.write_text(json.dumps(hashes, indent=1) + "\n")
        print(f"{len(hashes)} runs saved")
        return 0
    before = json.loads(options.compare.read_text())
    other = [run for run in before if hashes.get(run) != before[run]]
    print("\n".join(f"other tokens: phase {run}" for run in other) or f"{len(before)} runs gave the same tokens")
    return 1 if other or before.keys() != hashes.keys() else 0


if __name__ == "__main__":
    raise SystemExit(main())
