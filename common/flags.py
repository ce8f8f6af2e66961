"""Values that several options and environment variables share: switches, and the number of threads."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, Field

from common.errors import UserError

ON, OFF = ("1", "true", "yes", "on", "y", "t"), ("0", "false", "no", "off", "n", "f")  # pydantic's words for a bool


def flag(variable: str, default: bool = False) -> bool:
    """Return whether an environment variable is on; `default` if it is absent or empty.

    UserError, naming the variable, for any other word.
    """
    text = os.environ.get(variable, "")
    if text.lower() in ("", *ON, *OFF):
        return default if not text else text.lower() in ON
    raise UserError(
        f"environment variable {variable}: expected 1 or 0 (or true, yes, on; false, no, off), got {text!r}"
    )


def most_threads() -> int:
    """Return the maximum number of threads; more would slow each other down or fail to start."""
    return max(64, 4 * (os.cpu_count() or 1))


def _sane(threads: int) -> int:
    if threads > most_threads():
        raise ValueError(f"at most {most_threads()} threads here: four per processor, and at least 64")
    return threads


Threads = Annotated[int, Field(ge=0), AfterValidator(_sane)]
"""The type of an option `--threads`."""
