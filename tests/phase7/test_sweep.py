"""A sweep: its cells are processes, what they measure are rows, and no end of a process costs more than its cell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

import phase7
from common.errors import UserError
from common.phases import ROOT, phases
from common.prompts import load_prompts
from common.results import read_manifest, read_rows
from tests.support import forked
from tests.support.beside import beside

sweep = beside(7, "instruments.sweep")
executors = beside(7, "instruments.executors")
grid = beside(7, "instruments.grid")
cell = beside(7, "instruments.cell")
FOLDER = phases()[-1].folder
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER), str(ROOT)])}

# In the place of a cell's process: rows without a model, and an end that the cell's own option names.
STUB = """
import json, os, sys, time
task = json.loads(sys.stdin.readline())
settings, variants = task["cell"]["settings"], list(task["cell"]["variants"])
say = lambda message: print(json.dumps(message), flush=True)
fate = settings.get("seed", 0)
have = [row.get("variant") for row in task["rows"]]
for order, name in enumerate(variants):
    if fate == 1 and order == 1: os.kill(os.getpid(), 9)
    if fate == 2: sys.exit("the model is too large")
    if fate == 3: say({"refused": "no such draft"}); sys.exit()
    if fate == 4: time.sleep(60)
    if fate == 6: print('{"row": {"ki', end="", flush=True); os.kill(os.getpid(), 9)
    time.sleep(PAUSE)
    if name not in have:
        say({"row": {"kind": "run", "section": "sweep", "cell": settings, "variant": name, "prompt": "p", "round": 0,
                     "order": order, "seconds": 1.0, "tokens": 4.0, "baseline": None if order == 0 else variants[0]}})
