"""Starts the processes of a split model, or joins those that torchrun has started.

    python generate.py --tensor-parallel 2 --prompt "class Stack:"
    torchrun --nproc-per-node 2 generate.py --tensor-parallel 2 --prompt "class Stack:"

Rank 0 is the process that the user talks to. Before a weight is read, every rank tells rank 0 its options and the hash
of its checkpoint. Nothing of torch's process-wide default group is used, so one process can have several groups.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store, TCPStore

from common.checkpoint import open_checkpoint
from common.errors import UserError

from ..config import ModelConfig
from ..fake import is_fake
from .group import Group, Link
from .lifeline import Lifeline, read_line, send_line
from .shard import Mode, check_fits

if TYPE_CHECKING:
    from ..options import Options

PATIENCE = timedelta(minutes=5)  # until all ranks have imported torch
FOREVER = timedelta(days=365)  # a rank waits for the next request; the lifeline notices if rank 0 ends
OWN = (
    "prompt",
    "prompt_file",
    "as_json",
    "record",
    "config",
    "show",
    "show_tree",
    "explain",
    "metrics_detailed",
    "profile",
)

# A started process first watches its stdin, which ends with rank 0, and imports torch afterwards.
CHILD = """
import os, sys, threading, time
line = sys.stdin.buffer.readline()
def watch():
    os.read(0, 1)
    time.sleep(2)  # a process that knows of rank 0's end has ended by then
    if {rank} == 1:
        print("error: rank 0 (process {pid}) has ended unexpectedly: the other ranks end", file=sys.stderr, flush=True)
    os._exit(1)
threading.Thread(target=watch, daemon=True).start()
from {package}.worker import main
main(line)
"""


class RankLost(UserError):
    """A process has ended before the group was complete."""


@dataclass(frozen=True)
class Place:
    """Who this process is, and where rank 0's store is."""

    rank: int
    ranks: int
    local: int  # ranks on this machine
    address: str
    port: int


def wanted(options: Options) -> tuple[Mode, int]:
    """Return how the options split the model, and over how many processes."""
    if options.pipeline_parallel > 1:
        return "layers", options.pipeline_parallel
    return options.tensor_mode, options.tensor_parallel


