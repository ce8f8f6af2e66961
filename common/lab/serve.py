"""`lab serve`: serve a model over HTTP, as OpenAI's API does. Options: `lab serve --help`."""

from __future__ import annotations

from common.lab.programs import become


def run(arguments: list[str]) -> int:
    become("serve.py", [*arguments])
