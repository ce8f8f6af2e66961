"""Makes several steps of one sequence in one call into C++.

Between two calls Python runs, and then the CPU's caches no longer hold the model's weights: a step of a small model
costs as much again outside of its kernels. The controller says for how many steps its answer holds.

    python generate.py --kernels cpp --prompt "from pathlib import"
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from common.philox import Purpose

from .controllers import CostController, FixedController, KController
from .cpp_runner import CppRunner
from .drafters.model import ModelDrafter
from .drafting import Draft, Drafter, Outcome
from .drawing import Drawing, Speculated
from .policies import AcceptancePolicy, Rejection, SampleMatch
from .profiler import CURRENT
from .runner import ModelRunner
from .sequence import Sequence
from .speculative import append
from .steps import Path, Step, StepStats, StepTimes, step_stats
from .tree import Tree
from .verify import RandomSource

AT_ONCE = 8  # plain steps of a call; tokens past the end of the sequence are dropped
AHEAD = 4  # steps with drafts of one call
NO_DRAFT = Draft.nothing(1)


def multi_step(
    runner: ModelRunner,
    drafter: Drafter | None,
    sequence: Sequence,
    asked: int,
    policy: AcceptancePolicy,
    source: RandomSource,
) -> Iterator[Step]:
    """Make steps with drafts of `asked` tokens, or plain ones; none where runner, drafter or policy cannot."""
    if not isinstance(runner, CppRunner):
        return iter(())
    if asked and drafter is not None:
        return _drafted(runner, drafter, sequence, asked, policy, source)
    return _plain(runner, drafter, sequence, source)


def steps_ahead(controller: KController) -> int:
    """Return for how many steps the controller's last answer holds."""
    if isinstance(controller, FixedController):
        return AHEAD
    if not isinstance(controller, CostController):
        return 1
    if controller.declining:
        return controller.wait - controller.declined
    known = controller.cost_model.known and controller.plain > 0
    return AHEAD if known and controller.drafts > 1 and not controller.looking else 1


def _plain(runner: CppRunner, drafter: Drafter | None, sequence: Sequence, source: RandomSource) -> Iterator[Step]:
    """Steps without a draft. None for the first token, which somebody waits for."""
    taps = None if drafter is None else drafter.taps
    if drafter is not None and taps is not None and drafter.states_from(sequence) != sequence.length - 1:
        return  # the drafter wants states of more tokens than those to come
    count = min(AT_ONCE, sequence.params.max_new_tokens - len(sequence.tokens))
    if drafter is not None:
        count = min(count, steps_ahead(sequence.controller))
    if not sequence.tokens or count < 2:
        return
    began = time.perf_counter()
    how = Drawing(sequence.params, source, sequence.key, sequence.length, Purpose.SAMPLE, probs=False, taps=taps)
    tokens, states = runner.draw(sequence, sequence.prompt + sequence.tokens, count, how) or ([], None)
    for at, token in enumerate(tokens):
        if sequence.finish_reason is not None:
            return
        start, length = len(sequence.tokens), sequence.length
        append(runner, sequence, [token])
        if at == 0:
            verify_ms = (time.perf_counter() - began) * 1e3 / len(tokens)
        computed = runner.computed[0] - len(tokens) + 1 if at == 0 else 1
        stats = StepStats(0, 0, 0, 0, 1, length, computed, runner.plain(length), 0.0, verify_ms, 0.0)
        if drafter is not None:
            drafter.observe(Outcome([sequence], [0], None if states is None else [states[at : at + 1]]))
            sequence.controller.observe(stats)
        yield Step([sequence], [start], NO_DRAFT, [Tree([], [])], None, [Path([], token)], [stats])


def _drafted(
    runner: CppRunner,
    drafter: Drafter,
    sequence: Sequence,
    asked: int,
    policy: AcceptancePolicy,
    source: RandomSource,
) -> Iterator[Step]:
    """Steps with drafts by a model whose forwards are in C++ as well."""
    if not isinstance(drafter, ModelDrafter) or not isinstance(drafter.runner, CppRunner):
        return
    if not isinstance(policy, SampleMatch | Rejection):
        return
    if sequence.controller.ends_early or CURRENT.get() is not None:  # a profile tells the parts of a step apart
        return
    began = time.perf_counter()
    fitting = (sequence.params.max_new_tokens - len(sequence.tokens)) // (asked + 1)
    steps = (
        max(1, min(steps_ahead(sequence.controller), fitting)) if sequence.tokens else 1
    )  # the first token is waited for
    how = Drawing(sequence.params, source, sequence.key, sequence.length, policy.draft_noise)
    text, match = sequence.prompt + sequence.tokens, isinstance(policy, SampleMatch)
    done = runner.speculate(sequence, text, asked, how, drafter.runner, match, steps)
    around = time.perf_counter() - began - sum(each.draft_ms + each.verify_ms + each.accept_ms for each in done) / 1e3
    for at, each in enumerate(done):
        if sequence.finish_reason is not None:
            return
        computed = runner.computed[0] if at == 0 else each.computed
        step = _step(runner, drafter, sequence, asked, each, computed, around / len(done))
        sequence.controller.observe(step.stats[0])
        yield step


def _step(
    runner: CppRunner,
    drafter: Drafter,
    sequence: Sequence,
    asked: int,
    done: Speculated,
    computed: int,
    around: float,
) -> Step:
    """Commit one of the steps. around: its share of the seconds outside of the kernels."""
    began, start, length = time.perf_counter(), len(sequence.tokens), sequence.length
    append(runner, sequence, [*done.draft[: done.accepted], done.next_token])
    if sequence.finish_reason is not None:  # a drafter with a model observes nothing else
        drafter.observe(Outcome([sequence], [done.accepted], None))
    tree, path = Tree.chain(done.draft), Path(list(range(done.accepted)), done.next_token)
    accept = done.accept_ms / 1e3 + around + time.perf_counter() - began
    times = StepTimes(done.draft_ms / 1e3, done.verify_ms / 1e3, accept)
    stats = step_stats(sequence, asked, start, tree, path, computed, runner.plain(length), times)
    draft = Draft(done.tokens, done.draft_probs, [asked])
    return Step([sequence], [start], draft, [tree], None, [path], [stats], done.target_probs)
