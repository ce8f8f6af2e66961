"""`lab diff`: files in reading order, a diff for `git apply`, a page with all lines that needs no network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from common.errors import UserError
from common.lab import diff, diff_html
from common.phases import ROOT

README_2 = """\
## What changed since phase 1

    part rule: what is accepted
    + engine/verify.py  the rule, & <more>
    - engine/old.py     gone

    part loop
    + engine/draft.py   who guesses
    ~ engine/loop.py    goes round
        step
"""
README_3 = "## What changed since phase 2\n\n    + engine/tree.py    branches\n    ~ engine/draft.py\n"
NUMBERS = [f"n{i} = {i}\n" for i in range(40)]
LOOP = '"""Loops.\n\nAnd goes on.\n"""\n\n\ndef step(a, b):\n' + "".join("    " + line for line in NUMBERS)


def write(root: Path, contents: dict[str, str | bytes]) -> None:
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Make three phases with every kind of difference."""
    first: dict[str, str | bytes] = {
        "README.md": "one\n",
        "lesson.ipynb": "{}",
        "results/a.csv": "1\n",
        "bench.py": "1\n",
        "engine/__init__.py": "",
        "engine/loop.py": LOOP,
        "engine/old.py": "a = 1\n",
        "engine/end.py": "no line end",
        "engine/__pycache__/loop.pyc": b"1",
        "b.bin": b"\0one",
    }
    second = first | {
        "README.md": README_2,
        "lesson.ipynb": "{} ",
        "results/a.csv": "2\n",
        "bench.py": "2\n",
        "engine/loop.py": LOOP.replace("n3 = 3\n", "n3 = 'a < b & \"c\"'  # ü\n    n4 =\t3.5\n").replace(
            "    n30 = 30\n", ""
        ),
        "engine/end.py": "still no line end",
        "engine/verify.py": "x = 1\n" * 3,
        "engine/draft.py": "y = 1\n\n\n",
        "engine/a.py": "z = 1\n",
        "engine/__pycache__/loop.pyc": b"2",
        "b.bin": b"\0two",
    }
    del second["engine/old.py"]
    third = second | {"README.md": README_3, "engine/tree.py": "t = 1\n", "engine/draft.py": "y = 2\n"}
    for name, contents in {"phase-1-one": first, "phase-2-two": second, "phase-3-three": third}.items():
        write(tmp_path / name, contents)
    return tmp_path


@pytest.fixture
def lab_diff(root: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        assert diff.run(list(arguments), root) == 0
        return capsys.readouterr().out

    return run


def heads(out: str) -> list[str]:
    """Return the line above each file's diff."""
    return [line for line in out.splitlines() if re.match(r"[-+~] \w", line)]


IN_ORDER = [
    "+ engine/verify.py  the rule, & <more>",
    "+ engine/draft.py  who guesses",
    "+ engine/a.py",
    "~ engine/loop.py  goes round",
    "~ b.bin",
    "~ bench.py",
    "~ engine/end.py",
    "- engine/old.py  gone",
]


def test_files_come_in_reading_order_without_notebooks_readmes_results_and_caches(lab_diff: Callable[..., str]) -> None:
    assert heads(lab_diff("1", "2")) == IN_ORDER
    assert lab_diff("2") == lab_diff("1", "2")


def test_phases_that_are_no_neighbours_and_backwards(lab_diff: Callable[..., str]) -> None:
    assert heads(lab_diff("1", "3")) == [
        "+ engine/tree.py  branches",
        "+ engine/draft.py",
        "+ engine/a.py",
        "+ engine/verify.py",
        "~ b.bin",
        "~ bench.py",
        "~ engine/end.py",
        "~ engine/loop.py",
        "- engine/old.py",
    ]
    assert heads(lab_diff("2", "1"))[0] == "+ engine/old.py  gone"
    assert heads(lab_diff("3", "2"))[-1] == "- engine/tree.py  branches"


@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1), (1, 3)])
def test_what_is_printed_to_a_pipe_makes_the_other_phase(
    root: Path, lab_diff: Callable[..., str], old: int, new: int
) -> None:
    out = lab_diff(str(old), str(new))
    assert "\x1b" not in out
    names = {1: "phase-1-one", 2: "phase-2-two", 3: "phase-3-three"}
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    patch = out.replace(f"+++ {names[new]}", f"+++ {names[old]}")
    subprocess.run(["git", "apply", "-p0"], input=patch, text=True, cwd=root, check=True)
    for name in ("loop", "verify", "draft", "a", "end", "old"):
        made, right = (root / names[phase] / f"engine/{name}.py" for phase in (old, new))
        assert made.exists() == right.exists()
        assert not made.exists() or made.read_bytes() == right.read_bytes()


