"""`lab chat`: `lab complete --chat`."""

from __future__ import annotations

from .talk import run as talk


def run(arguments: list[str]) -> int:
    return talk(["--chat", *arguments])
