"""The drawings as matplotlib figures; matplotlib is imported by the functions that draw with it."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from gnaflex.drawn import (
    BLOCK_KINDS,
    BlockMap,
    Planes,
    coordinates,
    counts_line,
    front_line,
    plane_title,
    row_line,
    seen_line,
    strides_of,
    tile_grid,
    tiles_line,
    visited,
    visits_line,
    window_of,
)
from gnaflex.planner import Plan
from gnaflex.searching import SearchResult
from gnaflex.spec import GNA
from gnaflex.window import IntArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#eef1f4", "#f2a541", "#7fb2dd", "#1f5a94")  # of these kinds
QUERY_COLOR = "#d7263d"
MAP_CELLS = 900  # a side of a block map in a PNG; more would be less than a pixel
PANELS = 24  # planes in a PNG
NAMED = 7  # problems of a front whose windows are written out


def _canvas(title: str, panels: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure and its panels, ``size`` inches each; four in a row at most."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(panels, 4)
    down = -(-panels // across)
    width, height = max(size[0] * across, 6.5), max(size[1] * down, 1) + 1.3
    picture = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(picture)
    picture.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    lines = [fill(line, int(width * 11)) for line in title.split("\n")]
    picture.suptitle("\n".join(lines), fontsize=11)
    axes = list(picture.subplots(down, across, squeeze=False).ravel())
    for ax in axes[panels:]:
        ax.set_axis_off()
    return picture, axes[:panels]


def _color_key(picture: Figure, entries: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=color, edgecolor="#8a929a", label=name) for name, color in entries.items()]
    picture.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def _label(ax: Axes, across: str, down: str) -> None:
    ax.set_xlabel(across)
    ax.set_ylabel(down)
    ax.locator_params(integer=True)


def blocks_figure(p: Plan) -> Figure:
    """Every tile pair in the colour of its kind, blended where they are smaller than a pixel."""
    blocks = BlockMap(p)
    n = -(-max(blocks.shape) // MAP_CELLS)
    pooled = blocks.pooled(n)
    down, across = blocks.shape
    title = f"{p.spec!r}\n{tiles_line(p)}\n{counts_line(p, blocks)}"
    picture, (ax,) = _canvas(title, 1, (7.5, 7.5 * min(max(down / across, 0.2), 1.6)))
    colors = np.array([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in COLORS])
    shares = pooled / pooled.sum(2, keepdims=True)
    ax.imshow(shares @ colors, interpolation="nearest", aspect="auto", extent=(0, across, down, 0))
    _label(ax, "key tile", "query tile")
    _color_key(picture, dict(zip(BLOCK_KINDS, COLORS, strict=True)))
    return picture


def _plane_panels(
    title: str, shape: tuple[int, ...], planes: Planes, own: int | None
) -> tuple[Figure, list[Axes], list[tuple[int, int]]]:
    """A panel for every run of planes; of too many, some."""
    runs = list(planes.runs(own))
    keep = {*np.linspace(0, len(runs) - 1, PANELS).astype(int).tolist()}
    runs = [run for at, run in enumerate(runs) if at in keep or run[0] == own]
    down, across = len(planes.rows), len(planes.columns)
    wide = 7.5 if len(runs) == 1 else 3.6
    picture, axes = _canvas(title, len(runs), (wide, wide * min(max(down / across, 0.1), 1.6) + 0.3))
    for ax, run in zip(axes, runs, strict=True):
        ax.set_title(plane_title(shape, run), fontsize=10)
    return picture, axes, runs


def _show(ax: Axes, plane: IntArray, rank: int, of: str, **style: Any) -> Any:
    aspect: Any = "equal" if 0.1 < plane.shape[0] / plane.shape[1] < 1.7 else "auto"
    image = ax.imshow(plane, interpolation="nearest", aspect=aspect, **style)
    _label(ax, f"{of}axis {rank - 1}", f"{of}axis {rank - 2}" if rank > 1 else "")
    if rank == 1:
        ax.set_yticks([])
    return image


def window_figure(spec: GNA, query: int | Sequence[int] | None) -> Figure:
    """The keys that one query sees, plane by plane."""
    from matplotlib.colors import ListedColormap

    at = coordinates(spec, query)
    planes, (own, row, column) = window_of(spec, at)
    title = f"{spec!r}\n{seen_line(spec, at, planes)}"
    picture, axes, runs = _plane_panels(title, spec.shape, planes, own)
    colors = ListedColormap([COLORS[0], COLORS[-1]])
    for ax, run in zip(axes, runs, strict=True):
        _show(ax, np.outer(planes.rows, planes.columns), spec.rank, "", cmap=colors, vmin=0, vmax=1)
        if run[0] == own:
            ax.plot(column, row, "s", color=QUERY_COLOR, markersize=5)
    _color_key(picture, {"the query": QUERY_COLOR, "a key it sees": COLORS[-1], "any other": COLORS[0]})
    return picture


def tiles_figure(p: Plan) -> Figure:
    """Visited key tiles per query tile as a heat map."""
    planes = visited(p)
    title = f"{p.spec!r}\n{tiles_line(p)}\n{visits_line(p, planes)}"
    picture, axes, runs = _plane_panels(title, tile_grid(p), planes, None)
    plane = np.outer(planes.rows, planes.columns)
    for ax, (first, _) in zip(axes, runs, strict=True):
        numbers = plane * planes.before[first]
        image = _show(ax, numbers, p.spec.rank, "query tile, ", cmap="viridis", vmin=0, vmax=planes.most)
    where = "bottom" if p.spec.rank == 1 else "right"
    picture.colorbar(image, ax=axes, location=where, label="key tiles visited", shrink=0.9)
    return picture


def strides_figure(p: Plan) -> Figure:
    """Bars of ``work_speedup`` over the strides of every axis."""
    rows = strides_of(p)
    title = f"{p.spec!r}\n{tiles_line(p)}\none stride changed at a time, red edge: as given"
    picture, axes = _canvas(title, len(rows), (5.0, 3.6))
    top = max(one.speedup for axis in rows for one in axis)
    for at, (ax, row) in enumerate(zip(axes, rows, strict=True)):
        colors = [COLORS[3 if one.is_block_sparse else 1] for one in row]
        bars = ax.bar([str(one.stride) for one in row], [one.speedup for one in row], color=colors)
        ax.bar_label(bars, fmt="%.2f", rotation=90, fontsize=7, padding=2)
        ax.set_ylim(0, top * 1.15)
        ax.set_xlabel(f"stride of axis {at} (window {p.spec.window[at]})")
        ax.set_ylabel("work_speedup")
        ax.tick_params(axis="x", labelsize=7)
        bars[[one.is_given for one in row].index(True)].set(edgecolor=QUERY_COLOR, linewidth=2)
    _color_key(picture, {"block-sparse": COLORS[3], "needs masks": COLORS[1]})
    return picture


def front_figure(found: SearchResult) -> Figure:
    """The front of a search: speed-up (logarithmic) over reach, some problems by name."""
    picture, (ax,) = _canvas(front_line(found), 1, (9.0, 5.5))
    reach, speed = [100 * row.reach for row in found.front], [row.work_speedup for row in found.front]
    ax.plot(reach, speed, "o-", drawstyle="steps-pre", color=COLORS[3], markersize=4, linewidth=1)
    even = np.linspace(reach[0], reach[-1], NAMED)
    for at in sorted({int(np.abs(np.array(reach) - one).argmin()) for one in even}):
        above = reach[at] < 50  # else the text stands left of the curve, below
        ax.plot(reach[at], speed[at], "o", color=QUERY_COLOR, markersize=6)
        ax.annotate(
            row_line(found.front[at]),
            (reach[at], speed[at]),
            (8, 4) if above else (-8, -4),
            textcoords="offset points",
            fontsize=8,
            ha="left" if above else "right",
            va="bottom" if above else "top",
        )
    ax.set(xlim=(0, 102), yscale="log", xlabel="reach, % of an axis (geometric mean)", ylabel="speed-up")
    ax.grid(alpha=0.3, which="both")
    return picture
