"""Imported first by generate.py and bench.py: one line if a package is missing, a quiet end on Ctrl-C in imports.

Without this module, a Python outside of the environment ends in `No module named 'common'`, and Ctrl-C during the
import of torch, which takes seconds, ends in a traceback. common.options.run_main restores the usual Ctrl-C. On a
terminal a line says that torch is imported, and goes again. Garbage is not collected during the import, and the
objects that it made are never scanned: this saves a tenth of the import's time.
"""

import gc
import importlib.util
import os
import signal
import sys
from pathlib import Path

NEEDED = ("common", "torch", "pydantic_settings")


def leave(*_: object) -> None:
    """Exit at once with the status of Ctrl-C; a KeyboardInterrupt within an import would be printed by the import."""
    os._exit(130)


missing = next((name for name in NEEDED if importlib.util.find_spec(name) is None), None)
if missing is not None:
    script = Path(sys.argv[0])
    print(
        f"error: {sys.executable} has no package {missing!r}: in the repository's folder run `make install` once, then "
        f"`.venv/bin/python {script.resolve().parent.name}/{script.name}`",
        file=sys.stderr,
    )
    sys.exit(2)
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave)
watched = sys.stderr is not None and sys.stderr.isatty()
if watched:
    print("importing torch ...", end="\r", file=sys.stderr, flush=True)
gc.disable()
import torch  # noqa: E402, F401

gc.freeze()
gc.enable()
if watched:
    print("\033[K", end="", file=sys.stderr, flush=True)
