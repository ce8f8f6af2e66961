"""Programs of a phase that have a command of their own: `lab serve`, `lab chat`, `lab complete`."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from common.errors import UserError
from common.phases import phases


def become(script: str, arguments: list[str]) -> NoReturn:
    """Replace this process by a script of the newest phase that has it. UserError if there is none."""
    found = [phase.folder / script for phase in phases() if (phase.folder / script).is_file()]
    if not found:
        raise UserError(f"{script} is in no phase folder here; run lab in a checkout of the repository")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(found[-1]), *arguments])