say({"row": {"kind": "end", "section": "sweep", "cell": settings, "figures": {"variants": variants}}})
"""


def stub(pause: float = 0.0) -> list[str]:
    return [sys.executable, "-c", STUB.replace("PAUSE", str(pause))]


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "local", lambda tasks, timeout: executors.local(tasks, timeout, stub()))


def options(output: Path, *lines: str, **more: Any) -> Any:
    return sweep.SweepOptions(grid=list(lines), output=output, device="cpu", plots=False, **more)


@pytest.mark.usefixtures("stubbed")
def test_a_cell_that_ends_badly_is_a_row_and_the_others_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = sweep.sweep(options(tmp_path, "k=1,2", "seed=0,1,2,3,5,6"))
    found = {row.cell["seed"]: (row.status, row.reason or "") for row in read_rows(tmp_path) if row.status != "ok"}
    assert set(found) == {1, 2, 3, 6}
    assert "SIGKILL" in found[6][1]  # in the middle of a line
    assert found[1][0] == "failed"
    assert "SIGKILL" in found[1][1]
    assert found[2] == ("failed", "its process ended with status 1: the model is too large")
    assert found[3] == ("refused", "no such draft")
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (document["cells"], document["measured"], document["success_rate"]) == (6, 2, 2 / 6)
    assert status == 1
    assert {path.name for path in tmp_path.iterdir()} >= {"results.jsonl", "MANIFEST.json", "tables.csv"}


@pytest.mark.usefixtures("stubbed")
def test_a_cell_that_does_not_end_is_stopped_and_the_next_one_begins(tmp_path: Path) -> None:
    """Both would sleep, so a machine that has other work changes nothing."""
    assert sweep.sweep(options(tmp_path, "k=1,2", "seed=4", "max_tokens=8,9", cell_timeout=0.5)) == 1
    assert [(row.status, row.reason) for row in read_rows(tmp_path)] == 2 * [
        ("failed", "ran longer than --cell-timeout 0.5 s")
    ]


@pytest.mark.usefixtures("stubbed")
def test_resume_measures_what_is_missing_with_the_options_of_the_folder(tmp_path: Path) -> None:
    sweep.sweep(options(tmp_path, "k=1,2", "seed=0,5"))
    whole = (tmp_path / "results.jsonl").read_text(encoding="utf-8")
    lines = whole.splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_text("".join(lines[:5]) + lines[5][:20], encoding="utf-8")
    again = sweep.read_options(["--resume", "--output", str(tmp_path)])
    assert again.grid == ["k=1,2", "seed=0,5"]
    sweep.sweep(again)
    assert [row.key for row in read_rows(tmp_path)] == [json_key for json_key in map(key_of, lines)]


def key_of(line: str) -> str:
    return str(executors.Row.model_validate_json(line).key)


@pytest.mark.usefixtures("stubbed")
def test_a_folder_in_use_or_of_another_sweep_or_version_is_refused(tmp_path: Path) -> None:
    sweep.sweep(options(tmp_path, "k=1"))
    with pytest.raises(UserError, match="holds results already"):
        sweep.sweep(options(tmp_path, "k=1"))
    with pytest.raises(UserError, match="--grid"):
        sweep.sweep(options(tmp_path, "k=2", resume=True))
    with FileLock(tmp_path / ".lock"), pytest.raises(UserError, match="another bench is writing there"):
        sweep.sweep(options(tmp_path, "k=1", resume=True))
    manifest = {**read_manifest(tmp_path), "schema_version": 1}
    (tmp_path / "MANIFEST.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UserError, match="schema 1"):
        sweep.read_options(["--resume", "--output", str(tmp_path)])


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
from instruments import executors, sweep
folder, kills, command = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
sweep.local = lambda tasks, timeout: executors.local(tasks, timeout, command)
random.seed(3)
def child():
    have = folder.exists() and any(folder.iterdir())
    grid = ["k=1..3", "seed=10..15"]
    sweep.sweep(sweep.SweepOptions(grid=grid, output=folder, resume=have, device="cpu", plots=False))
for kill in range(kills + 1):
    pid = os.fork()
    if pid == 0:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1); os.dup2(devnull, 2)
        try:
            child()
        finally:
            os._exit(0)
    if kill < kills:
        time.sleep(random.uniform(0.05, 0.7))
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    rows = folder / "results.jsonl"
    print(sum('"kind": "end"' in line for line in rows.open()) if rows.exists() else 0)
"""


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_sweep_loses_at_most_the_cell_in_flight(kills: int, tmp_path: Path) -> None:
    """SIGKILL at random moments: complete cells stay complete, and --resume ends with the whole list of cells."""
    folder = tmp_path / "sweep"
    done = forked.run(
        [sys.executable, "-c", KILLS, str(folder), str(kills), *stub(0.02)], env=ENV, check=True
    ).stdout.split()
    counts = list(map(int, done))
    assert counts == sorted(counts)
    assert counts[-1] == 6
    rows = read_rows(folder)
    assert len({row.key for row in rows}) == len(rows)
    assert [row.cell["seed"] for row in rows if row.kind == "end"] == list(range(10, 16))
    assert sum(row.kind == "run" for row in rows) == 6 * 4


def test_a_cell_leaves_when_the_sweep_is_gone() -> None:
    """The process of a cell does not outlive the end of its stdin."""
    code = "import threading, time; from instruments import cell; "
    code += "threading.Thread(target=cell._leave_with_the_sweep).start(); time.sleep(60)"
    process = forked.start([sys.executable, "-c", code], env=ENV, stdin=subprocess.DEVNULL)
    assert process.wait() == 3


def test_what_a_library_prints_is_no_row(llama_folder: Path) -> None:
    """The process itself: its rows come back, and a refused task has its reason."""
    code = "import sys; from instruments import cell; real = cell.measure; "
    code += "cell.measure = lambda bench, task: (print('hello'), real(bench, task)); sys.exit(cell.main())"
    options = {"prompts": 1, "rounds": 1, "max_tokens": 3, "device": "cpu", "threads": 1}
    variants = {"plain": {"draft": "none"}, "tree": {"drafter": "ngram", "tree": "static"}}
    task = cell.Task(grid.Cell({"model": str(llama_folder)}, variants), options, "test")
    found = list(executors.messages(task.line(), 300.0, [sys.executable, "-c", code]))
    rows = [message["row"] for message in found]
    assert [row["status"] for row in rows if row.get("variant") == "tree"] == ["refused"]
    runs = [row["variant"] for row in rows if row["kind"] == "run" and "status" not in row]
    assert sorted(runs) == ["plain", "plain, again"]