def test_hunks_say_where_they_are_and_binary_files_are_not_shown(lab_diff: Callable[..., str]) -> None:
    out = lab_diff("1", "2")
    assert "@@ -35,7 +36,6 @@ def step(a, b):" in out.splitlines()
    assert re.search(r"\(binary, 4 bytes, sha256 \w+\) -> \(binary, 4 bytes, sha256 \w+\)", out)


def test_a_terminal_sees_colours(lab_diff: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    out = lab_diff("1", "2")
    assert "\x1b[32m+x = 1\x1b[0m" in out
    assert "\x1b[31m-a = 1\x1b[0m" in out


def test_stat_counts_lines(lab_diff: Callable[..., str]) -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lab_diff("1", "2", "--stat").splitlines()[4:]]
    assert rows[0] == ["+ engine/verify.py", "3", "0", "the rule, & <more>"]
    assert rows[3] == ["~ engine/loop.py", "2", "2", "goes round"]
    assert rows[7] == ["- engine/old.py", "0", "1", "gone"]
    assert rows[8] == ["8 files", "12", "6", ""]


def test_a_part_alone(lab_diff: Callable[..., str]) -> None:
    assert heads(lab_diff("2", "--part", "rule")) == [IN_ORDER[0], IN_ORDER[-1]]
    assert heads(lab_diff("1", "2", "--part", "loop")) == [IN_ORDER[1], IN_ORDER[3]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["1", "9"], r"there is no phase 9; the phases are 1, 2, 3$"),
        (["0"], r"there is no phase 0; the phases are 1, 2, 3$"),
        (["2", "0"], r"there is no phase 0"),
        (["1"], r"phase 1 is the first: there is none before it"),
        (["2", "2"], r"phase 2 does not differ from itself; name two phases$"),
        (["two"], r"invalid int value: 'two'"),
        ([], r"required: A"),
        (["2", "--part", "gpu"], r"phase-2-two/README\.md has no part 'gpu'; its parts are rule, loop$"),
        (["3", "--part", "gpu"], r"phase-3-three/README\.md has no part 'gpu'; it has no parts$"),
        (["2", "--stat", "--html", "x.html"], r"not allowed with"),
        (["2", "--html", "no/such/folder.html"], r"--html no/such/folder\.html: cannot be written \(No such file"),
    ],
)
def test_bad_input_is_one_line(root: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        diff.run(arguments, root)
    assert "\n" not in str(error.value)


def test_outside_a_checkout_it_says_where_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="in a checkout of the repository"):
        diff.run(["1", "2"], tmp_path)


