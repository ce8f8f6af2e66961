"""Chat templates: what they may do, and that they end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from tests.support.beside import beside

templates: Any = beside(7, "serving.chat_template")
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def render(source: str) -> str:
    text: str = templates.ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(MESSAGES)
    return text


def test_the_usual_constructs() -> None:
    source = (
        "{{ bos_token }}{%- for m in messages -%}{%- if loop.first %}[{{ loop.length }}]{% endif -%}"
        "{%- if m['role'] == 'user' and not loop.last %}<u>{{ m.content | trim }}</u>"
        "{% else %}<a>{{ m.content ~ eos_token }}{% endif -%}{%- endfor -%}"
        "{% if add_generation_prompt %}{{ '<' + 'a' * 1 + '>' }}{% endif %}{{ {'a': 1} | tojson }}"
        "{% for i in range(2) %}{{ i }}{% endfor %}"
    )
    assert render(source) == '<s>[2]<u>hi</u><a>yes</s><a>{"a": 1}01'


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(40000) %}{% endfor %}{% for i in range(40000) %}{% endfor %}",
        "{% for i in range(40000) %}{{ range(40000) | sum }}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{{ 'x' * 10000000000 }}",
        "{{ [0] * 10000000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% set ns = namespace(t='x') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}{{ ns.t }}",
        "{% set ns = namespace(t='x') %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}{{ ns.t }}",
        "{{ messages[7].content }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    ],
)
def test_what_goes_wrong_is_an_error_and_ends(source: str) -> None:
    with pytest.raises(templates.TemplateRefused):
        render(source)


def test_where_a_template_comes_from(tmp_path: Path) -> None:
    assert templates.load_template(tmp_path, None) is None
    config = {"chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "a"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert templates.load_template(tmp_path, None).source == "a"
    (tmp_path / "chat_template.jinja").write_text("b")
    assert templates.load_template(tmp_path, None).source == "b"
    (tmp_path / "other").write_text("c")
    assert templates.load_template(tmp_path, tmp_path / "other").source == "c"
    with pytest.raises(UserError, match="cannot be read"):
        templates.load_template(tmp_path, tmp_path / "nowhere")
    (tmp_path / "other").write_text("{% if %}")
    with pytest.raises(UserError, match="not valid Jinja"):
        templates.load_template(tmp_path, tmp_path / "other")
