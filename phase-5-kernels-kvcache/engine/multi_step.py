"""Several steps of one text in one call, where its models run: only what came of them comes back.

Between two calls there is Python, and by then the processor's caches hold the model's weights and none of it: a step
of a small model costs as much again outside of its kernels. Controllers say for how many steps their answer stands.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from .controllers import KController
from .drafters.model import ModelDrafter
from .drafting import Draft, Drafter, Outcome
from .generate import AT_ONCE, several
from .policies import AcceptancePolicy, Judged, Path, Rejection, SampleMatch
from .profiler import CURRENT, stage
from .runner import Drawing, ModelRunner, Speculated
from .sampling import SamplingParams
from .sequence import Sequence
from .steps import Step, StepStats, StepTimes, step_stats, take
from .tree import Tree
from .verify import RandomSource


def plain_steps(
    runner: ModelRunner,
    drafter: Drafter,
    sequence: Sequence,
    params: SamplingParams,
    controller: KController,
    source: RandomSource,
) -> Iterator[Step]:
    """Steps for which nobody asks for a draft: plain decoding, at its price. None where the runner cannot."""
    if drafter.taps is not None and drafter.known(sequence) != sequence.length - 1:
        return  # it wants more states than those of the tokens to come
    began = time.perf_counter()
    count = min(AT_ONCE, controller.holds)
    tokens, states = several(runner, sequence, params, source, count, drafter.taps)
    for at, token in enumerate(tokens):
        if sequence.finish_reason is not None:
            return
        start, length = len(sequence.tokens), sequence.length
        take(runner, sequence, [token])
        if at == 0:
            verify_ms = (time.perf_counter() - began) * 1e3 / len(tokens)
        drafter.observe(Outcome([sequence], [0], None if states is None else [states[at : at + 1]]))
        computed = runner.computed[0] - len(tokens) + 1 if at == 0 else 1
        stats = StepStats(0, 0, 0, 0, 1, length, computed, runner.plain(length), 0.0, verify_ms, 0.0)
        controller.observe(stats)
        draft = Draft(torch.empty(1, 0, dtype=torch.long), None, [0])
        yield Step([sequence], [start], draft, [Tree([], [])], None, None, [Path([], token)], [stats])


def drafted_steps(
    runner: ModelRunner,
    drafter: Drafter,
    sequence: Sequence,
    asked: int,
    params: SamplingParams,
    policy: AcceptancePolicy,
    controller: KController,
    source: RandomSource,
) -> Iterator[Step]:
    """Steps with drafts of `asked` tokens by a model. None where the runner, the policy or the controller cannot."""
    sample_match = isinstance(policy, SampleMatch)
    if not isinstance(drafter, ModelDrafter) or not (sample_match or isinstance(policy, Rejection)):
        return
    if controller.ends_early or CURRENT.get() is not None:  # a profile tells the parts of a step from one another
        return
    began = time.perf_counter()
    fitting = (params.max_new_tokens - len(sequence.tokens)) // (asked + 1)
    steps = max(1, min(controller.holds, fitting)) if sequence.tokens else 1  # the first token is waited for
    how = Drawing(params, source, sequence.sample, sequence.length, policy.draft_noise)
    done = runner.speculate(
        sequence, sequence.prompt + sequence.tokens, asked, how, drafter.runner, sample_match, steps
    )
    around = time.perf_counter() - began - sum(each.draft_ms + each.verify_ms + each.accept_ms for each in done) / 1e3
    for at, each in enumerate(done):
        if sequence.finish_reason is not None:
            return
        computed = runner.computed[0] if at == 0 else each.computed
        yield _step(runner, drafter, sequence, asked, each, computed, around / len(done), controller)


def _step(
    runner: ModelRunner,
    drafter: Drafter,
    sequence: Sequence,
    asked: int,
    done: Speculated,
    computed: int,
    around: float,
    controller: KController,
) -> Step:
    """The text takes what one of the steps gave. around: its share of the seconds outside of the kernels."""
    stage("accept")
    began, start, length = time.perf_counter(), len(sequence.tokens), sequence.length
    take(runner, sequence, [*done.draft[: done.accepted], done.next_token])
    drafter.observe(Outcome([sequence], [done.accepted], None))
    tree, path = Tree.chain(done.draft), Path(list(range(done.accepted)), done.next_token)
    accept = done.accept_ms / 1e3 + around + time.perf_counter() - began
    times = StepTimes(done.draft_ms / 1e3, done.verify_ms / 1e3, accept, 0.0)
    stats = step_stats(sequence, asked, start, length, tree, path, computed, runner.plain(length), times)
    controller.observe(stats)
    draft, judged = Draft(done.tokens, done.draft_probs, [asked]), Judged(done.target_probs, done.target_probs)
    return Step([sequence], [start], draft, [tree], judged, done, [path], [stats])
