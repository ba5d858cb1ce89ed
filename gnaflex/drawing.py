"""Drawings of a problem, how it tiles and what a search found, as text of any size; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from gnaflex.drawn import (
    BLOCK_KINDS,
    BlockMap,
    Planes,
    coordinates,
    counts_line,
    front_ends,
    front_line,
    plane_title,
    seen_line,
    strides_of,
    tile_grid,
    tiles_line,
    visited,
    visits_line,
    window_of,
)
from gnaflex.planner import KVTiling, Plan, plan
from gnaflex.searching import SearchResult
from gnaflex.spec import GNA, GNAError, whole
from gnaflex.tiles import Tile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Kind = Literal["blocks", "window", "tiles", "strides", "front"]
SUFFIXES = (".png", ".pdf", ".svg")
FRONT_LINES = 17  # of the text of a front
SHADES = "·░▒▓█"
SHARES = "█ all  ▓ over 2/3  ▒ over 1/3  ░ some  · none"


def draw(
    what: GNA | Plan | SearchResult,
    *,
    kind: Kind | None = None,
    query: int | Sequence[int] | None = None,
    q_tile: Tile | None = None,
    kv_tile: Tile | None = None,
    kv_tiling: KVTiling = "static",
    width: int = 80,
    path: str | PathLike[str] | None = None,
) -> str:
    """A drawing as text; with ``path`` the same is also written as a picture (needs matplotlib).

    Args:
        what: a problem, a plan of it, or what :func:`gnaflex.search` found.
        kind: "blocks", also if not given: which key tiles (across) each query tile (down) visits, and how;
            row-major in every dilation group, one group after another. Static tiling only: dynamic tiles
            lie on no grid.
            "window": the keys that one query sees. "tiles": how many key tiles each query tile visits,
            dilation group after group on each axis.
            "strides": ``work_speedup`` over the strides of each axis, the other axes and the tiles kept.
            "front", of a search and for that alone: its Pareto front, speed-up over reach.
        query: of "window": coordinates, or a row-major token; the middle of the grid if not given.
        q_tile, kv_tile, kv_tiling: of a problem, as :func:`gnaflex.plan` takes them; not of a "window".
        width: characters in a line of the drawing (captions may be longer), and at most as many lines in a
            plane: what is larger is summarised, and the caption says what a character stands for. Planes of
            more than two axes stand side by side; equal neighbours are drawn once.
        path: the picture to write, by its suffix .png, .pdf or .svg.

    Raises:
        GNAError: an argument is of no use here, or matplotlib is missing; the message says what to write.
        OSError: the picture cannot be written.

    Example:
        >>> import gnaflex
        >>> from gnaflex.drawing import draw
        >>> print(draw(gnaflex.GNA(12, window=5), kind="window"))
        GNA(shape=(12,), window=(5,))
        query (6,) sees 5 of 12 tokens
        ····██Q██···
        Q the query  █ a key it sees  · any other
    """
    kind = _checked_kind(what, kind, query, width)
    if path is not None:
        check_path(path)
    if isinstance(what, SearchResult) or kind == "window":
        _refuse_tiles(q_tile, kv_tile)
    if isinstance(what, SearchResult):
        text = _front_text(what, width)
    elif kind == "window":
        text = _window_text(what.spec if isinstance(what, Plan) else what, query, width)
    else:
        what = _planned(what, kind, q_tile, kv_tile, kv_tiling)
        text = {"blocks": _blocks_text, "tiles": _tiles_text, "strides": _strides_text}[kind](what, width)
    if path is not None:
        picture = figure(what, kind=kind, query=query)
        _write(picture, path)
    return text


def figure(
    what: GNA | Plan | SearchResult,
    *,
    kind: Kind | None = None,
    query: int | Sequence[int] | None = None,
    q_tile: Tile | None = None,
    kv_tile: Tile | None = None,
    kv_tiling: KVTiling = "static",
) -> Figure:
    """The drawing as a matplotlib figure, to show, change or save; arguments as in :func:`draw`.

    Raises:
        GNAError: an argument is of no use here, or matplotlib is missing; the message says what to write.

    Example:
        >>> import gnaflex
        >>> from gnaflex.drawing import figure
        >>> picture = figure(gnaflex.GNA((64, 64), window=16, stride=8), kind="window")
        >>> picture.axes[0].get_xlabel()
        'axis 1'
    """
    kind = _checked_kind(what, kind, query, 80)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise GNAError("Pictures need matplotlib: pip install 'gnaflex[demo]'.") from None
    from gnaflex import figures

    if isinstance(what, SearchResult):
        return figures.front_figure(what)
    if kind == "window":
        return figures.window_figure(what.spec if isinstance(what, Plan) else what, query)
    how = _planned(what, kind, q_tile, kv_tile, kv_tiling)
    return {
        "blocks": figures.blocks_figure,
        "tiles": figures.tiles_figure,
        "strides": figures.strides_figure,
    }[kind](how)


def _checked_kind(what: Any, kind: Kind | None, query: Any, width: int) -> Kind:
    if not isinstance(what, GNA | Plan | SearchResult):
        raise GNAError(
            f"what to draw must be a GNA, a Plan or a search's result: got {type(what).__name__}. "
            "Write draw(spec)."
        )
    kind = kind or ("front" if isinstance(what, SearchResult) else "blocks")
    if kind not in get_args(Kind):
        raise GNAError(f'kind must be one of {get_args(Kind)}: got {kind!r}. Write kind="blocks".')
    if isinstance(what, SearchResult) != (kind == "front"):
        raise GNAError(
            'kind="front" is for what a search found, and for that alone: '
            f"got kind={kind!r} of a {type(what).__name__}.\n  Write draw(gnaflex.search(shape))."
        )
    if isinstance(what, SearchResult) and not what.front:
        raise GNAError(
            f"no problem qualifies, of {what.problems:,} windows and strides tried, so there is no front.\n"
            "  Write gnaflex.search(shape, block_sparse=False), or widen the bounds of sparsity."
        )
    if query is not None and kind != "window":
        raise GNAError(f'query is of use with kind="window" alone: got kind={kind!r}. Leave query out.')
    whole("width", width, 16)
    return kind


def _refuse_tiles(q_tile: Tile | None, kv_tile: Tile | None) -> None:
    if (q_tile, kv_tile) != (None, None):
        raise GNAError("a window and the front of a search have no tiles: leave q_tile and kv_tile out.")


def check_path(path: str | PathLike[str]) -> None:
    """Refuse a picture's path without a suffix, or in no folder, before anything long is done for it."""
    where, known = Path(path), ", ".join(SUFFIXES)
    if where.suffix.lower() not in SUFFIXES or where.is_dir():
        raise GNAError(f"a picture's path must end in one of {known}: got {path!s}. Use the suffix .png.")
    if not where.parent.is_dir():
        raise GNAError(f"there is no folder {str(where.parent)!r} for the picture. Make it first.")