def test_a_real_cell_compares_with_plain_decoding(llama_folder: Path) -> None:
    """In this process, with a small model: rows of all variants, equal tokens, and a variant that cannot run."""
    settings = {"model": str(llama_folder), "temperature": 0.0, "dtype": "float32"}
    variants = {
        "plain": {"draft": "none"},
        "ngram": {"drafter": "ngram", "k": 2},
        "sampled": {"drafter": "ngram", "k": 3},
        "tree": {"drafter": "ngram", "tree": "static"},
    }
    task = cell.Task(grid.Cell(settings, variants), {}, "test", True)
    options = cell.BenchOptions(device="cpu", rounds=1, prompts=2, max_tokens=6, threads=1)
    bench = cell.Bench(options, cell.Results(None, {}, {}), cell.resolve_device("cpu"))
    cell.measure(bench, task)
    rows = bench.results.rows
    runs = [row for row in rows if row.kind == "run" and row.status == "ok"]
    assert {row.variant for row in runs} == {"plain", "plain, again", "ngram", "sampled"}
    assert all(row.tokens == 6 for row in runs)
    assert [row.figures["k"] for row in runs if row.variant == "ngram"] == [2, 2]
    bad = [row for row in rows if row.status != "ok"]
    assert [(row.variant, row.status) for row in bad] == [("tree", "refused")]
    assert "cannot branch" in (bad[0].reason or "")
    judged = [row for row in rows if row.section == cell.QUALITY]
    assert len(judged) == 2
    for row in judged:
        assert row.figures["nll_sum"] == pytest.approx(
            reference_nll(llama_folder, row.prompt or "", int(row.tokens or 0)), rel=1e-4
        )


def reference_nll(folder: Path, prompt: str, count: int) -> float:
    """Return the loss of a continuation by the plain forward of the torch model."""
    (found,) = [each for each in load_prompts("code", "test") if each.id == prompt]
    loaded = phase7.load(str(folder), torch.float32, torch.device("cpu"))
    before, after = loaded.tokenizer.encode(found.text), loaded.tokenizer.encode(found.continuation)[:count]
    text = [*before, *after]
    total = 0.0
    for at, token in enumerate(after):
        logits = phase7.next_logits(loaded.model, [text[: len(before) + at]])
        total -= float(logits[0].float().log_softmax(-1)[token])
    return total


@pytest.mark.parametrize("name", ["k-sweep", "gamma-dtype-pair", "kv-lengths"])
def test_the_shipped_grids_are_valid(name: str) -> None:
    options = sweep.read_options(["--config", str(FOLDER / "grids" / f"{name}.yaml")])
    cells = grid.cells(grid.parse(options.grid), options.compare_baseline)
    assert sum(len(each.variants) for each in cells) >= 12
    if name == "k-sweep":
        assert (options.prompts, options.rounds) == (10, 10)


def test_axes_follow_one_flag_and_a_dry_run_is_marked(tmp_path: Path) -> None:
    words = ["--grid", "k=1", "dtype=float32", "--dry-run", "--output", str(tmp_path), "--device", "cpu"]
    assert sweep.spread(words)[:4] == ["--grid", "k=1", "--grid", "dtype=float32"]
    assert sweep.sweep(sweep.read_options(words)) == 0
    assert all(row.synthetic for row in read_rows(tmp_path))
    assert (tmp_path / "throughput.png").is_file() is False  # one K is no axis


def test_without_ray_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="needs the package ray, which is not installed: pip install"):
        list(executors.on_ray([], 10.0, "local", 0))
