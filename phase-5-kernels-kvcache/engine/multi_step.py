"""Makes several steps of a batch in one call into C++.

Between two calls Python runs, and then the CPU's caches no longer hold the model's weights: a step of a small model
costs as much again outside of its kernels. The controllers say for how many steps their answers hold.

    python generate.py --kernels cpp --prompt "from pathlib import"
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor

from common.errors import UserError

from .controllers import CostController, FixedController, KController
from .cpp_runner import CppRunner, drawable
from .drafters import NgramDrafter
from .drafting import Draft, Drafter, Outcome
from .kernels.cpp import library
from .policies import AcceptancePolicy, Rejection, SampleMatch
from .profiler import CURRENT
from .runner import ModelRunner, Work
from .sequence import Sequence
from .speculative import append
from .steps import Path, Step, StepTimes, step_stats
from .tree import Tree
from .verify import RandomSource

AT_ONCE = 8  # plain steps of a call; tokens past the end of a sequence are dropped
AHEAD = 4  # steps with drafts of one call
MOST = 128  # tokens of a sequence in one call


@runtime_checkable
class CppDrafter(Protocol):
    """A drafter whose tokens C++ draws within a call."""

    deepest: int

    def start(self, sequences: list[Sequence], counts: list[int], steps: int) -> Any:
        """Return a drafter of the library for steps of counts[r] tokens. UserError if there is no room for them."""
        ...

    def finish(self, counts: list[int], gained: list[list[list[int]]]) -> None:
        """Record the steps after `start`: gained[s][r] are the tokens of sequence r in step s."""
        ...


def multi_step(
    runner: ModelRunner,
    drafter: Drafter | None,
    sequences: list[Sequence],
    asked: list[int],
    policy: AcceptancePolicy,
    source: RandomSource,
) -> Iterator[Step]:
    """Make steps with drafts of asked[r] tokens; none where runner, drafter or policy cannot."""
    if not isinstance(runner, CppRunner) or not drawable(sequences, source):
        return
    taps, counts, given = None if drafter is None else drafter.taps, list(asked), None
    if drafter is not None:
        if taps is not None and any(drafter.states_from(each) != each.length - 1 for each in sequences):
            return  # the drafter wants states of more tokens than those to come
        if any(counts):
            if not _takes(drafter, sequences, policy):
                return
            if isinstance(drafter, NgramDrafter):
                given = drafter.propose(sequences, counts)
                counts = given.widths
            else:
                counts = [min(count, cast(CppDrafter, drafter).deepest) for count in counts]
    steps = _steps(sequences, counts, drafter) if given is None else 1
    if (steps < 2 and not any(counts)) or any(
        sequence.length + steps * (count + 1) - 1 > runner.model.config.context
        for sequence, count in zip(sequences, counts, strict=True)
    ):
        return
    yield from _decode(runner, drafter, sequences, asked, counts, given, steps, isinstance(policy, SampleMatch))


def _takes(drafter: Drafter, sequences: list[Sequence], policy: AcceptancePolicy) -> bool:
    """Return True if C++ can draft and accept for these sequences."""
    if not isinstance(drafter, CppDrafter | NgramDrafter) or not isinstance(policy, SampleMatch | Rejection):
        return False
    if CURRENT.get() is not None:  # a profile tells the parts of a step apart
        return False
    return not any(sequence.controller.ends_early for sequence in sequences)


def _steps(sequences: list[Sequence], counts: list[int], drafter: Drafter | None) -> int:
    """Return how many steps to make at once."""
    if not all(sequence.tokens for sequence in sequences):  # somebody waits for a first token
        return 1
    steps = AHEAD if any(counts) else AT_ONCE
    for sequence, count in zip(sequences, counts, strict=True):
        remaining = sequence.params.max_new_tokens - len(sequence.tokens)
        steps = min(steps, remaining // (count + 1), MOST // (count + 1))
        if drafter is not None:
            steps = min(steps, steps_ahead(sequence.controller))
    return max(steps, 1)


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


def _decode(
    runner: CppRunner,
    drafter: Drafter | None,
    sequences: list[Sequence],
    asked: list[int],
    counts: list[int],
    given: Draft | None,
    steps: int,
    own: bool,
) -> Iterator[Step]:
    began = time.perf_counter()
    while True:
        try:
            works = runner.begin(sequences, [steps * (count + 1) - 1 for count in counts])
            fast = None
            if given is not None:
                fast = library().GivenDrafter(runner.fast._engine, given.tokens.tolist())
            elif any(counts):
                fast = cast(CppDrafter, drafter).start(sequences, counts, steps)
            break
        except UserError:  # no room for so many
            if steps == 1:
                raise
            steps = 1
    taps = None if drafter is None else drafter.taps
    made, states = runner.fast.decode(
        runner.batch(sequences, works), fast, counts, steps, own=own, taps=taps,
        ends=sequences[0].eos_ids, new=sum(len(work.new) for work in works),
    )  # fmt: skip
    gained = [[[*each.draft[: each.accepted], each.next] for each in step.results] for step in made]
    whole = [[token for of_step in gained for token in of_step[row]] for row in range(len(sequences))]
    rejected = sum(len(each.draft) - each.accepted for step in made for each in step.results)
    runner.appended(works, [tokens[:-1] for tokens in whole], rejected)
    if fast is not None and given is None:
        cast(CppDrafter, drafter).finish(counts, gained)
    in_kernels = sum(step.draft_ms + step.verify_ms + step.accept_ms for step in made)
    around = ((time.perf_counter() - began) * 1e3 - in_kernels) / len(made)
    at = 0
    for number, (step, tokens) in enumerate(zip(made, gained, strict=True)):
        active = [row for row, sequence in enumerate(sequences) if sequence.finish_reason is None]
        if not active:
            return
        read = list[Tensor]()
        for row, each in enumerate(step.results):
            new = len(works[row].new) if number == 0 else 1
            if states is not None:
                read.append(states[at : at + new + each.accepted])
                at += new + each.accepted
        yield _commit(runner, drafter, sequences, active, asked, step, tokens, works, number, read, around)


def _commit(
    runner: CppRunner,
    drafter: Drafter | None,
    sequences: list[Sequence],
    active: list[int],
    asked: list[int],
    made: Any,
    tokens: list[list[int]],
    works: list[Work],
    number: int,
    states: list[Tensor],
    around: float,
) -> Step:
    """Give the active sequences the tokens of a step. around: its share of the time outside of the kernels, in ms."""
    began = time.perf_counter()
    of_step, results = [sequences[row] for row in active], [made.results[row] for row in active]
    starts, lengths = [len(each.tokens) for each in of_step], [each.length for each in of_step]
    for row in active:
        append(runner, sequences[row], tokens[row])
    if drafter is not None:
        accepted = [each.accepted for each in results]
        drafter.observe(Outcome(of_step, accepted, [states[row] for row in active] if states else None))
    trees = [Tree.chain(each.draft) for each in results]
    paths = [Path(list(range(each.accepted)), each.next) for each in results]
    accept_ms = made.accept_ms + around + (time.perf_counter() - began) * 1e3
    times = StepTimes(made.draft_ms / 1e3, made.verify_ms / 1e3, accept_ms / 1e3)
    if not any(tree.tokens for tree in trees):  # all of a step without a draft counts as verification
        times = StepTimes(0.0, (made.verify_ms + made.draft_ms + accept_ms) / 1e3, 0.0)
    stats = [
        step_stats(
            sequence, asked[row], start, tree, path, _computed(works[row], result, number), runner.plain(length), times
        )
        for sequence, row, start, tree, path, result, length in zip(
            of_step, active, starts, trees, paths, results, lengths
        )
    ]
    if drafter is not None:
        for sequence, each in zip(of_step, stats, strict=True):
            sequence.controller.observe(each)
    return Step(of_step, starts, Draft.nothing(len(of_step)), trees, None, paths, stats)


def _computed(work: Work, result: Any, number: int) -> int:
    """Return how many positions a step computed for a sequence, a prefill before the first included."""
    return int(result.computed) + (work.prefilled if number == 0 else 0)
