"""Options declared in one class: command line, then environment, then YAML file, then default.

A program declares its options as a pydantic-settings class. This module turns the class into a command line with
kebab-case flags, and every wrong input into one line: `error: ...` on stderr, exit status 2.
(pydantic-settings has a command line of its own, but it splits `--prompt "a, b"` at the comma.)

    options = parse_options(Options, sys.argv[1:], program="generate.py")
"""

from __future__ import annotations

import argparse
import os
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsError

from common.errors import UserError
from common.streams import interruptions, prepare_streams, release_stdout, say

Options = TypeVar("Options", bound=BaseSettings)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def _name(field: str, info: FieldInfo) -> str:
    return info.alias or field


def _flag(field: str, info: FieldInfo) -> str:
    return "--" + _name(field, info).replace("_", "-")


def _is_list(info: FieldInfo) -> bool:
    return get_origin(info.annotation) is list


def _value_hint(annotation: Any) -> str:
    """Return the value that `--help` shows: the choices of a Literal, the item type of a list, else the type."""
    if get_origin(annotation) is Literal:
        return "|".join(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) in (list, UnionType, typing.Union):
        return "|".join(_value_hint(part) for part in get_args(annotation) if part is not type(None))
    return str(getattr(annotation, "__name__", annotation)).lower()


def build_parser(options: type[BaseSettings], program: str) -> argparse.ArgumentParser:
    """Build one flag per field. Values stay strings (pydantic converts them); absent flags set nothing."""
    description = (options.__doc__ or "").split("\n")[0]
    parser = _Parser(prog=program, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for field, info in options.model_fields.items():
        required = " (required)" if info.is_required() else f" (default: {info.get_default(call_default_factory=True)})"
        text = ((info.description or "") + required).replace("%", "%%")
        if info.annotation is bool:
            parser.add_argument(
                _flag(field, info), dest=_name(field, info), action=argparse.BooleanOptionalAction, help=text
            )
        else:
            action = "append" if _is_list(info) else "store"
            hint = _value_hint(info.annotation)
            parser.add_argument(_flag(field, info), dest=_name(field, info), action=action, metavar=hint, help=text)
    return parser


class _Loader(yaml.SafeLoader):
    """A YAML loader that keeps `off` a word, for each option to interpret. A key occurs once, with `-` or `_`."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key, _ in node.value:
            name = str(key.value).replace("-", "_")
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _read_yaml(path: Path, options: type[BaseSettings]) -> dict[str, Any]:
    """Return the values of a YAML file; keys may be written with `-` or `_`."""
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: the file cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: not valid YAML ({' '.join(str(error).split())})") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"--config {path}: expected `option: value` lines, got a {type(loaded).__name__}")
    keys = {_name(field, info) for field, info in options.model_fields.items()}
    values = {str(key).replace("-", "_"): value for key, value in loaded.items()}
    for key in values:
        if key not in keys:
            raise UserError(f"--config {path}: unknown key {key!r}; the keys are {', '.join(sorted(keys))}")
    return values


def _with_file(options: type[Options], values: dict[str, Any]) -> type[Options]:
    """Return the same settings class with the file's values as the last source before the defaults."""

    class WithFile(options):  # type: ignore[misc, valid-type]
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], **sources: PydanticBaseSettingsSource
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            file = InitSettingsSource(settings_cls, init_kwargs=values)
            return *super().settings_customise_sources(settings_cls, **sources), file

    return typing.cast(type[Options], WithFile)


def _variable(options: type[BaseSettings], name: str) -> str:
    return f"{options.model_config.get('env_prefix', '')}{name}".upper()


def _explain(error: ValidationError, options: type[BaseSettings], given: dict[str, Any], file: dict[str, Any]) -> str:
    """Describe the first wrong value in one line: its source, the value, and what would be right."""
    first = error.errors(include_url=False)[0]
    if not first["loc"]:
        return first["msg"].removeprefix("Value error, ")
    name = str(first["loc"][0])
    info = next((i for f, i in options.model_fields.items() if _name(f, i) == name or f == name), None)
    if info is None:
        return f"unknown option {name!r}"
    if first["type"] == "missing":
        return f"--{name.replace('_', '-')} is required"
    if name in given:
        where = "--" + name.replace("_", "-")
    elif _variable(options, name) in {key.upper() for key in os.environ}:
        where = f"environment variable {_variable(options, name)}"
    elif name in file:
        where = f"key {name!r} of the configuration file"
    else:
        where = name
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message[0].lower()}{message[1:]}, got {first['input']!r}"


def parse_options(options: type[Options], arguments: Sequence[str], program: str) -> Options:
    """Read the options of one run. Raises UserError with a single line for any wrong input."""
    given = vars(build_parser(options, program).parse_args(list(arguments)))
    path = given.get("config") or os.environ.get(_variable(options, "config"))
    file = _read_yaml(Path(path), options) if path else {}
    try:
        return _with_file(options, file)(**given)
    except ValidationError as error:
        raise UserError(_explain(error, options, given, file)) from None
    except SettingsError as error:
        raise UserError(f"environment: {error}") from None


def run_main(main: Callable[[list[str]], int], arguments: list[str]) -> NoReturn:
    """Run a command line and exit. On failure one line on stderr gives the reason; printed output is kept.

    Status 2: a UserError, or a file or stream that cannot be written (a full disk). 130, 143, 129: Ctrl-C, SIGTERM,
    SIGHUP. 141: the reader of stdout closed it, as in `... | head`.
    """
    with interruptions() as signals:
        try:
            prepare_streams()
            status = main(arguments)
            sys.stdout.flush()
        except UserError as error:
            say(f"error: {error}")
            status = 2
        except KeyboardInterrupt:
            say("\ninterrupted")
            status = 130
        except BrokenPipeError:
            status = 141
        except OSError as error:
            what = error.filename or "the output cannot be written to its end"
            say(f"error: {what}: {error.strerror or error}")
            status = 2
        finally:
            release_stdout()
    sys.exit(128 + signals[0] if status and signals else status)
