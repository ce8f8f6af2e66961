"""`lab chat`: chat with a model behind a server. Options: `lab chat --help`."""

from __future__ import annotations

from common.lab.programs import become


def run(arguments: list[str]) -> int:
    become("ask.py", ["--chat", *arguments])
