"""The cells of a sweep run on a Ray cluster of this machine, and their rows come back to the one writer."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from common.errors import UserError
from tests.support.beside import beside

executors = beside(7, "instruments.executors")
cell = beside(7, "instruments.cell")
grid = beside(7, "instruments.grid")


@pytest.mark.slow
def test_cells_run_on_a_local_cluster(llama_folder: Path) -> None:
    pytest.importorskip("ray", reason="needs the package ray: pip install 'ray>=2.40'")
    options = {"prompts": 1, "rounds": 1, "max_tokens": 4, "device": "cpu", "threads": 1}
    variants = {"plain": {"draft": "none"}, "ngram": {"drafter": "ngram", "k": 2}}
    found = [grid.Cell({"model": str(llama_folder), "seed": seed}, variants) for seed in (0, 1)]
    lost = grid.Cell({"model": "/no/such/folder", "seed": 2}, variants)
    tasks = [cell.Task(each, options, "test") for each in (*found, lost)]
    events = list(executors.on_ray(tasks, 600.0, "local", 0))
    assert sorted(each.settings["seed"] for each, row in events if row is None) == [0, 1, 2]
    for each in found:
        rows = [row for of, row in events if of == each and row is not None]
        assert {row.variant for row in rows if row.kind == "run"} == {"plain", "plain, again", "ngram"}
        assert rows[-1].kind == "end"
    bad = [row for of, row in events if of == lost and row is not None and row.status != "ok"]
    assert bad


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_is_not_there_is_one_line(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"{scheme}127.0.0.1:{taken.getsockname()[1]}"
        executors.check_address(address)
    for gone in (address, f"{scheme}127.0.0.1:70000", f"{scheme}a..b:1"):
        with pytest.raises(UserError, match="the cluster cannot be reached"):
            list(executors.on_ray([], 10.0, gone, 0))


@pytest.mark.slow
def test_without_a_cluster_auto_finds_none() -> None:
    pytest.importorskip("ray", reason="needs the package ray: pip install 'ray>=2.40'")
    with pytest.raises(UserError, match="the cluster cannot be reached"):
        list(executors.on_ray([], 10.0, "auto", 0))
