"""What the verbs of the command share: their words, and errors in a line or two."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Callable
from typing import NamedTuple

from gnaflex.spec import GNA

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
EXTRAS = {"demo": ("matplotlib", "PIL", "rich"), "plan": ("rich",)}
SEPARATOR = re.compile(r"(?<!ma)x|[,×]")  # the x of "max" separates nothing


class CommandError(Exception):
    """A run that cannot go on; the message is all that the user sees."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


class Verb(NamedTuple):
    """One verb of the command."""

    name: str
    help: str
    example: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def extents(text: str) -> int | str | tuple[int | str, ...]:
    """``"30x48x80"`` or ``"30,48,80"`` as a tuple, ``"21"`` as a number that holds on every axis."""
    entries: list[int | str] = []
    for word in SEPARATOR.split(text.strip().lower()):
        if not re.fullmatch(r"-?\d+|max", word):
            raise argparse.ArgumentTypeError(f"{text!r} is not like 30x48x80, or one integer")
        entries.append(word if word == "max" else int(word))
    return tuple(entries) if len(entries) > 1 else entries[0]


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def add_problem(parser: argparse.ArgumentParser) -> None:
    """The words that make a GNA: SHAPE --window --stride --dilation --causal."""
    parser.add_argument("shape", metavar="SHAPE", type=extents, help="tokens per axis, like 30x48x80")
    parser.add_argument(
        "--window", type=extents, required=True, help="keys per axis, -1: all, as in --window=-1x8"
    )
    parser.add_argument("--stride", type=extents, default=1, help="queries that share a window (default 1)")
    add_form(parser)


def add_form(parser: argparse.ArgumentParser) -> None:
    """The words for what a window is like: --dilation --causal."""
    parser.add_argument(
        "--dilation", type=extents, default=1, help="distance of neighbouring keys, or max (default 1)"
    )
    parser.add_argument(
        "--causal", metavar="AXES", type=extents, default=(), help="causal axes, like 0 or 0,2 (default none)"
    )


def problem(options: argparse.Namespace) -> GNA:
    """The GNA of the words of :func:`add_problem`."""
    spec = GNA(options.shape, options.window, options.stride, options.dilation)
    return GNA(options.shape, options.window, options.stride, options.dilation, _flags(options, spec.rank))


def grid(options: argparse.Namespace) -> GNA:
    """The GNA of SHAPE and the words of :func:`add_form`, its window a single key."""
    spec = GNA(options.shape, 1)
    if "max" in (options.dilation if isinstance(options.dilation, tuple) else (options.dilation,)):
        raise CommandError("--dilation max depends on the window: give a number.", USAGE)
    return GNA(options.shape, 1, 1, options.dilation, _flags(options, spec.rank))


def _flags(options: argparse.Namespace, rank: int) -> list[bool]:
    causal = options.causal if isinstance(options.causal, tuple) else (options.causal,)
    if wrong := [axis for axis in causal if axis not in range(rank)]:
        raise CommandError(f"--causal names axis {wrong[0]}, the axes are 0 to {rank - 1}.", USAGE)
    return [axis in causal for axis in range(rank)]


def require(extra: str) -> None:
    """Refuse with the pip command if a package of an optional extra is missing."""
    for name in EXTRAS[extra]:
        try:
            importlib.import_module(name)
        except ImportError as error:
            package = {"PIL": "pillow"}.get(name, name)
            raise CommandError(
                f"this needs {package}, which is not installed: pip install 'gnaflex[{extra}]'"
            ) from error
