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

    def __init__(self, tensor: Tensor | None = None) -> None:
        self._tensor = tensor

    @property
    def tensor(self) -> Tensor:
        assert self._tensor is not None
        return self._tensor


class Part(Staged):
    """An array of an Upload: `shape` numbers of `dtype` after `begin` words."""

    def __init__(self, upload: Upload, begin: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self._upload, self._begin, self._shape, self._dtype = upload, begin, shape, dtype
        self.sent: Tensor | None = None  # the words of all arrays, on the device

    @property
    def tensor(self) -> Tensor:
        if self._tensor is None:
            if self.sent is None:
                self._upload.send()
            assert self.sent is not None, "the upload began anew before this array was used"
            words = math.prod(self._shape) * self._dtype.itemsize // 4
            self._tensor = self.sent[self._begin : self._begin + words].view(self._dtype).view(self._shape)
        return self._tensor


class Upload:
    """Gathers integers and floats on the host, and sends them in one copy."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin()

    def begin(self) -> None:
        """Forget what was put and never used."""
        self._words = array("i")
        self._waiting: list[Part] = []

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
        self._waiting.append(part := Part(self, len(self._words), shape, dtype))
        self._words.frombytes(numbers.tobytes())
        self._words.frombytes(bytes(-4 * len(self._words) % ALIGNED))
        return part

    def send(self) -> None:
        """Copy all that waits to the device."""
        gathered, waiting = self._words, self._waiting
        self.begin()
        sent = self.copied(torch.frombuffer(gathered, dtype=torch.int32) if gathered else torch.empty(0).int())
        for part in waiting:
            part.sent = sent

    def copied(self, host: Tensor) -> Tensor:
        """Return a copy on the device: the one host-to-device copy.

        Of pinned memory, which torch keeps and reuses, the host does not wait for the copy.
        """
        if self.device.type == "cuda":
            return host.pin_memory().to(self.device, non_blocking=True)
        return host.clone().to(self.device)


def read(*tensors: Tensor) -> list[list[int]]:
    """Return the numbers of integer tensors on one device, each flattened, by one device-to-host copy."""
    parts = [tensor.reshape(-1) for tensor in tensors]
    flat: list[int] = (torch.cat([part.long() for part in parts]) if len(parts) > 1 else parts[0]).tolist()
    found, at = list[list[int]](), 0
    for tensor in tensors:
        found.append(flat[at : at + tensor.numel()])
        at += tensor.numel()
    return found