class Page(HTMLParser):
    """Reads a page like a browser: its elements, and the text of the code cells by file and column."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.references: list[tuple[str, str | None]] = []
        self.ids: set[str] = set()
        self.folds = 0
        self.code: dict[str, list[list[str | None]]] = {}  # file -> rows -> the text of each side, None where void
        self.file = ""
        self.cell: list[str] | None = None

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        classes = (given.get("class") or "").split()
        self.tags.add(tag)
        self.references += [(name, value) for name, value in attributes if name in ("href", "src", "srcset", "data")]
        self.ids |= {given["id"] or ""} if "id" in given else set()
        self.folds += "fold" in classes
        if "file" in classes:
            self.file = given["id"] or ""
            self.code[self.file] = []
        if tag == "tr" and self.file:
            self.code[self.file].append([])
        if tag == "td" and self.file and "number" not in classes:
            self.cell = []
            self.code[self.file][-1].append(None if "void" in classes else "")

    def handle_data(self, data: str) -> None:
        if self.cell is not None and self.code[self.file][-1][-1] is not None:
            self.cell.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "td" and self.cell is not None:
            row = self.code[self.file][-1]
            row[-1] = None if row[-1] is None else "".join(self.cell)
            self.cell = None


@pytest.fixture
def page(root: Path, lab_diff: Callable[..., str], tmp_path: Path) -> tuple[Page, str]:
    file = tmp_path / "diff.html"
    assert lab_diff("1", "2", "--html", str(file)) == f"wrote {file}: 8 files\n"
    text = file.read_text(encoding="utf-8")
    parser = Page()
    parser.feed(text)
    return parser, text


def test_the_page_refers_to_nothing_outside_itself(page: tuple[Page, str]) -> None:
    parser, text = page
    assert parser.references
    for name, value in parser.references:
        assert name == "href"
        assert value
        assert value[0] == "#"
        assert value[1:] in parser.ids
    assert not parser.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not re.search(r"https?:|//\w|url\(|@import|src=", text)


def test_the_page_holds_every_line_of_both_sides(root: Path, page: tuple[Page, str]) -> None:
    parser, _ = page
    rows = parser.code["file-3"]  # engine/loop.py, on two sides
    for phase, numbered in (("phase-1-one", 0), ("phase-2-two", 2)):
        sides = [row[numbered // 2] if len(row) == 2 else _two_sides(row)[numbered // 2] for row in rows]
        lines = (root / phase / "engine/loop.py").read_text().splitlines()
        assert [side for side in sides if side is not None] == lines
    assert [row[0] for row in parser.code["file-0"]] == ["x = 1"] * 3  # a new file has one side
    assert [row[0] for row in parser.code["file-1"]] == ["y = 1", "", ""]
    assert [row[0] for row in parser.code["file-7"]] == ["a = 1"]


def _two_sides(row: list[str | None]) -> list[str | None]:
    """Check that a void side is two void cells: its number's and its code's."""
    return [None, row[-1]] if row[0] is None else [row[0], None]


def test_the_page_folds_long_unchanged_runs_and_colours_for_light_and_dark(page: tuple[Page, str]) -> None:
    parser, text = page
    assert parser.folds == 3  # engine/loop.py: before, between and after its two changes
    assert re.search(r"<summary>\d+ unchanged lines</summary>", text)
    assert '<span class="k">def</span>' in text
    assert text.count("(prefers-color-scheme: dark)") == 3
    assert '<a class="path" href="#file-3">engine/loop.py</a>' in text
    assert "the rule, &amp; &lt;more&gt;" in text
    assert '<td class="count">rule</td>' in text


def test_the_files_of_a_long_page_are_closed(
    page: tuple[Page, str], lab_diff: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, short = page
    assert len(re.findall(r'<details class="file" id="file-\d" open>', short)) == 8
    monkeypatch.setattr(diff_html, "OPEN", 1)
    lab_diff("1", "2", "--html", str(tmp_path / "long.html"))
    long = (tmp_path / "long.html").read_text()
    assert len(re.findall(r'<details class="file" id="file-\d">', long)) == 8


def test_on_a_phone_both_sides_are_there(page: tuple[Page, str]) -> None:
    _, text = page
    narrow = text[text.index("@media (max-width") : text.index("</style>")]
    assert "grid-template-columns" in narrow
    assert 'class="code two"' in text
    assert 'class="code one"' in text
    assert ".two td.same:nth-child(-n+2)" in narrow  # an unchanged line is shown once


def test_make_diff_names_the_phase() -> None:
    clean = {name: value for name, value in os.environ.items() if "MAKE" not in name and name != "N"}
    make = shutil.which("make")
    assert make
    run = [make, "-n", "diff"]
    named = subprocess.run([*run, "N=2"], cwd=ROOT, env=clean, capture_output=True, text=True, timeout=300)
    assert named.stdout.splitlines()[-1] == ".venv/bin/lab diff 2"
    unnamed = subprocess.run(run, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=300)
    assert unnamed.returncode == 2
    assert "name a phase: make diff N=2" in unnamed.stderr
