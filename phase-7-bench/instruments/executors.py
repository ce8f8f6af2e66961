"""Where the cells of a sweep run: processes on this machine, one after the other, or the workers of a Ray cluster.

Both run the same command, `python -m instruments.cell`, and hand its rows to the sweep, which is the only writer.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.results import Row

from .cell import Task
from .grid import Cell

COMMAND = [sys.executable, "-m", "instruments.cell"]
FOLDER = Path(__file__).resolve().parents[1]
WHOLE = "(cell)"  # the variant of a row that says why a cell could not be measured
Event = tuple[Cell, "Row | None"]  # None: the cell has ended


def import_paths() -> list[str]:
    """Return where a process finds what this one imports: first of all the folder of this phase."""
    return [str(FOLDER), *(path for path in sys.path if path)]


def messages(task: str, timeout: float, command: Sequence[str] = COMMAND) -> Iterator[dict[str, Any]]:
    """Run the process of one cell; yield its messages, and at last `failed` with a reason if it ended badly."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(import_paths())}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=variables
        )
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        clock = threading.Timer(timeout, end)
        clock.start()
        try:
            try:
                process.stdin.write(task)
                process.stdin.flush()  # it stays open: the process leaves when this one does
            except BrokenPipeError:
                pass  # it has ended, and its status says why
            for line in process.stdout:
                if line.endswith("\n"):  # a killed process may leave half a line
                    yield json.loads(line)
            status = process.wait()
        finally:
            clock.cancel()
            process.kill()
            process.wait()
            process.stdout.close()
        if status:
            errors.seek(0)
            yield {"failed": _why(status, timeout if late.is_set() else None, errors.read())}


def _why(status: int, timeout: float | None, stderr: str) -> str:
    if timeout is not None:
        return f"ran longer than --cell-timeout {timeout:g} s"
    last = next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), "")[:300]
    if status < 0:
        name = signal.Signals(-status).name
        hint = ", as where memory runs out" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}" + (f": {last}" if last else "")
    return f"its process ended with status {status}: {last}"


def event(task: Task, message: dict[str, Any]) -> Event:
    """Turn a message into a row."""
    cell = task.cell
    if "row" in message:
        return cell, Row.model_validate(message["row"])
    status = "refused" if "refused" in message else "failed"
    return cell, Row.model_validate(
        {"kind": "count", "section": task.section, "cell": cell.settings, "variant": WHOLE, "status": status}
        | {"reason": message[status]}
    )


def local(tasks: Sequence[Task], timeout: float, command: Sequence[str] = COMMAND) -> Iterator[Event]:
    """Run the cells one after the other: two at once would disturb each other's times."""
    for task in tasks:
        for message in messages(task.line(), timeout, command):
            yield event(task, message)
        yield task.cell, None


def check_address(address: str) -> None:
    """UserError if nothing listens at HOST:PORT, where Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, OverflowError, UnicodeError) as error:
            raise UserError(f"--ray {address}: the cluster cannot be reached ({error})") from None


def on_ray(tasks: Sequence[Task], timeout: float, address: str, accelerators: int) -> Iterator[Event]:
    """Run the cells on a Ray cluster; every worker has one cell at a time, with all of its variants.

    accelerators: that one worker takes. UserError without the package, and for a cluster that cannot be reached.
    """
    check_address(address)
    try:
        import ray
    except ImportError:
        raise UserError("--ray needs the package ray, which is not installed: pip install 'ray>=2.40'") from None
    try:
        ray.init(address=None if address == "local" else address, log_to_driver=False, logging_level="error")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"--ray {address}: the cluster cannot be reached ({' '.join(str(error).split())})") from None
    paths = import_paths()

    def cell(line: str) -> Iterator[dict[str, Any]]:
        sys.path[:0] = [path for path in paths if path not in sys.path]
        from instruments.executors import messages

        yield from messages(line, timeout)

    work = ray.remote(num_cpus=1, num_gpus=accelerators, max_retries=0, num_returns="streaming")(cell)
    try:
        running = {work.remote(task.line()): task for task in tasks}
        while running:
            ready, _ = ray.wait(list(running), num_returns=1, fetch_local=False)
            for stream in ready:
                task = running[stream]
                try:
                    message = ray.get(next(stream))
                except StopIteration:
                    del running[stream]
                    yield task.cell, None
                except ray.exceptions.RayError as error:  # its worker died
                    del running[stream]
                    yield event(task, {"failed": f"its Ray worker failed: {' '.join(str(error).split())[:300]}"})
                    yield task.cell, None
                else:
                    yield event(task, message)
    finally:
        ray.shutdown()
