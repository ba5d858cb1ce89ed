"""What the planner's verbs of the command print: text and tables, or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from gnaflex.planner import KVTiling, Plan
from gnaflex.spec import GNA
from gnaflex.tiles import Tile

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
                    "printed_all_steps": row.all_steps and row.all_steps._asdict(),
                    "printed_with_dense_steps": row.with_dense_steps and row.with_dense_steps._asdict(),
                }
                for row in CONFIGURATIONS
            ]
        )
        return
    rows = []
    for row in CONFIGURATIONS:
        plan, model = row.plan, row.model
        share = model.attention_share
        found = 1 / (1 - share + share / plan.tile_speedup_worst)
        printed = ("", "") if row.all_steps is None else (row.all_steps.simulated, row.all_steps.measured)
        mark = "yes" if plan.is_block_sparse else ""
        rows.append(
            (model.name.removesuffix(" 4K"), by(row.window), by(row.stride), plan.flop_speedup,
             plan.tile_speedup_worst, plan.tile_speedup_mean, mark, found, *printed)
        )  # fmt: skip
    columns = ("model", "window", "stride", "FLOPs", "worst\ntile", "mean\ntile", "block\nsparse")
    end = ("model\nwhole", "paper\nsim.", "paper\nB200")
    print_table("arXiv 2504.16922: speed-ups with every step sparse", (*columns, *end), rows)


def print_nearest(
    spec: GNA, q_tile: Tile | None, kv_tile: Tile | None, tiling: KVTiling, limit: int, as_json: bool
) -> None:
    """Perfectly block-sparse problems near a problem."""
    from gnaflex.searching import nearest

    found = nearest(spec, q_tile, kv_tile, tiling, limit=limit)
    if as_json:
        print_json(
            [
                plan_fields(one.plan) | {"distance": one.distance, "changes": list(one.changes)}
                for one in found
            ]
        )
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
    return plan_fields(row.plan()) | {
        "speedup": row.speedup,
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

    console = Console(width=max(Console().width, NEEDED_WIDTH))
    console.print(found.table(front=True))
    console.print(found.table())
    print(f"{found.problems:,} windows and strides tried, each with all tiles")
