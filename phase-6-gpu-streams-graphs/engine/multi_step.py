"""Makes several steps of a batch in one call into C++.

Between two calls Python runs, and then the CPU's caches no longer hold the model's weights: a step of a small model
costs as much again outside of its kernels. The controllers say for how many steps their answers hold.

    python generate.py --kernels cpp --prompt "from pathlib import"
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from common.errors import UserError

from .controllers import CostController, FixedController, KController, observe, observe_plain
from .cpp_runner import CppRunner, drawable
from .drafters import NgramDrafter
from .drafting import Draft, Drafter, Outcome
from .kernels.cpp import library
from .kernels.cpp.model import Decoded
from .policies import Rejection, SampleMatch
from .profiler import CURRENT, stage
from .runner import NO_DRAFT, ModelRunner, Work
from .sequence import Sequence
from .speculative import append, block_width
from .steps import Path, Step, StepTimes, step_stats
from .synthetic import Synthetic, rule_of
from .tree import Tree
from .verify import RandomSource

AT_ONCE = 64  # plain steps of a call; tokens past the end of a sequence are dropped
AHEAD = 16  # steps with drafts of one call
WARM = 3  # plain steps after a call's first, which finds the weights evicted, that tell what one costs
WARM_MS = 6.0  # or the time of a call of fewer, larger steps
MOST = 128  # tokens of a sequence in one call
BUDGET_MS = 25.0  # a call makes no further step after so long, or once it is hurried: its text is shown at its end
NOTHING = Draft.nothing(0)  # a call keeps no distributions


class CppDrafter(Protocol):
    """A drafter whose tokens C++ draws within a call."""

    deepest: int

    def ready(self, sequence: Sequence) -> bool:
        """Return whether enough of the sequence was seen to draft."""
        ...

    def start(self, sequences: list[Sequence], counts: list[int], limits: list[int]) -> Any:
        """Return a drafter of the library for drafts of counts[r] tokens; sequence r gains at most limits[r] tokens.

        UserError if there is no room for them.
        """
        ...

    def finish(self, counts: list[int], gained: list[list[list[int]]]) -> None:
        """Record the steps after `start`: gained[s][r] are the tokens of sequence r in step s."""
        ...


class Call(NamedTuple):
    """What one call is to do for R sequences."""

    counts: list[int]  # draft tokens after each
    steps: int  # at most
    given: list[list[int]] | None = None  # the draft tokens, if Python found them; None: C++ drafts


def multi_step(
    runner: ModelRunner,
    drafter: Drafter | None,
    sequences: list[Sequence],
    asked: list[int],
    source: RandomSource,
    most: int,
) -> list[Step]:
    """Make at most so many steps with drafts of asked[r] tokens; none where runner, drafter or a policy cannot."""
    began = time.perf_counter()
    if not isinstance(runner, CppRunner) or not drawable(sequences, source):
        return []
    call = _plan(drafter, sequences, asked, most)
    if call is None:
        return []
    context = runner.model.config.context
    if any(sequence.length > context for sequence in sequences):
        return []
    rows = list(zip(sequences, call.counts, strict=True))
    limits = [block_width(each, max(MOST - 1, count), context) + 1 for each, count in rows]  # to the end, or a jump
    if any(limit <= count for limit, count in zip(limits, call.counts, strict=True)):
        return []
    stage("verify")
    works, made, states = _execute(runner, drafter, sequences, call, limits)
    return _commit(runner, drafter, sequences, asked, works, made, states, began)


def _plan(drafter: Drafter | None, sequences: list[Sequence], asked: list[int], most: int) -> Call | None:
    """Choose the steps of the next call; None if there is to be no call."""
    if drafter is None or not any(asked):
        return Call(asked, min(most, _steps(sequences, asked, drafter)))
    rules = [rule_of(sequence.policy) for sequence in sequences]
    in_cpp = hasattr(drafter, "start") or isinstance(drafter, NgramDrafter)
    if not in_cpp or not all(isinstance(rule, SampleMatch | Rejection) for rule in rules):
        return None
    if CURRENT.get() is not None or any(sequence.controller.ends_early for sequence in sequences):
        return None  # a profile tells the parts of a step apart
    if isinstance(drafter, NgramDrafter):
        draft = drafter.propose(sequences, asked)
        return Call(draft.widths, 1, draft.tokens.tolist())
    fast = cast(CppDrafter, drafter)
    counts, steps = [min(count, fast.deepest) for count in asked], AT_ONCE
    if drafter.taps is not None and not all(ready := [fast.ready(each) for each in sequences]):
        counts, steps = [count if able else 0 for count, able in zip(counts, ready, strict=True)], 1  # gives the states
    return Call(counts, min(most, steps, _steps(sequences, counts, drafter)))


def _steps(sequences: list[Sequence], counts: list[int], drafter: Drafter | None) -> int:
    """Return how many steps to make at once."""
    if not all(sequence.tokens for sequence in sequences):  # a sequence waits for its first token
        return 1
    steps = AHEAD if any(counts) else AT_ONCE
    if drafter is not None:
        steps = min(steps, *(steps_ahead(sequence.controller) for sequence in sequences))
    return max(steps, 1)


def steps_ahead(controller: KController) -> int:
    """Return for how many steps the controller's last answer holds."""
    if isinstance(controller, FixedController):
        return AT_ONCE
    return controller.holds if isinstance(controller, CostController) else 1


