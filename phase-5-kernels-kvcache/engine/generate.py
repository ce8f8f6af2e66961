"""Plain decoding: one forward of the model for every new token.

from engine import SamplingParams, generate, load
loaded = load("stdlib-10m", torch.float32, torch.device("cpu"))
print(generate(loaded.model, [loaded.tokenizer.encode("from pathlib import")], SamplingParams())[0].tokens)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from common.philox import Purpose

from .kv_cache import KVOptions, OutOfBlocks
from .model import Transformer
from .profiler import stage
from .runner import Drawing, ModelRunner, make_runner
from .sampling import KeyedSampler, Sampler, SamplingParams, check_finite
from .sequence import Ending, FinishReason, Sequence

Watch = Callable[[list[Sequence], Tensor], None]
"""Takes the sequences of a step, and the logits [R, V] that their new tokens were chosen by."""

AT_ONCE = 8  # tokens that a runner may draw in one call; what lies behind the text's end is dropped


@dataclass(frozen=True)
class Stats:
    """What one completion took. Times are wall time in milliseconds, from the start of decoding."""

    prompt_tokens: int
    new_tokens: int
    ttft_ms: float  # to the first new token
    total_ms: float  # to the last
    tpot_ms: float  # (total - to the first) / (tokens - 1): what every further token took
    tokens_per_s: float  # new tokens / wall time
    steps: int  # rounds of the decoding loop
    target_forwards: int  # forwards of the model that is sampled


@dataclass(frozen=True)
class Generation:
    """A finished completion. `tokens` are the new ids; `text` is theirs, cut before a stop string."""

    tokens: list[int]
    finish_reason: FinishReason
    stats: Stats
    text: str = ""


@dataclass
class _Marks:
    first: float
    last: float = 0.0
    steps: int = 0
    forwards: int = 0


class Clock:
    """When each sequence's tokens became known, and what had been computed for them by then."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self._marks: dict[Sequence, _Marks] = {}

    def mark(self, sequence: Sequence, forwards: int = 1) -> None:
        """A step has just given this sequence one or more tokens, at the price of some target forwards."""
        now = time.perf_counter() - self.began
        marks = self._marks.setdefault(sequence, _Marks(first=now))
        marks.last = now
        marks.steps += 1
        marks.forwards += forwards

    def stats(self, sequence: Sequence) -> Stats:
        marks = self._marks.get(sequence, _Marks(first=0.0))  # one that was refused may have no token
        return Stats(
            prompt_tokens=len(sequence.prompt),
            new_tokens=len(sequence.tokens),
            ttft_ms=marks.first * 1e3,
            total_ms=marks.last * 1e3,
            tpot_ms=(marks.last - marks.first) / max(1, len(sequence.tokens) - 1) * 1e3,
            tokens_per_s=len(sequence.tokens) / marks.last if sequence.tokens else 0.0,
            steps=marks.steps,
            target_forwards=marks.forwards,
        )


def decode_step(runner: ModelRunner, sequences: list[Sequence], params: SamplingParams, sampler: Sampler) -> Tensor:
    """Give every unfinished sequence its next token; the logits [R, V] that the tokens were chosen by."""
    stage("verify")
    logits = runner.logits(list(sequences), [sequence.prompt + sequence.tokens for sequence in sequences])
    stage("sample")
    for sequence, token in zip(sequences, sample(runner, logits, sequences, params, sampler), strict=True):
        if not sequence.append(token):
            runner.release(sequence)
    return logits


def sample(
    runner: ModelRunner, logits: Tensor, sequences: list[Sequence], params: SamplingParams, sampler: Sampler
) -> list[int]:
    """The token that follows each sequence, by logits [R, V]. UserError for logits that are not finite."""
    check_finite(logits)
    return runner.model.kernels.sample(
        logits,
        params,
        sampler,
        samples=[sequence.sample for sequence in sequences],
        positions=[sequence.length for sequence in sequences],
        prompts=[sequence.prompt for sequence in sequences],
        outputs=[sequence.tokens for sequence in sequences],
    )


