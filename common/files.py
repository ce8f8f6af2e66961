"""Small files of a checkpoint, and the errors that reading them can give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.errors import UserError


def one_line(error: BaseException) -> str:
    """An error's message as one line of at most 200 characters, for the end of a UserError."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}"[:200] if message else type(error).__name__


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError, naming the file, where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # of the JSON or of the UTF-8
        raise UserError(f"{path}: not valid JSON ({one_line(error)})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value