def _execute(
    runner: CppRunner, drafter: Drafter | None, sequences: list[Sequence], call: Call, limits: list[int]
) -> tuple[list[Work], list[Decoded], Tensor | None]:
    """Call C++. Returns the rows, the steps, and the target's states if the drafter reads them."""
    (counts, steps, given), policies = call, [sequence.policy for sequence in sequences]
    steps = min(steps, *(limit - count for limit, count in zip(limits, counts, strict=True)))  # each gives one token
    limits = [min(limit, steps * (count + 1)) for limit, count in zip(limits, counts, strict=True)]
    fast, started_ms, taps = None, 0.0, None if drafter is None else drafter.taps
    states_from = None if drafter is None or taps is None else [drafter.states_from(each) for each in sequences]
    while True:
        try:
            works, batch = runner.begin(sequences, [limit - 1 for limit in limits], states_from, taps or ())
            if given is not None:
                fast = library().GivenDrafter(runner.fast._engine, given)
            elif any(counts):
                at = time.perf_counter()
                fast = cast(CppDrafter, drafter).start(sequences, counts, limits)
                started_ms = (time.perf_counter() - at) * 1e3
            break
        except UserError:  # no room for so many
            if steps == 1:
                raise
            steps, limits = 1, [count + 1 for count in counts]
    made, states = runner.fast.decode(
        batch, fast, counts, steps, limits=limits,
        own=[isinstance(rule_of(policy), SampleMatch) for policy in policies],
        synthetic=[policy.acceptance if isinstance(policy, Synthetic) else -1 for policy in policies],
        taps=taps, ends=sorted({end for sequence in sequences for end in sequence.eos_ids}),
        new=sum(len(work.new) for work in works), budget_ms=BUDGET_MS,
    )  # fmt: skip
    made[0] = made[0]._replace(draft_ms=made[0].draft_ms + started_ms)  # a draft model has read the prompt
    gained = [
        [[*draft[:count], token] for draft, count, token in zip(step.drafts, step.accepted, step.next, strict=True)]
        for step in made
    ]
    whole = [[token for of_step in gained for token in of_step[row]][:-1] for row in range(len(sequences))]
    rejected = sum(len(draft) for step in made for draft in step.drafts) - sum(sum(step.accepted) for step in made)
    runner.appended(works, whole, rejected)
    if fast is not None and given is None:
        cast(CppDrafter, drafter).finish(counts, gained)
    return works, made, states


