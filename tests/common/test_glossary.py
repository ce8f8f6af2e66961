"""docs/glossary.md: every term links to a line of code, which holds the code that the term quotes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from common.errors import UserError
from common.lab.glossary import numbered
from common.phases import ROOT

GLOSSARY = ROOT / "docs" / "glossary.md"
ENTRY = re.compile(r"- \*\*([^*]+)\*\*: .+\. \[`([^`]+)`\]\(\.\./([^#)]+)#L(\d+)\): `(.+)`")


def test_every_term_is_a_line_of_code() -> None:
    terms = []
    for line in GLOSSARY.read_text(encoding="utf-8").splitlines():
        if not line.startswith("- "):
            continue
        entry = ENTRY.fullmatch(line)
        assert entry, line
        term, name, path, number, code = entry.groups()
        source = (ROOT / path).read_text(encoding="utf-8").splitlines()
        assert source[int(number) - 1].strip() == code, f"{term}: `lab tables` finds the line again"
        assert path.endswith(name)
        terms.append(term.lower())
    assert terms == sorted(set(terms))
    assert len(terms) > 40


def test_a_moved_line_is_found_and_a_changed_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    glossary = tmp_path / "docs" / "glossary.md"
    glossary.write_text("- **term**: words. [`a.py`](../a.py#L1): `def f():`\n")
    (tmp_path / "a.py").write_text("\n\ndef f():\n    pass\n")
    assert "(../a.py#L3): `def f():`" in numbered(glossary)
    (tmp_path / "a.py").write_text("def g():\n    pass\n")
    with pytest.raises(UserError, match=r"a\.py has no line `def f\(\):`"):
        numbered(glossary)
