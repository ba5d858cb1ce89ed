"""The command ``gnaflex``: one row of VERBS per verb, which imports for itself what is heavy."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from gnaflex.spec import GNA, GNAError

if TYPE_CHECKING:
    from gnaflex.planner import KVTiling, Plan

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
        options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _complain(options, "interrupted.", INTERRUPTED)
    except BrokenPipeError:  # the reader, `head` say, has gone; so that the exit does not flush into it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        return _failed(options, error)
    return OK


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
        return _complain(options, f"{error.strerror}: {error.filename}", FAILED)
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
    parser.add_argument(
        "--dilation", type=extents, default=1, help="distance of neighbouring keys, or max (default 1)"
    )
    parser.add_argument(
        "--causal", metavar="AXES", type=extents, default=(), help="causal axes, like 0 or 0,2 (default none)"
    )


def problem(options: argparse.Namespace) -> GNA:
    """The GNA of the words of :func:`add_problem`."""
    spec = GNA(options.shape, options.window, options.stride, options.dilation)
    causal = options.causal if isinstance(options.causal, tuple) else (options.causal,)
    if wrong := [axis for axis in causal if axis not in range(spec.rank)]:
        raise CommandError(f"--causal names axis {wrong[0]}, the axes are 0 to {spec.rank - 1}.", USAGE)
    flags = [axis in causal for axis in range(spec.rank)]
    return GNA(options.shape, options.window, options.stride, options.dilation, flags)


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


# ---- the planner -------------------------------------------------------------------------------------


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    add_problem(parser)
    parser.add_argument("--q-tile", type=extents, help="tokens of a query tile (default the best of 128)")
    parser.add_argument("--kv-tile", type=extents, help="tokens of a key tile (default the best of 128)")
    parser.add_argument("--dynamic", action="store_true", help="key tiles begin where the keys of a query do")
    _json(parser)


def _tile(extent: int | str | tuple[int | str, ...] | None, spec: GNA) -> tuple[int, ...] | None:
    if extent is None:
        return None
    entries = extent if isinstance(extent, tuple) else (extent,) * spec.rank
    if "max" in entries:
        raise CommandError("a tile is made of integers, like 2x8x8.", USAGE)
    return entries  # type: ignore[return-value]


def _planned(options: argparse.Namespace) -> Plan:
    from gnaflex.planner import plan

    spec = problem(options)
    tiling: KVTiling = "dynamic" if options.dynamic else "static"
    return plan(spec, _tile(options.q_tile, spec), _tile(options.kv_tile, spec), tiling)


def _plan(options: argparse.Namespace) -> None:
    from gnaflex import plan_verbs

    found = _planned(options)
    if options.json:
        plan_verbs.print_json(plan_verbs.plan_fields(found))
    else:
        plan_verbs.print_plan(found)


def _explain(options: argparse.Namespace) -> None:
    from gnaflex import plan_verbs

    found = _planned(options)
    if options.json:
        plan_verbs.print_json(plan_verbs.plan_fields(found) | {"why": found.explain().splitlines()})
    else:
        print(found.explain())


def _nearest_arguments(parser: argparse.ArgumentParser) -> None:
    add_problem(parser)
    parser.add_argument("--q-tile", type=extents, help="tokens of a query tile (default any of 128)")
    parser.add_argument("--kv-tile", type=extents, help="tokens of a key tile (default any of 128)")
    parser.add_argument("--static", action="store_true", help="key tiles lie on a fixed grid")
    parser.add_argument("--limit", type=positive, default=10, help="how many (default 10)")
    _json(parser)


def _nearest(options: argparse.Namespace) -> None:
    if not options.json:
        require("plan")
    from gnaflex import plan_verbs

    spec = problem(options)
    tiles = _tile(options.q_tile, spec), _tile(options.kv_tile, spec)
    tiling: KVTiling = "static" if options.static else "dynamic"
    plan_verbs.print_nearest(spec, *tiles, tiling, options.limit, options.json)


def _search_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shape", metavar="SHAPE", type=extents, help="tokens per axis, like 30x48x80")
    parser.add_argument("--step", type=positive, default=1, help="windows in multiples of this (default 1)")
    parser.add_argument("--min-sparsity", type=float, default=0.0, help="least share of masked pairs, 0 to 1")
    parser.add_argument("--max-sparsity", type=float, default=1.0, help="greatest share of masked pairs")
    parser.add_argument("--static", action="store_true", help="key tiles lie on a fixed grid")
    parser.add_argument("--any", action="store_true", help="problems with partial tiles too")
    names = ("speedup", "efficiency", "reach")
    parser.add_argument("--objective", choices=names, default="speedup", help="what sorts the rows")
    parser.add_argument("--limit", type=positive, default=20, help="how many rows (default 20)")
    _json(parser)


def _search(options: argparse.Namespace) -> None:
    if not options.json:
        require("plan")
    from gnaflex import plan_verbs
    from gnaflex.searching import search

    shape = GNA(options.shape, 1).shape
    found = search(
        shape,
        windows=[range(options.step, length + 1, options.step) for length in shape],
        min_sparsity=options.min_sparsity,
        max_sparsity=options.max_sparsity,
        block_sparse=not options.any,
        kv_tiling="static" if options.static else "dynamic",
        objective=options.objective,
        progress=not options.json and sys.stderr.isatty(),
        limit=options.limit,
    )
    plan_verbs.print_search(found, options.json)


def _draw_arguments(parser: argparse.ArgumentParser) -> None:
    _plan_arguments(parser)
    kinds = ("blocks", "window", "tiles", "strides")
    parser.add_argument("--kind", choices=kinds, default="blocks", help="what to draw (default blocks)")
    parser.add_argument("--query", type=extents, help="whose window, like 3x10x20 (default the middle)")
    parser.add_argument("--width", type=positive, default=80, help="characters across (default 80)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a .png, .pdf or .svg too")


def _draw(options: argparse.Namespace) -> None:
    from gnaflex.drawing import draw

    spec = problem(options)
    what = spec if options.kind == "window" else _planned(options)
    query = (options.query,) if isinstance(options.query, int) and spec.rank == 1 else options.query
    text = draw(what, kind=options.kind, query=query, width=options.width, path=options.out)
    if options.json:
        from gnaflex import plan_verbs

        plan_verbs.print_json({"kind": options.kind, "lines": text.splitlines()})
    else:
        print(text, end="" if text.endswith("\n") else "\n")


def _paper(options: argparse.Namespace) -> None:
    if not options.json:
        require("plan")
    from gnaflex import plan_verbs

    plan_verbs.print_paper(options.json)


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
        "plan",
        "Count the tiles of a problem: which are full, partial, skipped, and what speed-up that allows.",
        "gnaflex plan 30x48x80 --window 18x24x24 --stride 16x8x8 --q-tile 4x8x8 --kv-tile 2x8x8 --dynamic",
        _plan_arguments,
        _plan,
    ),
    Verb(
        "explain",
        "Say in words, per axis, why tiles need a mask, and the cheapest change that mends it.",
        "gnaflex explain 33x45x80 --window 18x24x24 --stride 16x8x8 --q-tile 4x8x8 --kv-tile 2x8x8",
        _plan_arguments,
        _explain,
    ),
    Verb(
        "nearest",
        "List the perfectly block-sparse problems closest to one, smallest change first.",
        "gnaflex nearest 21x45x80 --window 18x24x24 --stride 5x6x7",
        _nearest_arguments,
        _nearest,
    ),
    Verb(
        "search",
        "Search windows, strides and tiles: the fastest, and the front of speed against what a query sees.",
        "gnaflex search 30x48x80 --step 2 --min-sparsity 0.8",
        _search_arguments,
        _search,
    ),
    Verb(
        "draw",
        "Draw blocks, a query's window, tiles per query tile, or speed-up over strides: text or picture.",
        "gnaflex draw 16x16 --window 8x8 --stride 4x4 --kind window --query 3x10",
        _draw_arguments,
        _draw,
    ),
    Verb(
        "paper",
        "Print the table of the paper (arXiv 2504.16922) beside what the planner counts.",
        "gnaflex paper",
        _json,
        _paper,
    ),
)
