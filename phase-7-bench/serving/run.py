"""The program: takes the port, loads the model, serves, and ends within a stated time.

python serve.py --model stdlib-10m --port 8000
"""

from __future__ import annotations

import asyncio
import errno
import gc
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from common.errors import UserError
from common.options import parse_options
from common.streams import say

from .options import ServeOptions
from .server import make_app
from .service import Service

KEEP_ALIVE = 30  # seconds that an idle connection stays open
AFTERWARDS = 5  # seconds in which clients can read the error that ends their request
PRIVILEGED = 1024


def listen(host: str, port: int) -> socket.socket:
    """Take the port, before seconds are spent on loading. UserError if it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise UserError(f"--host {host}: there is no such address ({error.strerror})") from None
    taken = socket.socket(family, kind, protocol)  # without the protocol asyncio would not set TCP_NODELAY: 40 ms
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind(address)
        taken.listen(2048)
    except OSError as error:
        taken.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is in use: end the other server, or give another --port") from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise UserError(f"port {port} needs privileges: give a --port from {PRIVILEGED} on") from None
        raise UserError(f"--host {host} --port {port}: {error.strerror}") from None
    return taken


class Server(uvicorn.Server):
    """Ends on SIGTERM or Ctrl-C: running requests have some seconds to finish, then they get an error."""

    def __init__(self, service: Service) -> None:
        grace = service.options.shutdown_timeout
        super().__init__(
            uvicorn.Config(
                make_app(service),
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                lifespan="off",
                ws="none",
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=int(grace) + AFTERWARDS,
            )
        )
        self.service, self.grace = service, grace

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        self.loop = asyncio.get_running_loop()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self.loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                self.loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Take no more requests, and give the running ones `grace` seconds; none if this is asked again."""
        again = self.should_exit
        self.should_exit = self.service.closing = True
        self.loop.call_later(0 if again else self.grace, lambda: self.loop.run_in_executor(None, self.service.close))


def run(arguments: list[str]) -> int:
    options = parse_options(ServeOptions, arguments, program="serve.py")
    with listen(options.host, options.port) as taken:
        service = Service(options)
        port = taken.getsockname()[1]
        if options.host not in ("127.0.0.1", "::1", "localhost") and not options.api_key:
            say(f"note: every machine that reaches {options.host} can use this server; --api-key KEY asks for a key")
        drafts = f", drafts by {service.llm.draft_name}" if service.llm.speculative else ""
        if others := [name for name in service.drafters if name in service.options.other_drafters]:
            drafts += f" (requests can choose {', '.join(others)})"
        say(f"serving {service.model}{drafts} on http://{options.host}:{port} (Ctrl-C ends)")
        gc.collect()
        gc.freeze()  # models and modules stay: to look through them stops everything for 0.2 s, again and again
        try:
            Server(service).run([taken])
        finally:
            service.close()
    say("ended")
    return 0
