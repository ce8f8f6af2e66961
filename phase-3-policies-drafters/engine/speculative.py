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
from dataclasses import dataclass

import torch
from torch import Tensor

from common.device import synchronize

from .context import window_start
from .controllers import FixedController, KController
from .drafting import Draft, Drafter, Outcome
from .generate import decode_step
from .model import Transformer
from .policies import AcceptancePolicy, Judged, Path, Rejection
from .sampling import SamplingParams, probabilities
from .sequence import Sequence
from .target import Target, target_forward
from .tree import Tree
from .verify import GreedySource, KeyedSource, RandomSource, Verdict


@dataclass(frozen=True)
class StepStats:
    """What one step did for one sequence. Times are of the whole step, which a batch shares, in milliseconds.

    Draft tokens past an EOS, a stop string or the token limit count as neither proposed nor accepted.
    """

    k: int  # draft tokens asked for; of a tree, levels
    proposed: int  # draft tokens that the target looked at
    depth: int  # of them, those in one chain; of a tree, its levels
    accepted: int  # those that stood
    emitted: int  # tokens that the sequence gained
    length: int  # of the sequence before the step
    draft_ms: float
    verify_ms: float
    accept_ms: float
    kv_ms: float = 0.0  # nothing is cached yet
    rss_mib: float | None = None  # of the process after the step, where it was asked for


@dataclass(frozen=True)
class Step:
    """One round of the loop, with all that was decided in it."""

    sequences: list[Sequence]
    starts: list[int]  # output length of each sequence before the step
    draft: Draft
    trees: list[Tree]  # the same, a tree for every sequence: a chain is one
    judged: Judged | None  # what the target said, [R, K+1, V]; None where nothing was drafted
    verdict: Verdict | None  # of chains
    paths: list[Path]  # the draft tokens that stood, and what followed
    stats: list[StepStats]
    logits: Tensor | None = None  # instead of what the target said, where the step was one of plain decoding: [R, V]


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
    probs = probabilities(logits.flatten(0, 1), params, prompts, outputs).view(*logits.shape)
    opinion = probs if policy.lossless or not params.greedy else logits.float().softmax(-1)
    judged = Judged(probs, opinion)
    if draft.trees is not None:
        paths = []
        for row, (sequence, tree) in enumerate(zip(sequences, trees, strict=True)):
            nodes = len(tree.tokens)
            of_row = Judged(probs[row : row + 1, : nodes + 1], opinion[row : row + 1, : nodes + 1])
            paths.append(policy.accept_tree(tree, of_row, sequence.sample, sequence.length, source))
        return judged, None, paths
    keys = [draft.widths, [s.sample for s in sequences], [s.length for s in sequences]]
    widths, samples, positions = torch.tensor(keys, device=logits.device)
    verdict = policy.verify(draft, judged, widths, samples, positions, source)
    stood = zip(verdict.accepted.tolist(), verdict.next_tokens.tolist(), strict=True)
    return judged, verdict, [Path(list(range(accepted)), following) for accepted, following in stood]


def plain_step(
    model: Transformer,
    drafter: Drafter,
    sequences: list[Sequence],
    params: SamplingParams,
    controllers: list[KController],
    source: RandomSource,
) -> Step:
    """A step for which nobody asked for a draft: plain decoding, at its price."""
    starts, lengths = [len(s.tokens) for s in sequences], [s.length for s in sequences]
    began = time.perf_counter()
    logits = decode_step(model, sequences, params, source)
    verify_ms = (time.perf_counter() - began) * 1e3
    drafter.observe(Outcome(sequences, [0] * len(sequences), None))
    stats = [StepStats(0, 0, 0, 0, 1, length, 0.0, verify_ms, 0.0) for length in lengths]
    for controller, of_sequence in zip(controllers, stats, strict=True):
        controller.observe(of_sequence)
    draft = Draft(torch.empty(len(sequences), 0, dtype=torch.long), None, [0] * len(sequences))
    paths = [Path([], sequence.tokens[-1]) for sequence in sequences]
    return Step(sequences, starts, draft, [Tree([], [])] * len(sequences), None, None, paths, stats, logits)


