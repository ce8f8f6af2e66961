"""One bench: comparisons whose every run is a row, rounds until the ratios are known well enough, tables at the end.

    bench = Bench(options, results, device)
    bench.compare("sums", {"size": 100}, {"loop": lambda prompt, round: Outcome(), "sum": fast}, exact={"sum"})
    bench.report("sums")

A comparison times its variants in turns, prompt by prompt and round by round. The first variant is the baseline; it is
timed a second time under the name `NAME, again` (the null arm, see common/statistics.py). What the results hold already
is not run again.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from common.benchmark import BenchOptions, Outcome, WrongResult, refuse_if_different
from common.checkpoint import open_checkpoint
from common.device import dtype_name, memory, reset_peak, resolve_dtype, synchronize
from common.environment import environment
from common.errors import UserError
from common.prompts import Half, Prompt
from common.results import Results, Row, Scalar
from common.statistics import MIN_ROUNDS, precision, williams
from common.tables import AGAIN, derive, log_ratios, print_section, write_csv
from common.terminal import progress

Variant = Callable[[Prompt | None, int], Outcome]  # one run of one prompt; the number of the round is its seed's offset


def open_results(
    options: BenchOptions, definitions: Mapping[str, str], device: torch.device, dtype: str, models: Mapping[str, str]
) -> Results:
    """The results of one bench, in `--output` or in memory. `models` maps the names of all models to content hashes."""
    where = environment(device, dtype, options.threads or torch.get_num_threads(), models, options.prompts_sha256())
    return Results(options.output, definitions, where, options.model_dump(mode="json"), options.resume)


def model_hashes(model: str, draft: str) -> dict[str, str]:
    """Content hashes of a model and of its draft (`auto`: the one that its lab.json names, if any), by name."""
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
        """What the title of a figure ends with, so that nobody takes a dry run's for a real one."""
        return " (synthetic)" if self.options.dry_run else ""

    def prompts(self, count: int | None = None, half: Half = "test") -> list[Prompt]:
        """The prompts of this bench: the user's own, or those of the suite's half; `--prompts` of them, or `count`."""
        return self.options.load_prompts(half)[: self.options.prompts if count is None else count]

    def rows(self, section: str) -> list[Row]:
        """The rows of a section, real or synthetic as this bench is."""
        return [row for row in self.results.rows if row.section == section and row.synthetic == self.options.dry_run]

    def table(self, section: str, baseline: str | None = None) -> list[dict[str, Any]]:
        """The derived table of a section (common/tables.py)."""
        return derive(self.rows(section), baseline)

    def count(
        self, section: str, cell: Mapping[str, Scalar], variant: str, prompt: str | None, run: Callable[[], Outcome]
    ) -> None:
        """A row of what is counted or measured once, without being timed in turns. A failure is a row, too."""
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
        """A row for what cannot run here, with the reason."""
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

        `exact` names the variants whose output has to be the baseline's, run by run: others are refused. `baselines`
        names another baseline than the first for some variants. `warmup` is the number of prompts that every variant
        runs untimed before the first round. A variant that fails, or is refused, does not run again. Without prompts
        a variant is called with None. Raises UserError where a `--budget` that was asked for is too short for one
        round; the default budget never allows less than one.
        """
        Comparison(self, section, dict(cell), dict(variants), list(prompts), set(exact), dict(baselines or {})).run(
            warmup
        )

    def finished(self, section: str, cell: Mapping[str, Scalar]) -> bool:
        """Is there a complete comparison of this section and cell? Then its variants need not even be made."""
        return self.results.has(Row(kind="end", section=section, cell=dict(cell), synthetic=self.options.dry_run))

    def report(self, section: str, title: str, columns: Sequence[str] = ()) -> None:
        """Print the table of a section with its null arm, what failed, and what may be claimed."""
        if self.rows(section):
            print_section(title + self.mark, self.rows(section), columns)

    def close(self) -> int:
        """Write tables.csv, and return the exit status: 1 if a run failed or was refused."""
        if self.results.folder is not None:
            write_csv(self.results.rows, self.results.folder / "tables.csv")
        return 1 if any(row.status == "failed" or row.kind == "run" for row in self.results.failures) else 0

    def document(self) -> dict[str, Any]:
        """What a bench prints as its last line: the manifest and the derived tables."""
        sections = list(dict.fromkeys(row.section for row in self.results.rows))
        return self.results.manifest() | {"tables": {section: self.table(section) for section in sections}}

    def dtypes(self) -> list[torch.dtype]:
        """What to measure in: the dtype asked for; for `auto` float32, and bfloat16 where it multiplies no slower."""
        if self.options.dtype != "auto":
            return [resolve_dtype(self.options.dtype, self.device)]
        squares = {d: torch.randn(1024, 1024, device=self.device).to(d) for d in (torch.float32, torch.bfloat16)}
        runs: dict[str, Variant] = {dtype_name(d): product(square) for d, square in squares.items()}
        self.compare("dtypes", {}, runs)
        found = {row["variant"]: row["seconds_per_token"] for row in self.table("dtypes")}
        slower = found["bfloat16"] / found["float32"]
        if slower > 1:
            print(f"bfloat16 is left out: a matrix product takes {slower:.1f} times as long in it", file=sys.stderr)
        return [torch.float32] if slower > 1 else list(squares)


def product(square: torch.Tensor) -> Variant:
    """The product of a square matrix with itself, and its floating-point operations."""

    def run(prompt: Prompt | None, round: int) -> Outcome:
        square @ square
        return Outcome(1, {"gflop": 2 * square.shape[0] ** 3 / 1e9})

    return run


def attempt(run: Callable[[], Outcome]) -> tuple[Outcome | None, str, str | None]:
    """What a run gave; or None with `failed` or `refused` and the reason, so that the grid can go on."""
    try:
        return run(), "ok", None
    except (WrongResult, UserError) as error:
        return None, "refused", str(error)
    except Exception as error:  # whatever it is: it becomes a row, and the exit status says so
        return None, "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


@dataclass
class Comparison:
    """One cell of a section while it runs: variants x prompts x rounds."""

    bench: Bench
    section: str
    cell: dict[str, Scalar]
    variants: dict[str, Variant]
    prompts: list[Prompt]
    exact: set[str]
    baselines: dict[str, str]
    outputs: dict[tuple[str | None, int], Sequence[int]] = field(default_factory=dict)  # the baseline's
    dropped: set[str] = field(default_factory=set)

    @cached_property
    def names(self) -> list[str]:
        """The baseline, the null arm, and the others."""
        first, *others = self.variants
        return [first, first + AGAIN, *others]

    @property
    def texts(self) -> list[Prompt | None]:
        return list(self.prompts) or [None]

    def row(self, name: str, prompt: Prompt | None, round_: int) -> Row:
        return Row(
            kind="run", section=self.section, cell=self.cell, variant=name,
            baseline=self.baselines.get(name, self.names[0]) if name != self.names[0] else None,
            prompt=prompt.id if prompt else None, round=round_, synthetic=self.bench.options.dry_run,
        )  # fmt: skip

    def run(self, warmup: int) -> None:
        bench, options = self.bench, self.bench.options
        if bench.finished(self.section, self.cell):
            return
        failed = [row for row in bench.rows(self.section) if row.cell == self.cell and row.status != "ok"]
        self.dropped = {row.variant for row in failed}
        orders = williams(len(self.names))
        limit = options.round_limit
        if not options.dry_run:
            self.warm_up(max(1, warmup))
        total = (limit or MIN_ROUNDS) * len(self.texts) * len(self.names)
        title = ", ".join([self.section, *(f"{name} {value}" for name, value in self.cell.items())])
        with progress(title, total) as step:
            round_ = 0
            while self.names[0] not in self.dropped and not self.enough(round_):
                for number, prompt in enumerate(self.texts):
                    order = orders[(round_ * len(self.texts) + number) % len(orders)]
                    for place, index in enumerate(order):
                        self.one(self.names[index], prompt, round_, place)
                        step(self.names[index])
                round_ += 1
        end = Row(kind="end", section=self.section, cell=self.cell, synthetic=options.dry_run)
        bench.results.add(end.model_copy(update={"figures": {"variants": self.names}}))

    def warm_up(self, count: int) -> None:
        """Run every variant untimed on the first prompts; see that a round fits into a budget that was asked for."""
        spent = math.inf
        for _ in range(2):  # a first call may load or compile something: the second tells what a round takes
            began = time.perf_counter()
            for prompt in self.texts[:count]:
                for name in self.variants:
                    if name not in self.dropped:
                        outcome, status, reason = self.call(name, prompt, 0)
                        if outcome is None:
                            failed = self.row(name, prompt, 0).model_copy(update={"status": status, "reason": reason})
                            self.bench.results.add(failed)
                            self.dropped.add(name)
            per_prompt = (time.perf_counter() - began) / min(count, len(self.texts))
            spent = per_prompt * len(self.texts) * len(self.names) / len(self.variants)
            if spent <= self.bench.options.budget:
                return
        if self.bench.options.round_limit is None and "budget" in self.bench.options.model_fields_set:
            raise UserError(
                f"--budget {self.bench.options.budget:g}: one round of {self.section} {self.cell or ''} takes about "
                f"{math.ceil(spent)} s; allow more seconds, or take fewer --prompts"
            )

    def call(self, name: str, prompt: Prompt | None, round_: int) -> tuple[Outcome | None, str, str | None]:
        """One timed run, then checked: what it gave, or why it gave nothing (`attempt`)."""
        base, device = name.removesuffix(AGAIN), self.bench.device

        def timed() -> Outcome:
            peak_is_ours = reset_peak(device)
            synchronize(device)
            began = time.perf_counter()
            outcome = self.variants[base](prompt, round_)
            synchronize(device)
            seconds = time.perf_counter() - began
            self.check(base, prompt, round_, outcome)
            used = memory(device)
            peaks = ("peak_rss",) * peak_is_ours + ("cuda_peak",) * ("cuda_peak" in used)
            figures = {f"{peak}_mib": round(used[peak], 1) for peak in peaks} | dict(outcome.figures)
            return replace(outcome, figures=figures, seconds=outcome.seconds or seconds)

        return attempt(timed)

    def check(self, base: str, prompt: Prompt | None, round_: int, outcome: Outcome) -> None:
        """Raise WrongResult where the output has to be the baseline's and is not."""
        key = (prompt.id if prompt else None, round_)
        if base == self.names[0]:
            self.outputs[key] = outcome.output
        elif base in self.exact:
            if key not in self.outputs:  # the baseline's turn comes later, or it ran before a --resume
                self.outputs[key] = self.variants[self.names[0]](prompt, round_).output
            refuse_if_different(f"{base}, {key[0] or 'round'}, round {round_}", self.outputs[key], outcome.output)

    def one(self, name: str, prompt: Prompt | None, round_: int, place: int) -> None:
        """One row, unless it is there already or its variant has failed."""
        results, row = self.bench.results, self.row(name, prompt, round_)
        if name in self.dropped or results.has(row):
            return
        if row.synthetic:
            results.add(row.model_copy(update={"order": place, "seconds": 1.0, "tokens": 1.0}))
            return
        outcome, status, reason = self.call(name, prompt, round_)
        found: dict[str, Any] = {"order": place, "load": round(os.getloadavg()[0], 2)}
        if outcome is None:
            self.dropped.add(name)
            found |= {"status": status, "reason": reason}
        else:
            found |= {"seconds": outcome.seconds, "tokens": outcome.tokens, "figures": dict(outcome.figures)}
        results.add(row.model_copy(update=found))

    def enough(self, rounds: int) -> bool:
        """Are these rounds all that are wanted? A function of the rows alone, so that a resumed run ends alike."""
        options = self.bench.options
        if options.round_limit is not None or not rounds:
            return rounds >= (options.round_limit or 1)
        rows = [row for row in self.bench.rows(self.section) if row.kind == "run" and row.cell == self.cell]
        rows = [row for row in rows if (row.round or 0) < rounds]
        spent = sum(row.seconds or 0.0 for row in rows)
        if spent * (rounds + 1) / rounds > options.budget:
            return True
        wanted = math.log1p(options.precision)
        return rounds >= MIN_ROUNDS and all(precision(logs) <= wanted for logs in log_ratios(rows).values())
