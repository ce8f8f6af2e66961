"""What a rank other than 0 does: load its part of the models, and compute what rank 0 tells it.

It keeps no sequences, samples nothing and decides nothing: rank 0 sends rows, block tables and tokens.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import TYPE_CHECKING

import torch
from torch import nn

from common.device import resolve_device, torch_threads
from common.errors import UserError
from common.streams import say

from ..backends import Backends
from ..kernels.cpp.model import Cache, CppModel
from ..kv_cache.static import InPlaceCache
from ..model import Transformer
from ..runner import make_manager
from .group import Group
from .lead import load_part
from .messages import Load, MakeCache, Move, Ping, Step, Trace
from .split_model import SplitModel, set_rows
from .start import Place, check, follow, join
from .traffic import ping, trace

if TYPE_CHECKING:
    from ..options import Options


def serve(group: Group, options: Options) -> None:
    """Do what rank 0 says, until it says that nothing more comes."""
    device = resolve_device(options.device)
    models, caches, owners = list[Transformer](), dict[int, InPlaceCache](), dict[int, Transformer]()
    backends: Backends | None = None
    fast = dict[nn.Module, CppModel]()  # each model's part in C++
    with torch_threads(1):
        while (message := group.hear()) is not None:
            if isinstance(message, Load):
                loaded = load_part(group, message, device)
                backends = backends or Backends(options, device, message.dtype, group)
                backends.take([loaded.model], [])
                fast = backends.fast
                models.append(loaded.model)
            elif isinstance(message, MakeCache):
                for number in message.freed:
                    del caches[number], owners[number]
                model = owners[message.number] = models[message.model]
                cache = make_manager(model, message.options, message.rows, message.tokens, torch.float32).cache
                assert isinstance(cache, InPlaceCache)
                caches[message.number] = cache
            elif isinstance(message, Move):
                for storage in caches[message.cache].stores:
                    storage.move(message.source, message.target)
            elif isinstance(message, Step):
                cache, split = caches[message.cache], fast[owners[message.cache]]
                assert isinstance(split, SplitModel)
                assert isinstance(cache, Cache)
                set_rows(cache, message.rows)
                split.follow(cache, message)
            elif isinstance(message, Ping):
                ping(group, message)
            elif isinstance(message, Trace):
                trace(group, message.on)
            else:
                raise ValueError(f"an unknown message: {type(message).__name__}")


def run(options: Options, place: Place, lifeline: int | None = None) -> int:
    """Be this rank until the end; return the exit status. Rank 0 prints what was wrong."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # of the terminal; rank 0 decides
    try:
        check(options)
        group = join(options, place) if lifeline is None else follow(options, place, lifeline, None)
    except UserError:
        return 2
    try:
        serve(group, options)
    except UserError:
        return 2
    except Exception as error:
        group.lost(error)
    group.lifeline.close()
    return 0


def main(line: bytes) -> None:
    """Be a rank that rank 0 has started, which has sent this line."""
    from ..options import Options

    what, given = json.loads(line)
    options = Options(**given)
    try:
        status = run(options, Place(**what), what["port"])
    except Exception as error:
        say(f"error: rank {what['rank']}: {type(error).__name__}: {error}")
        status = 1
    sys.stderr.flush()
    os._exit(status)