def by_torchrun() -> Place | None:
    """Return this process's place if torchrun, or something with its variables, has started it."""
    try:
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        return Place(rank, ranks, local, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    except (KeyError, ValueError):
        return None


def check(options: Options) -> None:
    """Raise UserError for what can be known to fail before a process is started."""
    mode, ranks = wanted(options)
    place = by_torchrun()
    if place is not None and place.ranks != ranks and place.ranks > 1:
        raise UserError(
            f"{place.ranks} processes were started for a model that is to be split over {ranks}: "
            f"give --tensor-parallel {place.ranks} or --pipeline-parallel {place.ranks}"
        )
    if ranks == 1:
        return
    names = [
        options.model,
        *([options.draft] if options.draft_parallel and options.draft not in ("auto", "none") else []),
    ]
    for name in names:
        if is_fake(name):
            raise UserError(
                "the fake model has no matrices to split: leave out --tensor-parallel and --pipeline-parallel"
            )
        check_fits(mode, ranks, ModelConfig.from_hf(open_checkpoint(name, ModelConfig.from_hf).config), name)


def start(options: Options) -> Group | None:
    """Return rank 0's group, with all others ready; None if the model is not split. UserError as in `check`."""
    check(options)
    _mode, ranks = wanted(options)
    if ranks == 1:
        return None
    if (place := by_torchrun()) is not None:
        return join(options, place)
    listening = listen(os.environ.get("MASTER_PORT"))
    place = Place(0, ranks, ranks, "127.0.0.1", listening.getsockname()[1])
    children = [_spawn(options, rank, place) for rank in range(1, ranks)]
    try:
        return _lead(options, place, listening, store_of(place), children)
    except BaseException:
        for child in children:
            child.kill()
            child.wait()
        raise


def join(options: Options, place: Place) -> Group:
    """Return the group of a process that torchrun has started: of rank 0, or of one that `serve` is for."""
    store = store_of(place)
    if place.rank == 0:
        listening = listen(None, "")
        store.set("lifeline", str(listening.getsockname()[1]))
        return _lead(options, place, listening, store, [])
    return follow(options, place, int(store.get("lifeline")), store)


def store_of(place: Place) -> Store:
    """Return the store in which processes find each other. UserError if its port is taken."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    own = by_torchrun() is None
    try:
        port = 0 if own else place.port
        return TCPStore(place.address, port, place.ranks, place.rank == 0 and not agent, PATIENCE, False)
    except RuntimeError as error:
        raise UserError(
            f"port {place.port} of {place.address} cannot be used: {first_line(error)}; choose another"
        ) from None


def _lead(
    options: Options,
    place: Place,
    listening: socket.socket,
    store: Store,
    children: list[subprocess.Popen[bytes]],
) -> Group:
    """Wait for the other ranks, compare what they were given with rank 0's, and connect all."""
    mine, sockets, pids, wrong = hello(options, place), dict[int, socket.socket](), {0: os.getpid()}, dict[int, str]()
    with listening:
        for sock in arrivals(listening, place.ranks - 1, children):
            theirs = read_line(sock)
            if theirs.get("rank") not in range(1, place.ranks):
                sock.close()  # not one of our ranks
                continue
            sock.settimeout(None)
            rank = int(theirs["rank"])
            sockets[rank], pids[rank] = sock, theirs["pid"]
            if (difference := differs(mine, theirs)) is not None:
                wrong[rank] = difference
            if len(sockets) == place.ranks - 1:
                break
    verdict: dict[str, Any] = {"port": store.port if isinstance(store, TCPStore) else 0, "pid": os.getpid()}
    if wrong:
        verdict = {"error": wrong[min(wrong)]}
    for sock in sockets.values():
        send_line(sock, verdict)
    if wrong:
        raise UserError(wrong[min(wrong)])
    return connect(options, place, store, Lifeline(0, place.ranks, sockets, pids, children))


def follow(options: Options, place: Place, lifeline: int, store: Store | None) -> Group:
    """Return the group of a rank other than 0. UserError if rank 0 refuses it."""
    sock = socket.create_connection((place.address, lifeline), PATIENCE.total_seconds())
    sock.settimeout(None)
    send_line(sock, hello(options, place))
    verdict = read_line(sock)
    if "port" not in verdict:
        raise UserError(verdict.get("error", "rank 0 is gone"))
    store = store or TCPStore(place.address, verdict["port"], place.ranks, False, PATIENCE, False)
    return connect(options, place, store, Lifeline(place.rank, place.ranks, {0: sock}, {0: verdict["pid"]}))


def connect(options: Options, place: Place, store: Store, lifeline: Lifeline) -> Group:
    lifeline.watch()
    link = ProcessGroupGloo(PrefixStore("lab", store), place.rank, place.ranks, FOREVER)
    return Group(wanted(options)[0], place.rank, place.ranks, place.local, cast("Link", link), lifeline)


def hello(options: Options, place: Place) -> dict[str, Any]:
    """Return what a rank tells rank 0 of itself."""
    given = {name: value for name, value in options.model_dump(mode="json").items() if name not in OWN}
    names = [
        options.model,
        *([options.draft] if options.draft_parallel and options.draft not in ("auto", "none") else []),
    ]
    hashes = {name: open_checkpoint(name, ModelConfig.from_hf).content_hash() for name in names}
    return {"rank": place.rank, "pid": os.getpid(), "options": given, "checkpoints": hashes, "torch": torch.__version__}


def differs(mine: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """Return how a rank differs from rank 0, or None."""
    rank = theirs["rank"]
    for name, value in mine["options"].items():
        if theirs["options"].get(name) != value:
            option = f"--{name.replace('_', '-')}"
            return (
                f"rank {rank} has {option} {theirs['options'].get(name)}, and rank 0 {value}: give all the same options"
            )
    for name, value in mine["checkpoints"].items():
        if theirs["checkpoints"].get(name) != value:
            return (
                f"rank {rank} has another checkpoint {name} (hash {theirs['checkpoints'].get(name)}, "
                f"on rank 0 {value}): copy the same files to all machines"
            )
    if theirs["torch"] != mine["torch"]:
        return f"rank {rank} has torch {theirs['torch']}, and rank 0 {mine['torch']}: install the same on all machines"
    return None


def arrivals(listening: socket.socket, count: int, children: list[subprocess.Popen[bytes]]) -> Iterator[socket.socket]:
    """Yield connections. UserError if a child ends before, or not all come in time."""
    end = time.monotonic() + PATIENCE.total_seconds()
    listening.settimeout(0.2)
    while True:
        for rank, child in enumerate(children, 1):
            if (status := child.poll()) is not None:
                raise RankLost(
                    f"rank {rank} of {count + 1} (process {child.pid}) ended with status {status} at its start"
                )
        if time.monotonic() > end:
            raise UserError(f"not all of {count + 1} ranks have come within {PATIENCE.total_seconds():.0f} s")
        try:
            sock, _ = listening.accept()
        except TimeoutError:
            continue
        sock.settimeout(10)  # somebody else may have called, who says nothing
        yield sock


def listen(port: str | None, address: str = "127.0.0.1") -> socket.socket:
    """Return a listening socket, on a free port by default. UserError if the port is taken."""
    listening = socket.socket()
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((address, int(port or 0)))
        listening.listen()
    except (OSError, ValueError) as error:
        listening.close()
        raise UserError(f"port {port} (MASTER_PORT) cannot be used: {error}; leave it out for a free one") from None
    return listening


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _spawn(options: Options, rank: int, place: Place) -> subprocess.Popen[bytes]:
    package = __package__ or ""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(package=package, rank=rank, pid=os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=environment,
    )
    what = {"rank": rank, "ranks": place.ranks, "local": place.local, "address": place.address, "port": place.port}
    assert child.stdin is not None
    child.stdin.write(json.dumps([what, options.model_dump(mode="json", by_alias=True)]).encode() + b"\n")
    child.stdin.flush()  # and it stays open as long as this process lives
    return child
