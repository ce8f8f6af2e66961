"""Where the time goes, in every phase so far: the ranges of a decoding step, and what the target's forward does.

The same prompts are decoded plainly, and by draft and verify with the model's own draft, by the engine of each phase,
taking turns. Earlier phases do not say what they turn to; hooks on their models say it for them.
"""

from __future__ import annotations

import importlib
import sys
import timeit
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import thread_time
from typing import Any

import engine
from common.benchmark import median, refuse_if_different
from common.figures import figure
from common.phases import phase_of
from engine.profiler import RANGES, Profiler, stage
from engine.trace import Trace, read_trace

from .runs import Lab

PROFILE = {
    "profile": "ms_per_token: wall time of the decoding steps / new tokens, median of the rounds; draft, verify, "
    "accept, sample: shares of that time (`other`: between them), all rounds together. in_matrix, in_attention, "
    "in_elementwise, in_overhead: shares of `verify` by family of operators, from a trace of some steps; elementwise "
    "is all that is neither of the first two (norms, activations, additions, copies), overhead is what lies between "
    "operators (on a device: kernels), the tracing's own cost with it",
    "profile_cost": "off_share: calls of stage() in a step, times what one takes where nothing is profiled, over the "
    "step's time; coverage: the share of the steps' wall time that draft, verify, accept and sample add up to",
}
SHARES = (*RANGES, "other")
FAMILIES = {"matrix": "matrix products", "attention": "attention", "elementwise": "elementwise", "overhead": "overhead"}
OWN = phase_of(__file__)


@dataclass
class Decoding:
    """The texts, decoded by one phase's engine in one way; a profiler for every run."""

    engine: Any  # of any phase
    session: Any
    texts: list[str]
    runs: list[Profiler] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)  # of each text

    def __call__(self) -> None:
        with TemporaryDirectory() as folder:
            self.runs.append(self.profile(Path(folder), traced=0))

    def profile(self, folder: Path, traced: int) -> Profiler:
        session = self.session
        device, tokens = session.loaded.model.embedding.weight.device, []
        with hooked(session, self.engine is engine), Profiler(folder, device, traced) as profiler:
            for text in self.texts:
                sequences = session.sequences([text])
                for _ in profiler.watch(session.run(sequences, self.engine.Clock())):
                    pass
                tokens.append(sequences[0].tokens)
        self.tokens = tokens
        return profiler

    def trace(self, steps: int) -> Trace:
        with TemporaryDirectory() as folder:
            run = self.profile(Path(folder), steps).run
            assert run is not None
            return read_trace(run / "trace.json")

    @property
    def ms_per_token(self) -> float:
        count = sum(map(len, self.tokens))
        return median([run.total("ms") / count for run in self.runs[1:] or self.runs])

    def share(self, name: str) -> float:
        return sum(run.total(name) for run in self.runs) / sum(run.total("ms") for run in self.runs)


@contextmanager
def hooked(session: Any, says_it_itself: bool) -> Iterator[None]:
    """An earlier phase's forward begins in the embedding and ends in the head: so these two say `stage`."""
    if says_it_itself:
        yield
        return
    draft, target = getattr(session, "draft", None), session.loaded.model
    following = "accept" if draft else "sample"
    hooks = [
        target.embedding.register_forward_pre_hook(lambda *_: stage("verify")),
        target.head.register_forward_hook(lambda *_: stage(following)),
    ]
    if draft:
        hooks.append(draft.model.embedding.register_forward_pre_hook(lambda *_: stage("draft")))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def decodings(lab: Lab) -> dict[tuple[int, str, str], Decoding]:
    """By phase, way and dtype. What is not installed, or has no draft, is left out; the former is said."""
    found = {}
    for phase in range(1, OWN + 1):
        try:
            module = engine if phase == OWN else importlib.import_module(f"phase{phase}")
        except ModuleNotFoundError as error:
            print(f"note: phase {phase} is left out: {error}; `make install` installs the phases", file=sys.stderr)
            continue
        for dtype in ("float32", "bfloat16") if phase == OWN else ("float32",):
            for way in ("plain", "speculative") if phase > 1 else ("plain",):
                draft = {} if phase == 1 else {"draft": "none" if way == "plain" else "auto"}
                session = None if lab.options.dry_run else lab.session(module, dtype=dtype, **draft)
                if session is None or way == "plain" or session.draft:
                    found[phase, way, dtype] = Decoding(module, session, lab.texts())
    return found


