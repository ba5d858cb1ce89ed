"""Drawings of a problem and how it tiles, as text of any size and with matplotlib; no torch.

Everything comes from the ranges per axis: a kind of block, a window and a count of tiles are each a minimum
or a product over the axes. matplotlib is imported by the functions that draw with it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from os import PathLike
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from gnaflex.planner import KVTiling, Plan, plan
from gnaflex.spec import GNA, Axis, GNAError
from gnaflex.tiles import Tile, relation
from gnaflex.window import IntArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Kind = Literal["blocks", "window", "tiles", "strides"]
BLOCK_KINDS = {"empty": "·", "partial": "░", "clipped": "▒", "full": "█"}
COLORS = ("#eef1f4", "#f2a541", "#7fb2dd", "#1f5a94")  # of these kinds
QUERY_COLOR = "#d7263d"
SHADES = "·░▒▓█"
SHARES = "█ all  ▓ over 2/3  ▒ over 1/3  ░ some  · none"
MAX_PAIRS = 2**29  # of tiles in a block map: seconds
MAP_CELLS = 900  # a side of a block map in a PNG; more would be less than a pixel
ALL_STRIDES = 24  # windows up to here are drawn with every stride
PANELS = 24  # planes in a PNG


def draw(
    what: GNA | Plan,
    *,
    kind: Kind = "blocks",
    query: int | Sequence[int] | None = None,
    q_tile: Tile | None = None,
    kv_tile: Tile | None = None,
    kv_tiling: KVTiling = "static",
    width: int = 80,
    path: str | PathLike[str] | None = None,
) -> str:
    """A drawing as text; with ``path`` the same is also written as a picture (needs matplotlib).

    Args:
        what: a problem, or a plan of it.
        kind: "blocks": which key tiles (across) each query tile (down) visits, and how; row-major in every
            dilation group, one group after another. Static tiling only: dynamic tiles lie on no grid.
            "window": the keys that one query sees. "tiles": how many key tiles each query tile visits,
            dilation group after group on each axis.
            "strides": ``work_speedup`` over the strides of each axis, the other axes and the tiles kept.
        query: of "window": coordinates, or a row-major token; the middle of the grid if not given.
        q_tile, kv_tile, kv_tiling: of a problem, as :func:`gnaflex.plan` takes them; unused by "window".
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
    _check(what, kind, query, width)
    if kind == "window":
        text = _window_text(what.spec if isinstance(what, Plan) else what, query, width)
    else:
        what = _planned(what, kind, q_tile, kv_tile, kv_tiling)
        text = {"blocks": _blocks_text, "tiles": _tiles_text, "strides": _strides_text}[kind](what, width)
    if path is not None:
        picture = figure(what, kind=kind, query=query)
        _write(picture, path)
    return text


