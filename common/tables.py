"""Tables derived from the rows of a results folder: pure functions, so that every number can be recomputed.

    python -c "from common.results import *; from common.tables import *; from pathlib import Path; \\
        print(derive(read_rows(Path('phase-1-baseline/results'))))"

A table has a line for every cell and variant of a section. Every table has these columns: the cell's settings,
`variant`, `n_prompts`, `n_rounds`, `tokens_per_s`, `ms_per_token`. Timed variants add `speedup` (times as fast as the
baseline) with `speedup_low` and `speedup_high` (on prompts like these if there are at least five, else on these
prompts), `rounds_low` and `rounds_high` (on these prompts), `claimed`, `spread` (standard deviation of one paired log
ratio within a prompt) and `outliers` (pairs beyond five spreads, kept). Then the columns of RATIOS, and other figures.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.results import Row, failures
from common.statistics import MIN_ROUNDS, Logs, Ratio, claims, ratio
from common.terminal import print_table

AGAIN = ", again"  # the suffix of the null arm's name
# Columns that are a quotient of two sums over the rows: name -> numerator, denominator.
RATIOS = {
    "tokens_per_forward": ("tokens", "forwards"),
    "acceptance": ("accepted", "proposed"),
    "draft_share": ("draft_s", "steps_s"),
    "draft_cost": ("draft_token_s", "plain_token_s"),
    "loop_share": ("looped", "tokens"),
    "gflop_per_s": ("gflop", "seconds"),
    "gb_per_s": ("gb", "seconds"),
    "of_bandwidth": ("bandwidth_s", "seconds"),
    "of_roofline": ("roofline_s", "seconds"),
    "tpot_ms": ("later_ms", "later_tokens"),
    "nll": ("nll_sum", "tokens"),
    "nll_more": ("nll_more_sum", "tokens"),
    "agreement": ("agreed", "tokens"),
    "equal": ("equal_rows", "compared_rows"),
    "hit_share": ("hits", "tokens"),
    "verify_share": ("verify_s", "steps_s"),
    "accept_share": ("accept_s", "steps_s"),
    "sample_share": ("sample_s", "steps_s"),
    "coverage": ("ranges_s", "steps_s"),
    "in_matrix": ("matrix_s", "traced_s"),
    "in_attention": ("attention_s", "traced_s"),
    "in_elementwise": ("elementwise_s", "traced_s"),
    "in_overhead": ("overhead_s", "traced_s"),
}
# Figures that only serve the columns above and are not shown themselves.
SUMMED = {name for pair in RATIOS.values() for name in pair} | {"survived", "drafts"}


def _groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Group rows by cell and variant: cells in row order, variants in the bench's order (from the `end` row)."""
    found: dict[tuple[str, str], list[Row]] = {}
    listed: dict[str, list[str]] = {}
    for row in rows:
        cell = json.dumps(row.cell)
        listed.setdefault(cell, [])
        if row.kind == "end":
            listed[cell] = list(row.figures.get("variants", ()))
        else:
            found.setdefault((cell, row.variant), []).append(row)
    names = {cell: list(dict.fromkeys([*order, *(v for c, v in found if c == cell)])) for cell, order in listed.items()}
    return {(cell, name): found[cell, name] for cell in names for name in names[cell] if (cell, name) in found}


def _rate(row: Row) -> float:
    return (row.seconds or 0.0) / (row.tokens or 1.0)  # seconds per token


def log_ratios(rows: Sequence[Row], baseline: str | None = None) -> dict[str, Logs]:
    """Return, for every variant of one cell, log(baseline's seconds per token / its own) by prompt, round by round.

    The baseline is the one that each row names, or `baseline`. Pairs with a missing or failed run are left out.
    """
    timed = [row for row in rows if row.kind == "run" and row.status == "ok" and row.seconds]
    at = {(row.variant, row.prompt, row.round): row for row in timed}
    found: dict[str, dict[str, list[float]]] = {}
    for row in sorted(timed, key=lambda row: row.round or 0):
        base = baseline if baseline is not None else row.baseline
        other = at.get((base, row.prompt, row.round)) if base is not None and base != row.variant else None
        if other is not None:
            logs = found.setdefault(row.variant, {}).setdefault(row.prompt or "", [])
            logs.append(math.log(_rate(other) / _rate(row)))
    return {variant: logs for variant, logs in found.items()}


