"""Transfers between host and device: what a step needs goes up in one copy, and what it decides comes back in one.

A copy costs a few microseconds whatever its size, and a read makes the host wait for all work before it. So the parts
of a step put their integers into one `Upload`, which sends them together when the first is used on the device.

    upload = Upload(torch.device("cpu")); lengths = upload.put([3, 5], 2); print(lengths.tensor)
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable

import torch
from torch import Tensor

ALIGNED = 16  # bytes: arrays begin at multiples, whatever comes before them, so that a kernel is compiled once


class Staged:
    """An array that is on the device, or goes there with the other arrays of an Upload when it is first used."""

    def __init__(self, tensor: Tensor | None = None, upload: Upload | None = None) -> None:
        self._tensor, self._upload = tensor, upload

    @property
    def tensor(self) -> Tensor:
        if self._tensor is None:
            assert self._upload is not None
            self._upload.send()
        assert self._tensor is not None, "the upload began anew before this array was used"
        return self._tensor

    def arrived(self, tensor: Tensor) -> None:
        self._tensor, self._upload = tensor, None


class Upload:
    """Gathers integers and floats on the host, and sends them in one copy."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin()

    def begin(self) -> None:
        """Forget what was put and never used."""
        self._words = array("i")
        self._waiting: list[tuple[Staged, int, tuple[int, ...], torch.dtype]] = []

    def put(self, numbers: Iterable[int], *shape: int) -> Staged:
        """Stage an int32 array. OverflowError for numbers that need more bits."""
        return self._put(array("i", numbers), shape, torch.int32)

    def put_rows(self, rows: list[list[int]], width: int, *shape: int) -> Staged:
        """Stage an int32 array [..., width] of rows that are padded with zeros; by default of two dimensions."""
        words = array("i")
        for row in rows:
            words.extend(row)
            words.frombytes(bytes(4 * (width - len(row))))
        return self._put(words, (*(shape or (len(rows),)), width), torch.int32)

    def put_longs(self, numbers: Iterable[int], *shape: int) -> Staged:
        """Stage an int64 array."""
        return self._put(array("q", numbers), shape, torch.int64)

    def put_floats(self, numbers: Iterable[float], *shape: int) -> Staged:
        """Stage a float64 array."""
        return self._put(array("d", numbers), shape, torch.float64)

    def _put(self, numbers: array[int] | array[float], shape: tuple[int, ...], dtype: torch.dtype) -> Staged:
        staged = Staged(upload=self)
        self._waiting.append((staged, len(self._words), shape, dtype))
        self._words.frombytes(numbers.tobytes())
        self._words.frombytes(bytes(-4 * len(self._words) % ALIGNED))
        return staged

    def send(self) -> None:
        """Copy all that waits to the device."""
        gathered, waiting = self._words, self._waiting
        self.begin()
        sent = self.copied(torch.frombuffer(gathered, dtype=torch.int32) if gathered else torch.empty(0).int())
        for staged, begin, shape, dtype in waiting:
            words = math.prod(shape) * dtype.itemsize // 4
            staged.arrived(sent[begin : begin + words].view(dtype).view(shape))

    def copied(self, host: Tensor) -> Tensor:
        """Return a copy on the device: the one host-to-device copy.

        Of pinned memory, which torch keeps and reuses, the host does not wait for the copy.
        """
        if self.device.type == "cuda":
            return host.pin_memory().to(self.device, non_blocking=True)
        return host.clone().to(self.device)


def read(*tensors: Tensor) -> list[list[int]]:
    """Return the numbers of integer tensors on one device, each flattened, by one device-to-host copy."""
    flat: list[int] = torch.cat([tensor.reshape(-1).long() for tensor in tensors]).tolist()
    found, at = list[list[int]](), 0
    for tensor in tensors:
        found.append(flat[at : at + tensor.numel()])
        at += tensor.numel()
    return found
