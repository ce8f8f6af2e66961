"""Checkpoints and logs of a training run, so that the same command continues an interrupted run.

Used by train.py here, and by the training of draft heads in the phases.
"""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.files import one_line


def read_checkpoint(file: Path, options: dict[str, Any], device: torch.device) -> dict[str, Any] | None:
    """Return what `write_checkpoint` saved, with tensors on `device`; None without a checkpoint.

    UserError if the checkpoint cannot be read, or if its run had other options.
    """
    if not file.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
        before = state["options"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{file}: not a whole checkpoint of this program ({one_line(error)}); delete it to begin anew"
        ) from None
    for name in {**options, **before}:
        if before.get(name) != options.get(name):
            raise UserError(
                f"{file.parent} holds a run with --{name.replace('_', '-')} {before.get(name)}, not "
                f"{options.get(name)}; give it, or another --out"
            )
    return state


def write_checkpoint(file: Path, state: dict[str, Any]) -> None:
    """Save a state, which must hold the run's `options`. A kill leaves the old checkpoint, never a partial one."""
    part = file.with_suffix(".part")
    try:
        torch.save(state, part)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
        part.unlink(missing_ok=True)
        raise UserError(f"{file}: cannot be written ({one_line(error)}); is the disk full?") from None
    os.replace(part, file)


def keep_log(log: Path, step: int) -> None:
    """Drop the lines of a log from `step` on, and an incomplete last one. UserError for another broken line."""
    if not log.exists():
        return
    lines, kept = log.read_text(encoding="utf-8").splitlines(), []
    for number, line in enumerate(lines, start=1):
        try:
            if json.loads(line)["step"] < step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise UserError(f"{log}, line {number}: expected an object with a step; delete the line") from None
    part = log.with_suffix(".part")
    part.write_text("".join(kept), encoding="utf-8")
    os.replace(part, log)
