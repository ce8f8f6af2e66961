"""Small files of a checkpoint, and the errors of reading them.

A checkpoint may contain mistakes or be malicious. Each file is checked against its schema before any of it is used, and
every fault is one UserError.
"""

from __future__ import annotations

import json
import re
import reprlib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from common.errors import UserError

Read = TypeVar("Read")
MOST_BYTES = 64 * 2**20  # of a JSON file: the index of the largest models takes a few MiB

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def one_line(error: BaseException) -> str:
    """Return an error's message as one line of at most 200 characters, for the end of a UserError."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}"[:200] if message else type(error).__name__


def shown(value: object) -> str:
    """Format a value for an error message: its repr, shortened if it is long or nested."""
    return _SHORT.repr(value)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises UserError, naming the file, if there is none."""
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise UserError(f"{path}: has {size} bytes; expected a JSON file of at most {MOST_BYTES}")
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        if "\\ud" in text.lower():  # half of a surrogate pair cannot be encoded: a UnicodeEncodeError
            json.dumps(value, ensure_ascii=False).encode()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # of the JSON or of the UTF-8
        raise UserError(f"{path}: not valid JSON ({one_line(error)})") from None
    except RecursionError:
        raise UserError(f"{path}: lists or objects are nested too deep for a file of this kind") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value


def read_checked(path: Path, kind: TypeAdapter[Read]) -> Read:
    """Read a JSON file of this type. Raises UserError, naming the file and the key, for wrong contents."""
    try:
        return kind.validate_python(read_json(path))
    except ValidationError as error:
        raise UserError(wrong_value(error, str(path))) from None


def wrong_value(error: ValidationError, file: str) -> str:
    """Describe the first wrong value that pydantic found, for a UserError: `FILE: KEY should be ..., got ...`."""
    first = error.errors(include_url=False, include_context=False)[0]
    key = ".".join(str(part) for part in first["loc"])[:200]
    if first["type"] == "missing":
        return f"{file}: lacks the key {key!r}"
    if first["type"] == "extra_forbidden":
        return f"{file}: has the unknown key {key!r}"
    rule = re.sub(r"^[A-Z]\w* should", "should", first["msg"].removeprefix("Value error, "))
    rule = re.sub(r"valid dictionary or instance of \w+", "JSON object", rule)
    return f"{file}: {key} {rule}, got {shown(first['input'])}"