def _commit(
    runner: CppRunner,
    drafter: Drafter | None,
    sequences: list[Sequence],
    asked: list[int],
    works: list[Work],
    made: list[Decoded],
    states: Tensor | None,
    began: float,
) -> list[Step]:
    """Give the sequences the tokens of the steps of a call, which began at that time.

    Time outside of the kernels counts as well: every step has an equal share of that before, and its own.
    """
    context = runner.model.config.context
    inside = sum(step.draft_ms + step.verify_ms + step.accept_ms for step in made) / 1e3
    last = time.perf_counter()
    before, steps, active = (last - began - inside) / len(made), list[Step](), list(range(len(sequences)))
    new, prefilled, at = [len(work.new) for work in works], [work.prefilled for work in works], 0
    skip = [work.skip for work in works]  # states of the first step that the drafter does not need
    total, places = [0] * len(sequences), [list[range]() for _ in sequences]  # accepted tokens; rows of `states`
    for step in made:
        active = [row for row in active if sequences[row].finish_reason is None]
        if not active:
            break
        drafts, accepted, following = step.drafts, step.accepted, step.next
        if states is not None:
            for row, count in enumerate(accepted):
                total[row] += count
                places[row].append(range(at + skip[row], at + new[row] + count))
                at += new[row] + count
        done, asked_here = Step([sequences[row] for row in active], [], NOTHING, [], None, [], []), list[int]()
        for row in active:
            sequence, draft, count = sequences[row], drafts[row], accepted[row]
            asked_here.append(block_width(sequence, asked[row], context))
            done.starts.append(len(sequence.tokens))
            done.trees.append(Tree.chain(draft) if draft else NO_DRAFT)
            done.paths.append(Path(list(range(count)), following[row]))
            append(runner, sequence, [*draft[:count], following[row]])
        now = time.perf_counter()
        verify, accept, last = step.verify_ms / 1e3, step.accept_ms / 1e3 + before + now - last, now
        times = StepTimes(step.draft_ms / 1e3, verify, accept)
        if not any(drafts):  # all of a step without a draft counts as verification
            times = StepTimes(0.0, verify + accept, 0.0)
        for at_row, row in enumerate(active):
            start, tree, path = done.starts[at_row], done.trees[at_row], done.paths[at_row]
            computed = step.computed[row] + prefilled[row]
            done.stats.append(step_stats(sequences[row], asked_here[at_row], start, tree, path, computed, 1, times))
        if drafter is not None and any(asked):
            alone = any(drafts) and len(active) == len(sequences)
            spared = 0.0 if isinstance(drafter, NgramDrafter) else before * 1e3 * (1 - len(made) / AHEAD)
            observe([each.controller for each in done.sequences], done.stats, alone, spared)
        steps.append(done)
        new, prefilled, skip = [1] * len(new), [0] * len(new), [0] * len(new)
    if drafter is not None:
        if not any(asked):
            later = sorted(step.verify_ms + step.accept_ms for step in made[1:])
            warm = len(steps) == len(made) and (len(later) >= WARM or inside * 1e3 >= WARM_MS)
            outside = (last - began - inside) / AT_ONCE  # as if the call had made as many steps as it may
            took = (later[len(later) // 2] if len(later) >= WARM else inside * 1e3 / len(made)) + outside * 1e3
            decoded = all(len(work.new) + work.prefilled == 1 for work in works)  # and computed no prompt
            observe_plain([each.controller for each in sequences], len(steps), took if decoded else None, warm)
        prefill = [work.states for work in works]
        read = None if states is None else states_of_rows(states[:at], places, prefill)
        drafter.observe(Outcome(sequences, total, read))
    return steps


def states_of_rows(states: Tensor, places: list[list[range]], prefilled: list[list[Tensor]]) -> list[Tensor]:
    """Return the states of each sequence: those of its prefill, then those at its places.

    places[r][s]: the rows of `states` that step s gave for sequence r. Those of one sequence alone are a view, and so
    is one state of each sequence a step.
    """
    R = len(places)
    if R == 1:
        read = [states[places[0][0].start :]]
    elif len(states) == R * len(places[0]):  # every step gives a sequence one state at least
        read = list(states.view(-1, R, states.shape[1]).unbind(1))
    else:
        read = [states[[place for step in of_row for place in step]] for of_row in places]
    return [torch.cat((*first, mine)) if first else mine for first, mine in zip(prefilled, read, strict=True)]
