"""Which tests are about which module: what a test names, which files come first, and what is an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import UserError
from common.lab import tested

ENGINE = {
    "__init__": "from .loop import run\nfrom .parts import Part",
    "loop": "",
    "rare": "",
    "parts/__init__": "from .part import Part, make",
    "parts/part": "",
    "parts/other_part": "",
}
MUTANTS = """
LAWS = ("tests/phase1/test_laws.py", "-k", "phase1")
LOOP = mutants(f"{ENGINE}/loop.py", (LAWS[0], *LAWS[1:]), ("a", "b"))
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a repository of one phase, whose module `rare` no test names."""
    for name, text in ENGINE.items():
        write(tmp_path, f"phase-1-one/engine/{name}.py", text)
    write(tmp_path, "tests/phase1/test_laws.py", "import phase1\nphase1.Part()")
    write(tmp_path, "tests/mutants/one.py", 'ENGINE = "phase-1-one/engine"' + MUTANTS)
    monkeypatch.setattr(tested, "BY_HAND", {"rare.py": "phase1/test_laws.py"})
    return tmp_path


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


@pytest.mark.parametrize(
    ("test", "modules"),
    [
        ("import phase1.loop as x", {"loop"}),
        ("from phase3.parts import other_part, make", {"parts/other_part", "parts/part"}),
        ("import phase1\nphase1.Part.make()", {"parts/part"}),
        ("import phase1 as now\nnow.parts.other_part.f(now.run)", {"parts/other_part", "loop"}),
        ("def test(engine):\n    engine.run()", {"loop"}),
        ("def test(engine):\n    find(f'{engine.__name__}.parts.part')", {"parts/part"}),
        ("about('engine/rare.py, f')\nset('phase2.loop.run')", {"rare", "loop"}),
        ("import phase1\nimport common.loop\nphase1.unknown, engine.config, loop.run, 'loop'", set()),
    ],
)
def test_what_a_test_names(root: Path, test: str, modules: set[str]) -> None:
    assert tested.named(test, tested.modules_of(root / "phase-1-one/engine")) == modules


def test_the_files_that_are_most_about_a_module_come_first(root: Path) -> None:
    laws = "phase1/test_laws.py"
    others = {place: [laws] for place in ("loop.py", "rare.py", "parts/part.py")}
    write(
        root, "tests/phase1/test_many.py", "from phase1 import loop, parts, Part\nfrom phase1.parts import other_part"
    )
    many = {f"parts/{name}.py": ["phase1/test_many.py"] for name in ("__init__", "other_part")}
    found = tested.by_module(root)
    assert found == others | many | {"parts/part.py": [laws, "phase1/test_many.py"]}
    for name in ("test_big_loop", "test_loop", "test_loops"):
        write(root, f"tests/every_phase/{name}.py", "def test(engine):\n    engine.run()" if "big" in name else "")
    wanted = ["every_phase/test_loop.py", laws, "every_phase/test_big_loop.py"]
    assert tested.by_module(root) == found | {"loop.py": wanted}
    assert "| `loop.py`" in tested.table(root)


def test_a_module_without_a_test_and_a_stale_line_are_errors(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"engine/parts/__init__\.py: no test names it; write one"):
        tested.by_module(root)
    by_hand = {**tested.BY_HAND, "parts/": "phase1/test_laws.py"}
    monkeypatch.setattr(tested, "BY_HAND", by_hand)
    write(root, "phase-1-one/engine/parts/kernel.cu", "")
    assert "parts/other_part.py" not in tested.by_module(root)
    assert "| `parts/`, the rest |" in tested.table(root)
    for stale in ({"gone.py": "phase1/test_laws.py"}, {"loop.py": "phase1/test_gone.py"}):
        monkeypatch.setattr(tested, "BY_HAND", by_hand | stale)
        with pytest.raises(UserError, match="is out of date"):
            tested.by_module(root)
