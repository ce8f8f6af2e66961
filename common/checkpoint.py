"""Find a model by its name, and read its configuration and its tensors.

A name is, in this order: an embedded model (the folder `common/models/NAME`), a local folder, or a model on the Hugging
Face hub, which is downloaded once and then read from the cache.

    python -c "from common.checkpoint import open_checkpoint; print(open_checkpoint('stdlib-10m').config)"
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.files import read_json
from common.weights import read_tensors, weight_files

if TYPE_CHECKING:  # torch takes seconds to import, and `--help` lists the embedded models without it
    import torch

Check = Callable[[dict[str, Any]], object]
MODELS = Path(__file__).parent / "models"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)  # `owner/name`, or a bare name from the hub's early days


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk in the Hugging Face layout. No weights are in memory."""

    name: str  # as given by the user
    folder: Path  # also holds the tokenizer's files
    config: dict[str, Any]
    generation_config: dict[str, Any]  # empty if the folder has none

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each weight's name and tensor, on the CPU, in the dtype of the file, one at a time.

        The tensors are views of memory-mapped files, so a caller who copies each one before the next needs little more
        memory than the copies. Raises UserError, naming the file, if one is damaged.
        """
        for path in weight_files(self.folder):
            yield from read_tensors(path)

    def content_hash(self) -> str:
        """Return 12 hex digits that identify these weights and this config.json in results.

        The hash is a SHA-256 over the files' names and contents, so it does not depend on the folder.
        """
        digest = hashlib.sha256()
        for path in [self.folder / "config.json", *weight_files(self.folder)]:
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:12]


def embedded_models() -> list[str]:
    """List the models that come with the repository."""
    return sorted(path.parent.name for path in MODELS.glob("*/config.json"))


def open_checkpoint(name: str, check: Check | None = None) -> Checkpoint:
    """Find a model by its name (an embedded one, a folder, a hub id), and download it if necessary.

    `check` receives the contents of config.json and raises UserError for an unusable model, before any weight is
    downloaded.
    Raises UserError for an unknown name, and for a folder without a readable config.json or without weights.
    """
    check = _naming(name, check)
    folder = _folder(name, check)
    config = read_json(folder / "config.json")
    if check is not None:
        check(config)
    generation = folder / "generation_config.json"
    weight_files(folder)  # reports missing weights now, not at the first tensor
    return Checkpoint(name, folder, config, read_json(generation) if generation.is_file() else {})


def _naming(name: str, check: Check | None) -> Check | None:
    """Wrap a check so that its errors name the model."""
    if check is None:
        return None

    def named(config: dict[str, Any]) -> None:
        try:
            check(config)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None

    return named


def _folder(name: str, check: Check | None) -> Path:
    if name in embedded_models():
        return MODELS / name
    path = os.path.expanduser(name)
    if os.path.isdir(path):  # unlike Path.is_dir, False for an invalid path
        if not os.path.isfile(os.path.join(path, "config.json")):
            raise UserError(f"{name}: the folder holds no config.json; expected a checkpoint in Hugging Face layout")
        return Path(path)
    if os.path.isfile(path):
        raise UserError(f"{name}: a file; expected the folder that holds it, with its config.json")
    if not HUB_ID.fullmatch(name):
        raise _unknown(name, "no such folder")
    from common.hub import NotOnHubError, fetch_checkpoint

    try:
        return fetch_checkpoint(name, check)
    except NotOnHubError as error:
        raise _unknown(name, str(error)) from None


def _unknown(name: str, reason: str) -> UserError:
    return UserError(
        f"unknown model {name!r}: {reason}; the embedded models are {', '.join(embedded_models())}; "
        "give a local folder by its path, a hub model as owner/name"
    )