def measure_profile(lab: Lab) -> None:
    if lab.done(kind="profile", phase=f"phase {OWN}"):
        return
    every = decodings(lab)
    first = next(iter(every.values()))
    if not lab.options.dry_run:
        for (phase, way, dtype), decoding in every.items():
            decoding()
            for mine, right in zip(decoding.tokens, first.tokens, strict=True):
                if dtype == "float32":
                    refuse_if_different(f"phase {phase}, {way}", right, mine)
            decoding.runs.clear()
    runs = {" ".join(map(str, key)): decoding for key, decoding in every.items()}
    lab.times("profile", runs, lab.options.repeats)
    ns = 1.0 if lab.options.dry_run else off_ns()
    for (phase, way, dtype), decoding in every.items():
        key = {"phase": f"phase {phase}", "way": way, "dtype": dtype}
        lab.add(kind="profile", **key, **figures(decoding, 4 if lab.options.quick else 16, lab.options.dry_run))
        if phase == OWN:
            lab.add(kind="profile_cost", **key, ns_per_call=ns, **costs(decoding, ns, lab.options.dry_run))


def figures(decoding: Decoding, steps: int, dry_run: bool) -> dict[str, float]:
    if dry_run:
        even = dict.fromkeys(SHARES, 1 / len(SHARES)) | {f"in_{name}": 1 / len(FAMILIES) for name in FAMILIES}
        return {"ms_per_token": 1.0, **even}
    shares = {name: decoding.share(name) for name in RANGES}
    trace = decoding.trace(steps)
    families, whole = trace.families("verify"), trace.ranges["verify"]
    inside = {f"in_{name}": families[family] / whole for name, family in FAMILIES.items()}
    return {"ms_per_token": decoding.ms_per_token, **shares, "other": 1 - sum(shares.values()), **inside}


def off_ns(calls: int = 100_000) -> float:
    """Nanoseconds of the processor for a call of `stage` while nobody profiles, the loop around it with it."""
    return min(timeit.repeat(lambda: stage("verify"), timer=thread_time, number=calls, repeat=5)) / calls * 1e9


def costs(decoding: Decoding, ns: float, dry_run: bool) -> dict[str, float]:
    """Every range that began counts as a call, those of the profiler's own with them."""
    if dry_run:
        return {"calls_per_step": 1.0, "off_share": 0.0, "coverage": 1.0}
    steps = sum(len(run.steps) for run in decoding.runs)
    calls = sum(run.entered for run in decoding.runs) / steps
    ms = sum(run.total("ms") for run in decoding.runs) / steps
    coverage = sum(map(decoding.share, RANGES))
    return {"calls_per_step": calls, "off_share": calls * ns / (ms * 1e6), "coverage": coverage}


def draw_profile(lab: Lab, file: Path) -> None:
    """Stacked bars: milliseconds per token by range, and the target's forward by family of operators."""
    rows = lab.rows("profile")
    labels = [f"{row['phase']}, {row['way']}, {row['dtype']}" for row in rows]
    size = (6.2, 1.6 + 0.34 * len(rows))
    with figure(file, columns=2, size=size, title=f"where the time goes{lab.mark}", sharey=True) as (left, right):
        stack(left, labels, {name: [row["ms_per_token"] * row[name] for row in rows] for name in SHARES})
        left.set(xlabel="ms per token")
        left.invert_yaxis()
        stack(right, labels, {family: [row[f"in_{name}"] for row in rows] for name, family in FAMILIES.items()})
        right.set(xlabel="share of the target's forwards")


def stack(axes: Any, labels: list[str], parts: dict[str, list[float]]) -> None:
    begun = [0.0] * len(labels)
    for name, lengths in parts.items():
        axes.barh(labels, lengths, left=begun, label=name)
        begun = [a + b for a, b in zip(begun, lengths, strict=True)]
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(parts), frameon=False)
