"""Draft and verify: a cheap drafter guesses tokens, one target forward checks them all.

Every step: each sequence's controller says how many tokens to draft; the drafter proposes a chain of them, or a tree;
ONE target forward over sequence and draft gives the distributions that follow the sequence and each draft token; the
policy says which of them stand and what follows. A step costs one target forward and gives between 1 and K+1 tokens
(Leviathan et al. 2023, Algorithm 1; Chen et al. 2023, Algorithm 2); with a lossless policy, of exactly the target's
distribution.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator

import torch

from common.device import synchronize

from .context import window_start
from .controllers import FixedController, KController
from .drafting import Draft, Drafter, Outcome
from .generate import decode_step, refuse, sample
from .greedy import Greedy
from .kv_cache import OutOfBlocks
from .multi_step import drafted_steps, plain_steps
from .policies import AcceptancePolicy, Judged, Path, Rejection
from .profiler import stage
from .runner import ModelRunner
from .sampling import SamplingParams, check_finite, penalise, probabilities
from .sequence import Sequence
from .steps import Step as Step  # where others look for it
from .steps import StepStats, StepTimes, step_stats, take
from .target import Target
from .tree import Tree
from .verify import GreedySource, KeyedSource, RandomSource, Verdict


def block_width(sequence: Sequence, k: int, context: int) -> int:
    """How many tokens to draft: at most k, none past the token limit, and none past a jump of the window.

    The token limit leaves room for the token that follows the draft, so one less than what remains is useful.
    """
    remaining = sequence.params.max_new_tokens - len(sequence.tokens)
    length, width = sequence.length, min(k, remaining - 1)
    while width > 0 and window_start(length + width, context) != window_start(length, context):
        width -= 1
    return width


def accept(
    policy: AcceptancePolicy,
    draft: Draft,
    trees: list[Tree],
    target: Target,
    sequences: list[Sequence],
    params: SamplingParams,
    source: RandomSource,
) -> tuple[Judged, Verdict | None, list[Path]]:
    """Which draft tokens stand, by the policy, and what follows them."""
    logits = target.logits
    draft = dataclasses.replace(draft, tokens=draft.tokens.to(logits.device))
    # Penalties see at each position what plain decoding would have seen there: the output, and the draft up to it.
    prompts: list[list[int]] = []
    outputs: list[list[int]] = []
    if params.penalised:
        for sequence, tree in zip(sequences, trees, strict=True):
            lines = [sequence.tokens, *(sequence.tokens + tree.line(node) for node in range(len(tree.tokens)))]
            prompts += [sequence.prompt] * logits.shape[1]
            outputs += lines + lines[-1:] * (logits.shape[1] - len(lines))
    certain = params.greedy and draft.probs is None and isinstance(source, GreedySource)
    if certain and policy.lossless and draft.trees is None:
        flat = logits.flatten(0, 1)
        check_finite(flat)
        scores = penalise(flat.float(), params, prompts, outputs) if params.penalised else flat
        judged: Judged = Greedy(scores.view(*logits.shape))
    else:
        probs = probabilities(logits.flatten(0, 1), params, prompts, outputs).view(*logits.shape)
        judged = Judged(probs, probs if policy.lossless or not params.greedy else logits.float().softmax(-1))
    if draft.trees is not None:
        paths = []
        for row, (sequence, tree) in enumerate(zip(sequences, trees, strict=True)):
            nodes = len(tree.tokens)
            of_row = Judged(judged.probs[row : row + 1, : nodes + 1], judged.opinion[row : row + 1, : nodes + 1])
            paths.append(policy.accept_tree(tree, of_row, sequence.sample, sequence.length, source))
        return judged, None, paths
    keys = [draft.widths, [s.sample for s in sequences], [s.length for s in sequences]]
    widths, samples, positions = torch.tensor(keys, device=logits.device)
    verdict = policy.verify(draft, judged, widths, samples, positions, source)
    stood = zip(verdict.accepted.tolist(), verdict.next_tokens.tolist(), strict=True)
    return judged, verdict, [Path(list(range(accepted)), following) for accepted, following in stood]


def plain_step(
    runner: ModelRunner,
    drafter: Drafter,
    sequences: list[Sequence],
    params: SamplingParams,
    controllers: list[KController],
    source: RandomSource,
) -> Step:
    """A step for which nobody asked for a draft: plain decoding, at its price."""
    starts, lengths = [len(s.tokens) for s in sequences], [s.length for s in sequences]
    began = time.perf_counter()
    logits = decode_step(runner, sequences, params, source)
    verify_ms = (time.perf_counter() - began) * 1e3
    drafter.observe(Outcome(sequences, [0] * len(sequences), None))
    counts = zip(lengths, runner.computed, strict=True)
    stats = [
        StepStats(0, 0, 0, 0, 1, length, computed, runner.plain(length), 0.0, verify_ms, 0.0)
        for length, computed in counts
    ]
    for controller, of_sequence in zip(controllers, stats, strict=True):
        controller.observe(of_sequence)
    draft = Draft(torch.empty(len(sequences), 0, dtype=torch.long), None, [0] * len(sequences))
    paths = [Path([], sequence.tokens[-1]) for sequence in sequences]
    return Step(sequences, starts, draft, [Tree([], [])] * len(sequences), None, None, paths, stats, logits)


def speculative_step(
    runner: ModelRunner,
    drafter: Drafter,
    sequences: list[Sequence],
    asked: list[int],
    params: SamplingParams,
    policy: AcceptancePolicy,
    controllers: list[KController],
    source: RandomSource,
) -> Step:
    """Draft, verify, accept, for every given sequence at once; each takes its tokens and may end."""
    device = runner.model.embedding.weight.device
    stage("draft")
    began = time.perf_counter()
    draft = Draft(torch.empty(len(sequences), 0, dtype=torch.long), None, [0] * len(sequences))
    if any(asked):
        early = any(controller.ends_early for controller in controllers)
        draft = drafter.propose(sequences, asked, (lambda row, probs: controllers[row].stop(probs)) if early else None)
    synchronize(device)
    drafted = time.perf_counter()
    stage("verify")

    chains = zip(draft.tokens.tolist(), draft.widths, strict=True)
    trees = draft.trees or [Tree.chain(tokens[:width]) for tokens, width in chains]
    known = None if drafter.taps is None else [drafter.known(sequence) for sequence in sequences]
    starts, lengths = [len(s.tokens) for s in sequences], [s.length for s in sequences]
    judged, verdict, states, logits, kept = None, None, None, None, 0.0
    if known is None and not any(tree.tokens for tree in trees):  # nothing to verify: plain decoding, at its price
        logits = decode_step(runner, sequences, params, source)
        verified = time.perf_counter()
        paths = [Path([], sequence.tokens[-1]) for sequence in sequences]
    else:
        texts = [sequence.prompt + sequence.tokens for sequence in sequences]
        target = runner.step(list(sequences), texts, trees, known, drafter.taps or ())
        synchronize(device)
        verified = time.perf_counter()
        stage("accept")
        if any(tree.tokens for tree in trees):
            judged, verdict, paths = accept(policy, draft, trees, target, sequences, params, source)
        else:  # the forward was for its states
            logits = target.logits[:, 0]
            tokens = sample(runner, logits, sequences, params, source)
            paths = [Path([], token) for token in tokens]
        deciding = time.perf_counter()
        for sequence, path in zip(sequences, paths, strict=True):
            runner.keep(sequence, path.nodes)
        kept = time.perf_counter() - deciding
        for sequence, tree, path in zip(sequences, trees, paths, strict=True):
            take(runner, sequence, [*(tree.tokens[node] for node in path.nodes), path.next_token])
        if known is not None:
            states = [target.states_of(r, path.nodes, len(trees[r].tokens)) for r, path in enumerate(paths)]
    drafter.observe(Outcome(sequences, [len(path.nodes) for path in paths], states))
    done = time.perf_counter()

    times = StepTimes(drafted - began, verified - drafted, done - verified - kept, kept)
    stats = []
    for row, sequence in enumerate(sequences):
        computed, plain = runner.computed[row], runner.plain(lengths[row])
        of_row = (asked[row], starts[row], lengths[row], trees[row], paths[row])
        stats.append(step_stats(sequence, *of_row, computed, plain, times))
    for controller, of_sequence in zip(controllers, stats, strict=True):
        controller.observe(of_sequence)
    return Step(sequences, starts, draft, trees, judged, verdict, paths, stats, logits)


def next_steps(
    runner: ModelRunner,
    drafter: Drafter,
    sequences: list[Sequence],
    params: SamplingParams,
    policy: AcceptancePolicy,
    controllers: list[KController],
    source: RandomSource,
    multi_step: bool,
) -> Iterator[Step]:
    """The next step of all sequences; of a single one, if `multi_step`, as many as can be made in one call."""
    context = runner.model.config.context
    asked = [
        block_width(sequence, controller.next_k(), context)
        for sequence, controller in zip(sequences, controllers, strict=True)
    ]
    plain = not any(asked)
    made = 0
    if multi_step and len(sequences) == 1:
        one, controller = sequences[0], controllers[0]
        for step in (
            plain_steps(runner, drafter, one, params, controller, source)
            if plain
            else drafted_steps(runner, drafter, one, asked[0], params, policy, controller, source)
        ):
            made += 1
            yield step
    if not made and plain and drafter.taps is None:
        yield plain_step(runner, drafter, sequences, params, controllers, source)
    elif not made:
        yield speculative_step(runner, drafter, sequences, asked, params, policy, controllers, source)


def speculative_decode(
    runner: ModelRunner,
    drafter: Drafter,
    sequences: list[Sequence],
    params: SamplingParams,
    policy: AcceptancePolicy | None = None,
    controller: Callable[[], KController] | None = None,
    source: RandomSource | None = None,
    multi_step: bool = True,
) -> Iterator[Step]:
    """Decode a batch to its end by draft and verify. Acceptance is ragged: every row advances at its own pace.

    `controller` makes a fresh controller for each sequence. By default rejection, and K = 4. multi_step: several steps
    may be made in one call, which does not say what each of them took; the tokens are the same.
    """
    policy = policy or Rejection()
    source = source or (GreedySource() if params.greedy else KeyedSource(params.seed))
    make = controller or (lambda: FixedController(4))
    controllers = {sequence: make() for sequence in sequences}
    while active := [sequence for sequence in sequences if sequence.finish_reason is None]:
        mine = [controllers[sequence] for sequence in active]
        try:
            yield from next_steps(runner, drafter, active, params, policy, mine, source, multi_step)
        except OutOfBlocks as error:  # of the target's cache or the draft's
            refused = refuse(runner, sequences, error)
            if drafter.taps is None:  # a drafter that reads states keeps none of the others'
                drafter.observe(Outcome([refused], [0], None))
