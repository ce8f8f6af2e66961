"""Measures what steps cost before the first draft, so that `--controller cost` begins each text with the right K.

A few steps of made-up texts are decoded with fixed K, and the cost model observes them. The times are kept for a day in
the user's cache folder, for this machine and instruction set, these models, this number format and these options; later
runs read them. Runs without a draft, and other controllers, measure nothing.

    python generate.py --controller cost --prompt "from pathlib import"
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.environment import cpu_name

from .controllers import FixedController
from .cost_model import START, CostModel
from .kv_cache import KVOptions
from .runner import ModelRunner
from .sampling import SamplingParams
from .sequence import Sequence
from .speculative import decode
from .steps import Step
from .uncached_runner import UncachedRunner
from .verify import random_source

if TYPE_CHECKING:
    from .llm import LLM
    from .model import Transformer

Times = dict[str, dict[int, float]]
COUNTS = (0, 1, 2, 4, 8)  # draft tokens of the measured steps
ROUNDS = 2  # turns of each count: a pause of the machine then spoils one turn
STEPS, PLAIN_STEPS = 16, 64  # of a turn at most, as in one call into C++ (multi_step.py)
TOKENS = 40  # of the largest measured forward: beyond them, lines go on
SECONDS = 0.25  # of measuring for one number of rows
DRIFT = 1.3  # change of plain steps after which all is measured again
DAY = 24 * 3600
SETTINGS = (
    *("drafter", "quant", "draft_quant", "quant_group", "quant_asymmetric", "quant_head", "amp", "compile", "kv"),
    *("kv_dtype", "policy", "tree", "tree_nodes", "tensor_mode", "micro_batches", "draft_parallel"),
)


@dataclass
class Measured:
    """The times for a number of rows."""

    times: Times
    at: float  # seconds that had been decoded before the measurement
    took: float  # seconds of the measurement; SECONDS at least, for times that were read from the file

    def holds(self, cost_model: CostModel, rows: int) -> bool:
        """Return True unless plain steps have changed; measuring again may take 1% of the time of decoding."""
        as_measured = 1 / DRIFT < cost_model.plain.at(rows) / self.times["plain"][rows] < DRIFT
        return as_measured or decoded(cost_model) - self.at < 100 * self.took


def decoded(cost_model: CostModel) -> float:
    """Return the seconds of all steps that a cost model observed; without a cache, of one token in each."""
    return cost_model.spent * START / 1e3


class Prices:
    """Fills a cost model with the times of steps: kept ones, or those of a measurement."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.measured: dict[int, Measured] = {}  # by rows

    def provide(self, cost_model: CostModel, params: SamplingParams, rows: int) -> None:
        """Add the times of one row, and of the largest power of two of rows up to `rows`."""
        for count in sorted({1, 1 << rows.bit_length() - 1}):
            earlier = self.measured.get(count)
            if earlier is not None and earlier.holds(cost_model, count):
                continue
            key, began = self.key(params, count), time.monotonic()
            times = None if earlier else kept(key)
            if times is None:
                times = {name: table.usual() for name, table in self.measure(params, count).tables.items()}
                keep(key, times)
            took = max(SECONDS, time.monotonic() - began)
            self.measured[count] = Measured(times, decoded(cost_model), took)
            for name, table in cost_model.tables.items():
                for size, value in times[name].items():
                    table.recent.pop(size, None)
                    table.observe(size, value)

    def key(self, params: SamplingParams, rows: int) -> str:
        """Name everything that the times depend on; models by their shapes."""
        llm = self.llm
        options = {name: getattr(llm.options, name) for name in SETTINGS}
        shapes = [llm.loaded.config, llm.draft and llm.draft.config, llm.heads and llm.heads.shape]
        report = llm.backends.report
        ran = [report["step"], report.get("isa"), report.get("threads") or torch.get_num_threads()]
        weights = [each.model.embedding.weight for each in (llm.loaded, llm.draft) if each]
        means = [shapes, options, ran, [(each.dtype, each.device) for each in weights], params.greedy]
        digest = hashlib.sha256(repr(means).encode()).hexdigest()[:16]
        return f"{cpu_name()}, torch {torch.__version__}, {llm.loaded.checkpoint.name}, {rows} rows, {digest}"

    def measure(self, params: SamplingParams, rows: int) -> CostModel:
        """Measure steps with the counts of COUNTS in turn: for an equal share of SECONDS each, at least two steps."""
        measured = CostModel()
        most = min(self.llm.options.max_k, max(1, TOKENS // rows - 1))
        runs = [self._steps(params, rows, count) for count in COUNTS if count <= most]
        for run in ROUNDS * runs:
            until = time.monotonic() + SECONDS / ROUNDS / len(runs)
            for at, step in enumerate(run):
                if len(step.stats) < rows:  # the texts end, one before the other
                    break
                measured.observe(step.stats)
                if at > 0 and time.monotonic() > until:
                    break
        return measured

    def _steps(self, params: SamplingParams, rows: int, count: int) -> Iterator[Step]:
        """Decode made-up texts with `count` draft tokens in every step."""
        llm, length = self.llm, ROUNDS * (STEPS if count else PLAIN_STEPS) * (count + 1) + 1
        params = dataclasses.replace(params, max_new_tokens=length, ignore_eos=True, stop=())
        texts = [[(7 * row + at) % llm.loaded.config.vocab_size for at in range(8)] for row in range(rows)]
        sequences = [Sequence(text, params, dataclasses.replace(llm.loaded.ending, tokenizer=None)) for text in texts]
        source = random_source([params])
        draft = self._runner(llm.draft.model, rows, length) if llm.draft else None
        drafter = llm.new_drafter(draft, source)
        runner, several = self._runner(llm.loaded.model, rows, length), llm.backends.multi_step
        return decode(runner, drafter, sequences, llm.policy, lambda: FixedController(count), source, several)

    def _runner(self, model: Transformer, rows: int, length: int) -> ModelRunner:
        """Make a runner with a cache of its own, so that those of texts stay as they are."""
        options = self.llm.options
        if options.kv == "off" or not model.has_cache:
            return UncachedRunner(model)
        manager = self.llm.backends.manager(model, KVOptions(options.kv, options.kv_dtype), rows, 8 + length)
        return self.llm.backends.runner(model, manager)


def file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "llm-inference-lab/prices.json"


def kept(key: str) -> Times | None:
    """Return the times of an earlier run; None if there are none, or they are old or malformed."""
    try:
        found = json.loads(file().read_text(encoding="utf-8"))[key]
        times = {name: {int(size): float(value) for size, value in found[name].items()} for name in CostModel().tables}
        values = [value for table in times.values() for value in table.values()]
        fits = all(times.values()) and all(0 <= value < math.inf for value in values)
        return times if fits and 0 <= time.time() - float(found["at"]) < DAY else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def keep(key: str, times: Times) -> None:
    """Add times to the file, if it can be written; a malformed file is replaced."""
    try:
        others = dict(json.loads(file().read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        others = {}
    with contextlib.suppress(OSError):
        file().parent.mkdir(parents=True, exist_ok=True)
        unfinished = file().with_suffix(f".{os.getpid()}")
        unfinished.write_text(
            json.dumps(others | {key: {"at": time.time(), **times}}, indent=1) + "\n", encoding="utf-8"
        )
        os.replace(unfinished, file())