def _planned(
    what: GNA | Plan, kind: Kind, q_tile: Tile | None, kv_tile: Tile | None, kv_tiling: KVTiling
) -> Plan:
    if isinstance(what, GNA):
        what = plan(what, q_tile, kv_tile, kv_tiling)
    elif (q_tile, kv_tile) != (None, None) or kv_tiling not in ("static", what.kv_tiling):
        raise GNAError("a Plan has its tiles: give no q_tile, kv_tile or kv_tiling, or the spec with them.")
    if kind == "blocks" and what.kv_tiling == "dynamic":
        raise GNAError(
            "dynamic key tiles lie on no grid, so there is no block map of them.\n"
            '  Write kv_tiling="static", or kind="tiles" for how many each query tile visits.'
        )
    return what


def _write(picture: Figure, path: str | PathLike[str]) -> None:
    picture.savefig(path)


# ---- as text -----------------------------------------------------------------------------------------


def _blocks_text(p: Plan, width: int) -> str:
    blocks = BlockMap(p)
    n = -(-max(blocks.shape) // width)
    pooled = blocks.pooled(n)
    if n == 1:
        marks = np.array(list(BLOCK_KINDS.values()))[pooled.argmax(2)]
        legend = "  ".join(f"{mark} {kind}" for kind, mark in reversed(BLOCK_KINDS.items()))
    else:
        marks = _shaded(1 - pooled[..., 0] / pooled.sum(2))
        legend = f"a character stands for {n} x {n} tile pairs, visited: {SHARES}"
    caption = f"{tiles_line(p)}; {blocks.shape[0]:,} down, {blocks.shape[1]:,} across"
    return "\n".join([repr(p.spec), caption, *map("".join, marks), counts_line(p, blocks), legend])


def _shaded(share: Any) -> NDArray[np.str_]:
    """Shares as SHARES says; a mean of floats may miss a bound by a little."""
    level = np.searchsorted([0, 1 / 3 + 1e-9, 2 / 3 + 1e-9, 1 - 1e-9], share)
    marks: NDArray[np.str_] = np.array(list(SHADES))[level]
    return marks


def _window_text(spec: GNA, query: int | Sequence[int] | None, width: int) -> str:
    at = coordinates(spec, query)
    planes, (own, row, column) = window_of(spec, at)
    runs = list(planes.runs(own))
    n = planes.scale(width, len(runs))
    marks = [_shaded(planes.pooled(n)) for _ in runs]
    marks[[first for first, _ in runs].index(own)][row // n, column // n] = "Q"
    lines = _side_by_side(spec.shape, runs, [list(map("".join, plane)) for plane in marks], width)
    legend = "█ a key it sees  · any other" if n == 1 else f"{_cell(planes, n)} tokens, seen: {SHARES}"
    return "\n".join([repr(spec), seen_line(spec, at, planes), *lines, f"Q the query  {legend}"])


def _cell(planes: Planes, n: int) -> str:
    return f"a character stands for {n if len(planes.rows) == 1 else f'{n} x {n}'}"


def _tiles_text(p: Plan, width: int) -> str:
    planes = visited(p)
    runs = list(planes.runs())
    digits = len(str(planes.most))
    n = planes.scale(width, len(runs))
    if len(planes.rows) <= width and len(planes.columns) * (digits + 1) <= width + 1:
        numbers = [np.outer(planes.rows, planes.columns) * planes.before[first] for first, _ in runs]
        drawn = [[" ".join(f"{x:{digits}}" for x in row) for row in plane.tolist()] for plane in numbers]
        legend = visits_line(p, planes)
    else:
        shares = [planes.pooled(n) * planes.before[first] / planes.most for first, _ in runs]
        drawn = [list(map("".join, _shaded(plane))) for plane in shares]
        of = f"{_cell(planes, n)} query tiles, of {planes.most:,} visits"
        legend = f"{visits_line(p, planes)}\n{of}: {SHARES}"
    lines = _side_by_side(tile_grid(p), runs, drawn, width)
    return "\n".join([repr(p.spec), tiles_line(p), *lines, legend])


def _side_by_side(
    shape: tuple[int, ...], runs: list[tuple[int, int]], drawn: list[list[str]], width: int
) -> list[str]:
    """Planes with titles, as many beside each other as fit."""
    if len(shape) < 3:
        return drawn[0]
    lines: list[list[str]] = []
    for run, plane in zip(runs, drawn, strict=True):
        block = [plane_title(shape, run), *plane]
        wide = max(map(len, block))
        block = [line.ljust(wide) for line in block]
        if lines and len(lines[-1][0]) + 2 + wide <= width:
            lines[-1] = [f"{left}  {right}" for left, right in zip(lines[-1], block, strict=True)]
        else:
            lines.append(block)
    return [line.rstrip() for block in lines for line in block]


def _strides_text(p: Plan, width: int) -> str:
    axes = strides_of(p)
    most = max(one.speedup for axis in axes for one in axis)
    words = (" block-sparse", " < given") if width >= 40 else ("=", "<")
    lines = [repr(p.spec), f"work_speedup over the strides of an axis; {tiles_line(p)}"]
    for at, axis in enumerate(axes):
        lines.append(f"axis {at}, window {p.spec.window[at]}")
        digits = len(str(axis[-1].stride))
        room = width - digits - 2 - len(f"{most:.2f}") - sum(map(len, words))
        for one in axis:
            note = words[0] * one.is_block_sparse + words[1] * one.is_given
            figure = f"{one.speedup:.2f}{note}"
            bar = "█" * max(round(one.speedup / most * room), 1)
            lines.append(f"{one.stride:{digits}} {bar} {figure}")
    return "\n".join(lines)


def _front_text(found: SearchResult, width: int) -> str:
    speeds = np.log([row.work_speedup for row in found.front])
    top, room = float(speeds.max()), width - 8
    step = (top - float(speeds.min())) / (FRONT_LINES - 1) or 1.0
    marks = np.full((FRONT_LINES if len(found.front) > 1 else 1, room), " ")
    for row, speed in zip(found.front, speeds.tolist(), strict=True):
        marks[round((top - speed) / step), min(round(row.reach * (room - 1)), room - 1)] = "●"
    lines = [f"{np.exp(top - at * step):6.2f} │{''.join(line)}".rstrip() for at, line in enumerate(marks)]
    ends = f"{'':8}{'0%':4}{'reach':^{room - 8}}100%"
    return "\n".join([front_line(found), *lines, f"{'':6} └{'─' * room}", ends, *front_ends(found)])
