"""Completes prompts, and measures the time and forwards that each completion takes.

from engine import SamplingParams, generate, load
loaded = load("stdlib-10m", torch.float32, torch.device("cpu"))
print(generate(loaded.model, [loaded.tokenizer.encode("from pathlib import")], SamplingParams())[0].tokens)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .model import Transformer
from .sampling import SamplingParams
from .sequence import Ending, FinishReason, Sequence
from .speculative import decode
from .verify import RandomSource


@dataclass(frozen=True)
class Stats:
    """Counts and times of one completion: wall time in milliseconds, from the start of decoding."""

    prompt_tokens: int
    new_tokens: int
    ttft_ms: float  # to the first new token
    total_ms: float  # to the last
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


def stats_of(sequence: Sequence) -> Stats:
    progress = sequence.progress
    return Stats(
        prompt_tokens=len(sequence.prompt),
        new_tokens=len(sequence.tokens),
        ttft_ms=progress.first * 1e3,
        total_ms=progress.last * 1e3,
        tokens_per_s=len(sequence.tokens) / progress.last,
        steps=progress.steps,
        target_forwards=progress.forwards,
    )


def finish(sequence: Sequence) -> Generation:
    assert sequence.finish_reason is not None, "the sequence is still being decoded"
    return Generation(sequence.tokens, sequence.finish_reason, stats_of(sequence), sequence.text)


def generate(
    model: Transformer,
    prompts: list[list[int]],
    params: SamplingParams,
    ending: Ending | None = None,
    samples: list[int] | None = None,
    source: RandomSource | None = None,
) -> list[Generation]:
    """Complete every prompt (token ids), all in one batch; prompts may differ in length.

    `ending` names the EOS ids, and the tokenizer that stop strings need. `samples[i]` is the number of prompt i's
    sample (several samples of one prompt: the prompt several times, numbered); all 0 by default. UserError for an
    empty prompt.
    """
    samples = samples or [0] * len(prompts)
    ending = ending or Ending()
    sequences = [Sequence(p, params, ending, s) for p, s in zip(prompts, samples, strict=True)]
    for step in decode(model, None, sequences, source=source):
        for sequence in step.sequences:
            sequence.progress.mark()
    return [finish(sequence) for sequence in sequences]


def stream(
    model: Transformer, prompt: list[int], params: SamplingParams, ending: Ending | None = None, sample: int = 0
) -> Iterator[int]:
    """Yield the tokens of one completion, each as soon as it is chosen."""
    sequence = Sequence(prompt, params, ending or Ending(), sample)
    for _ in decode(model, None, [sequence]):
        yield sequence.tokens[-1]
