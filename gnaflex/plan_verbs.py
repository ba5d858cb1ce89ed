"""The planner's verbs of the command: what they take, and what they print, as text and tables or JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gnaflex.planner import KVTiling, Plan
from gnaflex.spec import GNA
from gnaflex.tiles import Tile
from gnaflex.words import (
    USAGE,
    CommandError,
    Verb,
    add_form,
    add_problem,
    extents,
    grid,
    positive,
    problem,
    require,
)

if TYPE_CHECKING:
    from gnaflex.searching import Row, SearchResult

WORDS = ("changes",)  # columns that may wrap
NEEDED_WIDTH = 96  # where output is no terminal rich assumes 80, and cuts figures off
FIGURES = ("flop_speedup", "tile_speedup_worst", "tile_speedup_mean", "work_speedup", "sparsity")
COUNTS = ("query_tiles", "touched_tiles", "full_tiles", "partial_tiles", "clipped_tiles")


def problem_fields(spec: GNA) -> dict[str, Any]:
    """A problem for JSON."""
    return {
        name: list(getattr(spec, name)) for name in ("shape", "window", "stride", "dilation", "is_causal")
    }


def plan_fields(plan: Plan) -> dict[str, Any]:
    """A plan for JSON: the problem, the tiles, every figure."""
    fields = problem_fields(plan.spec) | {
        "q_tile": list(plan.q_tile),
        "kv_tile": list(plan.kv_tile),
        "kv_tiling": plan.kv_tiling,
        "q_rows": plan.q_rows,
        "kv_rows": plan.kv_rows,
        "is_block_sparse": plan.is_block_sparse,
    }
    return fields | {name: getattr(plan, name) for name in (*FIGURES, *COUNTS)}


def print_json(value: Any) -> None:
    """Indented, one document."""
    print(json.dumps(value, indent=1))


def by(extents: Iterable[Any]) -> str:
    """``(30, 48, 80)`` as 30x48x80."""
    return "x".join(map(str, extents))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A rich table; numbers to the right, speed-ups with two decimals."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for at, name in enumerate(columns):
        words = at == 0 or name in WORDS
        table.add_column(name, justify="left" if words else "right", no_wrap=name not in WORDS)
    for row in rows:
        table.add_row(*(f"{one:.2f}" if isinstance(one, float) else str(one) for one in row))
    Console(width=max(Console().width, NEEDED_WIDTH)).print(table)


def print_plan(plan: Plan) -> None:
    """A plan as text."""
    spec = plan.spec
    share = {name: f"{getattr(plan, name) / plan.touched_tiles:.1%}" for name in COUNTS[2:]}
    print(repr(spec))
    print(
        f"  query tiles {by(plan.q_tile)}, key tiles {by(plan.kv_tile)}, {plan.kv_tiling} key tiling; "
        f"sparsity {plan.sparsity:.2%}"
    )
    print(
        f"  {plan.touched_tiles:,} tiles visited: {share['full_tiles']} full, {share['partial_tiles']} "
        f"partial, {share['clipped_tiles']} clipped"
    )
    print(f"  perfectly block-sparse: {'yes' if plan.is_block_sparse else 'no'}")
    print(
        f"  speed-up over dense: {plan.work_speedup:.2f} by all tiles visited (work), "
        f"{plan.tile_speedup_worst:.2f} by those of the busiest query tile,\n"
        f"    {plan.tile_speedup_mean:.2f} by those of the mean one; FLOPs allow {plan.flop_speedup:.2f}"
    )


def print_paper(as_json: bool) -> None:
    """The paper's table: what it prints, and what the planner counts."""
    from gnaflex.paper import CONFIGURATIONS

    if as_json:
        print_json(
            [
                plan_fields(row.plan)
                | {
                    "model": row.model.name,
                    "simulated_all_steps": row.simulated(),
                    "estimated_all_steps": row.estimated(),
                    "printed_all_steps": row.all_steps and row.all_steps._asdict(),
                    "printed_with_dense_steps": row.with_dense_steps and row.with_dense_steps._asdict(),
                }
                for row in CONFIGURATIONS
            ]
        )
        return
    rows = []
    for row in CONFIGURATIONS:
        plan, printed = row.plan, row.all_steps
        simulated, measured = ("", "") if printed is None else (printed.simulated, printed.measured)
        mark = "yes" if plan.is_block_sparse else ""
        rows.append(
            (row.model.name.removesuffix(" 4K"), by(row.window), by(row.stride), plan.flop_speedup,
             plan.tile_speedup_worst, plan.tile_speedup_mean, mark,
             row.simulated(), simulated, row.estimated(), measured)
        )  # fmt: skip
    columns = ("model", "window", "stride", "FLOPs", "worst\ntile", "mean\ntile", "block\nsparse")
    end = ("whole\nmodel", "paper\nsim.", "est.\nB200", "paper\nB200")
    print_table("arXiv 2504.16922: speed-ups with every step sparse", (*columns, *end), rows)


def print_nearest(
    spec: GNA, q_tile: Tile | None, kv_tile: Tile | None, tiling: KVTiling, limit: int, as_json: bool
) -> None:
    """Perfectly block-sparse problems near a problem."""
    from gnaflex.nearby import nearest

    found = nearest(spec, q_tile, kv_tile, tiling, limit=limit)
    if as_json:
        print_json(
            [
                plan_fields(one.plan) | {"distance": one.distance, "changes": list(one.changes)}
                for one in found
            ]
        )
        return
    if not found:
        print(f"No change of windows and strides makes {spec!r} block-sparse with these tiles.")
        return
    rows = [
        (by(one.spec.window), by(one.spec.stride), by(one.plan.q_tile), by(one.plan.kv_tile),
         one.work_speedup, f"{one.plan.sparsity:.2%}", one.distance, "; ".join(one.changes) or "as it is")
        for one in found
    ]  # fmt: skip
    columns = (
        "window",
        "stride",
        "query\ntile",
        "key\ntile",
        "work\nspeed-up",
        "sparsity",
        "distance",
        "changes",
    )
    print_table(f"block-sparse problems near {spec!r}", columns, rows)


