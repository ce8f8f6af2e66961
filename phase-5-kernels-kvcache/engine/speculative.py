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
from collections.abc import Sequence as Rows
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from common.device import synchronize

from .context import window_start
from .controllers import CostController, FixedController, KController, choose, observe
from .drafters.ngram import NgramDrafter
from .drafting import Draft, Drafter, Outcome
from .inputs import sampling_metadata
from .kernels import Kernels
from .kernels.tokens import SamplingMetadata
from .kv_cache import OutOfBlocks
from .policies import AcceptancePolicy, DraftRows, Rejection, TargetProbs
from .profiler import stage
from .runner import ModelRunner
from .sampling import check_finite, not_finite
from .sequence import Sequence
from .steps import Path, Step, StepTimes, Verified, outputs_before, step_stats
from .transfers import read
from .tree import Tree
from .verify import GreedySource, RandomSource, random_source


def block_width(sequence: Sequence, k: int, context: int) -> int:
    """Return how many tokens to draft: at most k, none past the token limit, and none past a jump of the window.

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
    if all(each.declined > 0 for each in costs):
        return [0] * len(sequences)
    limits = [block_width(each, mine.bounds.high, context) for each, mine in zip(sequences, costs, strict=True)]
    widths = choose(costs, limits)
    if any(widths) and isinstance(drafter, NgramDrafter):  # what a lookup finds is known beforehand
        widths = choose(costs, [len(found) for found in drafter.find(sequences, limits)])
    return widths


@runtime_checkable
class DeviceDrafter(Protocol):
    """A drafter whose tokens stay on the device until the target has verified them."""

    def able(self, target: ModelRunner, sequences: list[Sequence], widths: list[int]) -> bool:
        """Return True if it can do so for these sequences; `propose` drafts the others."""
        ...

    def propose_and_verify(self, target: ModelRunner, sequences: list[Sequence], widths: list[int]) -> Verified:
        """As the function propose_and_verify, with exactly widths[r] tokens for sequence r."""
        ...


def propose_and_verify(
    runner: ModelRunner, drafter: Drafter | None, sequences: list[Sequence], asked: list[int]
) -> Verified:
    """Draft up to asked[r] tokens for sequence r, then run one forward of the target over sequences and drafts."""
    began, upload, R = time.perf_counter(), runner.upload, len(sequences)
    draft = Draft.nothing(R)
    if drafter is not None and any(asked):
        stage("draft")
        controllers = [sequence.controller for sequence in sequences]
        early = any(controller.ends_early for controller in controllers)
        draft = drafter.propose(sequences, asked, (lambda row, probs: controllers[row].stop(probs)) if early else None)
    synchronize(upload.device)
    drafted = time.perf_counter()
    stage("verify")
    chains = draft.tokens.tolist()
    trees = draft.trees or [Tree.chain(chain[:width]) for chain, width in zip(chains, draft.widths, strict=True)]
    widths = upload.put_longs(draft.widths, R)
    tokens = upload.put_longs((token for chain in chains for token in chain), *draft.tokens.shape)
    taps = None if drafter is None else drafter.taps
    states_from = None if drafter is None or taps is None else [drafter.states_from(sequence) for sequence in sequences]
    output = runner.forward(list(sequences), [s.prompt + s.tokens for s in sequences], trees, states_from, taps or ())
    if any(tree.tokens for tree in trees):
        draft = dataclasses.replace(draft, tokens=tokens.tensor)
    synchronize(upload.device)
    return Verified(draft, widths, trees, output, drafted - began, time.perf_counter() - drafted)


def accept(
    kernels: Kernels, policy: AcceptancePolicy, made: Verified, sequences: list[Sequence], rows: SamplingMetadata
) -> tuple[list[Path], list[Tree]]:
    """Return the accepted path of each sequence, and its draft; one read tells the host.

    Without a draft, the next token of each sequence is chosen.
    """
    draft, trees = made.draft, made.trees
    logits, (R, width, _) = made.output.logits, made.output.logits.shape
    if made.plain:
        (tokens,) = read_if_finite(logits, kernels.sample(logits[:, 0], rows))
        return [Path([], token) for token in tokens], trees
    flat = logits.flatten(0, 1)
    if rows.texts is not None:
        texts = list[tuple[Rows[int], Rows[int]]]()
        for sequence, tree in zip(sequences, trees, strict=True):
            before = outputs_before(sequence.tokens, tree)
            texts += [(sequence.prompt, output) for output in before + before[-1:] * (width - len(before))]
        rows = dataclasses.replace(rows, texts=texts)
    certain = draft.probs is None and isinstance(rows.source, GreedySource) and rows.greedy
    if certain and policy.lossless and draft.trees is None:  # all lossless policies: the longest prefix of argmax
        scores = rows.penalised(flat).view(*logits.shape)
        accepted, following = kernels.verify_greedy(draft.tokens, scores, made.widths.tensor)
    else:
        probs = kernels.probabilities(flat, rows).view(*logits.shape)
        target = TargetProbs(probs, probs if policy.lossless else opinions(logits, probs, sequences))
        draft_rows = DraftRows(made.widths.tensor, *rows.keyed, rows.source)
        if draft.trees is not None:
            check_finite(logits)
            return [accept_row(policy, row, tree, target, draft_rows) for row, tree in enumerate(trees)], trees
        verdict = policy.verify(draft, target, draft_rows)
        accepted, following = verdict.accepted, verdict.next_tokens
    counts, tokens, drafted = read_if_finite(logits, accepted, following, draft.tokens)
    K = draft.tokens.shape[1]
    paths = [Path(list(range(count)), token) for count, token in zip(counts, tokens, strict=True)]
    return paths, [Tree.chain(drafted[r * K : r * K + draft.widths[r]]) for r in range(R)]


def accept_row(policy: AcceptancePolicy, row: int, tree: Tree, target: TargetProbs, rows: DraftRows) -> Path:
    at, nodes = slice(row, row + 1), slice(len(tree.tokens) + 1)
    return policy.accept_tree(tree, TargetProbs(target.probs[at, nodes], target.opinion[at, nodes]), rows.only(at))


def read_if_finite(logits: Tensor, *decisions: Tensor) -> list[list[int]]:
    """Read integers that were decided from logits [R, K+1, V]. UserError if these are not finite."""
    *found, (finite,) = read(*decisions, logits.amax(-1).isfinite().all())
    if not finite:
        raise not_finite(logits.dtype)
    return found


def opinions(logits: Tensor, probs: Tensor, sequences: list[Sequence]) -> Tensor:
    """Return what lossy policies go by, [R, K+1, V]: probs, or at temperature 0 the softmax of the raw logits."""
    greedy = torch.tensor([sequence.params.greedy for sequence in sequences], device=probs.device)
    return torch.where(greedy[:, None, None], logits.float().softmax(-1), probs) if greedy.any() else probs


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
    began = time.perf_counter()
    runner.upload.begin()
    rows = sampling_metadata(runner.upload, sequences, source)
    if any(asked) and isinstance(drafter, DeviceDrafter) and drafter.able(runner, sequences, asked):
        made = drafter.propose_and_verify(runner, sequences, asked)
    else:
        made = propose_and_verify(runner, drafter, sequences, asked)
    stage("sample" if made.plain else "accept")
    paths, trees = accept(runner.model.kernels, policy, made, sequences, rows)

    starts, lengths = [len(sequence.tokens) for sequence in sequences], [sequence.length for sequence in sequences]
    accepted = [[tree.tokens[node] for node in path.nodes] for tree, path in zip(trees, paths, strict=True)]
    decided = time.perf_counter()
    for sequence, path, tokens in zip(sequences, paths, accepted, strict=True):
        runner.commit(sequence, path.nodes, tokens)
    kept = time.perf_counter() - decided
    for sequence, path, tokens in zip(sequences, paths, accepted, strict=True):
        append(runner, sequence, [*tokens, path.next_token])
    if drafter is not None:
        states = None
        if made.output.states is not None:
            states = [made.output.states_of(r, path.nodes, len(trees[r].tokens)) for r, path in enumerate(paths)]
        drafter.observe(Outcome(sequences, [len(path.nodes) for path in paths], states))

    rest = time.perf_counter() - began - made.draft_s - made.verify_s - kept
    times = StepTimes(made.draft_s, made.verify_s, rest, kept)
    if made.plain:  # verification alone
        times = StepTimes(made.draft_s, made.verify_s + rest, 0.0, kept)
    each = zip(sequences, asked, starts, trees, paths, runner.computed, lengths, strict=True)
    stats = [
        step_stats(sequence, k, start, tree, path, computed, runner.plain(length), times)
        for sequence, k, start, tree, path, computed, length in each
    ]
    observe([sequence.controller for sequence in sequences], stats)
    return Step(sequences, starts, made.draft, trees, made.output, paths, stats)


def refuse(runner: ModelRunner, sequences: list[Sequence], error: OutOfBlocks) -> Sequence:
    """Refuse the request that found no block and free its blocks; the others go on. Raises if it is alone."""
    if len(sequences) == 1:
        raise error
    assert isinstance(error.owner, Sequence)
    error.owner.refuse(str(error))
    runner.release(error.owner)
    return error.owner


MultiStep = Callable[
    [ModelRunner, Drafter | None, list[Sequence], list[int], AcceptancePolicy, RandomSource], list[Step]
]
"""Makes several steps of the sequences in one call, with drafts of so many tokens; returns none if it cannot."""


def decode(
    runner: ModelRunner,
    drafter: Drafter | None,
    sequences: list[Sequence],
    policy: AcceptancePolicy | None = None,
    controller: Callable[[], KController] | None = None,
    source: RandomSource | None = None,
    multi_step: MultiStep | None = None,
) -> Iterator[Step]:
    """Decode a batch to its end, and yield every step; for the arguments see decode_calls."""
    for steps in decode_calls(runner, drafter, sequences, policy, controller, source, multi_step):
        yield from steps


def decode_calls(
    runner: ModelRunner,
    drafter: Drafter | None,
    sequences: list[Sequence],
    policy: AcceptancePolicy | None = None,
    controller: Callable[[], KController] | None = None,
    source: RandomSource | None = None,
    multi_step: MultiStep | None = None,
) -> Iterator[list[Step]]:
    """Decode a batch to its end, and yield the steps that one call made. Every sequence advances at its own pace.

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
        try:
            made = [] if multi_step is None else multi_step(runner, drafter, active, asked, policy, source)
            yield made or [decode_step(runner, drafter, active, asked, policy, source)]
        except OutOfBlocks as error:  # of the target's cache or the draft's
            refused = refuse(runner, sequences, error)
            if drafter is not None and drafter.taps is None:  # only a draft model has a cache to free
                drafter.observe(Outcome([refused], [0], None))
