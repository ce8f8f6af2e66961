"""One comparison of a bench: variants x prompts x rounds, every run a row (common/harness.py makes and uses it)."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from common.benchmark import Outcome, WrongResult, refuse_if_different
from common.device import memory, reset_peak, synchronize
from common.errors import UserError
from common.prompts import Prompt
from common.results import Row, Scalar
from common.statistics import MIN_ROUNDS, precision, williams
from common.tables import AGAIN, log_ratios
from common.terminal import progress

if TYPE_CHECKING:
    from common.harness import Bench

Variant = Callable[[Prompt | None, int], Outcome]  # one run of one prompt; the number of the round is its seed's offset


def attempt(run: Callable[[], Outcome]) -> tuple[Outcome | None, str, str | None]:
    """Return a run's outcome, or None with `failed` or `refused` and the reason, so that the grid can go on."""
    try:
        return run(), "ok", None
    except (WrongResult, UserError) as error:
        return None, "refused", str(error)
    except Exception as error:  # any exception becomes a row and a nonzero exit status
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
        """List the baseline, the null arm, and the others."""
        first, *others = self.variants
        return [first, first + AGAIN, *others]

    @property
    def each_prompt(self) -> list[Prompt | None]:
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
        total = limit * len(self.each_prompt) * len(self.names) if limit else None
        title = ", ".join([self.section, *(f"{name} {value}" for name, value in self.cell.items())])
        with progress(title, total) as step:
            round_ = 0
            while self.names[0] not in self.dropped and not self.enough(round_):
                for number, prompt in enumerate(self.each_prompt):
                    order = orders[(round_ * len(self.each_prompt) + number) % len(orders)]
                    for position, index in enumerate(order):
                        self.one(self.names[index], prompt, round_, position)
                        step(self.names[index])
                round_ += 1
        end = Row(kind="end", section=self.section, cell=self.cell, synthetic=options.dry_run)
        bench.results.add(end.model_copy(update={"figures": {"variants": self.names}}))

    def warm_up(self, count: int) -> None:
        """Run every variant untimed on the first prompts; check that a round fits into an explicit budget."""
        spent = math.inf
        for _ in range(2):  # the first call may load or compile something; the second one times a round
            began = time.perf_counter()
            for prompt in self.each_prompt[:count]:
                for name in self.variants:
                    if name not in self.dropped:
                        outcome, status, reason = self.call(name, prompt, 0)
                        if outcome is None:
                            failed = self.row(name, prompt, 0).model_copy(update={"status": status, "reason": reason})
                            self.bench.results.add(failed)
                            self.dropped.add(name)
            per_prompt = (time.perf_counter() - began) / min(count, len(self.each_prompt))
            spent = per_prompt * len(self.each_prompt) * len(self.names) / len(self.variants)
            if spent <= self.bench.options.budget:
                return
        if self.bench.options.round_limit is None and "budget" in self.bench.options.model_fields_set:
            raise UserError(
                f"--budget {self.bench.options.budget:g}: one round of {self.section} {self.cell or ''} takes about "
                f"{math.ceil(spent)} s; allow more seconds, or take fewer --prompts"
            )

    def call(self, name: str, prompt: Prompt | None, round_: int) -> tuple[Outcome | None, str, str | None]:
        """Do one timed run and check it; return its outcome, or why there is none (`attempt`)."""
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
        """Raise WrongResult if the output must equal the baseline's and does not."""
        key = (prompt.id if prompt else None, round_)
        if base == self.names[0]:
            self.outputs[key] = outcome.output
        elif base in self.exact:
            if key not in self.outputs:  # the baseline runs later, or ran before a --resume
                self.outputs[key] = self.variants[self.names[0]](prompt, round_).output
            refuse_if_different(f"{base}, {key[0] or 'round'}, round {round_}", self.outputs[key], outcome.output)

    def one(self, name: str, prompt: Prompt | None, round_: int, position: int) -> None:
        """Add one row, unless the row exists already or its variant has failed."""
        results, row = self.bench.results, self.row(name, prompt, round_)
        if name in self.dropped or results.has(row):
            return
        if row.synthetic:
            results.add(row.model_copy(update={"order": position, "seconds": 1.0, "tokens": 1.0}))
            return
        outcome, status, reason = self.call(name, prompt, round_)
        found: dict[str, Any] = {"order": position, "load": round(os.getloadavg()[0], 2)}
        if outcome is None:
            self.dropped.add(name)
            found |= {"status": status, "reason": reason}
        else:
            found |= {"seconds": outcome.seconds, "tokens": outcome.tokens, "figures": dict(outcome.figures)}
        results.add(row.model_copy(update=found))

    def enough(self, rounds: int) -> bool:
        """Return whether these rounds are enough: a function of the rows alone, so that a resumed run ends alike."""
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
