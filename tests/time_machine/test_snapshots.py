"""The files that count as a phase's, and the definitions in which two Python files differ."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.lab.snapshots import changed_definitions, files


def test_outside_git_caches_do_not_count(tmp_path: Path) -> None:
    for name in ("b.py", "a/c.txt", "a/__pycache__/b.pyc", ".cache/d", "x.egg-info/e", "build/f"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert files(tmp_path) == ["a/c.txt", "b.py"]


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("a = 1", "a = 2", "a"),
        ("a: int = 1\nb = 2", "a: int = 3", "a b"),
        ("a, b = 1, 2", "a, b = 2, 1", "a b"),
        ("__all__ = ['a']", "__all__ = ['b']", ""),
        ("if 1:\n    a = 1", "if 2:\n    a = 1", "module"),
        ("def f(): ...", "@property\ndef f(): ...", "f"),
        ("def f(): ...", "async def f(): ...", "f"),
        ("def f():\n    'a'", "def f():\n    'b'", "f"),
        ("def f():\n    def g(): return 1", "def f():\n    def g(): return 2", "f"),
        ("", "class A:\n    b = 1\n    def c(self): ...\n    class D:\n        def e(self): ...", "A"),
        ("class A:\n    def b(self): ...", "", "A"),
        ("class A:\n    def b(self): ...", "class A:\n    def c(self): ...", "A.c A.b"),
        ("class A:\n    b: int = 1\n    def c(self): ...", "class A:\n    b: int = 2\n    def c(self): ...", "A"),
        ("class A: ...", "class A(B): ...", "A"),
        ("class A:\n    class B:\n        def c(self): ...", "class A:\n    class B:\n        def c(self): 2", "A.B.c"),
        (
            "class A:\n    @property\n    def b(self): ...\n    @b.setter\n    def b(self, c): return 1",
            "class A:\n    @property\n    def b(self): ...\n    @b.setter\n    def b(self, c): return 2",
            "A.b",
        ),
        ("def f(): ...\ndef g(): ...", "def g(): ...\n\ndef f(): ...  # moved", ""),
    ],
)
def test_definitions_that_differ(tmp_path: Path, old: str, new: str, names: str) -> None:
    (tmp_path / "old.py").write_text(old)
    (tmp_path / "new.py").write_text(new)
    assert changed_definitions(tmp_path / "old.py", tmp_path / "new.py") == tuple(names.split())
