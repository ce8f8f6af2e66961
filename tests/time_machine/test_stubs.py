"""Stubs and hints: removed and kept parts of a source, and a README's hints."""

from __future__ import annotations

import ast

from common.lab.exercise import parse_hints
from common.lab.stubs import stub, stubs_in


def test_stubs() -> None:
    """Every form of a function."""
    source = '''import torch
from .other import used

TABLE = make()


def make() -> dict[str, int]:
    return _fill({})


def _fill(table: dict[str, int]) -> dict[str, int]:
    return table | {"secret": 1}


def register(name: str):
    return lambda function: function


@register("a")
@torch.inference_mode()
def decorated(
    x: int,
    key=lambda v: -v,
) -> int:
    # the secret is out
    @register("b")
    def inner() -> int:
        return 1

    return inner() + x
    # a secret comment


# a secret helper
@register("c")
def _helper() -> int:
    return 7


def short() -> int: return 3
def mentioned() -> int:
    """One.

    Two."""; return 4


class Shape(Base):
    sides: int = 3  # of the triangle

    def __init__(self) -> None:
        self.secret = 5

    def __post_init__(self) -> None:
        self.kept = 6

    @property
    def area(self) -> float: ...

    def nothing(self) -> None:
        """Does nothing."""

    async def _hidden(self) -> int:
        return 8

    class Inner:
        def method(self) -> None:
            """Of the inner."""
            return None


class Bare:
    def _only(self) -> int:
        return 10


if torch:

    def conditional() -> int:
        return 9


if __name__ == "__main__":
    print(short())
'''
    text = stub({"engine/a.py": source}, {"engine/a.py"})["engine/a.py"]
    ast.parse(text)
    names = [s.name for s in stubs_in("engine/a.py", text)]
    assert names == [
        "decorated",
        "short",
        "mentioned",
        "Shape.__init__",
        "Shape.Inner.method",
        "Bare._only",
        "conditional",
    ]
    assert text.count("raise NotImplementedError") == len(names)
    assert text.endswith("    print(short())\n"), "what a program runs is kept, and does not run at import"
    assert "_fill({})" in text, "what runs at import stays written"
    assert '{"secret": 1}' in text
    for gone in ("secret is out", "secret comment", "secret helper", "_helper", "self.secret", "_hidden", "return 3"):
        assert gone not in text
    for kept in (
        "sides: int = 3  # of the triangle",
        "self.kept = 6",
        "def area(self) -> float: ...",
        "key=lambda v: -v",
    ):
        assert kept in text
    assert text.index('@register("a")') < text.index("def decorated")


def test_hints() -> None:
    section = "Do it.\n\n- engine/a/b.py, C.d: one\n  two\n- engine/a.py: three\n- no hint\n"
    text = f"# X\n\n## Exercise\n\n{section}\n## Y\n\n- engine/c.py: no\n"
    assert parse_hints(text) == {"engine/a/b.py, C.d": "one two", "engine/a.py": "three"}
    chapters = (
        "## A\n\n### Exercise\n\n- engine/a.py: one\n\n## B\n\n- engine/c.py: no\n\n### Exercise\n\n- engine/b.py: two"
    )
    assert parse_hints(chapters) == {"engine/a.py": "one", "engine/b.py": "two"}
    assert parse_hints("# X\n") == {}
