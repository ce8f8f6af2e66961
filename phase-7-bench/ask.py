"""Ask a server for a completion, or chat with it: `lab complete`, `lab chat`.

python ask.py --prompt "class Stack:" --max-tokens 64
python ask.py --help
"""

import sys

import launch  # noqa: F401 (must come first)
from serving.talk import main

from common.options import run_main

if __name__ == "__main__":
    run_main(main, sys.argv[1:])
