"""Sums up loads from their rows: percentiles, throughput, goodput, as tables and a picture.

A percentile needs so many requests that one of them lies beyond it with 95% confidence: 5, 29 and 299 for p50, 90, 99.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.figures import figure, look
from common.results import Row
from common.terminal import print_table

SECTION = "latency"
CONFIDENCE = 0.95
LATE_MS = 20.0  # a client that is later than this at the median measures itself


def needed(share: float) -> int:
    """Return how many samples it takes so that one lies beyond this quantile with 95% confidence."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(share))


def summary(rows: Sequence[Row], objectives: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """Return a line for every rate: percentiles, throughput, goodput. Computed from the rows alone."""
    lines = []
    for key in dict.fromkeys(json.dumps(row.cell) for row in rows if row.section == SECTION):
        mine = [row for row in rows if json.dumps(row.cell) == key and row.section == SECTION]
        good = [row for row in mine if row.status == "ok"]
        line: dict[str, Any] = {**mine[0].cell, "requests": len(mine), "failed": len(mine) - len(good)}
        if good:
            span = max(row.figures["scheduled_s"] + row.figures["e2e_ms"] / 1e3 for row in good)
            tokens = sum(row.tokens or 0 for row in good)
            line |= {"seconds": span, "completed_per_s": len(good) / span, "tokens_per_s": tokens / span}
            gaps = [gap for row in good for gap in row.figures["itl_ms"]]
            columns = {
                name: [row.figures[name] for row in good if name in row.figures]
                for name in ("ttft_ms", "tpot_ms", "e2e_ms")
            }
            for name, values in {**columns, "itl_ms": gaps}.items():
                # Gaps of one request are no samples of their own.
                count = len(good) if name == "itl_ms" else len(values)
                for share in (0.5, 0.9, 0.99):
                    enough = values and count >= needed(share)
                    line[f"{name[:-3]}_p{share * 100:.0f}"] = float(np.quantile(values, share)) if enough else None
            if columns["tpot_ms"]:
                line["tokens_per_s_per_user"] = 1e3 / float(np.median(columns["tpot_ms"]))
            line["tokens_per_chunk"] = float(np.mean([row.figures["tokens_per_chunk"] for row in good]))
            line["late_ms"] = float(np.median([row.figures["late_ms"] for row in good]))
            if objectives:
                met = [row for row in good if all(row.figures.get(n, 0.0) <= limit for n, limit in objectives.items())]
                line |= {"goodput": len(met) / span, "met": len(met) / len(mine)}
        lines.append(line)
    return lines


def draw(lines: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw throughput against rate, TTFT against rate, and the tokens/s of one user against those of all."""
    from matplotlib.ticker import LogFormatter

    lines = [line for line in lines if "tokens_per_s" in line]
    with figure(file, 1, 3, (5.0, 4.0)) as [rate, first, users]:
        x = [line["rate"] for line in lines]
        rate.plot(x, [line["completed_per_s"] for line in lines], label="completed", **look(0))
        rate.plot(x, x, color="#7F7F7F", linewidth=0.8, label="offered")
        if any("goodput" in line for line in lines):
            rate.plot(x, [line["goodput"] for line in lines], label="within the objectives", **look(2))
        rate.set_ylabel("requests per second")
        for at, name in enumerate(("p50", "p90", "p99")):
            shown = [line for line in lines if line.get(f"ttft_{name}") is not None]
            if shown:
                first.plot(
                    [line["rate"] for line in shown], [line[f"ttft_{name}"] for line in shown], label=name, **look(at)
                )
        first.set_ylabel("ms from arrival to the first token")
        first.set_yscale("log")
        first.yaxis.set_major_formatter(LogFormatter())  # 20, not 2 x 10^1
        first.yaxis.set_minor_formatter(LogFormatter())
        both = [line for line in lines if "tokens_per_s_per_user" in line]
        users.plot([line["tokens_per_s"] for line in both], [line["tokens_per_s_per_user"] for line in both], **look(1))
        users.set_xlabel("tokens per second, all users")
        users.set_ylabel("tokens per second, one user (median)")
        for axes in (rate, first):
            axes.set_xlabel("requests per second that arrive")
            if axes.get_legend_handles_labels()[0]:
                axes.legend()


def report(lines: Sequence[dict[str, Any]]) -> None:
    shown = ["arrivals", "rate", "requests", "failed", "completed_per_s", "tokens_per_s", "tokens_per_s_per_user"]
    shown += ["tokens_per_chunk", *(["goodput", "met"] if any("goodput" in line for line in lines) else [])]
    print_table("Throughput", shown, [[line.get(name) for name in shown] for line in lines])
    names = [f"{name}_{p}" for name in ("ttft", "tpot", "itl", "e2e") for p in ("p50", "p90", "p99")]
    print_table(
        "Latency, in milliseconds", ["rate", *names], [[line.get(name) for name in ("rate", *names)] for line in lines]
    )
    print(
        f"\nFrom {', '.join(str(needed(share)) for share in (0.5, 0.9, 0.99))} requests on, p50, p90 and p99 are shown."
    )
    for line in lines:
        if line.get("late_ms", 0.0) > LATE_MS:
            print(f"At {line['rate']:g} requests/s the client was {line['late_ms']:.0f} ms late: it is the bottleneck.")
