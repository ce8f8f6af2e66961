"""Profiles every phase so far: the ranges of a decoding step, and the operators of the target's forward.

The engines of all phases decode the same prompts in turn, plainly and with the model's own draft. Earlier phases do not
call `stage`; hooks on their models call it.

    python bench.py --only profile
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import engine
from common.benchmark import Outcome, progress
from common.errors import UserError
from common.prompts import Prompt
from engine.profiler import RANGES, Profiler, stage
from engine.trace import read_trace

from .runs import OWN, Lab, engine_of

PROFILE = {
    "profile": "ms_per_token: wall time of the decoding steps / new tokens; draft_share, verify_share, accept_share, "
    "sample_share: shares of that time; coverage: their sum; speedup: over phase 1",
    "trace": "in_matrix, in_attention, in_elementwise, in_overhead: shares of the time in the target's forwards by "
    "family of operators, from a trace of some steps; elementwise is all that is neither of the first two (norms, "
    "activations, additions, copies), overhead is what lies between operators (on a device: kernels), the tracing's "
    "own cost with it",
}
FAMILIES = {"matrix": "matrix products", "attention": "attention", "elementwise": "elementwise", "overhead": "overhead"}
TRACED_PROMPTS, TRACED_STEPS = 3, 8


@dataclass
class Decoding:
    """One phase's engine, plain or speculative, with a profiler for every run."""

    engine: Any  # of any phase
    llm: Any

    def profile(self, prompt: Prompt | None, folder: Path, traced: int) -> tuple[Profiler, list[int]]:
        assert prompt is not None
        llm = self.llm
        device = llm.loaded.model.embedding.weight.device
        with hooked(llm, self.engine is engine), Profiler(folder, device, traced) as profiler:
            sequences = llm.sequences([prompt.text])
            for _ in profiler.watch(llm.run(sequences)):
                pass
        return profiler, sequences[0].tokens

    def __call__(self, prompt: Prompt | None, round_: int) -> Outcome:
        with TemporaryDirectory() as folder:
            profiler, tokens = self.profile(prompt, Path(folder), traced=0)
        seconds = {f"{name}_s": profiler.total(name) / 1e3 for name in RANGES}
        whole = profiler.total("ms") / 1e3
        return Outcome(len(tokens), {**seconds, "ranges_s": sum(seconds.values()), "steps_s": whole}, tokens, whole)

    def trace(self, prompt: Prompt) -> Outcome:
        """Measure the seconds of the target's forwards by family of operators, over some steps."""
        with TemporaryDirectory() as folder:
            profiler, tokens = self.profile(prompt, Path(folder), TRACED_STEPS)
            if len(profiler.steps) < 2:
                raise UserError(f"{prompt.id} ends after one step, and a trace begins with the second")
            assert profiler.run is not None
            trace = read_trace(profiler.run / "trace.json")
        families = trace.families("verify")
        seconds = {f"{name}_s": families[family] / 1e3 for name, family in FAMILIES.items()}
        return Outcome(len(tokens), {**seconds, "traced_s": trace.ranges["verify"] / 1e3})


@contextmanager
def hooked(llm: Any, has_stages: bool) -> Iterator[None]:
    """Call `stage` for an earlier phase, whose forward begins in the embedding and ends in the head."""
    if has_stages:
        yield
        return
    draft, target = getattr(llm, "draft", None), llm.loaded.model
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


def decodings(lab: Lab) -> dict[str, Decoding]:
    """Make one decoding per phase, kind and dtype. A phase that cannot run becomes a row with the reason."""
    found = {}
    for phase in range(1, OWN + 1):
        for dtype in ("float32", "bfloat16") if phase == OWN and not lab.options.quick else ("float32",):
            for kind in ("plain", "speculative") if phase > 1 else ("plain",):
                name = f"phase {phase} {kind}" + (" bfloat16" if dtype == "bfloat16" else "")
                draft = {} if phase == 1 else {"draft": "none" if kind == "plain" else lab.options.draft}
                try:
                    if dtype == "bfloat16" and lab.no_bfloat16:
                        raise UserError(lab.no_bfloat16)
                    of = engine_of(phase)
                    llm = lab.llm(of, dtype=dtype, **draft)
                    if llm is not None and kind == "speculative" and not llm.draft:
                        raise UserError(f"{lab.options.model} names no draft model; pass --draft")
                    found[name] = Decoding(of, llm)
                except UserError as error:
                    lab.refuse("profile", {}, name, str(error))
    return found


def measure_profile(lab: Lab) -> None:
    every = decodings(lab)
    exact = [name for name in every if not name.endswith("bfloat16")]
    lab.with_rounds(1).compare("profile", {}, every, lab.greedy_prompts, exact=exact)
    with progress("trace", len(every)) as show:
        for name, decoding in every.items():
            for prompt in lab.greedy_prompts[: 1 if lab.options.quick else TRACED_PROMPTS]:
                lab.count("trace", {}, name, prompt.id, partial(decoding.trace, prompt))
            show(name)
