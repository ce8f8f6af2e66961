"""lab.json: the models that belong to a checkpoint, and the folders that it may name.

    {"draft": "stdlib-1m", "eagle": "stdlib-10m-eagle", "medusa": "stdlib-10m-medusa"}

Each is an embedded model or a folder inside the checkpoint's own. The file may be part of a download, so it cannot name
any other folder; models elsewhere are named on the command line.

    companion(checkpoint.folder, "draft")  # "stdlib-1m"
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from common.checkpoint import MODELS
from common.errors import UserError
from common.files import read_checked

Kind = Literal["draft", "medusa", "eagle"]
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f]*$")]
MADE_OF = {"draft": "config.json", "medusa": "heads.json", "eagle": "heads.json"}  # the file that identifies each kind


class LabFile(BaseModel):
    """The schema of lab.json."""

    model_config = ConfigDict(strict=True, extra="forbid")

    draft: Name | None = None
    medusa: Name | None = None
    eagle: Name | None = None


LAB_FILE = TypeAdapter(LabFile)


def companion(folder: Path, kind: Kind) -> str | None:
    """Return the embedded model or the folder that a checkpoint's lab.json names; None if it names none.

    Raises UserError, naming the file and the key, for anything else.
    """
    file = folder / "lab.json"
    if not file.is_file():
        return None
    name: str | None = getattr(read_checked(file, LAB_FILE), kind)
    if name is None or name in {path.parent.name for path in MODELS.glob(f"*/{MADE_OF[kind]}")}:
        return name
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not (path / MADE_OF[kind]).is_file():
        option = "--draft" if kind == "draft" else "--heads"
        raise UserError(
            f"{kind} of {file} should be an embedded model or a folder inside {folder} with a {MADE_OF[kind]}, "
            f"got {name!r}; what lies elsewhere is named with {option}"
        )
    return str(path)
