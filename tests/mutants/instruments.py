"""Phase 7: schedules, latencies, predictions, grids, and the rows of a sweep."""
# ruff: noqa: E501

from __future__ import annotations

from tests.support.mutants import mutants

FOLDER = "phase-7-bench/instruments"
LATENCY = mutants(
    f"{FOLDER}/latency.py",
    ("tests/phase7/test_latency.py",),
    ("first, last = times[0] - self.scheduled, times[-1] - self.scheduled", "first, last = times[0] - self.sent, times[-1] - self.sent"),
    ('found["tpot_ms"] = 1e3 * (last - first) / (self.tokens - 1)', 'found["tpot_ms"] = 1e3 * (last - first) / self.tokens'),
)  # fmt: skip
LOADS = mutants(
    f"{FOLDER}/loads.py",
    ("tests/phase7/test_latency.py",),
    ("math.ceil(math.log(1 - CONFIDENCE) / math.log(share))", "math.floor(math.log(1 - CONFIDENCE) / math.log(share))"),
    ('"met": len(met) / len(mine)', '"met": len(met) / len(good)'),
    ("enough = values and count >= needed(share)", "enough = values and len(values) >= needed(share)"),
)  # fmt: skip
ARRIVALS = mutants(
    f"{FOLDER}/arrivals.py",
    ("tests/phase7/test_latency.py",),
    ("random.exponential(1 / rate, count)", "random.exponential(rate, count)"),
    ("random.exponential(BURST / rate,", "random.exponential(1 / rate,"),
    ("np.random.default_rng(seed)", "np.random.default_rng()"),
)
TARGETS = mutants(
    f"{FOLDER}/targets.py",
    ("tests/phase7/test_latency.py",),
    ('if not chunk.body.get("choices"):', "if False:"),
    ("timeout=timeout, retries=0)  # a refusal is a result", "timeout=timeout)"),
    ("            self.idle.append(client)\n", "            pass\n"),
)
PREDICT = mutants(
    f"{FOLDER}/predict.py",
    ("tests/phase7/test_predict.py",),
    ("return self.first + max(0.0, steps - 1) * self.step", "return self.first + steps * self.step"),
    ("accepted / (accepted + rejections)", "accepted / (accepted + 2 * rejections)"),
    ("2 * between**2 / len(logs) + cost_error(timed, plain) ** 2 + DRIFT**2", "cost_error(timed, plain) ** 2 + DRIFT**2"),
    ("2 * between**2 / len(logs) + cost_error(timed, plain) ** 2 + DRIFT**2)", "2 * between**2 / len(logs) + DRIFT**2)"),
    ('prompts = bench.prompts(half="calibrate" if task.half == "test" else "test")', "prompts = bench.prompts(half=task.half)"),
)  # fmt: skip
GRID = mutants(
    f"{FOLDER}/grid.py",
    ("tests/phase7/test_grid.py",),
    ("range(int(found[1]), int(found[2]) + 1)", "range(int(found[1]), int(found[2]))"),
    ("return all(name in DRAFTING for name in self.names)", "return any(name in DRAFTING for name in self.names)"),
    ("    if len(set(places)) < len(places):\n", "    if False:\n"),
)
CELLS = mutants(
    f"{FOLDER}/executors.py",
    ("tests/phase7/test_sweep.py",),
    ("        if status:\n", "        if status > 0:\n"),
    ('status = "refused" if "refused" in message else "failed"', 'status = "failed"'),
    ('            if line.endswith("\\n"):  # a killed', "            if True:  # a killed"),
)

MUTANTS = [*LATENCY, *LOADS, *ARRIVALS, *TARGETS, *PREDICT, *GRID, *CELLS]
