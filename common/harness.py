"""What the measurements of one bench share: what is done already, timing or a dry run, rows, and tables of them.

bench = Bench(options, results, device)
if not bench.done(kind="sum"):
    times = bench.times("sums", {"loop": loop, "sum": lambda: sum(numbers)}, options.repeats)
    bench.add(kind="sum", **bench.ratio("speedup", times["loop"], times["sum"]))
bench.table("sum", "Sums")
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from common.benchmark import (
    BenchOptions,
    Ratio,
    Results,
    interleave,
    median,
    print_table,
    progress,
    ratio_interval,
    seconds,
)
from common.device import dtype_name, resolve_dtype


@dataclass(frozen=True)
class Bench:
    """One run of a bench."""

    options: BenchOptions
    results: Results
    device: torch.device

    @property
    def mark(self) -> str:
        """What the title of a figure ends with, so that nobody takes a dry run's for a real one."""
        return " (synthetic)" if self.options.dry_run else ""

    def done(self, **key: object) -> bool:
        """Do the results hold a row with these values? A dry run counts its own rows, a real one only real rows."""
        return self.results.has({**key, "synthetic": self.options.dry_run})

    def add(self, **row: object) -> None:
        """Keep a row; that of a dry run is marked."""
        self.results.add({**row, "synthetic": self.options.dry_run})

    def times(self, title: str, runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
        """Seconds of every run, round by round (`interleave`); in a dry run nothing is called, and all take 1 s."""
        if self.options.dry_run:
            return {name: [1.0, 1.0] for name in runs}
        with progress(title, len(runs) * (repeats + 1)) as step:
            timed = interleave(runs, repeats, device=self.device, on_run=step)
        return {name: seconds(timed[name]) for name in runs}

    def ratio(self, name: str, numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
        """How many times as long the numerator takes, as columns of a row: `name`, `name_low` and `name_high`."""
        found = ratio_interval(numerator, denominator, seed=self.options.seed)
        return {name: found.median, f"{name}_low": found.low, f"{name}_high": found.high}

    def dtypes(self) -> list[torch.dtype]:
        """What to measure in: the dtype asked for; for `auto` float32, and bfloat16 where it multiplies no slower.

        The rate of a large matrix product in both is kept as rows of the kind `dtype`.
        """
        if self.options.dtype != "auto":
            return [resolve_dtype(self.options.dtype, self.device)]
        squares = {d: torch.randn(1024, 1024, device=self.device).to(d) for d in (torch.float32, torch.bfloat16)}
        runs = {dtype_name(d): partial(torch.matmul, square, square) for d, square in squares.items()}
        times = {name: median(each) for name, each in self.times("dtypes", runs, self.options.repeats).items()}
        for name, each in times.items():
            if not self.done(kind="dtype", dtype=name):
                self.add(kind="dtype", dtype=name, matmul_gflops_per_s=2 * 1024**3 / each / 1e9)
        slower = times["bfloat16"] / times["float32"]
        if slower > 1:
            print(f"bfloat16 is left out: a matrix product takes {slower:.1f} times as long in it", file=sys.stderr)
        return [torch.float32] if slower > 1 else list(squares)

    def rows(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.results.rows if row["kind"] == kind]

    def table(self, kind: str, title: str) -> None:
        """Print all rows of a kind; a ratio with its interval is one column."""
        rows = self.rows(kind)
        names = list(dict.fromkeys(name for row in rows for name in row if name not in ("kind", "synthetic")))
        columns = [name for name in names if not name.endswith(("_low", "_high"))]

        def cell(row: dict[str, Any], name: str) -> object:
            if f"{name}_low" not in row:
                return row.get(name)
            return str(Ratio(row[name], row[f"{name}_low"], row[f"{name}_high"]))

        print_table(title, columns, [[cell(row, name) for name in columns] for row in rows])
