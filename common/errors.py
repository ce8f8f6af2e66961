"""The one error that users see: a single line that says what is wrong and what would be right."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. Command lines print `error: <message>` and exit with status 2; libraries let it rise."""

    def __str__(self) -> str:
        """One line, whatever a file holds that it quotes: a newline is written `\\n`, an escape `\\x1b`."""
        message = super().__str__()
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
