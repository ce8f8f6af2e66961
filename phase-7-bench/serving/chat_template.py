"""Chat templates: Jinja programs of a checkpoint that turn messages into a prompt.

They come with a download, so they run in Jinja's sandbox, and with a budget: every pass of a loop and every call
counts, and a template that needs more ends with an error. Time is no measure, because a thread cannot be stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from common.errors import UserError
from common.files import read_json

BUDGET = 50_000  # passes and calls of one rendering
LONGEST = 4_000_000  # characters of a product of texts, or of the result


class TemplateRefused(Exception):
    """The template raised an error, or does not end."""


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        self.left = 0
        self.filters["counted"], self.filters["joined"] = self._counted, _joined
        self.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
        self.globals["raise_exception"], self.globals["range"] = _raise, self._range

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Guard().visit(tree)
        tree.set_environment(self)
        return tree

    def _spend(self, passes: int = 1) -> None:
        self.left -= passes
        if self.left < 0:
            raise TemplateRefused(f"the chat template makes more than {BUDGET} passes and calls")

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._spend()
            yield value

    def _range(self, *bounds: int) -> range:
        values = range(*bounds)
        self._spend(len(values))  # a filter can pass over it as well
        return values

    def call(self, context: Context, obj: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self._spend()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Refuse `**`, and sums and products that make large texts and lists."""
        size = sum(len(value) for value in (left, right) if isinstance(value, str | list | tuple))
        if operator == "*" and size:
            size *= max(value for value in (left, right) if isinstance(value, int))
        if operator == "**" or size > LONGEST:
            raise TemplateRefused(f"the chat template computes {operator} of large values")
        return super().call_binop(context, operator, left, right)


class _Guard(NodeTransformer):
    """Makes every loop count its passes, and every `~` the length of its text."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(cast(nodes.Expr, node.iter), "counted")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "joined")


def _filtered(value: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)


def _joined(parts: list[Any]) -> str:
    texts = [str(part) for part in parts]
    if sum(map(len, texts)) > LONGEST:
        raise TemplateRefused(f"the chat template makes a text of more than {LONGEST} characters")
    return "".join(texts)


def _raise(message: str) -> None:
    raise TemplateRefused(message)


class ChatTemplate:
    """A template and the special tokens that it may name."""

    def __init__(self, source: str, special: dict[str, str | None]) -> None:
        """UserError if the source is no template."""
        self.source, self.special, self._environment = source, special, _Environment()
        try:
            self._template = self._environment.from_string(source)
        except TemplateError as error:
            raise UserError(f"the chat template is not valid Jinja: {error}") from None

    def render(self, messages: list[dict[str, Any]]) -> str:
        """Return the prompt after which an assistant's answer begins. TemplateRefused if there is none."""
        self._environment.left = BUDGET
        try:
            text = self._template.render(messages=messages, add_generation_prompt=True, **self.special)
        except TemplateRefused:
            raise
        except (TemplateError, RecursionError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise TemplateRefused(f"the chat template failed: {error}") from None
        if len(text) > LONGEST:
            raise TemplateRefused(f"the chat template gives more than {LONGEST} characters")
        return text


def special_tokens(config: dict[str, Any]) -> dict[str, str | None]:
    """Return the texts of the tokens that tokenizer_config.json names."""
    found = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        found[name] = token if isinstance(token, str) else None
    return found


def tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def load_template(folder: Path, named: Path | None) -> ChatTemplate | None:
    """Return the template of a file, else of the checkpoint; None if there is none. UserError if it cannot be read."""
    config = tokenizer_config(folder)
    path = named or folder / "chat_template.jinja"
    source = config.get("chat_template")
    if named is not None or path.is_file():
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: the chat template cannot be read ({error})") from None
    if isinstance(source, list):  # several by name
        source = next((each.get("template") for each in source if each.get("name") == "default"), None)
    return ChatTemplate(source, special_tokens(config)) if isinstance(source, str) else None
