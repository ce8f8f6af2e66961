"""Finds the setting to use: drafter, K, controller and kernels, for one model and one kind of text.

    lab recommend
    lab recommend --model stdlib-10m --draft stdlib-1m --prompts-from prompts.jsonl --temperature 1

Rounds of prompts of the calibrate half time all candidates in turns. After each round, candidates that are behind the
best by more than the noise leave. The survivor is measured on the other half, against plain decoding and its null arm,
so the gain that is printed is not that of a lucky draw. Where the interval does not exclude 1, the advice is not to
speculate. `--seconds` bounds all of it.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

from common.benchmark import BenchOptions, print_document
from common.checkpoint import open_checkpoint
from common.device import resolve_device
from common.errors import UserError
from common.harness import Bench, Variant, model_hashes, open_results
from common.options import parse_options, run_main
from common.prompts import Prompt
from common.results import read_rows
from common.statistics import williams
from common.tables import derive, text_of
from common.terminal import print_table, progress

from .cell import SECTION as SWEEP
from .cell import Models, base_settings, must_repeat, way
from .grid import PLAIN, Cell, Settings, label

SEARCH, FINAL = "candidates", "recommended"
DEFINITIONS = {
    SEARCH: "all candidates in turns, on prompts of the calibrate half; those that are clearly behind leave",
    FINAL: "the survivor against plain decoding, on the other half of the prompts",
}
KS = (1, 2, 3, 4, 6, 8)
SHARE = 0.55  # of the seconds that the search may take
AT_ONCE = 2  # prompts of one round of the search
BEHIND = 3.0  # standard errors of a difference behind the best at which a candidate leaves, and
LEAST = 4  # rounds before the first one leaves


class RecommendOptions(BenchOptions):
    """Find the drafter, K, controller and kernels that decode fastest here."""

    draft: str = Field("auto", description="the draft model; none; auto: the model's own")
    temperature: float = Field(0.0, ge=0, description="of the texts")
    seconds: float = Field(120, gt=5, description="all may take about so long, after the models are loaded")
    max_tokens: int = Field(48, ge=8, description="new tokens per prompt")
    against: Path | None = Field(None, description="folder of a sweep: say how far its best setting is ahead")


def candidates(options: RecommendOptions) -> dict[str, Settings]:
    """List what can be tried: chains of every drafter that exists for this model, and the controller by costs."""
    folder = open_checkpoint(options.model).folder
    about = json.loads((folder / "lab.json").read_text(encoding="utf-8")) if (folder / "lab.json").is_file() else {}
    drafters = ["ngram"]
    if options.draft != "none" and (options.draft != "auto" or "draft" in about):
        drafters.insert(0, "model")
    drafters += [kind for kind in ("medusa", "eagle") if kind in about]
    found: dict[str, Settings] = {}
    for drafter in drafters:
        draft = {"draft": options.draft} if drafter == "model" else {}
        most = max(KS) if drafter != "medusa" else 4
        for k in [k for k in KS if k <= most]:
            settings = {"drafter": drafter, "k": k, **draft}
            found[label({"drafter": drafter, "k": k})] = settings
        found[label({"drafter": drafter, "controller": "cost"})] = {"drafter": drafter, "controller": "cost", **draft}
    return found


@dataclass
class Race:
    """Candidates that are timed in turns until one is left, or time is up."""

    runs: dict[str, Variant]
    logs: dict[str, list[float]] = field(default_factory=dict)  # log seconds per token, by round
    failed: dict[str, str] = field(default_factory=dict)

    out: set[str] = field(default_factory=set)  # clearly behind

    def alive(self) -> list[str]:
        return [name for name in self.runs if name not in self.failed and name not in self.out]

    def round(self, prompts: Sequence[Prompt], number: int) -> None:
        """Time all that are left on these prompts."""
        names = self.alive()
        order = williams(len(names))[number % len(williams(len(names)))]
        sums = dict.fromkeys(names, 0.0)
        for prompt in prompts:
            for at in order:
                name = names[at]
                if name in self.failed:
                    continue
                try:
                    began = time.perf_counter()
                    done = self.runs[name](prompt, number)
                    seconds = done.seconds or time.perf_counter() - began
                    sums[name] += math.log(seconds / max(1.0, done.tokens)) / len(prompts)
                except (UserError, RuntimeError, MemoryError) as error:
                    self.failed[name] = f"{type(error).__name__}: {error}"
        for name in names:
            if name not in self.failed:
                self.logs.setdefault(name, []).append(sums[name])

    def drop(self) -> None:
        """Let those leave that are clearly behind the best, by paired differences of rounds."""
        names = self.alive()
        rounds = min((len(self.logs[name]) for name in names), default=0)
        if rounds < LEAST:
            return
        ranked = sorted(names, key=lambda name: statistics.fmean(self.logs[name]))
        best, stays = ranked[0], next((name for name in ranked if name != PLAIN), PLAIN)
        for name in names:
            if name in (best, stays, PLAIN):
                continue
            gaps = [a - b for a, b in zip(self.logs[name], self.logs[best], strict=False)]
            error = statistics.stdev(gaps) / math.sqrt(len(gaps))
            if statistics.fmean(gaps) > BEHIND * error:
                self.out.add(name)


def search(bench: Bench, options: RecommendOptions, runs: dict[str, Variant], until: float) -> Race:
    """Race the candidates on prompts of the calibrate half."""
    race, prompts, number = Race(runs), bench.prompts(half="calibrate"), 0
    with progress("candidates", None) as step:
        race.round(prompts[:1], 0)  # loads and compiles
        race.logs.clear()
        while time.monotonic() < until or number < LEAST:
            at = number * AT_ONCE % len(prompts)
            race.round((prompts[at:] + prompts[:at])[:AT_ONCE], number)
            number += 1
            race.drop()
            step(f"{len(race.alive())} left")
            if len(race.alive()) <= 2 and number >= 2 * LEAST:
                break
    return race


def kernels(models: Models, bench: Bench, settings: Settings) -> str:
    """Return the faster of the kernels that can run here, for plain decoding: `auto`, unless torch's are faster."""
    prompt = bench.prompts(1, half="calibrate")[0]
    found = dict[str, float]()
    for name in ("auto", "torch"):
        run = way(models, {**settings, "kernels": name})
        try:
            run(prompt, 0)
            found[name] = min((run(prompt, at).seconds or math.inf) for at in range(3))
        except UserError:
            continue
    return min(found, key=lambda name: found[name] * (1.0 if name == "auto" else 1.1))


