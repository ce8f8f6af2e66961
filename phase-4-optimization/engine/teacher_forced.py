"""Teacher-forced acceptance: how many draft tokens are accepted on held-out text.

At each point of the text the drafter proposes from the true prefix and the policy decides. The text then advances along
the truth by as many tokens as the step would have given. Sampled output drifts to what the models find easy, and greedy
output loops; both flatter a drafter.
"""

from __future__ import annotations

from .drafting import Drafter, Outcome
from .model import Transformer
from .policies import AcceptancePolicy
from .sampling import SamplingParams
from .sequence import Ending, Sequence
from .speculative import accept
from .target import target_forward
from .tree import Tree
from .verify import RandomSource


def teacher_forced_acceptance(
    model: Transformer,
    drafter: Drafter,
    prompt: list[int],
    truth: list[int],
    params: SamplingParams,
    policy: AcceptancePolicy,
    k: int,
    source: RandomSource,
) -> list[int]:
    """Count the accepted of k draft tokens (of a tree's levels) at each point of `truth`, which follows `prompt`.

    Token ids. All of it must fit in the model's context: a drafter that reads the target's states is given those of the
    true text, from one forward over the whole.
    """
    sequence, accepted = Sequence(prompt, params, Ending()), list[int]()
    taps = drafter.taps
    every = None
    if taps is not None:
        every = target_forward(model, [prompt + truth], [Tree([], [])], [0], taps).states_of(0, [], 0)
    while len(sequence.tokens) + k < len(truth):
        if every is not None:
            before = every[drafter.states_from(sequence) : sequence.length - 1]
            drafter.observe(Outcome([sequence], [0], [before]))
        draft = drafter.propose([sequence], [k])
        trees = draft.trees or [Tree.chain(draft.tokens[0].tolist())]
        output = target_forward(model, [prompt + sequence.tokens], trees)
        (path,) = accept(policy, draft, trees, output, [sequence], source)
        accepted.append(len(path.nodes))
        for token in truth[len(sequence.tokens) :][: accepted[-1] + 1]:
            sequence.append(token)
    return accepted