def figure(
    what: GNA | Plan,
    *,
    kind: Kind = "blocks",
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
    _check(what, kind, query, 80)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise GNAError("Pictures need matplotlib: pip install 'gnaflex[demo]'.") from None
    if kind == "window":
        return _window_figure(what.spec if isinstance(what, Plan) else what, query)
    how = _planned(what, kind, q_tile, kv_tile, kv_tiling)
    return {"blocks": _blocks_figure, "tiles": _tiles_figure, "strides": _strides_figure}[kind](how)


def _check(what: Any, kind: str, query: Any, width: int) -> None:
    if not isinstance(what, GNA | Plan):
        raise GNAError(f"what to draw must be a GNA or a Plan: got {type(what).__name__}. Write draw(spec).")
    if kind not in get_args(Kind):
        raise GNAError(f'kind must be one of {get_args(Kind)}: got {kind!r}. Write kind="blocks".')
    if query is not None and kind != "window":
        raise GNAError(f'query is of use with kind="window" alone: got kind={kind!r}. Leave query out.')
    if width < 16:
        raise GNAError(f"width must be at least 16 characters: got {width}. Write width=80.")


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
    try:
        picture.savefig(path)
    except ValueError as error:  # a suffix that matplotlib does not know
        raise GNAError(f"the picture cannot be written: {error}. Use the suffix .png.") from None


def _tiles_line(p: Plan) -> str:
    return f"query tiles {p.q_tile}, key tiles {p.kv_tile}, {p.kv_tiling}"


# ---- what is drawn: numbers from ranges --------------------------------------------------------------


class _BlockMap:
    """Kinds of the blocks of a plan, in the order of BLOCK_KINDS: the least over the axes."""

    def __init__(self, p: Plan) -> None:
        kv_tiles = math.prod(
            sum(one.groups * -(-one.length // kv) for one in axis)
            for axis, kv in zip(p.axes, p.kv_tile, strict=True)
        )
        if p.query_tiles * kv_tiles > MAX_PAIRS:
            rule = f"a block map has at most {MAX_PAIRS:,} tile pairs: got {p.query_tiles:,} x {kv_tiles:,}"
            raise GNAError(f'{rule}.\n  Give larger tiles, or write kind="tiles".')
        parts = [_axis_kinds(p, at) for at in range(p.spec.rank)]
        self.kinds = [kinds for kinds, _, _ in parts]
        self.rows = _tile_major([group for _, group, _ in parts])
        self.columns = _tile_major([group for _, _, group in parts])
        self.shape = len(self.rows[0]), len(self.columns[0])

    def pooled(self, n: int) -> IntArray:
        """How many blocks of each kind lie in every n x n blocks: [rows, columns, kinds]."""
        edges = np.arange(0, self.shape[1], n)
        return np.stack([self._pooled_row(row, n, edges) for row in range(0, self.shape[0], n)])

    def _pooled_row(self, row: int, n: int, edges: IntArray) -> IntArray:
        least = np.full((1, 1), len(BLOCK_KINDS) - 1, np.uint8)
        for kinds, rows, columns in zip(self.kinds, self.rows, self.columns, strict=True):
            least = np.minimum(least, kinds[rows[row : row + n]][:, columns])
        sums = [(least == kind).sum(0, dtype=np.int64) for kind in range(len(BLOCK_KINDS))]
        return np.stack([np.add.reduceat(one, edges) for one in sums], 1)


def _axis_kinds(p: Plan, at: int) -> tuple[NDArray[np.uint8], IntArray, IntArray]:
    """The kinds on one axis [query tiles, key tiles], and the dilation group of either; group by group."""
    kv = p.kv_tile[at]
    by_length = [(one, _kinds_of_group(one, kv)) for one in p.axes[at]]
    blocks = [kinds for one, kinds in by_length for _ in range(one.groups)]
    q_group, kv_group = (
        np.repeat(np.arange(len(blocks)), [b.shape[side] for b in blocks]) for side in (0, 1)
    )
    kinds = np.zeros((len(q_group), len(kv_group)), np.uint8)
    corner = [0, 0]
    for block in blocks:
        stop = [first + extent for first, extent in zip(corner, block.shape, strict=True)]
        kinds[corner[0] : stop[0], corner[1] : stop[1]] = block
        corner = stop
    return kinds, q_group, kv_group


def _kinds_of_group(one: Any, kv: int) -> NDArray[np.uint8]:
    tile = np.arange(-(-one.length // kv))
    start, stop = tile * kv, np.minimum(tile * kv + kv, one.length)
    (lo, hi), (all_lo, all_hi) = (np.array(ends).T[..., None] for ends in (one.needed, one.shared))
    visited = (start < hi) & (lo < stop)
    unmasked = (all_lo <= start) & (stop <= all_hi)
    full = unmasked & (stop - start == kv)
    kinds: NDArray[np.uint8] = visited.astype(np.uint8) + unmasked + full
    return kinds


def _tile_major(group: list[IntArray]) -> list[IntArray]:
    """The tile on every axis, of all tiles: dilation groups one after another, row-major in each."""
    tiles = [grid.ravel() for grid in np.meshgrid(*(np.arange(len(g)) for g in group), indexing="ij")]
    order = np.lexsort([g[tile] for g, tile in zip(group, tiles, strict=True)][::-1])
    return [tile[order] for tile in tiles]


class _Planes(NamedTuple):
    """A product over the axes: planes of the last two, times one factor for each place on those before."""

    before: IntArray
    rows: IntArray
    columns: IntArray

    @classmethod
    def of(cls, factors: Sequence[IntArray]) -> _Planes:
        """From one factor per axis; a single axis is a plane of one row."""
        *before, rows, columns = (np.ones(1, np.int64), *factors) if len(factors) < 2 else factors
        return cls(_outer(before), rows, columns)

    def runs(self, at: int | None = None) -> Iterator[tuple[int, int]]:
        """Planes first to last that are equal and not empty; plane ``at`` stands alone."""
        alone = [] if at is None else [at, at + 1]
        starts = sorted({0, *alone, *(np.flatnonzero(np.diff(self.before)) + 1).tolist()})
        for start, stop in zip(starts, [*starts[1:], len(self.before)], strict=True):
            if start < stop and self.before[start]:
                yield start, stop - 1

    @property
    def most(self) -> int:
        """The largest entry."""
        return math.prod(int(part.max()) for part in self)

    def scale(self, width: int, planes: int) -> int:
        """The least n for which so many planes of n x n places a character fit, three beside each other."""
        beside = min(planes, 3)
        room = (width - 2 * (beside - 1)) // beside
        return -(-max(len(self.rows), len(self.columns)) // room)

    def pooled(self, n: int) -> NDArray[np.float64]:
        """The means of n x n places of a plane whose factor is one."""
        return np.outer(_means(self.rows, n), _means(self.columns, n))


def _outer(factors: Sequence[IntArray]) -> IntArray:
    product = np.ones(1, np.int64)
    for factor in factors:
        product = np.outer(product, factor).ravel()
    return product


def _means(values: IntArray, n: int) -> NDArray[np.float64]:
    edges = np.arange(0, len(values), n)
    means: NDArray[np.float64] = np.add.reduceat(values, edges) / np.diff(edges, append=len(values))
    return means


def _coordinates(spec: GNA, query: int | Sequence[int] | None) -> tuple[int, ...]:
    if query is None:
        return tuple(length // 2 for length in spec.shape)
    try:
        at = tuple(map(operator.index, query)) if isinstance(query, Sequence) else operator.index(query)
        if isinstance(at, int):
            return tuple(int(x) for x in np.unravel_index(at, spec.shape))
        if len(at) == spec.rank and all(0 <= x < n for x, n in zip(at, spec.shape, strict=True)):
            return at
    except (TypeError, ValueError):
        pass
    middle = tuple(length // 2 for length in spec.shape)
    raise GNAError(f"query must be a token of the grid {spec.shape}: got {query!r}. Write query={middle}.")


def _seen(axis: Axis, x: int) -> IntArray:
    """1 where the query at ``x`` sees the key, 0 elsewhere."""
    group, place = x % axis.dilation, x // axis.dilation
    pairs = relation(axis.group_length(group), axis)
    keys = np.zeros(axis.length, np.int64)
    keys[group + np.arange(pairs.lo[place], pairs.hi[place]) * axis.dilation] = 1
    return keys


def _window(spec: GNA, query: tuple[int, ...]) -> tuple[_Planes, tuple[int, int, int]]:
    """1 at the keys that a query sees; and its plane, row and column."""
    *before, row, column = (0, *query) if spec.rank == 1 else query
    at = int(np.ravel_multi_index(before, spec.shape[:-2])) if before else 0
    return _Planes.of(list(map(_seen, spec.axes, query))), (at, row, column)


def _visited(p: Plan) -> _Planes:
    """Key tiles that every query tile visits."""
    return _Planes.of([np.concatenate([np.tile(one.visited, one.groups) for one in axis]) for axis in p.axes])


class _Stride(NamedTuple):
    stride: int
    speedup: float
    is_block_sparse: bool
    is_given: bool


def _strides(p: Plan) -> list[list[_Stride]]:
    """Axis by axis what other strides would give."""
    return [[_with_stride(p, at, s) for s in _choices(axis)] for at, axis in enumerate(p.spec.axes)]


def _choices(axis: Axis) -> list[int]:
    if axis.window <= ALL_STRIDES:
        return list(range(1, axis.window + 1))
    rounds = {a << b for a in (1, 3) for b in range(axis.window.bit_length())}
    return sorted({s for s in rounds if s < axis.window} | {axis.stride, axis.window})


def _with_stride(p: Plan, at: int, stride: int) -> _Stride:
    spec = p.spec
    strides = (*spec.stride[:at], stride, *spec.stride[at + 1 :])
    other = replace(p, spec=GNA(spec.shape, spec.window, strides, spec.dilation, spec.is_causal))
    return _Stride(stride, other.work_speedup, other.is_block_sparse, stride == spec.stride[at])


# ---- as text -----------------------------------------------------------------------------------------


def _blocks_text(p: Plan, width: int) -> str:
    blocks = _BlockMap(p)
    n = -(-max(blocks.shape) // width)
    pooled = blocks.pooled(n)
    if n == 1:
        marks = np.array(list(BLOCK_KINDS.values()))[pooled.argmax(2)]
        legend = "  ".join(f"{mark} {kind}" for kind, mark in reversed(BLOCK_KINDS.items()))
    else:
        marks = _shaded(1 - pooled[..., 0] / pooled.sum(2))
        legend = f"a character stands for {n} x {n} tile pairs, visited: {SHARES}"
    caption = f"{_tiles_line(p)}; {blocks.shape[0]:,} down, {blocks.shape[1]:,} across"
    return "\n".join([repr(p.spec), caption, *map("".join, marks), _counts_line(p, blocks), legend])


def _counts_line(p: Plan, blocks: _BlockMap) -> str:
    kinds = f"{p.full_tiles:,} full, {p.clipped_tiles:,} clipped, {p.partial_tiles:,} partial"
    return f"{p.touched_tiles:,} of {math.prod(blocks.shape):,} tile pairs visited: {kinds}"


def _shaded(share: Any) -> NDArray[np.str_]:
    """Shares as SHARES says; a mean of floats may miss a bound by a little."""
    level = np.searchsorted([0, 1 / 3 + 1e-9, 2 / 3 + 1e-9, 1 - 1e-9], share)
    marks: NDArray[np.str_] = np.array(list(SHADES))[level]
    return marks


def _window_text(spec: GNA, query: int | Sequence[int] | None, width: int) -> str:
    at = _coordinates(spec, query)
    planes, (own, row, column) = _window(spec, at)
    runs = list(planes.runs(own))
    n = planes.scale(width, len(runs))
    marks = [_shaded(planes.pooled(n)) for _ in runs]
    marks[[first for first, _ in runs].index(own)][row // n, column // n] = "Q"
    lines = _side_by_side(spec.shape, runs, [list(map("".join, plane)) for plane in marks], width)
    legend = "█ a key it sees  · any other" if n == 1 else f"{_cell(planes, n)} tokens, seen: {SHARES}"
    return "\n".join([repr(spec), _seen_line(spec, at, planes), *lines, f"Q the query  {legend}"])


def _seen_line(spec: GNA, at: tuple[int, ...], planes: _Planes) -> str:
    return f"query {at} sees {math.prod(int(part.sum()) for part in planes):,} of {spec.num_tokens:,} tokens"


def _cell(planes: _Planes, n: int) -> str:
    return f"a character stands for {n if len(planes.rows) == 1 else f'{n} x {n}'}"


def _tiles_text(p: Plan, width: int) -> str:
    planes = _visited(p)
    runs = list(planes.runs())
    digits = len(str(planes.most))
    n = planes.scale(width, len(runs))
    if len(planes.rows) <= width and len(planes.columns) * (digits + 1) <= width + 1:
        numbers = [np.outer(planes.rows, planes.columns) * planes.before[first] for first, _ in runs]
        drawn = [[" ".join(f"{x:{digits}}" for x in row) for row in plane.tolist()] for plane in numbers]
        legend = _visits_line(p, planes)
    else:
        shares = [planes.pooled(n) * planes.before[first] / planes.most for first, _ in runs]
        drawn = [list(map("".join, _shaded(plane))) for plane in shares]
        of = f"{_cell(planes, n)} query tiles, of {planes.most:,} visits"
        legend = f"{_visits_line(p, planes)}\n{of}: {SHARES}"
    lines = _side_by_side(_grid(p), runs, drawn, width)
    return "\n".join([repr(p.spec), _tiles_line(p), *lines, legend])


def _visits_line(p: Plan, planes: _Planes) -> str:
    least = math.prod(int(part.min()) for part in planes)
    mean = p.touched_tiles / p.query_tiles
    return f"key tiles that a query tile visits: {least:,} to {planes.most:,}, mean {mean:,.1f}"


def _grid(p: Plan) -> tuple[int, ...]:
    """Query tiles per axis."""
    return tuple(sum(one.groups * len(one.start) for one in axis) for axis in p.axes)


def _title(shape: tuple[int, ...], run: tuple[int, int]) -> str:
    """Which planes a drawing stands for."""
    if len(shape) < 3:
        return ""
    places = [np.unravel_index(at, shape[:-2]) for at in run]
    first, last = (str(tuple(map(int, at)) if len(at) > 1 else int(at[0])) for at in places)
    return f"plane {first}" if first == last else f"planes {first}-{last}"


def _side_by_side(
    shape: tuple[int, ...], runs: list[tuple[int, int]], drawn: list[list[str]], width: int
) -> list[str]:
    """Planes with titles, as many beside each other as fit."""
    if len(shape) < 3:
        return drawn[0]
    lines: list[list[str]] = []
    for run, plane in zip(runs, drawn, strict=True):
        block = [_title(shape, run), *plane]
        wide = max(map(len, block))
        block = [line.ljust(wide) for line in block]
        if lines and len(lines[-1][0]) + 2 + wide <= width:
            lines[-1] = [f"{left}  {right}" for left, right in zip(lines[-1], block, strict=True)]
        else:
            lines.append(block)
    return [line.rstrip() for block in lines for line in block]


def _strides_text(p: Plan, width: int) -> str:
    axes = _strides(p)
    most = max(one.speedup for axis in axes for one in axis)
    lines = [repr(p.spec), f"work_speedup over the strides of an axis; {_tiles_line(p)}"]
    for at, axis in enumerate(axes):
        lines.append(f"axis {at}, window {p.spec.window[at]}")
        digits = len(str(axis[-1].stride))
        for one in axis:
            bar = "█" * max(round(one.speedup / most * max(width - digits - 29, 8)), 1)
            note = " block-sparse" * one.is_block_sparse + " < given" * one.is_given
            lines.append(f"{one.stride:{digits}} {bar} {one.speedup:.2f}{note}")
    return "\n".join(lines)


# ---- with matplotlib ---------------------------------------------------------------------------------


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


def _blocks_figure(p: Plan) -> Figure:
    blocks = _BlockMap(p)
    n = -(-max(blocks.shape) // MAP_CELLS)
    pooled = blocks.pooled(n)
    down, across = blocks.shape
    title = f"{p.spec!r}\n{_tiles_line(p)}\n{_counts_line(p, blocks)}"
    picture, (ax,) = _canvas(title, 1, (7.5, 7.5 * min(max(down / across, 0.2), 1.6)))
    colors = np.array([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in COLORS])
    shares = pooled / pooled.sum(2, keepdims=True)
    ax.imshow(shares @ colors, interpolation="nearest", aspect="auto", extent=(0, across, down, 0))
    _label(ax, "key tile", "query tile")
    _color_key(picture, dict(zip(BLOCK_KINDS, COLORS, strict=True)))
    return picture


def _plane_panels(
    title: str, shape: tuple[int, ...], planes: _Planes, own: int | None
) -> tuple[Figure, list[Axes], list[tuple[int, int]]]:
    """A panel for every run of planes; of too many, some."""
    runs = list(planes.runs(own))
    keep = {*np.linspace(0, len(runs) - 1, PANELS).astype(int).tolist()}
    runs = [run for at, run in enumerate(runs) if at in keep or run[0] == own]
    down, across = len(planes.rows), len(planes.columns)
    wide = 7.5 if len(runs) == 1 else 3.6
    picture, axes = _canvas(title, len(runs), (wide, wide * min(max(down / across, 0.1), 1.6) + 0.3))
    for ax, run in zip(axes, runs, strict=True):
        ax.set_title(_title(shape, run), fontsize=10)
    return picture, axes, runs


def _show(ax: Axes, plane: IntArray, rank: int, of: str, **style: Any) -> Any:
    aspect: Any = "equal" if 0.1 < plane.shape[0] / plane.shape[1] < 1.7 else "auto"
    image = ax.imshow(plane, interpolation="nearest", aspect=aspect, **style)
    _label(ax, f"{of}axis {rank - 1}", f"{of}axis {rank - 2}" if rank > 1 else "")
    if rank == 1:
        ax.set_yticks([])
    return image


def _window_figure(spec: GNA, query: int | Sequence[int] | None) -> Figure:
    from matplotlib.colors import ListedColormap

    at = _coordinates(spec, query)
    planes, (own, row, column) = _window(spec, at)
    title = f"{spec!r}\n{_seen_line(spec, at, planes)}"
    picture, axes, runs = _plane_panels(title, spec.shape, planes, own)
    colors = ListedColormap([COLORS[0], COLORS[-1]])
    for ax, run in zip(axes, runs, strict=True):
        _show(ax, np.outer(planes.rows, planes.columns), spec.rank, "", cmap=colors, vmin=0, vmax=1)
        if run[0] == own:
            ax.plot(column, row, "s", color=QUERY_COLOR, markersize=5)
    _color_key(picture, {"the query": QUERY_COLOR, "a key it sees": COLORS[-1], "any other": COLORS[0]})
    return picture


def _tiles_figure(p: Plan) -> Figure:
    planes = _visited(p)
    title = f"{p.spec!r}\n{_tiles_line(p)}\n{_visits_line(p, planes)}"
    picture, axes, runs = _plane_panels(title, _grid(p), planes, None)
    plane = np.outer(planes.rows, planes.columns)
    for ax, (first, _) in zip(axes, runs, strict=True):
        numbers = plane * planes.before[first]
        image = _show(ax, numbers, p.spec.rank, "query tile, ", cmap="viridis", vmin=0, vmax=planes.most)
    where = "bottom" if p.spec.rank == 1 else "right"
    picture.colorbar(image, ax=axes, location=where, label="key tiles visited", shrink=0.9)
    return picture


def _strides_figure(p: Plan) -> Figure:
    rows = _strides(p)
    title = f"{p.spec!r}\n{_tiles_line(p)}\none stride changed at a time, red edge: as given"
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
