"""The argument parser of the `lab` subcommands: argparse, with errors as the one line that users see."""

from __future__ import annotations

import argparse
from typing import NoReturn

from common.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises UserError instead of printing its usage, and keeps line breaks of help texts."""

    def __init__(self, prog: str, description: str, usage: str | None = None, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists what there is)")
