"""The command line: the one way every script here reads its flags, and writes its --help.

A script's settings are one frozen dataclass, and its source is the only place where a flag is written down:

    @dataclass(frozen=True)
    class Config:
        # How it learns                                                     a group of the page that --help prints
        rate: float = 1e-4  # the size of a step                            --rate X   the size of a step [0.0001]
        method: Literal["lora", "full"] = "lora"  # what is trained         --method {lora,full}   what is trained [lora]

argparse does the parsing; this file reads the comments off the source and corrects what argparse takes for granted: that
`--flag False` is true, that `--fl` is `--flag`, that a mistake deserves the whole list of flags instead of one sentence.
"""

import argparse
import dataclasses
import difflib
import inspect
import re
import types
import typing
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def parse_flags(config_class, description: str, argv: list[str] | None = None) -> dict:
    """The flags given on the command line, {name: value}, for a dataclass whose fields are the flags.

    The comment at the end of a field's line is its help; a comment on a line of its own opens a group. The description, such as
    a script's docstring, stands above them as it is. A flag or value that does not exist ends the program with code 2 and the
    known ones."""
    parser = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        add_help=False,
        usage="%(prog)s [--flag value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message} (--help lists every flag)\n")
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    kinds = typing.get_type_hints(config_class)
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    group = parser
    classes = [kind for kind in config_class.__mro__ if dataclasses.is_dataclass(kind)]  # its own fields, then those it inherits
    for line in "".join(map(inspect.getsource, classes)).splitlines():
        if title := re.match(r"    # (.+)", line):
            group = parser.add_argument_group(title[1])
        elif (flag := re.match(r"    (\w+): [^#]*(?:# (.*))?", line)) and flag[1] in kinds:
            name, text = flag[1], (flag[2] or "").replace("%", "%%")
            if defaults[name] not in (None, (), dataclasses.MISSING):
                shown = defaults[name] if isinstance(defaults[name], tuple) else (defaults[name],)
                text += f" [{' '.join(map(str, shown))}]".replace(f"{REPOSITORY}/", "")
            group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text, **_flag_kind(kinds[name]))
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], [f"--{name}" for name in defaults], n=1)
        parser.error(f"unknown argument {unknown[0]}" + (f", did you mean {near[0]}?" if near else ""))
    return vars(given)


def with_tuples(settings: dict) -> dict:
    """argparse and JSON know lists only; a frozen dataclass holds tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def _flag_kind(kind) -> dict:
    """argparse's options for a field of this type: bool, int, float, str, Literal choices, a tuple of strings, or X | None."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is typing.Literal:
        return {"choices": typing.get_args(kind)}
    if typing.get_origin(kind) is tuple:
        return {"nargs": "+", "action": "extend", "metavar": "TEXT", "type": str}  # --adapter a b, or --adapter a --adapter b
    if kind is bool:  # --resume, --resume True and --resume False
        return {"nargs": "?", "const": True, "metavar": "True|False", "type": _true_or_false}
    return {"type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}


def _true_or_false(text: str) -> bool:
    if text not in ("True", "False", "true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"
