"""Continue a text with this phase's engine.

python generate.py --prompt "import " --max-tokens 32
python generate.py --help
"""

import sys

from common.options import run_main
from engine.cli import main

if __name__ == "__main__":
    run_main(main, sys.argv[1:])
