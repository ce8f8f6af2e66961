"""Continue a text with this phase's engine.

python generate.py --prompt "from pathlib import" --max-tokens 32
python generate.py --help
"""

import sys

import launch  # noqa: F401 (must come first)

from common.options import run_main
from engine.cli import main

if __name__ == "__main__":
    run_main(main, sys.argv[1:])