def _spread(logs: Logs) -> tuple[float | None, int]:
    """Return the standard deviation of a paired log ratio within a prompt, and the number of pairs beyond five."""
    of_prompt = [np.asarray(each) for each in logs.values()]
    residuals = np.concatenate([each - each.mean() for each in of_prompt])
    freedom = len(residuals) - len(logs)
    if freedom < 1:
        return None, 0
    away = np.abs(np.concatenate([each - np.median(each) for each in of_prompt]))  # outliers do not move medians
    usual = 1.4826 * float(np.median(away))
    return math.sqrt(float(np.square(residuals).sum()) / freedom), int((away > 5 * usual).sum()) if usual else 0


def _figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Compute RATIOS, survival, the mean of every other number, and values that are not numbers if all rows agree."""
    sums: dict[str, float] = {"tokens": sum(row.tokens or 0.0 for row in rows)}
    sums["seconds"] = sum(row.seconds or 0.0 for row in rows)
    values: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in row.figures.items():
            values.setdefault(name, []).append(value)
    for name, each in values.items():
        if name in SUMMED and name not in ("survived", "tokens", "seconds"):
            sums[name] = sum(each)
    found: dict[str, Any] = {}
    for name, (above, below) in RATIOS.items():
        if above in sums and sums.get(below) and (above in values or below in values):
            found[name] = sums[above] / sums[below]
    if "nll" in found:
        found["perplexity"] = math.exp(found["nll"])
    if sums.get("drafts") and "survived" in values:
        depth = max(map(len, values["survived"]))
        totals = [sum(each[at] for each in values["survived"] if at < len(each)) for at in range(depth)]
        found["survival"] = [total / sums["drafts"] for total in totals]
    for name, each in values.items():
        if name not in SUMMED:
            if all(isinstance(value, int | float) and not isinstance(value, bool) for value in each):
                found[name] = max(each) if name.startswith("peak_") else statistics.fmean(each)
            elif all(value == each[0] for value in each):
                found[name] = each[0]
    return found


def _cell_ratios(rows: Sequence[Row], baseline: str | None, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Return, for every timed variant of one cell, its speed-up with intervals, and whether it may be claimed."""
    logs = log_ratios(rows, baseline)
    ratios: dict[str, Ratio] = {name: ratio(of_variant, seed) for name, of_variant in logs.items()}
    null = next((found for name, found in ratios.items() if name.endswith(AGAIN)), Ratio(1.0))
    claimed = claims({name: found for name, found in ratios.items() if not name.endswith(AGAIN)}, null)
    columns = {}
    for name, found in ratios.items():
        spread, outliers = _spread(logs[name])
        interval, rounds = found.interval, found.rounds
        columns[name] = {
            "speedup": found.value,
            "speedup_low": interval.low if interval else None,
            "speedup_high": interval.high if interval else None,
            "rounds_low": rounds.low if rounds else None,
            "rounds_high": rounds.high if rounds else None,
            "claimed": claimed.get(name),
            "spread": spread,
            "outliers": outliers,
        }
    return columns


