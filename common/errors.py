"""The one kind of error that users see: a single line with the fault and the remedy."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. Command lines print `error: <message>` and exit with status 2; libraries do not catch it."""

    def __str__(self) -> str:
        """Return one line, whatever file contents it quotes: a newline is written `\\n`, an escape `\\x1b`."""
        message = super().__str__()
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
