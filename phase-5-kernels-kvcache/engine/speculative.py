"""The decoding loop: a drafter proposes tokens, one target forward verifies them, an acceptance policy decides.

Every step has three parts. Plan: each sequence's controller says how many tokens to draft. Execute: the drafter
proposes a chain of so many tokens, or a tree; ONE target forward over sequences and drafts gives the distributions that
follow the sequence and each draft token; the policy says which draft tokens are accepted and which token follows.
Commit: the sequences take their tokens, drafter and controllers see the outcome. A step costs one target forward and
gives between 1 and K+1 tokens (Leviathan et al. 2023, Algorithm 1; Chen et al. 2023, Algorithm 2); with a lossless
policy they follow the target's distribution exactly. Plain decoding is the case K = 0.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from common.device import synchronize

from .context import window_start
from .controllers import CostController, FixedController, KController, choose, observe
from .drafters.ngram import NgramDrafter
from .drafting import Draft, Drafter, Outcome
from .kernels import Kernels
from .kv_cache import OutOfBlocks
from .policies import AcceptancePolicy, DraftRows, Rejection, TargetProbs
from .profiler import stage
from .runner import ModelRunner
from .sampling import check_finite, penalise, probabilities
from .sequence import Sequence
from .steps import Path, Step, StepTimes, TargetOutput, outputs_before, step_stats
from .tree import Tree
from .verify import GreedySource, RandomSource, random_source


def block_width(sequence: Sequence, k: int, context: int) -> int:
    """How many tokens to draft: at most k, none past the token limit, and none past a jump of the window.

    The token limit leaves room for the token that follows the draft, so one less than what remains is useful.
    """
    remaining = sequence.params.max_new_tokens - len(sequence.tokens)
    length, width = sequence.length, min(k, remaining - 1)
    if length + width <= context:
        return width
    while width > 0 and window_start(length + width, context) != window_start(length, context):
        width -= 1
    return width


def plan(drafter: Drafter, sequences: list[Sequence], context: int) -> list[int]:
    """Return how many tokens to draft for each sequence."""
    costs = [each.controller for each in sequences if isinstance(each.controller, CostController)]
    if len(costs) < len(sequences):
        return [block_width(sequence, sequence.controller.next_k(), context) for sequence in sequences]
    limits = [block_width(each, mine.bounds.high, context) for each, mine in zip(sequences, costs, strict=True)]
    if isinstance(drafter, NgramDrafter):  # a lookup costs next to nothing, so what it found is known beforehand
        limits = drafter.propose(sequences, limits).widths
    return choose(costs, limits)


def accept(
    kernels: Kernels,
    policy: AcceptancePolicy,
    draft: Draft,
    trees: list[Tree],
    output: TargetOutput,
    sequences: list[Sequence],
    source: RandomSource,
) -> list[Path]:
    """For each sequence the accepted draft tokens and the token that follows them; without a draft, the next token."""
    params, keys = [sequence.params for sequence in sequences], [sequence.key for sequence in sequences]
    lengths = [sequence.length for sequence in sequences]
    logits, prompts = output.logits, [sequence.prompt for sequence in sequences]
    if not any(tree.tokens for tree in trees):
        check_finite(logits)
        texts = [sequence.tokens for sequence in sequences]
        tokens = kernels.sample(logits[:, 0], params, source, keys, lengths, prompts, texts)
        return [Path([], token) for token in tokens]
    width, outputs, flat = logits.shape[1], list[list[int]](), logits.flatten(0, 1)
    params = [mine for mine in params for _ in range(width)]
    penalised = any(mine.penalised for mine in params)
    if penalised:
        prompts = [prompt for prompt in prompts for _ in range(width)]
        for sequence, tree in zip(sequences, trees, strict=True):
            before = outputs_before(sequence.tokens, tree)
            outputs += before + before[-1:] * (width - len(before))
    draft = dataclasses.replace(draft, tokens=draft.tokens.to(logits.device))
    widths, at, positions = (torch.tensor(each, device=logits.device) for each in (draft.widths, keys, lengths))
    rows = DraftRows(widths, at, positions, source)
    certain = draft.probs is None and isinstance(source, GreedySource) and all(mine.greedy for mine in params)
    if certain and policy.lossless and draft.trees is None:  # all lossless policies: the longest prefix of argmax
        check_finite(flat)
        scores = penalise(flat.float(), params, prompts, outputs) if penalised else flat
        return paths_of(*kernels.verify_greedy(draft.tokens, scores.view(*logits.shape), widths))
    probs = probabilities(flat, params, prompts if penalised else [], outputs).view(*logits.shape)
    target = TargetProbs(probs, probs if policy.lossless else opinions(logits, probs, sequences))
    if draft.trees is None:
        verdict = policy.verify(draft, target, rows)
        return paths_of(verdict.accepted, verdict.next_tokens)
    paths = []
    for row, tree in enumerate(trees):
        part = slice(row, row + 1), slice(len(tree.tokens) + 1)
        of_row = TargetProbs(target.probs[part], target.opinion[part])
        paths.append(policy.accept_tree(tree, of_row, rows.only(row)))
    return paths


def opinions(logits: Tensor, probs: Tensor, sequences: list[Sequence]) -> Tensor:
    """Return what lossy policies go by, [R, K+1, V]: probs, or at temperature 0 the softmax of the raw logits."""
    greedy = torch.tensor([sequence.params.greedy for sequence in sequences], device=probs.device)
    return torch.where(greedy[:, None, None], logits.float().softmax(-1), probs) if greedy.any() else probs


def paths_of(accepted: Tensor, next_tokens: Tensor) -> list[Path]:
    """Of R chains, from the number of accepted tokens and the token after them, int64 [R] each."""
    return [Path(list(range(n)), token) for n, token in zip(accepted.tolist(), next_tokens.tolist(), strict=True)]


def append(runner: ModelRunner, sequence: Sequence, tokens: list[int]) -> None:
    """Give the sequence these tokens, up to where it ends; its cache is then released."""
    for token in tokens:
        if not sequence.append(token):
            runner.release(sequence)
            return


def decode_step(
    runner: ModelRunner,
    drafter: Drafter | None,
    sequences: list[Sequence],
    asked: list[int],
    policy: AcceptancePolicy,
    source: RandomSource,
) -> Step:
    """Draft asked[r] tokens for sequence r, verify and accept, for all sequences at once; each may end."""
    device = runner.model.embedding.weight.device
    controllers = [sequence.controller for sequence in sequences]
    began = time.perf_counter()
    draft = Draft.nothing(len(sequences))
    if drafter is not None and any(asked):
        stage("draft")
        early = any(controller.ends_early for controller in controllers)
        draft = drafter.propose(sequences, asked, (lambda row, probs: controllers[row].stop(probs)) if early else None)
    synchronize(device)
    drafted = time.perf_counter()
    stage("verify")

    chains = zip(draft.tokens.tolist(), draft.widths, strict=True)
    trees = draft.trees or [Tree.chain(tokens[:width]) for tokens, width in chains]
    plain = not any(tree.tokens for tree in trees)
    taps = None if drafter is None else drafter.taps
    states_from = None if drafter is None or taps is None else [drafter.states_from(sequence) for sequence in sequences]
    output = runner.forward(list(sequences), [s.prompt + s.tokens for s in sequences], trees, states_from, taps or ())
    synchronize(device)
    verified = time.perf_counter()
    stage("sample" if plain else "accept")

    paths = accept(runner.model.kernels, policy, draft, trees, output, sequences, source)
    starts, lengths = [len(sequence.tokens) for sequence in sequences], [sequence.length for sequence in sequences]
    decided = time.perf_counter()
    for sequence, path in zip(sequences, paths, strict=True):
        runner.commit(sequence, path.nodes)
    kept = time.perf_counter() - decided
    for sequence, tree, path in zip(sequences, trees, paths, strict=True):
        append(runner, sequence, [*(tree.tokens[node] for node in path.nodes), path.next_token])
    if drafter is not None:
        states = None
        if states_from is not None:
            states = [output.states_of(r, path.nodes, len(trees[r].tokens)) for r, path in enumerate(paths)]
        drafter.observe(Outcome(sequences, [len(path.nodes) for path in paths], states))
    done = time.perf_counter() - kept
    if plain:
        verified = done
    times = StepTimes(drafted - began, verified - drafted, done - verified, kept)
    each = zip(sequences, asked, starts, trees, paths, runner.computed, lengths, strict=True)
    stats = [
        step_stats(sequence, k, start, tree, path, computed, runner.plain(length), times)
        for sequence, k, start, tree, path, computed, length in each
    ]
    observe(controllers, stats)
    return Step(sequences, starts, draft, trees, output, paths, stats)


def refuse(runner: ModelRunner, sequences: list[Sequence], error: OutOfBlocks) -> Sequence:
    """Refuse the request that found no block and free its blocks; the others go on. Raises if it is alone."""
    if len(sequences) == 1:
        raise error
    assert isinstance(error.owner, Sequence)
    error.owner.refuse(str(error))
    runner.release(error.owner)
    return error.owner


MultiStep = Callable[
    [ModelRunner, Drafter | None, list[Sequence], list[int], AcceptancePolicy, RandomSource], Iterator[Step]
]
"""Makes several steps of the sequences, with drafts of so many tokens, in one call; none where it cannot."""


def decode(
    runner: ModelRunner,
    drafter: Drafter | None,
    sequences: list[Sequence],
    policy: AcceptancePolicy | None = None,
    controller: Callable[[], KController] | None = None,
    source: RandomSource | None = None,
    multi_step: MultiStep | None = None,
) -> Iterator[Step]:
    """Decode a batch to its end. Acceptance is ragged: every sequence advances at its own pace.

    Without a drafter every step gives one token. `controller` makes a fresh controller for each sequence. By default
    rejection, and K = 4. `multi_step` is asked first; the tokens are the same.
    """
    policy = policy or Rejection()
    source = source or random_source(sequence.params for sequence in sequences)
    make = controller or (lambda: FixedController(4))
    for sequence in sequences:
        sequence.controller = make()
    while active := [sequence for sequence in sequences if sequence.finish_reason is None]:
        asked = [0] * len(active) if drafter is None else plan(drafter, active, runner.model.config.context)
        made = 0
        try:
            if multi_step is not None:
                for step in multi_step(runner, drafter, active, asked, policy, source):
                    made += 1
                    yield step
            if not made:
                yield decode_step(runner, drafter, active, asked, policy, source)
        except OutOfBlocks as error:  # of the target's cache or the draft's
            refused = refuse(runner, sequences, error)
            if drafter is not None and drafter.taps is None:  # a drafter that reads states keeps none of the others'
                drafter.observe(Outcome([refused], [0], None))
