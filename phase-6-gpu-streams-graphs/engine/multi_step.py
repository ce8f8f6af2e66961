"""Makes several steps of a batch in one call into C++.

Between two calls Python runs, and then the CPU's caches no longer hold the model's weights: a step of a small model
costs as much again outside of its kernels. The controllers say for how many steps their answers hold.

    python generate.py --kernels cpp --prompt "from pathlib import"
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

from torch import Tensor

from common.errors import UserError

from .controllers import CostController, FixedController, KController, observe
from .cpp_runner import CppRunner, drawable
from .drafters import NgramDrafter
from .drafting import Draft, Drafter, Outcome
from .kernels.cpp import library
from .policies import AcceptancePolicy, Rejection, SampleMatch
from .profiler import CURRENT
from .runner import NO_DRAFT, ModelRunner, Work
from .sequence import Sequence
from .speculative import append
from .steps import Path, Step, StepTimes, step_stats
from .tree import Tree
from .verify import RandomSource

AT_ONCE = 8  # plain steps of a call; tokens past the end of a sequence are dropped
AHEAD = 4  # steps with drafts of one call
MOST = 128  # tokens of a sequence in one call
NOTHING = Draft.nothing(0)  # a call keeps no distributions


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


class Call(NamedTuple):
    """What one call is to do for R sequences."""

    counts: list[int]  # draft tokens after each
    steps: int
    given: list[list[int]] | None = None  # the draft tokens, if Python found them; None: C++ drafts


def multi_step(
    runner: ModelRunner,
    drafter: Drafter | None,
    sequences: list[Sequence],
    asked: list[int],
    policy: AcceptancePolicy,
    source: RandomSource,
    most: int,
) -> Iterator[Step]:
    """Make at most so many steps with drafts of asked[r] tokens; none where runner, drafter or policy cannot."""
    if not isinstance(runner, CppRunner) or not drawable(sequences, source):
        return
    call = _plan(drafter, sequences, asked, policy, most)
    if call is None or any(
        sequence.length + call.steps * (count + 1) - 1 > runner.model.config.context
        for sequence, count in zip(sequences, call.counts, strict=True)
    ):
        return
    began = time.perf_counter()
    works, made, states = _execute(runner, drafter, sequences, call, isinstance(policy, SampleMatch))
    inside = sum(step.draft_ms + step.verify_ms + step.accept_ms for step in made) / 1e3
    around = (time.perf_counter() - began - inside) / len(made)
    news = [len(work.new) for work in works]
    prefilled = [work.prefilled for work in works]
    for step in made:
        active = [row for row, sequence in enumerate(sequences) if sequence.finish_reason is None]
        if not active:
            return
        counts = [new + each.accepted for new, each in zip(news, step.results, strict=True)]
        of_step = None if states is None else list(states[: sum(counts)].split(counts))
        states = None if states is None else states[sum(counts) :]
        yield _commit(runner, drafter, sequences, active, asked, step, prefilled, of_step, around)
        news, prefilled = [1] * len(news), [0] * len(news)


def _plan(
    drafter: Drafter | None, sequences: list[Sequence], asked: list[int], policy: AcceptancePolicy, most: int
) -> Call | None:
    """Choose the steps of the next call; None if there is to be no call."""
    if drafter is not None and drafter.taps is not None and not all(_up_to_date(drafter, each) for each in sequences):
        return None
    if drafter is None or not any(asked):
        return Call(asked, min(most, _steps(sequences, asked, drafter)))
    if not isinstance(drafter, CppDrafter | NgramDrafter) or not isinstance(policy, SampleMatch | Rejection):
        return None
    if CURRENT.get() is not None or any(sequence.controller.ends_early for sequence in sequences):
        return None  # a profile tells the parts of a step apart
    if isinstance(drafter, NgramDrafter):
        draft = drafter.propose(sequences, asked)
        return Call(draft.widths, 1, draft.tokens.tolist())
    counts = [min(count, cast(CppDrafter, drafter).deepest) for count in asked]
    return Call(counts, min(most, _steps(sequences, counts, drafter)))


def _up_to_date(drafter: Drafter, sequence: Sequence) -> bool:
    """Return True if the drafter has the states of all positions but the last."""
    return bool(sequence.tokens) and drafter.states_from(sequence) == sequence.length - 1


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
        return AT_ONCE
    return controller.holds if isinstance(controller, CostController) else 1


def _execute(
    runner: CppRunner, drafter: Drafter | None, sequences: list[Sequence], call: Call, own: bool
) -> tuple[list[Work], list[Any], Tensor | None]:
    """Call C++. Returns the rows, the steps, and the target's states if the drafter reads them."""
    counts, steps, given = call
    fast = None
    while True:
        try:
            works, batch = runner.begin(sequences, [steps * (count + 1) - 1 for count in counts])
            if given is not None:
                fast = library().GivenDrafter(runner.fast._engine, given)
            elif any(counts):
                fast = cast(CppDrafter, drafter).start(sequences, counts, steps)
            break
        except UserError:  # no room for so many
            if steps == 1:
                raise
            steps = 1
    made, states = runner.fast.decode(
        batch, fast, counts, steps, own=own, taps=None if drafter is None else drafter.taps,
        ends=sorted({end for sequence in sequences for end in sequence.eos_ids}),
        new=sum(len(work.new) for work in works),
    )  # fmt: skip
    gained = [[[*each.draft[: each.accepted], each.next] for each in step.results] for step in made]
    whole = [[token for of_step in gained for token in of_step[row]][:-1] for row in range(len(sequences))]
    runner.appended(works, whole, sum(len(each.draft) - each.accepted for step in made for each in step.results))
    if fast is not None and given is None:
        cast(CppDrafter, drafter).finish(counts, gained)
    return works, made, states


def _commit(
    runner: CppRunner,
    drafter: Drafter | None,
    sequences: list[Sequence],
    active: list[int],
    asked: list[int],
    made: Any,
    prefilled: list[int],
    states: list[Tensor] | None,
    around: float,
) -> Step:
    """Give the active sequences the tokens of a step. around: its share of the seconds outside of the kernels."""
    began = time.perf_counter()
    step = Step([sequences[row] for row in active], [], NOTHING, [], None, [], [])
    accepted, lengths = list[int](), list[int]()
    for row in active:
        sequence, result = sequences[row], made.results[row]
        step.starts.append(len(sequence.tokens))
        lengths.append(sequence.length)
        step.trees.append(Tree.chain(result.draft) if result.draft else NO_DRAFT)
        step.paths.append(Path(list(range(result.accepted)), result.next))
        accepted.append(result.accepted)
        append(runner, sequence, [*result.draft[: result.accepted], result.next])
    if drafter is not None:
        drafter.observe(Outcome(step.sequences, accepted, None if states is None else [states[row] for row in active]))
    verify, accept = made.verify_ms / 1e3, made.accept_ms / 1e3 + around + time.perf_counter() - began
    times = StepTimes(made.draft_ms / 1e3, verify, accept)
    if all(tree is NO_DRAFT for tree in step.trees):  # all of a step without a draft counts as verification
        times = StepTimes(0.0, verify + accept, 0.0)
    for at, row in enumerate(active):
        sequence, computed = sequences[row], made.results[row].computed + prefilled[row]
        parts = sequence, asked[row], step.starts[at], step.trees[at], step.paths[at]
        stats = step_stats(*parts, computed, runner.plain(lengths[at]), times)
        step.stats.append(stats)
    if drafter is not None:
        controllers = [sequence.controller for sequence in step.sequences]
        observe(controllers, step.stats, alone=len(active) == len(sequences))
    return step
