"""One bench: comparisons whose every run is a row, rounds until the ratios are precise enough, tables at the end.

    bench = Bench(options, results, device)
    bench.compare("sums", {"size": 100}, {"loop": lambda prompt, round: Outcome(), "sum": fast}, exact={"sum"})
    bench.report("sums")

A comparison times its variants in turns, prompt by prompt and round by round. The first variant is the baseline; it is
timed a second time under the name `NAME, again` (the null arm, see common/statistics.py). Runs that the results hold
already are skipped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from common.benchmark import BenchOptions, Outcome
from common.checkpoint import open_checkpoint
from common.comparison import Comparison, Variant, attempt
from common.device import dtype_name, resolve_dtype
from common.environment import environment
from common.prompts import Half, Prompt
from common.results import Results, Row, Scalar
from common.tables import derive, print_section, write_csv

__all__ = ["Bench", "Variant", "model_hashes", "open_results", "product"]


def open_results(
    options: BenchOptions, definitions: Mapping[str, str], device: torch.device, dtype: str, models: Mapping[str, str]
) -> Results:
    """Open the results of one bench, in `--output` or in memory. `models` maps all models' names to content hashes."""
    where = environment(device, dtype, options.threads or torch.get_num_threads(), models, options.prompts_sha256())
    return Results(options.output, definitions, where, options.model_dump(mode="json"), options.resume)


def model_hashes(model: str, draft: str) -> dict[str, str]:
    """Return content hashes of a model and of its draft (`auto`: the one that its lab.json names, if any), by name."""
    target = open_checkpoint(model)
    file = target.folder / "lab.json"
    if draft == "auto" and file.is_file():
        draft = str(json.loads(file.read_text(encoding="utf-8"))["draft"])
    drafts = [] if draft in ("auto", "none") else [open_checkpoint(draft)]
    return {each.name: each.content_hash() for each in (target, *drafts)}


@dataclass(frozen=True)
class Bench:
    """One run of a bench."""

    options: BenchOptions
    results: Results
    device: torch.device

    @property
    def mark(self) -> str:
        """Return the suffix of a figure's title that marks a dry run."""
        return " (synthetic)" if self.options.dry_run else ""

    def with_options(self, **changed: Any) -> Self:
        """Return the same bench with some options changed; the changes do not count as given by the user."""
        options = self.options.model_copy(update=changed)
        options.model_fields_set.intersection_update(self.options.model_fields_set)
        return replace(self, options=options)

    def prompts(self, count: int | None = None, half: Half = "test") -> list[Prompt]:
        """Return `--prompts` (or `count`) prompts: the user's own, or those of the suite's half."""
        return self.options.load_prompts(half)[: self.options.prompts if count is None else count]

    def rows(self, section: str) -> list[Row]:
        """Return the rows of a section, real or synthetic like this bench."""
        return [row for row in self.results.rows if row.section == section and row.synthetic == self.options.dry_run]

    def table(self, section: str, baseline: str | None = None) -> list[dict[str, Any]]:
        """Return the derived table of a section (common/tables.py)."""
        return derive(self.rows(section), baseline)

    def count(
        self, section: str, cell: Mapping[str, Scalar], variant: str, prompt: str | None, run: Callable[[], Outcome]
    ) -> None:
        """Add a row that is counted or measured once, without being timed in turns. A failure is a row, too."""
        row = Row(
            kind="count",
            section=section,
            cell=dict(cell),
            variant=variant,
            prompt=prompt,
            synthetic=self.options.dry_run,
        )
        if self.results.has(row):
            return
        if self.options.dry_run:
            self.results.add(row.model_copy(update={"tokens": 1.0}))
            return
        outcome, status, reason = attempt(run)
        if outcome is None:
            self.results.add(row.model_copy(update={"status": status, "reason": reason}))
            return
        found = {"tokens": float(outcome.tokens), "figures": dict(outcome.figures), "seconds": outcome.seconds}
        self.results.add(row.model_copy(update=found))

    def refuse(self, section: str, cell: Mapping[str, Scalar], variant: str, reason: str) -> None:
        """Add a row for a variant that cannot run here, with the reason."""
        row = Row(kind="count", section=section, cell=dict(cell), variant=variant, synthetic=self.options.dry_run)
        if not self.results.has(row):
            print(f"note: {section}, {variant} is left out: {reason}", file=sys.stderr)
            self.results.add(row.model_copy(update={"status": "refused", "reason": reason}))

    def compare(
        self,
        section: str,
        cell: Mapping[str, Scalar],
        variants: Mapping[str, Variant],
        prompts: Sequence[Prompt] = (),
        exact: Collection[str] = (),
        baselines: Mapping[str, str] | None = None,
        warmup: int = 1,
    ) -> None:
        """Time variants in turns, and keep every run as a row. The first variant is the baseline.

        `exact` names the variants whose output must equal the baseline's, run by run: others are refused. `baselines`
        names another baseline than the first for some variants. `warmup` is the number of prompts that every variant
        runs untimed before the first round. A variant that fails, or is refused, does not run again. Without prompts
        a variant is called with None. Raises UserError if an explicit `--budget` is too short for one
        round; the default budget never allows less than one.
        """
        Comparison(self, section, dict(cell), dict(variants), list(prompts), set(exact), dict(baselines or {})).run(
            warmup
        )

    def finished(self, section: str, cell: Mapping[str, Scalar]) -> bool:
        """Return whether the comparison of this section and cell is complete; then its variants need not be built."""
        return self.results.has(Row(kind="end", section=section, cell=dict(cell), synthetic=self.options.dry_run))

    def report(self, section: str, title: str, columns: Sequence[str] = ()) -> None:
        """Print the table of a section with its null arm, the failures, and the claims."""
        if self.rows(section):
            print_section(title + self.mark, self.rows(section), columns)

    def close(self) -> int:
        """Write tables.csv, and return the exit status: 1 if a run failed or was refused."""
        if self.results.folder is not None:
            write_csv(self.results.rows, self.results.folder / "tables.csv")
        return 1 if any(row.status == "failed" or row.kind == "run" for row in self.results.failures) else 0

    def document(self) -> dict[str, Any]:
        """Return the last line that a bench prints: the manifest and the derived tables."""
        sections = list(dict.fromkeys(row.section for row in self.results.rows))
        return self.results.manifest() | {"tables": {section: self.table(section) for section in sections}}

    def dtypes(self) -> list[torch.dtype]:
        """List the dtypes to measure: the given one; for `auto` float32, and bfloat16 if it multiplies no slower."""
        if self.options.dtype != "auto":
            return [resolve_dtype(self.options.dtype, self.device)]
        squares = {d: torch.randn(1024, 1024, device=self.device).to(d) for d in (torch.float32, torch.bfloat16)}
        runs: dict[str, Variant] = {dtype_name(d): product(square) for d, square in squares.items()}
        few = self.with_options(rounds=self.options.rounds or 3)  # the difference is large
        few.compare("dtypes", {}, runs)
        found = {row["variant"]: row["seconds_per_token"] for row in self.table("dtypes")}
        slower = found["bfloat16"] / found["float32"]
        if slower > 1:
            print(f"bfloat16 is left out: a matrix product takes {slower:.1f} times as long in it", file=sys.stderr)
        return [torch.float32] if slower > 1 else list(squares)


def product(square: torch.Tensor) -> Variant:
    """Return the product of a square matrix with itself, with its floating-point operations."""

    def run(prompt: Prompt | None, round: int) -> Outcome:
        square @ square
        return Outcome(1, {"gflop": 2 * square.shape[0] ** 3 / 1e9})

    return run
