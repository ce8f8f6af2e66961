"""Notices within a moment that a process of the group has ended, whatever the others are doing.

Every rank holds a TCP connection to rank 0, on which nothing is sent but a failure or the orderly end. The operating
system closes the connections of a process that is killed. A thread of each rank watches them: rank 0 reports a rank
that is gone, tells the others, and ends; the others end when rank 0 says so, or is gone itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from typing import Any, Never

from common.streams import say

PATIENCE = 5.0  # seconds in which a broken exchange is explained by the rank that is gone


class Lifeline:
    """The connections of this rank: rank 0 has one to every other rank, the others have one to rank 0."""

    def __init__(
        self,
        rank: int,
        ranks: int,
        sockets: dict[int, socket.socket],
        pids: dict[int, int],
        children: list[subprocess.Popen[bytes]] | None = None,
    ) -> None:
        """children: the processes that rank 0 has started itself."""
        self.rank, self.ranks, self.sockets, self.pids = rank, ranks, sockets, pids
        self.children = children or []
        self.closed = False
        self._ending = threading.Lock()

    def watch(self) -> None:
        """Start the thread that watches."""
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def _watch(self) -> None:
        open_ones = {sock: rank for rank, sock in self.sockets.items()}
        while open_ones and not self.closed:
            ready, _, _ = select.select(list(open_ones), [], [], 0.5)
            for sock in ready:
                rank = open_ones[sock]
                message = read_line(sock)
                if self.closed or message.get("bye"):
                    del open_ones[sock]
                    if self.rank:  # rank 0 has ended all; this process ends in time by itself, or never heard of it
                        time.sleep(PATIENCE)
                        os._exit(1)
                elif self.rank == 0:
                    self._report(self._reason(rank, message.get("failed")))
                elif message.get("end"):  # rank 0 has said why
                    os._exit(1)
                else:
                    self._report(self._reason(0, message.get("failed")), loud=self.rank == 1)

    def _reason(self, rank: int, failed: str | None) -> str:
        who = f"rank {rank} of {self.ranks} (process {self.pids[rank]})"
        return f"{who} failed: {failed}" if failed else f"{who} has ended unexpectedly"

    def _report(self, reason: str, loud: bool = True) -> Never:
        """Say why this process ends, tell the others, and end."""
        with self._ending:
            if loud:
                say(f"error: {reason}: the other ranks end")
            if self.rank == 0:
                for sock in self.sockets.values():
                    send_line(sock, {"end": True})
            sys.stdout.flush()
            os._exit(1)

    def end(self, error: str, broken: bool) -> Never:
        """End this process because of an error. broken: an exchange failed, so a rank that is gone may be the cause."""
        if broken:
            time.sleep(PATIENCE)  # the thread that watches knows the cause, and ends the process
        if self.rank == 0:
            self._report(f"rank 0 of {self.ranks} failed: {error}")
        send_line(self.sockets[0], {"failed": error})
        time.sleep(PATIENCE)  # rank 0 reports it, and ends this process
        os._exit(1)

    def close(self) -> None:
        """End in order."""
        self.closed = True
        for sock in self.sockets.values():
            send_line(sock, {"bye": True})
        for child in self.children:
            try:
                child.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def send_line(sock: socket.socket, message: dict[str, Any]) -> None:
    """Send one line of JSON; nothing if the other side is gone."""
    with contextlib.suppress(OSError):
        sock.sendall(json.dumps(message).encode() + b"\n")


def read_line(sock: socket.socket) -> dict[str, Any]:
    """Return one line of JSON; {} if the other side is gone, or is none of ours."""
    line = b""
    try:
        while not line.endswith(b"\n"):
            part = sock.recv(1)
            if not part:
                return {}
            line += part
        found = json.loads(line)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
