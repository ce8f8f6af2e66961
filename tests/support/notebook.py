"""Run the code cells of a notebook in one process, without Jupyter and without pictures on a screen.

    python -m tests.support.notebook phase-2-specdec/lesson.ipynb [--quick]

`--quick` makes runs small: at most 6 tokens, 2 prompts, little calibration, and the small model wherever a cell names a
model, or drafts nothing. Draft heads belong to the large model, so cells with heads keep it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

SMALLER = (
    (r'load\("stdlib-10m"', 'load("stdlib-1m"'),
    (r'"draft": "none"', '"draft": "none", "model": "stdlib-1m"'),
    (r'draft="none"', 'draft="none", model="stdlib-1m"'),
    (r'(\bmax_(?:new_)?tokens"?[=:] ?|\bwants\()\d\d+', r"\g<1>6"),
    (r"\brange\(4\)", "range(1)"),  # seeds
    (r"\b8192, 512\b", "1024, 256"),  # calibration
    (r"\[:512\]", "[:128]"),
    (r"\bprompts=4\b", "prompts=2"),
)


def smaller(source: str) -> str:
    """Return a cell with smaller numbers."""
    for pattern, replacement in SMALLER:
        source = re.sub(pattern, replacement, source)
    return source


def main(path: Path, quick: bool) -> None:
    os.environ["MPLBACKEND"] = "agg"
    sys.path.insert(0, str(path.resolve().parent))  # `engine`, as where Jupyter starts the notebook
    names: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            exec(compile(smaller(source) if quick else source, f"{path.parent.name}, cell {number}", "exec"), names)


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--quick" in sys.argv)
