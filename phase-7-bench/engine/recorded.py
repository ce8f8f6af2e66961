"""A CUDA graph on a CPU: kernels of the emulator, and torch's operations, recorded and replayed.

Device memory is one arena, which the host cannot touch while it is closed: any access outside of a kernel or of a
counted copy is a fault. An error names the operation that could not be captured on a card either. Between two replays
all memory of the graph is filled with NaN or 0xA5, so that only state that was declared can survive.

    SPECDEC_CUDA_EMULATOR=recorder/emulator.h python generate.py --kernels cuda --device cpu --cuda-graph on
"""

from __future__ import annotations

import ctypes
import faulthandler
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from common.errors import UserError

from .kv_cache import KVCache
from .kv_cache.static import InPlaceCache
from .model import Transformer

ALIGNED = 256  # bytes, as of cudaMalloc
READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2"}
UNWRITTEN = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
UPLOADS = {"lift_fresh"}  # what torch.tensor and its like make of numbers


class CaptureError(RuntimeError):
    """A step did what a graph cannot hold."""


@dataclass
class Recording:
    """What a capture noted: the work in order, all that is frozen in it, and the memory that it allocated."""

    begin: int  # of its memory
    # Launches first .. last - 1, or what torch computes.
    work: list[tuple[int, int] | Callable[[], None]] = field(default_factory=list)
    arguments: list[object] = field(default_factory=list)  # must not depend on the state when the step was captured
    memory: list[Tensor] = field(default_factory=list)


