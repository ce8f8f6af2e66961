"""The one error that users see: a single line that says what is wrong and what would be right."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. Command lines print `error: <message>` and exit with status 2; libraries let it rise."""