def advise(options: RecommendOptions, bench: Bench) -> dict[str, Any]:
    """Run the search and the final comparison; return the advice."""
    base = {"temperature": options.temperature}
    cell = Cell(base, {})
    models = Models(base_settings(bench, cell), base)
    began = time.monotonic()
    chosen = kernels(models, bench, {"draft": "none"})
    listed: dict[str, Settings] = {PLAIN: {"draft": "none"}, **candidates(options)}
    runs: dict[str, Variant] = {name: way(models, {**settings, "kernels": chosen}) for name, settings in listed.items()}
    race = search(bench, options, runs, began + SHARE * options.seconds)
    ranking = sorted(race.alive(), key=lambda name: statistics.fmean(race.logs[name]))
    best = next((name for name in ranking if name != PLAIN), None)
    lines = [
        {"candidate": name, "times_as_fast": math.exp(statistics.fmean(pairs)), "rounds": len(pairs)}
        for name in race.logs
        if name != PLAIN and (pairs := [a - b for a, b in zip(race.logs[PLAIN], race.logs[name], strict=False)])
    ]
    lines.sort(key=lambda line: -float(str(line["times_as_fast"])))
    found: dict[str, Any] = {"kernels": chosen, "candidates": lines, "failed": race.failed, "speculate": False}
    if best is None:
        return found
    left = max(5.0, options.seconds - (time.monotonic() - began))
    final = bench.with_options(budget=left, rounds=None)
    llm = cache(lambda name: models.llm({**listed[name], "kernels": chosen}))
    exact = [best] if must_repeat(llm(best), llm(PLAIN)) else []
    prompts = final.prompts()
    per_round = sum(math.exp(statistics.fmean(race.logs[name])) for name in (PLAIN, PLAIN, best)) * options.max_tokens
    count = max(5, min(len(prompts), int(left / (5 * per_round)))) if options.round_limit is None else len(prompts)
    final.compare(FINAL, base, {PLAIN: runs[PLAIN], best: runs[best]}, prompts[:count], exact)
    table = {line["variant"]: line for line in final.table(FINAL)}
    line = table.get(best, {})
    found |= {"setting": {**listed[best], "kernels": chosen}, "name": best, "line": line}
    found["prompts"] = min(count, len(prompts))
    found["speculate"] = bool(line.get("claimed")) and line.get("speedup", 0.0) > 1
    return found


