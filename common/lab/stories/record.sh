#!/bin/sh
# Record the three stories of `lab replay --stories` again, on an idle machine: sh common/lab/stories/record.sh
set -e
cd "$(dirname "$0")/../../../phase-6-gpu-streams-graphs"
export PYTHONPATH=..
record() {
    name=$1; shift
    "${PYTHON:-python}" generate.py --dtype float32 --threads 1 "$@" --record "../common/lab/stories/$name.jsonl" < "${TEXT:-/dev/null}"
}

tree='from pathlib import Path

class Node:
    """A node of a binary tree."""

    def __init__(self, value, left=None, right=None):'
record win-plain --prompt "$tree" --max-tokens 48 --temperature 0.8 --draft none
record win-speculative --prompt "$tree" --max-tokens 48 --temperature 0.8 --k 4

prose='The old lighthouse keeper looked out over the sea and'
record loss-plain --prompt "$prose" --max-tokens 40 --temperature 1 --seed 1 --draft none
record loss-speculative --prompt "$prose" --max-tokens 40 --temperature 1 --seed 1 --tree static --tree-nodes 24

TEXT=../build/jump.txt
mkdir -p ../build
head -c 2840 ../common/benchmark.py > $TEXT
record jump-plain --max-tokens 32 --draft none
record jump-speculative --max-tokens 32 --k 4
