"""The command ``gnaflex``: one row of VERBS per verb, which imports for itself what is heavy."""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from gnaflex import kernel_verbs, plan_verbs
from gnaflex.spec import GNAError
from gnaflex.words import (
    FAILED,
    INTERRUPTED,
    OK,
    USAGE,
    CommandError,
    Verb,
    add_problem,
    extents,
    positive,
    problem,
    require,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command ``gnaflex``.

    Args:
        argv: the words after ``gnaflex``; None takes those of the process.

    Returns:
        The exit code: 0 done, 1 the run failed, 2 the words make no sense, 130 interrupted by Ctrl-C.

    Example:
        >>> from gnaflex.cli import main
        >>> main(["source", "8", "--window", "4", "--stride", "4"])  # doctest: +ELLIPSIS
        GNA(shape=(8,), window=(4,), stride=(4,))
        ...
        0
    """
    try:
        options = _parser().parse_args(argv)
    except SystemExit as done:
        return int(done.code or OK)
    try:
        _tolerate()
        options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _complain(options, "interrupted.", INTERRUPTED)
    except BrokenPipeError:  # the reader, `head` say, has gone; so that the exit does not flush into it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        return _failed(options, error)
    return OK


def _tolerate() -> None:
    """Output where there is none, and characters that the terminal does not know as question marks."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _failed(options: argparse.Namespace, error: Exception) -> int:
    """The exit code of an error, its message printed."""
    if options.traceback:
        traceback.print_exception(error)
    if isinstance(error, CommandError):
        return _complain(options, str(error), error.code)
    if isinstance(error, GNAError):
        return _complain(options, str(error), USAGE)
    if isinstance(error, NotImplementedError):  # a backend's reasons, one per line
        return _complain(options, str(error), FAILED)
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return _complain(options, f"{error.strerror}{where}", FAILED)
    what = next(iter(str(error).strip().splitlines()), "")
    hint = "" if options.traceback else "\n  Add --traceback to see where."
    return _complain(options, f"{type(error).__name__}: {what}{hint}", FAILED)


def _complain(options: argparse.Namespace, message: str, code: int) -> int:
    print(f"gnaflex {options.verb}: {message}", file=sys.stderr)
    return code


# ---- words -------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message}\n  Write {self.prog} --help for what it takes.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gnaflex",
        description="Generalized Neighborhood Attention compiled into FlexAttention block masks.",
        epilog="exit codes: 0 done, 1 the run failed, 2 wrong usage, 130 interrupted",
    )
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True)
    for verb in VERBS:
        one = verbs.add_parser(
            verb.name,
            help=verb.help,
            description=verb.help,
            epilog=f"example:\n  {verb.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.arguments(one)
        one.add_argument("--traceback", action="store_true", help="on failure print the whole traceback too")
        one.set_defaults(run=verb.run)
    return parser


# ---- gnaflex demo ------------------------------------------------------------------------------------


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--window", type=extents, help="keys per axis (default photo 21, video 18x24x24)")
    parser.add_argument("--stride", type=extents, help="queries per window (default photo 1, video 16x8x8)")
    parser.add_argument("--seed", type=int, help="of the noise and the inputs (default 0)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the accelerator if there is one)")
    photo = parser.add_argument_group("the photograph: denoised by attention; writes demo.png")
    photo.add_argument("--out", type=Path, metavar="DIR", help="folder of the picture (default demo-out)")
    photo.add_argument("--size", type=extents, help="height x width in pixels (default 256x208)")
    photo.add_argument("--noise", type=float, help="its standard deviation, white is 1 (default 0.1)")
    video = parser.add_argument_group("the video: one attention head, timed against dense attention")
    video.add_argument("--video", action="store_true", help="run this instead of the photograph")
    video.add_argument("--shape", type=extents, help="tokens per axis (default 30x48x80)")
    video.add_argument("--head-dim", type=positive, help="channels of the head (default 128)")
    dtypes = ("float32", "bfloat16", "float16")
    video.add_argument("--dtype", choices=dtypes, help="of the inputs (default float32)")
    video.add_argument("--tile-major", action="store_true", help="order the tokens by tiles of 2x8x8")


def _demo(options: argparse.Namespace) -> None:
    mine = {True: ("shape", "head_dim", "dtype", "tile_major"), False: ("out", "size", "noise")}
    for name in mine[not options.video]:
        if getattr(options, name):
            which = "photograph: leave --video out" if options.video else "video: add --video"
            raise CommandError(f"--{name.replace('_', '-')} is for the {which}.", USAGE)
    require("demo")
    from gnaflex import demo

    names = ("window", "stride", "seed", "device", *mine[options.video])
    given = {name: getattr(options, name) for name in names}
    run = demo.video if options.video else demo.photo
    run(**{name: value for name, value in given.items() if value is not None})


# ---- gnaflex source ----------------------------------------------------------------------------------


def _source(options: argparse.Namespace) -> None:
    spec = problem(options)
    from gnaflex.window import source

    print(source(spec), end="")


# ---- gnaflex bench -----------------------------------------------------------------------------------


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    from gnaflex.benchmarks.run import add_arguments

    add_arguments(parser)


def _bench(options: argparse.Namespace) -> None:
    from gnaflex.benchmarks.run import Refused, run

    try:
        code = run(options)
    except Refused as why:
        raise CommandError(str(why), USAGE) from why
    if code:
        raise CommandError("some items did not end well, as said above.")


VERBS = (
    Verb(
        "demo",
        "Denoise a photograph by neighborhood attention and draw what happened; or time one video head.",
        "gnaflex demo --out demo-out\n  gnaflex demo --video --tile-major",
        _demo_arguments,
        _demo,
    ),
    Verb(
        "source",
        "Print what a problem is compiled to: windows per axis as formulas, and the mask as torch code.",
        "gnaflex source 30x48x80 --window 18x24x24 --stride 16x8x8",
        add_problem,
        _source,
    ),
    Verb(
        "bench",
        "Time every backend on the problems of models, checked against float64, and write what was measured.",
        "gnaflex bench\n  gnaflex bench --set full --budget 20m --resume\n  gnaflex bench growth",
        _bench_arguments,
        _bench,
    ),
    *plan_verbs.VERBS,
    *kernel_verbs.VERBS,
)
