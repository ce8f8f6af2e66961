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
from .controllers import FixedController, KController
from .drafting import Draft, Drafter, Outcome
from .model import Transformer
from .policies import AcceptancePolicy, DraftRows, Rejection, TargetProbs
from .profiler import stage
from .sampling import choose, probabilities
from .sequence import Sequence
from .steps import Path, Step, TargetOutput, outputs_before, step_stats
from .target import target_forward
from .tree import Tree
from .verify import RandomSource, random_source


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


def accept(
    policy: AcceptancePolicy,
    draft: Draft,
    trees: list[Tree],
    output: TargetOutput,
    sequences: list[Sequence],
    source: RandomSource,
) -> list[Path]:
    """Return each sequence's accepted draft tokens and the token that follows; without a draft, the next token."""
    params, keys = [sequence.params for sequence in sequences], [sequence.key for sequence in sequences]
    lengths = [sequence.length for sequence in sequences]
    logits, prompts = output.logits, [sequence.prompt for sequence in sequences]
    if not any(tree.tokens for tree in trees):
        texts = [sequence.tokens for sequence in sequences]
        tokens = choose(logits[:, 0], params, source, keys, lengths, prompts, texts)
        return [Path([], token) for token in tokens]
    width, outputs = logits.shape[1], list[list[int]]()
    params = [mine for mine in params for _ in range(width)]
    penalised = any(mine.penalised for mine in params)
    if penalised:
        prompts = [prompt for prompt in prompts for _ in range(width)]
        for sequence, tree in zip(sequences, trees, strict=True):
            before = outputs_before(sequence.tokens, tree)
            outputs += before + before[-1:] * (width - len(before))
    probs = probabilities(logits.flatten(0, 1), params, prompts if penalised else [], outputs).view(*logits.shape)
    target = TargetProbs(probs, probs if policy.lossless else opinions(logits, probs, sequences))
    widths, at, positions = (torch.tensor(each, device=logits.device) for each in (draft.widths, keys, lengths))
    rows = DraftRows(widths, at, positions, source)
    if draft.trees is not None:
        paths = []
        for row, tree in enumerate(trees):
            part = slice(row, row + 1), slice(len(tree.tokens) + 1)
            of_row = TargetProbs(target.probs[part], target.opinion[part])
            paths.append(policy.accept_tree(tree, of_row, rows.only(slice(row, row + 1))))
        return paths
    draft = dataclasses.replace(draft, tokens=draft.tokens.to(logits.device))
    verdict = policy.verify(draft, target, rows)
    accepted = zip(verdict.accepted.tolist(), verdict.next_tokens.tolist(), strict=True)
    return [Path(list(range(count)), token) for count, token in accepted]


def opinions(logits: Tensor, probs: Tensor, sequences: list[Sequence]) -> Tensor:
    """Return what lossy policies go by, [R, K+1, V]: probs, or at temperature 0 the softmax of the raw logits."""
    greedy = torch.tensor([sequence.params.greedy for sequence in sequences], device=probs.device)
    return torch.where(greedy[:, None, None], logits.float().softmax(-1), probs) if greedy.any() else probs


def decode_step(
    model: Transformer,
    drafter: Drafter | None,
    sequences: list[Sequence],
    asked: list[int],
    policy: AcceptancePolicy,
    source: RandomSource,
) -> Step:
    """Draft asked[r] tokens for sequence r, verify and accept, for all sequences at once; each may end."""
    device = model.embedding.weight.device
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
    output = target_forward(model, [s.prompt + s.tokens for s in sequences], trees, states_from, taps or ())
    synchronize(device)
    verified = time.perf_counter()
    stage("sample" if plain else "accept")

    paths = accept(policy, draft, trees, output, sequences, source)
    starts = [len(sequence.tokens) for sequence in sequences]
    for sequence, tree, path in zip(sequences, trees, paths, strict=True):
        for token in [*(tree.tokens[node] for node in path.nodes), path.next_token]:
            if not sequence.append(token):
                break
    if drafter is not None:
        states = None
        if states_from is not None:
            states = [output.states_of(r, path.nodes, len(trees[r].tokens)) for r, path in enumerate(paths)]
        drafter.observe(Outcome(sequences, [len(path.nodes) for path in paths], states))
    done = time.perf_counter()
    if plain:
        verified = done
    times = drafted - began, verified - drafted, done - verified
    each = zip(sequences, asked, starts, trees, paths, strict=True)
    stats = [step_stats(*of_sequence, *times) for of_sequence in each]
    for controller, of_sequence in zip(controllers, stats, strict=True):
        controller.observe(of_sequence)
    return Step(sequences, starts, draft, trees, output, paths, stats)


def decode(
    model: Transformer,
    drafter: Drafter | None,
    sequences: list[Sequence],
    policy: AcceptancePolicy | None = None,
    controller: Callable[[], KController] | None = None,
    source: RandomSource | None = None,
) -> Iterator[Step]:
    """Decode a batch to its end. Acceptance is ragged: every sequence advances at its own pace.

    Without a drafter every step gives one token. `controller` makes a fresh controller for each sequence. By default
    rejection, and K = 4.
    """
    policy = policy or Rejection()
    source = source or random_source(sequence.params for sequence in sequences)
    make = controller or (lambda: FixedController(4))
    for sequence in sequences:
        sequence.controller = make()
    while active := [sequence for sequence in sequences if sequence.finish_reason is None]:
        asked = [0] * len(active)
        if drafter is not None:
            context = model.config.context
            asked = [block_width(sequence, sequence.controller.next_k(), context) for sequence in active]
        yield decode_step(model, drafter, active, asked, policy, source)