class RecordedDevice:
    """The emulator's device. `run` executes a step, `capture` records it; both on tensors of the arena alone."""

    def __init__(self, library: ModuleType, nbytes: int = 1 << 33) -> None:
        """Take the library of the kernels. UserError if its emulator records no launches."""
        self.library = ctypes.CDLL(str(library.__file__))
        if not hasattr(self.library, "recorder_arena"):
            raise UserError(
                "this emulator of CUDA records no graphs: let SPECDEC_CUDA_EMULATOR name the file recorder/emulator.h"
            )
        self.library.recorder_arena.restype = ctypes.c_void_p
        self.library.recorder_arena.argtypes = [ctypes.c_size_t]
        self.library.recorder_hash.restype = ctypes.c_uint64
        self.first = self.library.recorder_arena(nbytes)
        self.memory = torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(self.first), dtype=torch.uint8)
        self.used = self.limit = self.noted = 0
        self.recording: Recording | None = None
        self.closed = False
        self.reads = 0
        faulthandler.enable()  # a fault says where the host was

    def owns(self, tensor: Tensor) -> bool:
        return tensor.numel() == 0 or 0 <= tensor.data_ptr() - self.first < len(self.memory)

    def empty(self, nbytes: int) -> Tensor:
        """Allocate memory that lives as long as the device, uint8 [nbytes]. CaptureError while a step is recorded."""
        if self.recording is not None:
            raise CaptureError("an allocation of device memory while a step was recorded")
        return self.at(torch.empty(nbytes, dtype=torch.uint8, device="meta"))

    def adopt(self, models: Iterable[Transformer], caches: Iterable[KVCache]) -> None:
        """Move weights and caches into the arena; they keep their content."""
        for model in models:
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = self._moved(tensor.data)
            if model._tables is not None:
                cos, sin = model._tables
                model._tables = self._moved(cos), self._moved(sin)
        for cache in caches:
            for store in cast(InPlaceCache, cache).stores:
                store.values = self._moved(store.values)
                store.scales = None if store.scales is None else self._moved(store.scales)

    def copy_in(self, to: Tensor, host: Tensor) -> None:
        self._no_copy("from the host")
        with self.opened():
            to.copy_(host)

    def copy_out(self, tensor: Tensor) -> Callable[[], list[int]]:
        """Begin a copy to the host; the function returned waits for its numbers."""
        self._no_copy("to the host")
        self.reads += 1
        with self.opened():
            numbers: list[int] = tensor.clone().flatten().tolist()
        return lambda: numbers

    def _no_copy(self, way: str) -> None:
        if self.recording is not None:
            raise CaptureError(f"a copy {way} while a step was recorded")

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor if self.owns(tensor) else self.at(tensor).copy_(tensor)

    def at(self, like: Tensor) -> Tensor:
        """Allocate memory for a tensor of these sizes and strides."""
        span = 1 + sum((n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True))
        nbytes = span * like.element_size() if like.numel() else 0
        begin, self.used = self.used, self.used + -(-nbytes // ALIGNED) * ALIGNED
        flat = self.memory[begin : begin + nbytes].view(like.dtype)
        if self.recording is not None:
            if self.used > self.limit:
                raise CaptureError(f"an allocation of {nbytes} bytes, more than the same step took before")
            self.recording.memory.append(flat)
        return flat.as_strided(like.shape, like.stride())

    def run(self, step: Callable[[], Tensor]) -> Tensor:
        """Execute a step, operation by operation."""
        with self.watched(), torch.inference_mode(), Operations(self):
            return step()

    def capture(self, step: Callable[[], Tensor], like: Recorded | None = None) -> Recorded:
        """Record a step, which runs twice before: what it makes only once, such as tables, is no part of the graph.

        like: a graph of the same step, whose memory this one takes; then their arguments can be compared.
        """
        self.run(step)
        begin = self.used
        self.run(step)
        taken, begin = self.used - begin, self.used if like is None else like.begin
        kept = self.used + taken if like is None else self.used
        self.recording, self.used, self.limit = Recording(begin), begin, begin + taken
        self.noted = self.library.recorder_launches()
        self.library.recorder_record(1)
        try:
            out = self.run(step)
            self.note()
        finally:
            self.library.recorder_record(0)
            made, self.recording, self.used = self.recording, None, kept
        return Recorded(self, made, out)

    def note(self) -> None:
        """Record the launches since the last call."""
        assert self.recording is not None
        launched = self.library.recorder_launches()
        if launched > self.noted:
            self.recording.work.append((self.noted, launched))
            self.recording.arguments += map(self.library.recorder_hash, range(self.noted, launched))
        self.noted = launched

    def opened(self) -> AbstractContextManager[None]:
        """Let the host access the arena, for the time of a copy or of one of torch's operations."""
        return self._access(closed=False)

    def watched(self) -> AbstractContextManager[None]:
        """Close the arena: the host may only launch and copy."""
        return self._access(closed=True)

    @contextmanager
    def _access(self, closed: bool) -> Iterator[None]:
        before, self.closed = self.closed, closed
        self.library.recorder_close(int(closed))
        try:
            yield
        finally:
            self.closed = before
            self.library.recorder_close(int(before))


@lru_cache
def recorded_device(library: ModuleType) -> RecordedDevice:
    """Return the device of a library: there is one, as there is one card."""
    return RecordedDevice(library)


class Recorded:
    """A graph: replays its work on the memory and with the arguments of the capture."""

    def __init__(self, device: RecordedDevice, recording: Recording, out: Tensor) -> None:
        self.device, self.recording, self.out = device, recording, out

    @property
    def begin(self) -> int:
        return self.recording.begin

    def replay(self) -> Tensor:
        device = self.device
        with device.watched(), torch.inference_mode():
            with device.opened():
                for memory in self.recording.memory:
                    spoilt = 0xFF if memory.is_floating_point() else 0xA5  # NaN, or far too large
                    memory.view(torch.uint8).fill_(spoilt)
            for work in self.recording.work:
                if isinstance(work, tuple):
                    device.library.recorder_replay(*work)
                else:
                    with device.opened():
                        work()
        return self.out


class Operations(TorchDispatchMode):
    """Torch's operations as launches on the arena: executed at once, or recorded."""

    def __init__(self, device: RecordedDevice) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, str(func)
        if func.overloadpacket.__name__ in READS:
            raise CaptureError(f"the host reads device memory: {name}")
        if func.overloadpacket.__name__ in UPLOADS:
            raise CaptureError(f"a copy from the host within a step: {name}")
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if not all(map(self.device.owns, tensors)):
            raise CaptureError(f"an operation on host memory within a step: {name}")
        if func.is_view:
            return func(*args, **kwargs)
        written = [args[at] if at < len(args) else kwargs[each.name] for at, each in enumerate(func._schema.arguments)
                   if each.alias_info is not None and each.alias_info.is_write]  # fmt: skip
        outs = None if written else tree_map_only(Tensor, self.device.at, self._shapes(func, args, kwargs))

        if func.overloadpacket.__name__ in UNWRITTEN:
            return outs

        def work() -> None:
            found = func(*args, **kwargs)
            if outs is not None:
                for to, made in zip(tree_leaves(outs), tree_leaves(found), strict=True):
                    to.copy_(made)

        if self.device.recording is None:
            with self.device.opened():
                work()
        else:
            self.device.note()
            self.device.recording.work.append(work)
            self.device.recording.arguments.append(f"{name} {tree_map_only(Tensor, self._where, (args, kwargs))}")
        return (written[0] if len(written) == 1 else tuple(written)) if written else outs

    def _where(self, tensor: Tensor) -> str:
        at = tensor.data_ptr() - self.device.first
        return f"{tensor.dtype}{list(tensor.shape)}{list(tensor.stride())}@{at}"

    @staticmethod
    def _shapes(func: Any, args: Any, kwargs: Any) -> Any:
        """Return what the operation would return, without memory."""
        args, kwargs = tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))  # keeps the strides
        if any(argument.name == "device" for argument in func._schema.arguments):
            kwargs = {**kwargs, "device": torch.device("meta")}
        try:
            return func(*args, **kwargs)
        except NotImplementedError as error:
            raise CaptureError(f"the shape of a result depends on device memory: {func}") from error
