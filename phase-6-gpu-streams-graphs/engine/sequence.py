"""One request while it is decoded: its tokens, and the rules by which it ends.

Every decoding loop, plain or speculative, passes its tokens to `Sequence.append` one at a time. So end of text, stop
strings and the token limit cut the output at the same position in every loop.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from common.errors import UserError
from common.tokenizer import IncrementalDecoder, Tokenizer

from .sampling import SamplingParams

if TYPE_CHECKING:
    from .controllers import KController
    from .drafting import Drafter
    from .logprobs import TokenLogprob
    from .policies import AcceptancePolicy
    from .runner import ModelRunner
    from .steps import StepStats

FinishReason = Literal["length", "eos", "stop", "refused", "aborted", "error"]


@dataclass(frozen=True)
class Ending:
    """What ends a text besides its length: token ids (from the model) and stop strings (which need the tokenizer)."""

    eos_ids: tuple[int, ...] = ()
    tokenizer: Tokenizer | None = None


@dataclass
class Progress:
    """When tokens came, in seconds since the request's arrival, and what was computed for them."""

    began: float = field(default_factory=time.perf_counter)  # on that clock
    scheduled: float | None = None  # until then the request waited
    first: float = 0.0
    last: float = 0.0
    steps: int = 0
    forwards: int = 0
    chunks: list[tuple[float, int]] = field(default_factory=list)  # when, and how many tokens came at once
    preemptions: int = 0
    blocks: int = 0  # the most that it held of a paged cache

    def mark(self, forwards: int = 1) -> None:
        """Record a step that gave one or more tokens and took so many target forwards."""
        self.last = time.perf_counter() - self.began
        self.first = self.first or self.last
        self.steps += 1
        self.forwards += forwards


class Sequence:
    """Prompt, output and state of one request. `tokens` is the output, an EOS included."""

    controller: KController  # of how many tokens to draft, from the start of decoding on
    policy: AcceptancePolicy  # which of them are accepted, and with what noise they are drawn
    drafter: Drafter | None = None  # proposes them, in an LLMEngine
    draft: ModelRunner | None = None  # of the draft model, if that drafts for this sequence
    reach = 0  # at most so many draft tokens, or nodes of a tree, follow it in one step
    branches = False  # its drafts are trees
    number = 0  # of its request
    top: int | None = None  # with the log-probability of each token, those of so many likeliest; None: none are wanted
    prompt_top: int | None = None  # the same for the prompt
    unscored = False  # those of the prompt are wanted and not computed yet

    def __init__(self, prompt: list[int], params: SamplingParams, ending: Ending, sample: int = 0) -> None:
        if not prompt:
            raise UserError("the prompt is empty: give at least one token of text to continue")
        if params.stop and ending.tokenizer is None:
            raise UserError("stop strings need the tokenizer")
        self.prompt, self.params, self.sample = prompt, params, sample
        self.key = ((params.seed + 2**63) % 2**64 - 2**63, sample)  # of its random numbers; the seed as an int64
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.refusal = ""  # why it was refused, or failed
        self.error: Exception | None = None  # the error that ended it
        self.progress = Progress()
        self.steps: list[StepStats] = []  # what its steps did
        self.logprobs: list[TokenLogprob] = []  # of the output
        self.prompt_logprobs: list[TokenLogprob] = []  # of the prompt's tokens but the first, which nothing precedes
        self._text, self._decoded = "", 0  # the text of so many output tokens
        self.eos_ids = () if params.ignore_eos else ending.eos_ids
        self._decoder = IncrementalDecoder(ending.tokenizer, prompt) if ending.tokenizer else None
        self._released = 0  # characters that `take_text` has returned

    @property
    def length(self) -> int:
        """Count the tokens of prompt and output."""
        return len(self.prompt) + len(self.tokens)

    @property
    def text(self) -> str:
        """Decode the output so far, cut at a stop string."""
        if self._decoder is not None and self._decoded < len(self.tokens):
            self._text += self._decoder.push(*self.tokens[self._decoded :])
            self._decoded = len(self.tokens)
        return self._text

    def append(self, token: int) -> bool:
        """Append one token; True while more are wanted. After the end, tokens are ignored."""
        if self.finish_reason is not None:
            return False
        self.tokens.append(token)
        if token in self.eos_ids:
            self._finish("eos")
        elif self.params.stop and self._cut_at_stop_string():
            self._finish("stop")
        elif len(self.tokens) >= self.params.max_new_tokens:
            self._finish("length")
        return self.finish_reason is None

    def refuse(self, why: str) -> None:
        """End the sequence; its tokens stay."""
        self.refusal = why
        self._finish("refused")

    def abort(self) -> None:
        """End a sequence that nobody waits for."""
        self._finish("aborted")

    def fail(self, error: Exception) -> None:
        """End the sequence with the error of one of its steps."""
        self.error, self.refusal = error, str(error)
        self.finish_reason = "error"

    def take_text(self) -> str:
        """Return the text that became final since the last call; a possible beginning of a stop string is held back."""
        text = self.text
        end = len(text)
        if self.finish_reason is None:
            end -= max((_overlap(text, stop) for stop in self.params.stop), default=0)
        released = text[self._released : end]
        self._released = max(self._released, end)
        return released

    def _finish(self, reason: FinishReason) -> None:
        if reason != "stop" and self._decoder is not None:
            self._text = self.text + self._decoder.flush()
            if self._cut_at_stop_string():
                reason = "stop"
        self.finish_reason = reason

    def _cut_at_stop_string(self) -> bool:
        text = self.text
        found = [at for at in (text.find(stop) for stop in self.params.stop) if at >= 0]
        if found:
            self._text = text[: min(found)]
        return bool(found)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
