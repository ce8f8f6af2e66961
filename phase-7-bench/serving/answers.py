"""The bodies of answers: whole ones and the chunks of a stream, for completions and for chats."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from common.tokenizer import IncrementalDecoder, Tokenizer
from engine import Output, StepStats
from engine.logprobs import TokenLogprob

from .metrics import speculation
from .protocol import ChatRequest, CompletionRequest

Json = dict[str, Any]
LEAST = -9999.0  # in place of minus infinity, which JSON does not have
FINISH = {"length": "length", "eos": "stop", "stop": "stop"}


@dataclass
class Choice:
    """One sample of one prompt: what came of it so far."""

    index: int
    prompt: list[int]
    prompt_text: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    steps: list[StepStats] = field(default_factory=list)
    offset: int = 0  # characters of the tokens before those of `logprobs`
    finish_reason: str | None = None
    begun: bool = False
    decoder: IncrementalDecoder | None = None  # of the tokens' origins

    def add(self, output: Output) -> None:
        self.text += output.text
        self.tokens += output.tokens
        self.logprobs += output.logprobs
        self.steps += output.steps
        if output.finish_reason is not None:
            self.finish_reason = FINISH[output.finish_reason]


class Form:
    """Makes the bodies of one request's answer."""

    def __init__(self, request: CompletionRequest | ChatRequest, model: str, tokenizer: Tokenizer) -> None:
        self.request, self.model, self.tokenizer = request, model, tokenizer
        self.head: Json = {"id": f"{self.PREFIX}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    PREFIX = ""
    OBJECT, CHUNK = "", ""

    def answer(self, choices: list[Choice], drafts: int | None) -> Json:
        """Return the whole answer. drafts: the longest draft of the request; None if nothing drafts."""
        body = {**self.head, "object": self.OBJECT, "choices": [self.choice(choice) for choice in choices]}
        return {**body, "usage": self.used(choices), "metrics": figures(choices, drafts)}

    def chunk(self, choice: Choice, output: Output, choices: list[Choice]) -> Json | None:
        """Return the next event of a stream; None if the output shows nothing yet."""
        request, first = self.request, not choice.begun
        logprobs = choice.logprobs[len(choice.logprobs) - len(output.logprobs) :]
        text = output.text
        if first and isinstance(request, CompletionRequest) and request.echo:
            text, logprobs = choice.prompt_text + text, choice.logprobs
        shown = text or output.finish_reason or logprobs or request.return_token_ids or request.return_token_origins
        if not shown:
            return None
        choice.begun = True
        mine = self.part(choice, text, logprobs, first)
        if request.return_token_ids:
            mine |= {"token_ids": output.tokens, **({"prompt_token_ids": choice.prompt} if first else {})}
        if request.return_token_origins:
            choice.decoder = choice.decoder or IncrementalDecoder(self.tokenizer, choice.prompt)
            mine["token_origins"] = origins(choice.decoder, output)
            mine["num_draft_tokens"] = sum(step.proposed for step in choice.steps)  # so far
        body = {**self.head, "object": self.CHUNK, "choices": [mine]}
        if (options := request.stream_options) is not None and (
            options.include_usage or options.continuous_usage_stats
        ):
            body["usage"] = self.used(choices) if options.continuous_usage_stats else None
        return body

    def last(self, choices: list[Choice], drafts: int | None) -> Json:
        """Return the event with the usage of the whole request."""
        body = {**self.head, "object": self.CHUNK, "choices": [], "usage": self.used(choices)}
        return {**body, "metrics": figures(choices, drafts)}

    def used(self, choices: list[Choice]) -> dict[str, int]:
        """Count token ids; the samples of one prompt share it."""
        prompt = sum(len(choice.prompt) for choice in choices[:: self.request.n or 1])
        completion = sum(len(choice.tokens) for choice in choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def choice(self, choice: Choice) -> Json:
        raise NotImplementedError

    def part(self, choice: Choice, text: str, logprobs: list[TokenLogprob | None], first: bool) -> Json:
        raise NotImplementedError

    def spell(self, token: int) -> str:
        return self.tokenizer.token_text(token)


class CompletionForm(Form):
    PREFIX, OBJECT, CHUNK = "cmpl", "text_completion", "text_completion"
    request: CompletionRequest

    def choice(self, choice: Choice) -> Json:
        text = (choice.prompt_text if self.request.echo else "") + choice.text
        made = self.part(choice, text, choice.logprobs, first=True)
        if self.request.return_token_ids:
            made |= {"token_ids": choice.tokens, "prompt_token_ids": choice.prompt}
        return made

    def part(self, choice: Choice, text: str, logprobs: list[TokenLogprob | None], first: bool) -> Json:
        made = {"index": choice.index, "text": text, "finish_reason": choice.finish_reason}
        return {**made, "logprobs": None if self.request.logprobs is None else self._logprobs(choice, logprobs)}

    def _logprobs(self, choice: Choice, found: list[TokenLogprob | None]) -> Json:
        """A prompt's first token, None in `found`, has no probability."""
        ids = [choice.prompt[0] if each is None else each.token for each in found]
        texts, offsets = [self.spell(token) for token in ids], list[int]()
        for text in texts:
            offsets.append(choice.offset)
            choice.offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [None if each is None else finite(each.logprob) for each in found],
            "top_logprobs": [None if each is None else self._top(each) for each in found],
            "text_offset": offsets,
        }

    def _top(self, each: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens and the token itself. Of two with one spelling the likelier one is told."""
        found = dict[str, float]()
        for token, logprob in [*each.top, (each.token, each.logprob)]:
            found.setdefault(self.spell(token), finite(logprob))
        return found


class ChatForm(Form):
    PREFIX, OBJECT, CHUNK = "chatcmpl", "chat.completion", "chat.completion.chunk"
    request: ChatRequest

    def answer(self, choices: list[Choice], drafts: int | None) -> Json:
        body = super().answer(choices, drafts)
        return {**body, "prompt_token_ids": choices[0].prompt} if self.request.return_token_ids else body

    def choice(self, choice: Choice) -> Json:
        made = {"index": choice.index, "message": {"role": "assistant", "content": choice.text}}
        made |= {"finish_reason": choice.finish_reason, "logprobs": self._logprobs(choice.logprobs)}
        return {**made, "token_ids": choice.tokens} if self.request.return_token_ids else made

    def part(self, choice: Choice, text: str, logprobs: list[TokenLogprob | None], first: bool) -> Json:
        delta = {**({"role": "assistant"} if first else {}), "content": text}
        made = {"index": choice.index, "delta": delta, "finish_reason": choice.finish_reason}
        return {**made, "logprobs": self._logprobs(logprobs)}

    def _logprobs(self, found: list[TokenLogprob | None]) -> Json | None:
        if not self.request.logprobs:
            return None
        content = [
            {
                **self._one(each.token, each.logprob),
                "top_logprobs": [self._one(token, logprob) for token, logprob in each.top],
            }
            for each in found
            if each is not None
        ]
        return {"content": content, "refusal": None}

    def _one(self, token: int, logprob: float) -> Json:
        text = self.spell(token)
        return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode())}


def figures(choices: list[Choice], drafts: int | None) -> Json:
    """vLLM tells them of a request with a single sample."""
    single = drafts is not None and len(choices) == 1
    return {"speculative_decoding": speculation(choices[0].steps, drafts or 0) if single else None}


def origins(decoder: IncrementalDecoder, output: Output) -> list[Json]:
    """Say for each token of an output whether it was drafted, and replaced or followed a draft.

    `corrected`: the target's own in place of a rejected draft token; `bonus`: after a fully accepted draft; `target`:
    in a step without a draft. In a tree a path that ends above the deepest level counts as corrected.
    """
    found, at = list[Json](), 0
    for step in output.steps:
        for i in range(step.emitted):
            last = "target" if not step.proposed else "bonus" if step.accepted == step.depth else "corrected"
            text = decoder.push(output.tokens[at])
            found.append({"text": text, "origin": "accepted" if i < step.accepted else last})
            at += 1
    if output.finish_reason is not None and (rest := decoder.flush()):
        found.append({"text": rest, "origin": found[-1]["origin"] if found else "target"})
    return found


def finite(logprob: float) -> float:
    return max(logprob, LEAST)
