"""What travels over HTTP: the requests and answers of OpenAI's API, with vLLM's and this lab's extensions.

Requests are checked against these models, strictly: a number is no string. Unknown fields are ignored, as OpenAI does;
a known one that would change the text and cannot be served is refused. The OpenAPI document is made from the models.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.controllers import ControllerName
from engine.options import DrafterName
from engine.policies import PolicyName

MOST_STOPS, LONGEST_STOP = 32, 1024  # each is searched for in every new text
MOST_SAMPLES, MOST_LOGPROBS = 128, 20

Finite = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[Finite, Field(ge=-2, le=2)]
StopText = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[TokenId], Field(min_length=1)]


class Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=(), frozen=True)


class StreamOptions(Model):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's: usage with every chunk


class Sampling(Model):
    """The fields that completions and chats share. null is as good as absent."""

    model: str | None = Field(None, description="the served model; see /v1/models")
    max_tokens: int | None = Field(None, ge=0, description="new tokens at most")
    temperature: Finite | None = Field(None, ge=0, description="0 is greedy; 1 by default")
    top_p: Finite | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="0 or -1 keeps all tokens")
    min_p: Finite | None = Field(None, ge=0, le=1)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Finite | None = Field(None, ge=1e-6, le=1e6)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="the same seed gives the same tokens")
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None = None
    n: int | None = Field(None, ge=1, le=MOST_SAMPLES)
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, Finite] | None = Field(None, max_length=0, description="not supported")
    # Speculation of this request. Without these fields it is that of the server.
    drafter: Literal["none"] | DrafterName | None = Field(
        None, description="none, or one that is loaded: see /v1/models"
    )
    k: int | None = Field(None, ge=0, le=64, description="draft tokens per target forward; 0: none")
    policy: PolicyName | None = Field(None, description="accepts draft tokens")
    controller: ControllerName | None = Field(None, description="how many tokens to draft")
    lossless: bool | None = Field(None, description="refuse policies that change the output's distribution")
    return_token_ids: bool | None = Field(None, description="vLLM's: token ids of prompt and output")
    return_token_origins: bool | None = Field(None, description="with a stream: what became of each draft token")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(Sampling):
    prompt: str | list[str] | Ids | list[Ids] = Field(description="texts, or token ids")
    echo: bool | None = Field(None, description="the prompt before the completion; max_tokens may be 0 then")
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS, description="and of so many likeliest tokens")
    best_of: int | None = Field(None, ge=1, le=MOST_SAMPLES, description="n, or absent")
    suffix: Annotated[str, Field(max_length=0)] | None = Field(None, description="not supported")

    @model_validator(mode="after")
    def _serves(self) -> Self:
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of: not supported; leave it out, or give n")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: at least 1, or 0 with echo: true")
        if not self.prompt:
            raise ValueError("prompt: at least one text or token")
        return self


class ContentPart(Model):
    type: Literal["text"]
    text: str


class Message(Model):
    role: str = Field(min_length=1)
    content: str | list[ContentPart] | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        parts = self.content or ""
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)


class ResponseFormat(Model):
    type: Literal["text"]


class ChatRequest(Sampling):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    tools: list[Any] | None = Field(None, max_length=0, description="not supported")
    response_format: ResponseFormat | None = Field(None, description="only text")

    @model_validator(mode="after")
    def _serves(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs: true")
        if self.max_tokens == 0:
            raise ValueError("max_tokens: at least 1")
        return self


class TokenizeRequest(Model):
    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Model):
    model: str | None = None
    tokens: list[TokenId]


class Usage(Model):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class SpeculativeDecoding(Model):
    """vLLM's figures of one request: steps with a draft, and what became of it."""

    mean_acceptance_length: float  # 1 + accepted draft tokens / steps
    draft_acceptance_rate: float
    acceptance_histogram: list[int]  # steps by the number of accepted draft tokens
    num_spec_steps: int
    num_draft_tokens: int
    num_accepted_draft_tokens: int
    num_spec_tokens: int  # the longest draft


class Metrics(Model):
    speculative_decoding: SpeculativeDecoding | None


class Logprobs(Model):
    """Of a completion: one entry a token, and null for the first of a prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TopLogprob(Model):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Model):
    content: list[ChatLogprob]
    refusal: None = None


class CompletionChoice(Model):
    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: Logprobs | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionResponse(Model):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    metrics: Metrics | None = None


class ChatMessage(Model):
    role: Literal["assistant"]
    content: str


class ChatChoice(Model):
    index: int
    message: ChatMessage
    finish_reason: Literal["stop", "length"]
    logprobs: ChatLogprobs | None
    token_ids: list[int] | None = None


class ChatResponse(Model):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    metrics: Metrics | None = None
    prompt_token_ids: list[int] | None = None


class ModelCard(Model):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    drafters: list[str]  # that a request can name


class ModelList(Model):
    object: Literal["list"]
    data: list[ModelCard]


class TokenizeResponse(Model):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(Model):
    prompt: str


class TokenizerInfo(BaseModel):
    """The checkpoint's tokenizer_config.json, and these."""

    model_config = ConfigDict(extra="allow")
    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None


class Fault(Model):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Model):
    error: Fault


class ApiError(Exception):
    """An error for the client: an HTTP status and OpenAI's error object."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.retry_s = status, retry_s
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
        self.body = {
            "error": {
                "message": message,
                "type": "server_error" if status >= 500 else kind,
                "param": param,
                "code": code,
            }
        }


def parse(kind: type[Model], body: bytes) -> Any:
    """Return the request in a body. ApiError, naming the first field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _explained(error) from None


def _explained(error: ValidationError) -> ApiError:
    errors = error.errors(include_url=False)
    where = errors[0]["loc"]
    if errors[0]["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {errors[0]['msg']}")
    if not where:
        message = errors[0]["msg"].removeprefix("Value error, ")
        param, _, rest = message.partition(": ")
        return ApiError(400, message, param if rest else None)
    param = str(where[0])
    if errors[0].get("ctx", {}).get("max_length") == 0:
        return ApiError(400, f"{param}: not supported; leave it out", param)
    mine = list(dict.fromkeys(each["msg"] for each in errors if each["loc"][:1] == where[:1]))  # a union has several
    said = " or ".join(message[0].lower() + message[1:] for message in mine[:4])
    return ApiError(400, f"{param}: {said}", param)
