"""Weight files to tensors: the files that hold a checkpoint's weights, and their tensors, one at a time.

Safetensors files are preferred to PyTorch's `.bin`. Both are memory-mapped, so a caller who copies each tensor before
the next needs the memory of the weights once, not twice. Pages that were read through a map stay resident as long as
the map exists. So a file is mapped anew along the way, and its largest tensors come first: when most of the copies
exist, little of the file is resident beside them.

No code from a checkpoint ever runs: a `.bin` is read by torch's restricted unpickler (`weights_only=True`).
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from common.errors import UserError
from common.files import one_line, read_checked, shown

if TYPE_CHECKING:  # torch takes seconds to import, and finding files does not need it
    import torch

INDEX = ".index.json"
# In the order of preference. An index names the shards of weights that are split over several files.
WEIGHTS = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")
REMAPS = 10  # about so often a file is mapped anew while it is read


class Index(BaseModel):
    """The schema of an index of shards."""

    model_config = ConfigDict(strict=True, extra="ignore")

    weight_map: dict[str, str] = Field(min_length=1)


INDEX_FILE = TypeAdapter(Index)


def shard_names(index: Path) -> list[str]:
    """List the files that an index names, each once. Raises UserError for an invalid index."""
    names = sorted(set(read_checked(index, INDEX_FILE).weight_map.values()))
    for name in names:
        outside = name in ("", ".", "..") or "/" in name or "\\" in name  # a shard must be inside the folder
        if outside or not name.isprintable() or len(name.encode()) > 255:
            raise UserError(f"{index}: names the shard {shown(name)}, which is not a file beside the index")
    return names


def weight_files(folder: Path) -> list[Path]:
    """List the files with the weights. Raises UserError if there are none, or a shard is missing."""
    for name in WEIGHTS:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(INDEX):
            return [path]
        shards = [folder / shard for shard in shard_names(path)]
        for shard in shards:
            if not shard.is_file():
                raise UserError(f"{shard}: the file is missing, though {name} names it; download or copy it again")
        return shards
    raise UserError(f"{folder}: no weights; expected one of {', '.join(WEIGHTS)}")


def read_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor of each weight in a file, the largest first, on the CPU, in the file's dtype.

    A tensor is a view of the mapped file: copy it, or keep it and do not move the file. Writing to it does not change
    the file. Raises UserError, naming the file, if it is damaged or holds anything but tensors.
    """
    return _safetensors(path) if path.suffix == ".safetensors" else _bin(path)


def _safetensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    sizes = _safetensors_sizes(path)
    before_remap = path.stat().st_size / REMAPS
    file, read = _opened(path), 0
    for name in sorted(sizes, key=lambda name: sizes[name], reverse=True):
        if read > before_remap:  # a new mapping: pages of the old one leave memory with its last tensor
            file, read = _opened(path), 0
        read += sizes[name]
        yield name, _safetensor(file, path, name)


def _safetensors_sizes(path: Path) -> dict[str, int]:
    """Return each tensor's bytes, from the header: its length in 8 bytes, then JSON with every tensor's offsets."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):  # checks the header and the file's length
            pass
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or incomplete, download or copy it again ({one_line(error)})") from None
    header.pop("__metadata__", None)
    return {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()}


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from None


def _safetensor(file: Any, path: Path, name: str) -> torch.Tensor:
    from safetensors import SafetensorError

    try:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: tensor {name} cannot be read ({one_line(error)})") from None


def _bin(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    mapped = _is_zip(path)
    tensors = _load_bin(path, mapped)
    before_remap = path.stat().st_size / REMAPS if mapped else math.inf
    read = 0
    for name in sorted(tensors, key=lambda name: tensors[name].nbytes, reverse=True):
        if read > before_remap:
            tensors, read = _load_bin(path, mapped), 0
        tensor = tensors.pop(name)  # if the file is not mapped, this frees its memory once the caller moves on
        read += tensor.nbytes
        yield name, tensor


def _is_zip(path: Path) -> bool:
    """Return whether torch can map the file: it must have the zip format, which torch writes since 1.6."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _load_bin(path: Path, mapped: bool) -> dict[str, torch.Tensor]:
    import torch

    try:
        state = torch.load(path, weights_only=True, mmap=mapped, map_location="cpu")
    except pickle.UnpicklingError:  # torch's own message explains how to run the code in it; not shown
        raise UserError(
            f"{path}: holds more than plain tensors, or is damaged, and was not loaded; use a safetensors file"
        ) from None
    except Exception as error:  # torch's error type depends on where the file is damaged
        raise UserError(f"{path}: damaged or incomplete, download or copy it again ({one_line(error)})") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: expected a dictionary of tensors by name")
    return dict(state)