def _perplexity_ratios(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Return by how many percent each counted variant's perplexity in a cell exceeds the first's, text by text."""
    nll: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.kind == "count" and row.status == "ok" and row.prompt is not None and "nll_sum" in row.figures:
            nll.setdefault(row.variant, {})[row.prompt] = row.figures["nll_sum"] / (row.tokens or 1.0)
    columns = {}
    first, *others = nll or [""]
    for variant in others:
        shared = nll[variant].keys() & nll[first].keys()
        if shared:
            found = ratio({prompt: [nll[variant][prompt] - nll[first][prompt]] for prompt in sorted(shared)})
            low, high = (found.prompts.low, found.prompts.high) if found.prompts else (None, None)
            percent = {"": found.value, "_low": low, "_high": high}
            columns[variant] = {
                f"perplexity_percent{end}": None if value is None else 100 * (value - 1)
                for end, value in percent.items()
            }
    return columns


def derive(rows: Sequence[Row], baseline: str | None = None) -> list[dict[str, Any]]:
    """Derive the table of one section's rows; `baseline` compares all variants with that one instead of their own."""
    lines = []
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for (cell, variant), every in _groups(rows).items():
        if cell not in cells:
            own = [row for row in rows if json.dumps(row.cell) == cell]
            cells[cell] = _perplexity_ratios(own) | _cell_ratios(own, baseline)
        done = [row for row in every if row.status == "ok"]
        line: dict[str, Any] = {**every[0].cell, "variant": variant}
        if done:
            line |= {
                "n_prompts": len({row.prompt for row in done if row.prompt is not None}),
                "n_rounds": len({row.round for row in done if row.round is not None}),
            }
            timed = [row for row in done if row.seconds and row.tokens]
            if timed:
                rate = sum(row.seconds or 0 for row in timed) / sum(row.tokens or 0 for row in timed)
                line |= {"seconds_per_token": rate, "tokens_per_s": 1 / rate, "ms_per_token": 1e3 * rate}
            line |= cells[cell].get(variant, {})
            line |= {"synthetic": True} if done[0].synthetic else _figures(done)
        for row in every:
            if row.status != "ok":
                line |= {"status": row.status, "reason": row.reason}
        lines.append(line)
    return lines


def text_of(line: Mapping[str, Any], column: str) -> object:
    """Format a column for a table: a speed-up with its interval, without one if there are too few rounds."""
    value = line.get(column)
    low, high = line.get(f"{column}_low"), line.get(f"{column}_high")
    if value is None or low is None or high is None:
        return f"{value:.2f}" if column == "speedup" and value is not None else value
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


HIDDEN = {"seconds_per_token", "speedup_low", "speedup_high", "rounds_low", "rounds_high", "synthetic", "survival"}
HIDDEN |= {"perplexity_percent_low", "perplexity_percent_high"}
HIDDEN |= {"status", "reason", "outliers", "n_prompts", "n_rounds", "peak_rss_mib"}


def print_section(title: str, rows: Sequence[Row], columns: Sequence[str] = ()) -> None:
    """Print a section's table, how it was measured, and the failures."""
    lines = derive(rows)
    names = list(columns) or [n for n in dict.fromkeys(name for line in lines for name in line) if n not in HIDDEN]
    print_table(title, names, [[text_of(line, name) for name in names] for line in lines])
    for sentence in notes(lines):
        print(sentence)
    for failure in failures(rows):
        print(f"left out: {failure}")
    print()


def notes(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the notes on the intervals of a table, a sentence each."""
    timed = [line for line in lines if "speedup" in line]
    if not timed:
        return []
    rounds = _span([line["n_rounds"] for line in timed], "round")
    with_interval = [line for line in timed if line["speedup_low"] is not None]
    if not with_interval:
        return [f"{rounds}: too few for an interval, and nothing is claimed."]
    few = "" if len(with_interval) == len(timed) else "; without one there were too few"
    over = [line["n_prompts"] for line in with_interval if line["n_prompts"] >= MIN_ROUNDS]
    on = f"on prompts like these {_span(over, 'prompt')}" if over else "on this work"
    found = [f"Intervals: 95%, {on}; {rounds}{few}."]
    outliers = sum(line["outliers"] or 0 for line in timed)
    if outliers:
        found.append(f"Outliers (over five spreads), all kept: {outliers} paired runs.")
    for line in with_interval:
        if str(line["variant"]).endswith(AGAIN) and not line["speedup_low"] <= 1 <= line["speedup_high"]:
            found.append(f"{_label(line)}: the baseline differs from itself; no difference can be claimed here now.")
    unclaimed = [_label(line) for line in timed if line["claimed"] is False]
    if unclaimed:
        found.append(f"Not to be claimed as a difference: {'; '.join(unclaimed)}.")
    return found


def _span(counts: Sequence[int], what: str) -> str:
    low, high = min(counts), max(counts)
    return f"{low if low == high else f'{low} to {high}'} {what}{'' if high == 1 else 's'}"


def _label(line: Mapping[str, Any]) -> str:
    return ", ".join([*(f"{name} {line[name]}" for name in _cell_names(line)), str(line["variant"])])


def _cell_names(line: Mapping[str, Any]) -> list[str]:
    names = list(line)
    return names[: names.index("variant")]


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write all derived tables to one CSV file: a line for every section, cell and variant."""
    lines = []
    for section in dict.fromkeys(row.section for row in rows):
        lines += [{"section": section, **line} for line in derive([row for row in rows if row.section == section])]
    columns = list(dict.fromkeys(name for line in lines for name in line))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for line in lines:  # strings unchanged; all else as JSON, so that true, 1.5 and [1, 2] read the same in both
            cells = (line.get(name) for name in columns)
            writer.writerow([c if isinstance(c, str) else "" if c is None else json.dumps(c) for c in cells])