def _row_fields(row: Row) -> dict[str, Any]:
    return plan_fields(row.plan) | {
        "efficiency": row.efficiency,
        "reach": row.reach,
    }


def print_search(found: SearchResult, as_json: bool) -> None:
    """The Pareto front and the best rows of a search."""
    if as_json:
        print_json(
            {
                "problems": found.problems,
                "front": [_row_fields(row) for row in found.front],
                "rows": [_row_fields(row) for row in found.rows],
            }
        )
        return
    from rich.console import Console

    if not found.front:
        print(f"No problem qualifies, of {found.problems:,} windows and strides tried, each with all tiles.")
        return
    console = Console(width=max(Console().width, NEEDED_WIDTH))
    console.print(found.table(front=True))
    console.print(found.table())
    print(f"{found.problems:,} windows and strides tried, each with all tiles")


# ---- the planner -------------------------------------------------------------------------------------


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    add_problem(parser)
    _add_tiles(parser, "static")
    _json(parser)


def _add_tiles(parser: argparse.ArgumentParser, tiling: KVTiling) -> None:
    """The words that make tiles; ``tiling`` unless another is asked for."""
    parser.add_argument("--q-tile", type=extents, help="tokens of a query tile (default the best of 128)")
    parser.add_argument("--kv-tile", type=extents, help="tokens of a key tile (default the best of 128)")
    each = parser.add_mutually_exclusive_group()
    parser.set_defaults(tiling=tiling)
    for name, what in (("static", "lie on a fixed grid"), ("dynamic", "begin where the keys of a query do")):
        default = " (default)" if name == tiling else ""
        words = f"key tiles {what}{default}"
        each.add_argument(f"--{name}", action="store_const", const=name, dest="tiling", help=words)


def _per_axis(extent: Any, base: GNA) -> list[Any]:
    return list(extent) if isinstance(extent, tuple) else [extent] * base.rank


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
    return plan(spec, _tile(options.q_tile, spec), _tile(options.kv_tile, spec), options.tiling)


def _plan(options: argparse.Namespace) -> None:
    found = _planned(options)
    if options.json:
        print_json(plan_fields(found))
    else:
        print_plan(found)


def _explain(options: argparse.Namespace) -> None:
    found = _planned(options)
    if options.json:
        print_json(plan_fields(found) | {"why": found.explain().splitlines()})
    else:
        print(found.explain())


def _nearest_arguments(parser: argparse.ArgumentParser) -> None:
    add_problem(parser)
    _add_tiles(parser, "dynamic")
    parser.add_argument("--limit", type=positive, default=10, help="how many (default 10)")
    _json(parser)


def _nearest(options: argparse.Namespace) -> None:
    if not options.json:
        require("plan")
    spec = problem(options)
    tiles = _tile(options.q_tile, spec), _tile(options.kv_tile, spec)
    print_nearest(spec, *tiles, options.tiling, options.limit, options.json)


def _search_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shape", metavar="SHAPE", type=extents, help="tokens per axis, like 30x48x80")
    parser.add_argument("--step", type=positive, default=1, help="windows in multiples of this (default 1)")
    parser.add_argument("--window", type=extents, help="this window alone, as in --window=-1x8 (default all)")
    parser.add_argument("--stride", type=extents, help="these strides alone (default all)")
    add_form(parser)
    _add_tiles(parser, "dynamic")
    parser.add_argument("--min-sparsity", type=float, default=0.0, help="least share of masked pairs, 0 to 1")
    parser.add_argument("--max-sparsity", type=float, default=1.0, help="greatest share of masked pairs")
    parser.add_argument("--any", action="store_true", help="problems with partial tiles too")
    names = ("work_speedup", "efficiency", "reach")
    parser.add_argument("--objective", choices=names, default="work_speedup", help="what sorts the rows")
    parser.add_argument("--limit", type=positive, default=20, help="how many rows (default 20)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="draw the front: a .png, .pdf or .svg")
    _json(parser)


def _search(options: argparse.Namespace) -> None:
    if not options.json:
        require("plan")
    from gnaflex.drawing import check_path, draw
    from gnaflex.searching import search

    if options.out:
        check_path(options.out)
    base = grid(options)
    every = [range(options.step, length + 1, options.step) for length in base.shape]
    found = search(
        base.shape,
        windows=every if options.window is None else _per_axis(options.window, base),
        strides=None if options.stride is None else _per_axis(options.stride, base),
        dilation=base.dilation,
        is_causal=base.is_causal,
        q_tile=_tile(options.q_tile, base),
        kv_tile=_tile(options.kv_tile, base),
        min_sparsity=options.min_sparsity,
        max_sparsity=options.max_sparsity,
        block_sparse=not options.any,
        kv_tiling=options.tiling,
        objective=options.objective,
        progress=not options.json and sys.stderr.isatty(),
        limit=options.limit,
    )
    print_search(found, options.json)
    if options.out:
        draw(found, path=options.out)


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
        print_json({"kind": options.kind, "lines": text.splitlines()})
    else:
        print(text, end="" if text.endswith("\n") else "\n")


def _paper(options: argparse.Namespace) -> None:
    if not options.json:
        require("plan")
    print_paper(options.json)


VERBS = (
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
