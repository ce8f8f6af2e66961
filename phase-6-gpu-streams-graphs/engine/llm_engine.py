"""Serves many requests at once: every step decodes all that run, and computes parts of the prompts that are new.

engine = LLMEngine(LLM(Options(max_tokens=32)))
first, second = engine.add_request("from pathlib import"), engine.add_request("class Stack:")
while engine.busy:
    for output in engine.step():
        print(output.request, output.text)

Every random number is keyed by its request, so the tokens of a request do not depend on the others. One thread owns an
engine; async_engine.py serves several.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, get_args

from common.errors import UserError

from .capacity import check_caches, fitted
from .controllers import ControllerName, CostController, FixedController, KController
from .drafter_choice import by_drafter
from .generate import Stats, stats_of
from .kernels import registry
from .logprobs import TokenLogprob, of_tokens
from .options import MOST_ROWS, DrafterName
from .policies import LOSSLESS, AcceptancePolicy, PolicyName
from .profiler import stage
from .runner import DRAFT_ROOM, CachedRunner
from .sampling import SamplingParams
from .scheduler import BUDGET, Scheduler
from .sequence import FinishReason, Sequence
from .speculative import advance
from .steps import Step, StepStats
from .verify import KeyedSource, random_source

if TYPE_CHECKING:
    from .llm import LLM

SEVERAL = 128  # steps of one call, at most, while nobody waits


@dataclass(frozen=True)
class Output:
    """What one sample of a request gained in a step."""

    request: int
    sample: int
    tokens: list[int]
    text: str  # that can no longer change
    finish_reason: FinishReason | None = None
    error: Exception | None = None  # that ended it
    stats: Stats | None = None  # of the whole, at its end
    steps: list[StepStats] = field(default_factory=list)  # that gave the tokens
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of the tokens, if the request wants them
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # with the first tokens, likewise


class LLMEngine:
    """Runs the models of an LLM over requests that come and go."""

    def __init__(
        self,
        llm: LLM,
        rows: int = 0,
        tokens: int = 0,
        multi_step: bool = True,
        budget: int = BUDGET,
        others: Iterable[LLM] = (),
    ) -> None:
        """rows: sequences of one step, by default `--batch-size`. tokens: of the longest, by default the context.

        budget: tokens of one step, prompts included. others: LLMs with other drafters (drafter_choice.py).
        UserError for numbers out of range, two LLMs with one drafter, and caches that do not fit in memory.
        """
        self.llm, self.rows = llm, rows or llm.options.batch_size
        if not 1 <= self.rows <= MOST_ROWS or tokens < 0 or budget < 1:
            wrong = f"got {self.rows}, {tokens} and {budget}"
            raise UserError(f"rows must be from 1 to {MOST_ROWS}, tokens at least 0, the budget at least 1; {wrong}")
        tokens = tokens or llm.loaded.config.context
        self.drafting = by_drafter([llm, *others])
        models = [llm.loaded.model, *(each.draft.model for each in self.drafting.values() if each.draft)]
        reads = {model: llm.backends.computed(model) for model in models}
        kv = fitted(llm.options.kv_options(), reads, llm.caches, self.rows, tokens)
        self.target, *drafts = (llm.make_runner(model, self.rows, tokens, kv) for model in models)
        self.draft = drafts[0] if drafts else None
        self.drafters = {name: each.new_drafter(self.draft, KeyedSource()) for name, each in self.drafting.items()}
        self.scheduler = Scheduler(self.target, self.draft, self.rows, budget)
        self.several = llm.backends.multi_step if multi_step else None
        self.policies: dict[PolicyName, AcceptancePolicy] = {}
        self.requests: dict[int, list[Sequence]] = {}  # those that have not ended
        self.numbers, self.closed = count(), False
        self.priced, self.unpriced = set[DrafterName](), dict[DrafterName, SamplingParams]()  # whose costs are needed
        self.ended: list[Sequence] = []  # without a step: aborted, or by an error

    @property
    def busy(self) -> bool:
        """Return True while a request waits or runs, or an end was not reported yet."""
        return bool(self.scheduler.waiting or self.scheduler.running or self.ended)

    def add_request(
        self,
        prompt: str | list[int],
        params: SamplingParams | None = None,
        *,
        n: int = 1,
        seeded: bool = True,
        drafter: DrafterName | None = None,
        policy: PolicyName | None = None,
        controller: ControllerName | None = None,
        k: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> int:
        """Queue n samples of a prompt, a text or token ids; return the number of the request.

        params, drafter, policy, controller, k: by default those of the options; k = 0 drafts nothing. A static tree
        keeps the shape for the options' K. seeded: False if the request did not ask for a seed, so that one is drawn.
        Without a policy, sampled tokens are accepted by `coupled` if the request has a seed, and by `rejection`, which
        accepts more, if not. logprobs, prompt_logprobs: report those of the output and the prompt, each with so many
        likeliest tokens; every call makes a single step then. UserError for a request that cannot be served; the others
        are not concerned.
        """
        llm, options = self.llm, self.llm.options
        tokens = llm.encoder.encode([prompt])[0] if isinstance(prompt, str) else list(prompt)
        if (wrong := next((t for t in tokens if not 0 <= t < llm.loaded.config.vocab_size), None)) is not None:
            raise UserError(f"token {wrong} is not in the vocabulary of {llm.loaded.config.vocab_size} tokens")
        if n < 1 or not 0 <= (k or 0) <= DRAFT_ROOM:
            raise UserError(f"n must be at least 1, and k from 0 to {DRAFT_ROOM}; got n = {n}, k = {k}")
        if min(logprobs or 0, prompt_logprobs or 0) < 0:
            raise UserError(f"logprobs and prompt_logprobs must be at least 0; got {logprobs} and {prompt_logprobs}")
        if prompt_logprobs is not None:
            if not isinstance(self.target, CachedRunner):
                raise UserError("log-probabilities of a prompt need a KV cache: leave out --kv off")
            if len(tokens) > llm.loaded.config.context:
                raise UserError("log-probabilities of a prompt that is longer than the context are not defined")
        for what, name, known in (("policy", policy, PolicyName), ("controller", controller, ControllerName)):
            if name is not None and name not in get_args(known):
                raise UserError(f"there is no {what} {name}; give one of {', '.join(get_args(known))}")
        if drafter not in (None, *self.drafting):
            raise UserError(f"the drafter {drafter} is not loaded; loaded: {', '.join(self.drafting) or 'none'}")
        params = params or llm.params
        if not seeded:
            params = dataclasses.replace(params, seed=secrets.randbits(63))
        if policy is None and options.policy == "auto":
            policy = "longest_prefix" if params.greedy else "coupled" if seeded else "rejection"
        rule = self._policy(policy) if policy else llm.policy
        changed = {"controller": controller or options.controller, **({"k": k} if k else {})}
        chosen, drafting = options.model_copy(update=changed), self.drafting[drafter] if drafter else llm
        sequences = [Sequence(tokens, params, llm.loaded.ending, sample) for sample in range(n)]
        number = next(self.numbers)
        for sequence in sequences:
            sequence.number, sequence.top, sequence.prompt_top = number, logprobs, prompt_logprobs
            sequence.unscored = prompt_logprobs is not None and len(tokens) > 1
            own = FixedController(0) if k == 0 else chosen.make_controller(drafting.cost_model)
            self.add(sequence, rule, own, drafting)
        self.requests[number] = sequences
        return number

    def add(
        self,
        sequence: Sequence,
        policy: AcceptancePolicy | None = None,
        controller: KController | None = None,
        drafting: LLM | None = None,
    ) -> None:
        """Queue a sequence; drafting: one of `others` that drafts for it. UserError if the cache can never hold it."""
        if self.closed:
            raise UserError("the engine is closed")
        drafting = drafting or self.llm
        options, name = drafting.options, drafting.options.drafter
        sequence.policy = policy or drafting.policy
        sequence.controller = controller = controller or options.make_controller(drafting.cost_model)
        sequence.drafter = self.drafters.get(name)
        most = controller.k if isinstance(controller, FixedController) else options.max_k
        if sequence.drafter is not None and most:
            sequence.branches = options.tree != "off"
            sequence.reach = options.tree_nodes if sequence.branches else most
            sequence.draft = self.draft if drafting.draft else None
            if isinstance(controller, CostController) and name not in self.priced:
                self.unpriced.setdefault(name, sequence.params)
        check_caches(sequence, self.target)
        self.scheduler.add(sequence)

    def _policy(self, name: PolicyName) -> AcceptancePolicy:
        options = self.llm.options
        if options.lossless and name not in LOSSLESS:
            raise UserError(f"--lossless refuses the policy {name}; lossless are {', '.join(LOSSLESS)}")
        if name not in self.policies:
            made = options.acceptance_policy(name)
            registry.use(made, self.llm.backends.kernels)
            self.policies[name] = made
        return self.policies[name]

    def abort(self, number: int) -> bool:
        """End a request whose output nobody wants any more. False if there is none: it has ended, or never was."""
        sequences = [each for each in self.requests.pop(number, []) if each.finish_reason is None]
        for sequence in sequences:
            sequence.abort()
            self._drop(sequence)
        return bool(sequences)

    def hurry(self, on: bool) -> None:
        """Let `step` return soon, because there is new work, until this is turned off. Any thread may call it."""
        if (fast := self.llm.backends.fast.get(self.llm.loaded.model)) is not None:
            fast.hurry(on)

    def step(self) -> list[Output]:
        """Make the next steps, and return what the requests gained in them."""
        if self.closed:
            raise UserError("the engine is closed")
        gained = dict[Sequence, tuple[int, list[StepStats]]]()
        with self.llm.computing():
            for step in self.advance():
                for sequence, start, stats in zip(step.sequences, step.starts, step.stats, strict=True):
                    gained.setdefault(sequence, (start, []))[1].append(stats)
        for sequence in self.ended:
            gained.setdefault(sequence, (len(sequence.tokens), []))
        self.ended = []
        return [self._output(sequence, *found) for sequence, found in gained.items()]

    def _output(self, sequence: Sequence, start: int, steps: list[StepStats]) -> Output:
        reason, number, tokens = sequence.finish_reason, sequence.number, sequence.tokens[start:]
        if reason is not None and all(each.finish_reason is not None for each in self.requests.get(number, [])):
            self.requests.pop(number, None)
        stats = stats_of(sequence) if reason is not None else None
        scored = sequence.logprobs[start:], [] if start else sequence.prompt_logprobs
        return Output(
            number, sequence.sample, tokens, sequence.take_text(), reason, sequence.error, stats, steps, *scored
        )

    def advance(self) -> Iterator[Step]:
        """Compute parts of prompts, then make steps of all sequences that can decode; yield these."""
        while self.unpriced:
            name, params = self.unpriced.popitem()
            self.priced.add(name)
            self.drafting[name].prices.provide(self.drafting[name].cost_model, params, self.rows)
        chunks, ready = self.scheduler.schedule()
        for sequence, tokens in chunks:
            self._prefill(sequence, tokens)
        most = 1 if self.scheduler.changes else SEVERAL
        ready = [each for each in ready if each.finish_reason is None]
        for drafter in dict.fromkeys(each.drafter for each in ready):  # each has a step of its own
            yield from self._decode([each for each in ready if each.drafter is drafter], most)

    def _prefill(self, sequence: Sequence, most: int) -> None:
        stage("prefill")
        text, first = sequence.prompt + sequence.tokens, None
        taps: tuple[int, ...] = ()
        if sequence.drafter is not None and sequence.drafter.taps is not None:
            first, taps = sequence.drafter.states_from(sequence), sequence.drafter.taps
        try:
            if sequence.unscored:
                self._score(sequence, most, first, taps)
            elif isinstance(self.target, CachedRunner):
                self.target.prefill(sequence, text, most, first, taps)
            if isinstance(sequence.draft, CachedRunner) and not isinstance(sequence.controller, CostController):
                sequence.draft.prefill(sequence, text, most)  # `cost` has the prompt read only if it drafts
        except Exception as error:
            self._fail(sequence, error)
        stage("schedule")

    def _score(self, sequence: Sequence, most: int, states_from: int | None, taps: tuple[int, ...]) -> None:
        """Compute a part of a prompt, and the log-probabilities of the tokens that follow each of its own."""
        assert isinstance(self.target, CachedRunner)
        assert sequence.prompt_top is not None
        prompt, found = sequence.prompt, sequence.prompt_logprobs
        while most > 0:
            start, logits = self.target.score(sequence, prompt, most, states_from, taps)
            most -= len(logits)
            known = len(found) - start  # it was preempted, and computes them again
            following = prompt[start + 1 : start + 1 + len(logits)]
            found += of_tokens(logits, following, sequence.prompt_top)[max(0, known) :]
        sequence.unscored = len(found) < len(prompt) - 1

    def _decode(self, group: list[Sequence], most: int) -> Iterator[Step]:
        """Make steps of these sequences. If that fails, each is tried alone: only those that fail end."""
        source = random_source(sequence.params for sequence in group)
        before = [len(sequence.tokens) for sequence in group]
        several = None if any(each.top is not None for each in group) else self.several
        try:
            for step in advance(self.target, group[0].drafter, group, source, several, most):
                for row, (sequence, stats) in enumerate(zip(step.sequences, step.stats, strict=True)):
                    sequence.progress.mark()
                    self.llm.keep(sequence, stats)
                    if sequence.top is not None:
                        sequence.logprobs += step.logprobs(row, sequence.top)
                yield step
        except Exception as error:
            if len(group) == 1:
                self._fail(group[0], error)
            else:
                for sequence in [each for each in group if each.finish_reason is None]:
                    yield from self._decode([sequence], 1)
        for sequence, tokens in zip(group, before, strict=True):
            if len(sequence.tokens) > tokens:
                sequence.progress.chunks.append((sequence.progress.last, len(sequence.tokens) - tokens))
            if sequence.finish_reason is not None and sequence in self.scheduler.running:
                self.scheduler.remove(sequence)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        sequence.fail(error)
        self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self.ended.append(sequence)

    def close(self) -> None:
        """End all requests, and free their blocks. The engine cannot be used afterwards."""
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            self.scheduler.remove(sequence)
        self.requests, self.closed = {}, True
