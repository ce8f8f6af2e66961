"""From a request to the engine and back: checks, limits, and the outputs of all its samples in one stream."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from common.errors import UserError
from engine import LLM, AsyncLLMEngine, LLMEngine, Output, SamplingParams, with_drafter
from engine.async_engine import Refused
from engine.policies import LOSSLESS

from .answers import ChatForm, Choice, CompletionForm, Form
from .chat_template import ChatTemplate, TemplateRefused, load_template
from .metrics import Metrics
from .options import ServeOptions
from .protocol import ApiError, ChatRequest, CompletionRequest, Sampling

LONG = 4096  # characters of a text that is tokenised outside of the event loop
DEFAULT_TOKENS = 16  # OpenAI's, of a completion


@dataclasses.dataclass
class Job:
    """A request that may run: its prompts, what the engine is asked, and its answer's form."""

    form: Form
    prompts: list[list[int]]
    params: SamplingParams
    how: dict[str, Any]  # other arguments of LLMEngine.add_request
    choices: list[Choice]
    silent: bool  # nothing but the prompt is wanted; the engine makes one token all the same
    drafts: int | None  # the longest draft; None if nothing drafts

    @property
    def n(self) -> int:
        return len(self.choices) // len(self.prompts)


class Service:
    """One model behind one engine."""

    def __init__(self, options: ServeOptions) -> None:
        """Load what the options name, and start the engine's thread."""
        self.options, self.llm = options, LLM(options)
        checkpoint = self.llm.loaded.checkpoint
        self.model, self.tokenizer = options.served_name or checkpoint.name, self.llm.loaded.tokenizer
        self.context, self.vocab_size = self.llm.loaded.config.context, self.llm.loaded.config.vocab_size
        self.longest_token = max(len(piece) for piece in self.tokenizer.pieces.values())
        self.template: ChatTemplate | None = load_template(checkpoint.folder, options.chat_template)
        others = [with_drafter(self.llm, name) for name in options.other_drafters]
        engine = LLMEngine(self.llm, others=others)
        self.drafters = list(engine.drafters)  # that a request can name
        self.metrics = Metrics(engine, self.model)
        self.engine = AsyncLLMEngine(engine, self.metrics.observe)
        self.samples, self.closing = 0, False  # samples that wait or run
        self.began = int(time.time())

    def close(self) -> None:
        """End all requests: their clients get an error."""
        self.closing = True
        self.engine.close()

    async def job(self, request: CompletionRequest | ChatRequest) -> Job:
        """Check a request against the model and the limits. ApiError if it cannot be served."""
        self.check_model(request.model)
        if isinstance(request, ChatRequest):
            text = self.prompt_of(request)
            prompts, texts = [await self.encode(text, "messages", special=False)], [text]
            form: Form = ChatForm(request, self.model, self.tokenizer)
        else:
            prompts, texts = await self._prompts(request)
            form = CompletionForm(request, self.model, self.tokenizer)
        longest = max(map(len, prompts))
        wanted = self._new_tokens(request, longest)
        n = request.n or 1
        capacity = self.llm.options.batch_size + self.options.max_queue
        if len(prompts) * n > capacity:
            raise ApiError(
                400, f"{len(prompts)} prompts and n = {n} are more than the {capacity} samples served at once"
            )
        drafts = self._drafts(request)
        return Job(
            form,
            prompts,
            self._params(request, max(1, wanted)),
            {
                "n": n,
                "seeded": request.seed is not None,
                "drafter": None if request.drafter == "none" else request.drafter,
                "policy": request.policy,
                "controller": request.controller,
                "k": 0 if request.drafter == "none" else request.k,
                **self._logprobs(request),
            },
            [
                Choice(at * n + sample, prompt, text,
                       logprobs=[None] if isinstance(request, CompletionRequest) and request.echo else [])
                for at, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
                for sample in range(n)
            ],
            wanted == 0,
            drafts,
        )  # fmt: skip

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model:
            raise ApiError(404, f"the model {name!r} is not served here; this is {self.model!r}", "model",
                           "model_not_found")  # fmt: skip

    def prompt_of(self, request: ChatRequest) -> str:
        """Return the prompt that the chat template makes of the messages."""
        if self.template is None:
            raise ApiError(
                400,
                f"{self.model} has no chat template: use /v1/completions, or start the server with --chat-template",
                "messages",
            )
        messages = [{"role": message.role, "content": message.text} for message in request.messages]
        try:
            return self.template.render(messages)
        except TemplateRefused as error:
            raise ApiError(400, str(error), "messages") from None

    async def encode(self, text: str, param: str, special: bool = True) -> list[int]:
        """Tokenise a prompt. ApiError if it is empty, or cannot fit in the context."""
        if len(text) > self.context * self.longest_token:
            raise self._too_long(f"more than {self.context}", param)
        tokens = await self.tokens(text, special, param)
        if not tokens:
            raise ApiError(400, f"{param}: the prompt is empty: give at least one token to continue", param)
        return tokens

    async def tokens(self, text: str, special: bool = True, param: str = "prompt") -> list[int]:
        """Tokenise a text, a long one in another thread."""
        try:
            if len(text) < LONG:
                return self.tokenizer.encode(text, special)
            return await asyncio.to_thread(self.tokenizer.encode, text, special)
        except UserError as error:
            raise ApiError(400, str(error), param) from None

    def check_tokens(self, tokens: list[int], param: str) -> None:
        if (most := max(tokens, default=0)) >= self.vocab_size:
            raise ApiError(400, f"{param}: token {most} is not in the vocabulary of {self.vocab_size}", param)

    async def _prompts(self, request: CompletionRequest) -> tuple[list[list[int]], list[str]]:
        """Return token ids and text of every prompt."""
        prompt: Any = request.prompt
        several = isinstance(prompt, list) and not isinstance(prompt[0], int)
        found = list[list[int]](), list[str]()
        for each in prompt if several else [prompt]:
            if isinstance(each, str):
                tokens, text = await self.encode(each, "prompt"), each
            else:
                self.check_tokens(each, "prompt")
                tokens, text = each, self.tokenizer.decode(each) if request.echo else ""
            found[0].append(tokens)
            found[1].append(text)
        return found

    def _too_long(self, what: str, param: str) -> ApiError:
        message = f"the prompt has {what} tokens, and the context of {self.model} has {self.context}"
        return ApiError(400, message, param, "context_length_exceeded")

    def _new_tokens(self, request: CompletionRequest | ChatRequest, longest: int) -> int:
        """Return how many new tokens to make at most."""
        chat = isinstance(request, ChatRequest)
        left, limit = self.context - longest, self.options.max_new_tokens or self.context
        asked = request.max_tokens
        if isinstance(request, ChatRequest) and asked is None:
            asked = request.max_completion_tokens
        if left < (0 if asked == 0 else 1):
            raise self._too_long(str(longest), "messages" if chat else "prompt")
        if asked is None:
            return min(left, limit, self.context if chat else DEFAULT_TOKENS)
        if asked > left:
            raise ApiError(
                400,
                f"{longest} tokens of the prompt and max_tokens = {asked} are more than the context of {self.context}; "
                f"max_tokens can be at most {left}",
                "max_tokens",
                "context_length_exceeded",
            )
        if asked > limit:
            raise ApiError(400, f"max_tokens: at most {limit} on this server, got {asked}", "max_tokens")
        return asked

    def _params(self, request: Sampling, tokens: int) -> SamplingParams:
        def given(value: Any, default: Any) -> Any:
            return default if value is None else value

        return SamplingParams(
            temperature=given(request.temperature, 1.0),
            top_k=max(0, given(request.top_k, 0)),
            top_p=given(request.top_p, 1.0),
            min_p=given(request.min_p, 0.0),
            presence_penalty=given(request.presence_penalty, 0.0),
            frequency_penalty=given(request.frequency_penalty, 0.0),
            repetition_penalty=given(request.repetition_penalty, 1.0),
            seed=given(request.seed, 0),
            stop=request.stops,
            max_new_tokens=tokens,
            ignore_eos=bool(request.ignore_eos),
        )

    def _drafts(self, request: Sampling) -> int | None:
        """Return the longest draft of the request; None if nothing drafts. ApiError if this server cannot draft so."""
        options = self.llm.options
        loaded = ", ".join(["none", *self.drafters])
        if request.drafter not in (None, "none", *self.drafters):
            raise ApiError(400, f"drafter: {request.drafter} is not loaded on this server; loaded: {loaded}", "drafter")
        drafts = self.llm.speculative if request.drafter is None else request.drafter != "none"
        if not drafts and request.drafter is None and (request.k or request.controller):
            param = "k" if request.k else "controller"
            raise ApiError(400, f"{param}: nothing drafts here unless the request names a drafter: {loaded}", param)
        policy = request.policy or options.policy
        if request.lossless and policy not in ("auto", *LOSSLESS):
            raise ApiError(
                400, f"lossless: the policy {policy} is lossy; lossless are {', '.join(LOSSLESS)}", "lossless"
            )
        if not drafts or request.k == 0:
            return None
        fixed = (request.controller or options.controller) == "fixed"
        return request.k or options.k if fixed else options.max_k

    def _logprobs(self, request: CompletionRequest | ChatRequest) -> dict[str, int | None]:
        if isinstance(request, ChatRequest):
            return {"logprobs": request.top_logprobs or 0 if request.logprobs else None}
        return {"logprobs": request.logprobs, "prompt_logprobs": request.logprobs if request.echo else None}

    async def outputs(self, job: Job) -> AsyncGenerator[tuple[Choice, Output]]:
        """Yield what each sample gains. Leaving early aborts all of them. ApiError if the engine ends the request."""
        if self.closing:
            raise ApiError(503, "the server is shutting down")
        waiting = len(job.choices)
        if self.samples + waiting > self.llm.options.batch_size + self.options.max_queue:
            raise ApiError(429, f"{self.samples} samples wait or run; try again later", retry_s=1)
        self.samples += waiting
        try:
            async with asyncio.timeout(self.options.timeout), aclosing(self._merged(job)) as merged:
                async for at, output in merged:
                    choice = job.choices[at * job.n + output.sample]
                    if output.prompt_logprobs:
                        choice.logprobs += output.prompt_logprobs
                    if job.silent:
                        output = dataclasses.replace(output, tokens=[], text="", logprobs=[], steps=[])
                    choice.add(output)
                    yield choice, output
        except Refused as error:
            raise ApiError(400, str(error)) from None
        except UserError as error:
            raise ApiError(503 if self.closing else 500, str(error)) from None
        except TimeoutError:
            raise ApiError(504, f"the request took more than {self.options.timeout:g} s") from None
        finally:
            self.samples -= waiting

    async def _merged(self, job: Job) -> AsyncGenerator[tuple[int, Output]]:
        """Yield the outputs of all prompts, each with the number of its prompt, as they come."""
        if len(job.prompts) == 1:
            async with aclosing(self.engine.generate(job.prompts[0], job.params, **job.how)) as only:
                async for output in only:
                    yield 0, output
            return
        arrived, ends = asyncio.Queue[tuple[int, Output | BaseException | None]](), len(job.prompts)

        async def read(at: int, prompt: list[int]) -> None:
            try:
                async with aclosing(self.engine.generate(prompt, job.params, **job.how)) as outputs:
                    async for output in outputs:
                        arrived.put_nowait((at, output))
                arrived.put_nowait((at, None))
            except Exception as error:
                arrived.put_nowait((at, error))

        readers = [asyncio.create_task(read(at, prompt)) for at, prompt in enumerate(job.prompts)]
        try:
            while ends:
                at, item = await arrived.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    ends -= 1
                else:
                    yield at, item
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