def decode(
    runner: ModelRunner,
    sequences: list[Sequence],
    params: SamplingParams,
    sampler: Sampler | None = None,
    watch: Watch | None = None,
) -> Iterator[list[Sequence]]:
    """Decode a batch to its end; after every step, the sequences that got a token. Rows end each on their own.

    `watch` is called after every step, before the sequences are given out; tokens drawn at once have no logits to show,
    so with it they are drawn one at a time.
    """
    sampler = sampler or KeyedSampler(params.seed)
    while active := [sequence for sequence in sequences if sequence.finish_reason is None]:
        if watch is None and len(active) == 1 and (tokens := several(runner, active[0], params, sampler)[0]):
            for token in tokens:
                more = active[0].append(token)
                if not more:
                    runner.release(active[0])
                yield active
                if not more:  # what was drawn past the end is no step
                    break
            continue
        try:
            logits = decode_step(runner, active, params, sampler)
        except OutOfBlocks as error:
            refuse(runner, sequences, error)
            continue
        if watch is not None:
            watch(active, logits)
        yield active


def refuse(runner: ModelRunner, sequences: list[Sequence], error: OutOfBlocks) -> Sequence:
    """The request that found no page is refused and gives its pages back; the others go on. Raises if it is alone."""
    if len(sequences) == 1:
        raise error
    assert isinstance(error.owner, Sequence)
    error.owner.refuse(str(error))
    runner.release(error.owner)
    return error.owner


def several(
    runner: ModelRunner,
    sequence: Sequence,
    params: SamplingParams,
    sampler: Sampler,
    count: int = AT_ONCE,
    taps: tuple[int, ...] | None = None,
) -> tuple[list[int], Tensor | None]:
    """The next few tokens in one call, with `taps` the states before each; no tokens where the runner cannot.

    And none for the first token, which somebody waits for.
    """
    count = min(count, params.max_new_tokens - len(sequence.tokens))
    if not sequence.tokens or count < 2:
        return [], None
    how = Drawing(params, sampler, sequence.sample, sequence.length, Purpose.SAMPLE, probs=False, taps=taps)
    return runner.draw(sequence, sequence.prompt + sequence.tokens, count, how) or ([], None)


def finish(sequence: Sequence, stats: Stats) -> Generation:
    assert sequence.finish_reason is not None, "the sequence is still being decoded"
    return Generation(sequence.tokens, sequence.finish_reason, stats, sequence.text)


def generate(
    model: Transformer,
    prompts: list[list[int]],
    params: SamplingParams,
    ending: Ending | None = None,
    samples: list[int] | None = None,
    sampler: Sampler | None = None,
) -> list[Generation]:
    """Complete every prompt (token ids), all in one batch; prompts may differ in length.

    `ending` names the EOS ids, and the tokenizer that stop strings need. `samples[i]` is the number of prompt i's
    sample (several samples of one prompt: the prompt several times, numbered); all 0 by default. UserError for an
    empty prompt.
    """
    samples = samples or [0] * len(prompts)
    ending = ending or Ending()
    sequences = [Sequence(p, params, ending, s) for p, s in zip(prompts, samples, strict=True)]
    clock = Clock()
    runner = make_runner(model, KVOptions(), len(sequences), max(map(len, prompts)) + params.max_new_tokens)
    for active in decode(runner, sequences, params, sampler):
        for sequence in active:
            clock.mark(sequence)
    return [finish(sequence, clock.stats(sequence)) for sequence in sequences]


def stream(
    model: Transformer, prompt: list[int], params: SamplingParams, ending: Ending | None = None, sample: int = 0
) -> Iterator[int]:
    """The tokens of one completion, each as soon as it is known."""
    sequence = Sequence(prompt, params, ending or Ending(), sample)
    runner = make_runner(model, KVOptions(), 1, len(prompt) + params.max_new_tokens)
    for _ in decode(runner, [sequence], params):
        yield sequence.tokens[-1]
