"""The tokens of each training step: a pure function of (seed, step).

No state is carried from step to step, so a resumed run reads exactly the batches that an uninterrupted one would have
read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from common.errors import UserError
from common.models.corpus import SourceFile
from common.models.train_tokenizer import END_OF_TEXT


def encode_documents(tokenizer: Tokenizer, files: list[SourceFile]) -> torch.Tensor:
    """Encode all files as one stream of token ids, int64 [N]; each document begins with `<|endoftext|>`."""
    separator = tokenizer.token_to_id(END_OF_TEXT)
    if separator is None:
        raise UserError(f"the tokenizer has no {END_OF_TEXT} to separate documents")
    stream: list[int] = []
    for encoding in tokenizer.encode_batch([file.text for file in files]):
        stream.append(separator)
        stream.extend(encoding.ids)
    return torch.tensor(stream, dtype=torch.long)


@dataclass(frozen=True)
class Stage:
    """Consecutive steps with one window length (in tokens)."""

    first_step: int
    steps: int
    window: int


def plan_stages(steps: int, short: int, full: int, full_share: float) -> list[Stage]:
    """Plan short windows first, because they are cheaper, and the full context for the last share of the steps."""
    full_steps = steps if short >= full else max(1, round(steps * full_share))
    stages = [Stage(0, steps - full_steps, short)] if full_steps < steps else []
    return [*stages, Stage(steps - full_steps, full_steps, full)]


class Batches:
    """Windows of the stream, in a fresh random order and at a fresh random offset every epoch."""

    def __init__(self, stream: torch.Tensor, stages: list[Stage], tokens_per_step: int, seed: int) -> None:
        longest = max(stage.window for stage in stages)
        if len(stream) < 2 * longest:
            raise UserError(f"the corpus has {len(stream)} tokens; at least {2 * longest} are needed")
        self.stream, self.stages, self.tokens_per_step, self.seed = stream, stages, tokens_per_step, seed
        self._epoch: tuple[tuple[int, int], torch.Tensor] | None = None

    def at(self, step: int) -> torch.Tensor:
        """Return the batch of one step, int64 [rows, window]."""
        index, stage = next((i, s) for i, s in enumerate(self.stages) if s.first_step <= step < s.first_step + s.steps)
        rows = max(1, self.tokens_per_step // stage.window)
        first = (step - stage.first_step) * rows
        starts = [self._start(index, stage.window, first + row) for row in range(rows)]
        return torch.stack([self.stream[start : start + stage.window] for start in starts])

    def _start(self, stage: int, window: int, number: int) -> int:
        per_epoch = len(self.stream) // window - 1  # one window fewer, for the random offset
        key = (stage, number // per_epoch)
        if self._epoch is None or self._epoch[0] != key:
            # a tuple of ints has the same hash in every process; torch accepts negative seeds
            generator = torch.Generator().manual_seed(hash((self.seed, *key)))
            offset = torch.randint(window, (1,), generator=generator)
            self._epoch = (key, torch.randperm(per_epoch, generator=generator) * window + offset)
        return int(self._epoch[1][number % per_epoch])
