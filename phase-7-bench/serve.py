"""Serve a model over HTTP, as OpenAI's API does.

python serve.py --model stdlib-10m --port 8000
python serve.py --help
"""

import sys

import launch  # noqa: F401 (must come first)
from serving.run import run

from common.options import run_main

if __name__ == "__main__":
    run_main(run, sys.argv[1:])