def speculative_step(
    model: Transformer,
    drafter: Drafter,
    sequences: list[Sequence],
    params: SamplingParams,
    policy: AcceptancePolicy,
    controllers: list[KController],
    source: RandomSource,
) -> Step:
    """Draft, verify, accept, for every given sequence at once; each takes its tokens and may end."""
    device = model.embedding.weight.device
    began = time.perf_counter()
    asked = [
        block_width(sequence, controller.next_k(), model.config.context)
        for sequence, controller in zip(sequences, controllers, strict=True)
    ]
    if not any(asked) and drafter.taps is None:
        return plain_step(model, drafter, sequences, params, controllers, source)
    draft = drafter.propose(sequences, asked, lambda row, probs: controllers[row].stop(probs))
    synchronize(device)
    drafted = time.perf_counter()

    chains = zip(draft.tokens.tolist(), draft.widths, strict=True)
    trees = draft.trees or [Tree.chain(tokens[:width]) for tokens, width in chains]
    known = None if drafter.taps is None else [drafter.known(sequence) for sequence in sequences]
    starts, lengths = [len(s.tokens) for s in sequences], [s.length for s in sequences]
    judged, verdict, states, logits = None, None, None, None
    if known is None and not any(tree.tokens for tree in trees):  # nothing to verify: plain decoding, at its price
        logits = decode_step(model, sequences, params, source)
        verified = time.perf_counter()
        paths = [Path([], sequence.tokens[-1]) for sequence in sequences]
    else:
        target = target_forward(model, [s.prompt + s.tokens for s in sequences], trees, known, drafter.taps or ())
        synchronize(device)
        verified = time.perf_counter()
        judged, verdict, paths = accept(policy, draft, trees, target, sequences, params, source)
        for sequence, tree, path in zip(sequences, trees, paths, strict=True):
            for token in [*(tree.tokens[node] for node in path.nodes), path.next_token]:
                if not sequence.append(token):
                    break
        if known is not None:
            states = [target.states_of(r, path.nodes, len(trees[r].tokens)) for r, path in enumerate(paths)]
    drafter.observe(Outcome(sequences, [len(path.nodes) for path in paths], states))
    done = time.perf_counter()

    stats = []
    for row, (sequence, tree, path) in enumerate(zip(sequences, trees, paths, strict=True)):
        emitted = len(sequence.tokens) - starts[row]
        # Where the text ended inside the accepted part, what lies past its end was never looked at.
        reach = emitted if emitted <= len(path.nodes) else tree.depth
        stats.append(
            StepStats(
                k=asked[row],
                proposed=sum(depth <= reach for depth in tree.depths),
                depth=reach,
                accepted=min(len(path.nodes), emitted),
                emitted=emitted,
                length=lengths[row],
                draft_ms=(drafted - began) * 1e3,
                verify_ms=(verified - drafted) * 1e3,
                accept_ms=(done - verified) * 1e3,
            )
        )
        controllers[row].observe(stats[-1])
    return Step(sequences, starts, draft, trees, judged, verdict, paths, stats, logits)


def speculative_decode(
    model: Transformer,
    drafter: Drafter,
    sequences: list[Sequence],
    params: SamplingParams,
    policy: AcceptancePolicy | None = None,
    controller: Callable[[], KController] | None = None,
    source: RandomSource | None = None,
) -> Iterator[Step]:
    """Decode a batch to its end by draft and verify. Acceptance is ragged: every row advances at its own pace.

    `controller` makes a fresh controller for each sequence. By default rejection, and K = 4.
    """
    policy = policy or Rejection()
    source = source or (GreedySource() if params.greedy else KeyedSource(params.seed))
    make = controller or (lambda: FixedController(4))
    controllers = {sequence: make() for sequence in sequences}
    while active := [sequence for sequence in sequences if sequence.finish_reason is None]:
        mine = [controllers[sequence] for sequence in active]
        yield speculative_step(model, drafter, active, params, policy, mine, source)
