"""Imported first by generate.py and bench.py: one line where a package is missing, a quiet end on Ctrl-C meanwhile.

Without it, a Python outside of the environment ends in `No module named 'common'`, and Ctrl-C while torch is imported,
which takes seconds, in a traceback. From common.options.run_main on, Ctrl-C is what it always is.
"""

import importlib.util
import os
import signal
import sys
from pathlib import Path

NEEDED = ("common", "torch", "pydantic_settings")


def leave(*_: object) -> None:
    """End at once with the status of Ctrl-C; a KeyboardInterrupt could come up within an import, which reports it."""
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