def words(advice: dict[str, Any]) -> str:
    """Return the advice in one paragraph."""
    line = advice.get("line", {})
    gain = text_of(line, "speedup") if line.get("speedup") else "unknown"
    if not advice["speculate"]:
        if "name" not in advice:
            return "Do not speculate here: no candidate could run. Use --draft none."
        best = f"the best candidate, {advice['name']}, is {gain} times as fast as plain decoding"
        return f"Do not speculate here: {best}, which is no gain that can be claimed. Use --draft none."
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in advice["setting"].items())
    return f"Use {flags}: {gain} times as fast as plain decoding, on {advice['prompts']} other prompts."


def behind(folder: Path, advice: dict[str, Any], temperature: float) -> dict[str, Any]:
    """Return the best setting of a sweep, and how many times as fast it is as the one that is recommended.

    The sweep varies drafter, k and controller, and may have cells of other temperatures. UserError if it did not
    measure the recommended setting.
    """
    lines = [line for line in derive([row for row in read_rows(folder) if row.section == SWEEP]) if line.get("speedup")]
    lines = [line for line in lines if line.get("temperature", 0.0) == temperature and line.get("drafter")]
    setting = advice["setting"] if advice["speculate"] else None

    def is_it(line: dict[str, Any]) -> bool:
        assert setting is not None
        wanted = {name: setting.get(name, other) for name, other in (("drafter", "model"), ("controller", "fixed"))}
        same = all(line.get(name, "fixed") == value for name, value in wanted.items())
        return same and (wanted["controller"] != "fixed" or line.get("k") == setting["k"])

    mine = [line["speedup"] for line in lines if setting is not None and is_it(line)] if setting else [1.0]
    if not lines or not mine:
        raise UserError(f"--against {folder}: that sweep did not measure the recommended setting, {advice.get('name')}")
    best = max(lines, key=lambda line: float(line["speedup"]))
    ahead = max(1.0, float(best["speedup"])) / mine[0]
    return {"best": best["variant"], "best_speedup": best["speedup"], "recommended_speedup": mine[0], "ahead": ahead}


def run(arguments: list[str]) -> int:
    options = parse_options(RecommendOptions, arguments, program="lab recommend")
    if options.dry_run:
        raise UserError("--dry-run is no option of recommend, which has to measure")
    if options.quick:
        options.seconds = min(options.seconds, 30)
    device = resolve_device(options.device)
    hashes = model_hashes(options.model, options.draft)
    with open_results(options, DEFINITIONS, device, options.dtype, hashes) as results:
        bench = Bench(options, results, device)
        advice = advise(options, bench)
        names = ("candidate", "times_as_fast", "rounds")
        rows = [[line[name] for name in names] for line in advice["candidates"]]
        print_table("Candidates, on the calibrate half", names, rows)
        for name, why in advice["failed"].items():
            print(f"left out: {name}: {why}")
        bench.report(FINAL, "The best candidate, on the other half")
        print(words(advice))
        if options.against is not None:
            found = advice["against"] = behind(options.against, advice, options.temperature)
            print(f"The best of the sweep, {found['best']}, is {found['ahead']:.3f} times as fast as this setting.")
        bench.close()
        print_document(results.manifest() | {"advice": advice, "words": words(advice)})
    return 0


if __name__ == "__main__":
    run_main(run, sys.argv[1:])
