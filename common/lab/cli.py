"""The `lab` command: find the subcommand and run it.

A subcommand is a module with `run(arguments) -> exit status`; COMMANDS is the list of them.

    lab --help
"""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

from common.errors import UserError
from common.lab.arguments import Parser
from common.options import run_main
from common.phases import phases

# Modules outside of `common` are in the folder of the newest phase.
# name -> (module with `run(arguments: list[str]) -> int`, one line of help). Imported only when used: torch is slow.
COMMANDS = {
    "demo": ("common.lab.demo", "run every phase on the embedded models and compare them in one table"),
    "doctor": ("common.lab.doctor", "say what this machine can do, and what each missing thing would enable"),
    "pull": ("common.lab.pull", "download a model from the Hugging Face hub into the cache and check it"),
    "diff": ("common.lab.diff", "show how two phases differ: in the terminal, as a table, or as a page"),
    "replay": ("common.lab.replay", "write a page that replays recorded runs step by step"),
    "compare": ("common.lab.compare_results", "say what differs between two results folders, beyond noise"),
    "bench": ("common.lab.bench", "run every phase's bench, and draw how speed has grown over the phases"),
    "sweep": ("instruments.sweep", "measure a grid of options, a comparison per cell"),
    "recommend": (
        "instruments.recommend",
        "find the fastest drafter, K, controller and kernels for a model",
    ),
    "reproduce": ("instruments.reproduce", "run a saved sweep or bench again, and compare"),
    "latency": ("instruments.latency", "measure latency and goodput under load, here or of a server"),
    "report": ("instruments.report", "write one HTML page from a results folder, or from two"),
    "tables": ("common.lab.tables", "fill the measured numbers of the READMEs from the committed rows"),
    "drift": ("common.lab.drift", "check that neighbouring phases differ in what the READMEs list and in nothing else"),
    "port": ("common.lab.port", "carry a fix made in one phase forward to all later phases"),
    "kernel": ("common.lab.kernel", "build, check and time one kernel: C++, Triton or CUDA"),
    "start": ("common.lab.start", "make a folder in which to write a phase yourself"),
    "serve": ("serving.run", "serve a model over HTTP, as OpenAI's API does"),
    "chat": ("serving.chat", "chat with a model behind a server"),
    "complete": ("serving.talk", "continue a text with a model behind a server"),
    "check": ("common.lab.check", "test your own version of a phase, and help with what fails first"),
}


def _parser() -> Parser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())
    parser = Parser(
        prog="lab",
        usage="lab COMMAND [OPTIONS]",
        description="The command of the LLM inference lab.",
        epilog=f"commands:\n{listing}\n\n`lab COMMAND --help` lists a command's options.",
    )
    parser.add_argument("command", metavar="COMMAND", help="one of the commands below")
    return parser


def main(arguments: list[str]) -> int:
    """Run `lab` with these arguments and return its exit status. Raises UserError for an unknown command."""
    name = _parser().parse_args(arguments[:1]).command  # the rest belongs to the command
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; the commands are {', '.join(COMMANDS)} (see lab --help)")
    module = COMMANDS[name][0]
    if not module.startswith("common."):
        use_newest_phase(name)
    status: int = importlib.import_module(module).run(arguments[1:])
    return status


def use_newest_phase(command: str) -> None:
    """Let modules be imported from the folder of the newest phase. UserError outside of a checkout, which has none."""
    found = phases()
    if not found:
        raise UserError(f"lab {command} needs the folders of the phases: run it from a checkout of the repository")
    sys.path.insert(0, str(found[-1].folder))


def entry() -> NoReturn:
    """Run the console script: bad input is one line on stderr and exit status 2."""
    run_main(main, sys.argv[1:])


if __name__ == "__main__":
    entry()
