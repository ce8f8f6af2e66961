"""The OpenAPI document, made from the models of protocol.py; tests send what it allows, and what it does not."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import JsonSchemaMode, models_json_schema

from . import protocol
from .protocol import Model

Json = dict[str, Any]
TEXT = {"schema": {"type": "string"}}

POSTS: dict[str, tuple[type[Model], type[Model], str]] = {
    "/v1/completions": (protocol.CompletionRequest, protocol.CompletionResponse, "continue texts"),
    "/v1/chat/completions": (protocol.ChatRequest, protocol.ChatResponse, "answer messages"),
    "/tokenize": (protocol.TokenizeRequest, protocol.TokenizeResponse, "turn a text into token ids"),
    "/detokenize": (protocol.DetokenizeRequest, protocol.DetokenizeResponse, "turn token ids into a text"),
}
GETS: dict[str, tuple[Any, str]] = {
    "/v1/models": (protocol.ModelList, "list the model"),
    "/tokenizer_info": (protocol.TokenizerInfo, "tell the tokenizer's settings"),
    "/health": (None, "answer 200 while requests are taken"),
    "/metrics": ("text/plain", "counters for Prometheus"),
}


def document() -> Json:
    """Return the document, OpenAPI 3.1."""
    inputs: list[tuple[Any, JsonSchemaMode]] = [(given, "validation") for given, _, _ in POSTS.values()]
    outputs: list[tuple[Any, JsonSchemaMode]] = [(gives, "serialization") for _, gives, _ in POSTS.values()]
    outputs += [(gives, "serialization") for gives, _ in GETS.values() if gives is not None and gives != "text/plain"]
    outputs.append((protocol.ErrorResponse, "serialization"))
    refs, schemas = models_json_schema([*inputs, *outputs], ref_template="#/components/schemas/{model}")
    kinds = {kind: ref for (kind, _), ref in refs.items()}

    def answers(good: Json, also: Json | None = None) -> Json:
        error = {
            "description": "OpenAI's error object",
            "content": {"application/json": {"schema": kinds[protocol.ErrorResponse]}},
        }
        return {"200": {"description": "as asked", "content": {**good, **(also or {})}}, "default": error}

    paths = dict[str, Json]()
    for path, (given, gives, words) in POSTS.items():
        stream = {"text/event-stream": TEXT} if path.startswith("/v1/") else {}
        body = {"required": True, "content": {"application/json": {"schema": kinds[given]}}}
        made = {
            "summary": words,
            "requestBody": body,
            "responses": answers({"application/json": {"schema": kinds[gives]}}, stream),
        }
        paths[path] = {"post": made}
    for path, (kind, words) in GETS.items():
        good = (
            {}
            if kind is None
            else {kind: TEXT}
            if kind == "text/plain"
            else {"application/json": {"schema": kinds[kind]}}
        )
        paths[path] = {"get": {"summary": words, "responses": answers(good)}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "LLM inference lab", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": schemas.get("$defs", {}),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
