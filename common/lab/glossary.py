"""The lines that docs/glossary.md links to: every term quotes a line of code, and `lab tables` keeps its number right.

python -c "from common.lab.glossary import *; print(numbered(Path('docs/glossary.md')).count('#L'))"
"""

from __future__ import annotations

import re
from pathlib import Path

from common.errors import UserError

QUOTED = re.compile(r"\(\.\./(?P<path>[^#)]+)#L(?P<line>\d+)\): `(?P<code>.+)`$", re.MULTILINE)


def numbered(glossary: Path) -> str:
    """Return the glossary with the number of every quoted line. UserError if a file has the line no more."""

    def link(found: re.Match[str]) -> str:
        source = (glossary.parent.parent / found["path"]).read_text(encoding="utf-8").splitlines()
        lines = [number for number, text in enumerate(source, 1) if text.strip() == found["code"]]
        if not lines:
            raise UserError(f"{glossary}: {found['path']} has no line `{found['code']}`; quote the one that it became")
        line = int(found["line"]) if int(found["line"]) in lines else lines[0]
        return f"(../{found['path']}#L{line}): `{found['code']}`"

    return QUOTED.sub(link, glossary.read_text(encoding="utf-8"))
