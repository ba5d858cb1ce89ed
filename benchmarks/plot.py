"""Draw what was measured, and measure nothing: ``python -m benchmarks.plot [FOLDER] [--out docs]``.

growth.json becomes growth.png, backends.json backends.png; FOLDER is by default that of this machine's
results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gnaflex.figures import COLORS, QUERY_COLOR
from gnaflex.words import FAILED, OK, USAGE

from .engine import RESULTS, folder
from .growth import CALL_S, HEAD_DIM, WALK_S, WINDOW, exponent
from .measure import environment
from .parts import dtype_on
from .results import Results, Row, load

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, DPI = 9.0, 150  # inches: letters of 8 points are 11 pixels high where a page shows it 900 wide
GREY, INK, VIOLET = "#7d868f", "#24292f", "#8e5ea2"


class Empty(Exception):
    """A results file without what a picture shows."""


def main(words: list[str] | None = None) -> int:
    """Parse, draw, say which pictures there are; the exit code is 2 where there is nothing to draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", nargs="?", type=Path, help="of results (default: those of this machine)")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="of the pictures (default docs)")
    options = parser.parse_args(words)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("pictures need matplotlib: pip install 'gnaflex[demo]'")
        return FAILED
    where = options.folder or RESULTS / folder(environment())
    if not sum(_picture(where, options.out, name, draw) for name, draw in DRAW.items()):
        print(f"nothing to draw in {where}: python -m benchmarks.run {' '.join(DRAW)}")
        return USAGE
    return OK


def _picture(where: Path, out: Path, name: str, draw: Callable[[Results], Figure]) -> bool:
    """Whether it was drawn; a line says so, or why not."""
    source, path = where / f"{name}.json", out / f"{name}.png"
    try:
        figure = draw(load(source))
    except FileNotFoundError:
        print(f"{path.name}: not drawn, there is no {source}")
        return False
    except (OSError, ValueError, Empty) as error:
        print(f"{path.name}: not drawn, {error}")
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    print(f"{path}: drawn from {source}")
    return True


def _canvas(title: str, found: Results, height: float, **panels: Any) -> tuple[Figure, Any]:
    """A figure and its panels, under a title and where and when it was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(picture)
    picture.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06, rect=(0, 0, 1, 1 - 0.55 / height))
    picture.text(0.012, 1 - 0.1 / height, title, fontsize=11.5, color=INK, va="top", weight="bold")
    picture.text(0.012, 1 - 0.33 / height, _origin(found.environment), fontsize=8.5, color=GREY, va="top")
    return picture, picture.subplots(**panels)


def _origin(facts: Row) -> str:
    device = facts.get("device", "cpu")
    name = device if device != "cpu" else f"{facts.get('cpu', 'CPU')}, {facts.get('cores', '?')} cores"
    return f"{name}, torch {facts.get('torch', '?')}, {facts.get('date', 'no date')}"


def _bare(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#c3c9cf")
    ax.tick_params(which="both", color="#c3c9cf", labelcolor=INK, labelsize=8)
    ax.grid(color=COLORS[0], linewidth=0.8)
    ax.set_axisbelow(True)


# ---- growth ------------------------------------------------------------------------------------------


MASKS = {
    "block_mask, tile-major": (COLORS[3], "o"),
    "block_mask, row-major": (COLORS[2], "s"),
    "create_block_mask, compiled": (COLORS[1], "^"),
    "create_block_mask, eager": (GREY, "D"),
}
ATTENTION = {
    'gnaflex, "cuda"': (QUERY_COLOR, "v"),
    'gnaflex, "flex"': (COLORS[3], "o"),
    'gnaflex, "sdpa"': (COLORS[2], "s"),
    "FlexAttention, create_block_mask": (COLORS[1], "^"),
    "dense, flash": (GREY, "D"),
}
KEY = 0.06  # of a panel's height: a line of its key


def growth_figure(found: Results) -> Figure:
    """Time and memory of masks and of attention over tokens, every subject with its exponents."""
    lines: dict[str, list[Row]] = {}
    for point in found.points:
        if "ms" in point:
            lines.setdefault(point["subject"], []).append(point)
    if not lines:
        raise Empty("the file has no points")
    window, device = "x".join(map(str, WINDOW)), found.environment.get("device", "cpu")
    dtype = str(dtype_on(torch.device("cpu" if device == "cpu" else "cuda"))).removeprefix("torch.")
    title = f"What a grid of N tokens costs: window {window}, one head of {HEAD_DIM} channels, {dtype}"
    picture, axes = _canvas(title, found, 7.8, nrows=2, ncols=2, sharex=True)
    for column, (of, is_mask) in zip(axes.T, (("masks", True), ("attention", False)), strict=True):
        own = {name: rows for name, rows in lines.items() if (name in MASKS) == is_mask}
        for ax, field, what in zip(column, ("ms", "peak_mib"), ("time", "peak memory"), strict=True):
            _growth_panel(ax, own, field)
            ax.set_title(f"{of}: {what} of a call", fontsize=9.5, color=INK, loc="left")
        column[-1].set_xlabel("tokens N", fontsize=8.5, color=INK)
    why = (
        f"A line ends where the next size would take more than {CALL_S:.0f} s a call, {WALK_S:.0f} s with "
        "all smaller ones and compilers, or half of the memory."
    )
    picture.supxlabel(why, fontsize=7.5, color=GREY, x=0.012, ha="left")
    return picture


def _growth_panel(ax: Axes, lines: dict[str, list[Row]], field: str) -> None:
    """A line per subject; the key stands in order of their last values."""
    known = {
        name: pairs
        for name, rows in lines.items()
        if (pairs := [(row["tokens"], row[field]) for row in rows if row.get(field)])
    }
    for name in sorted(known, key=lambda name: -known[name][-1][1]):
        slope = exponent(lines[name], field)
        label = name if slope is None else f"{name}: $N^{{{slope:.2f}}}$"
        ax.plot(*zip(*known[name], strict=True), **_style(name), markersize=4, linewidth=1.6, label=label)
    _bare(ax)
    ax.set(xscale="log", xlim=(800, 1.6e6))
    ax.xaxis.set_major_formatter(_tokens)
    _scale(ax, field, len(known))
    if known:
        ax.legend(loc="upper left", fontsize=7.5, frameon=False, labelcolor=INK, handlelength=1.8)


def _style(subject: str) -> dict[str, Any]:
    """That of the subject whose name this begins with; the markers tell what colours might not."""
    styles = (style for name, style in (MASKS | ATTENTION).items() if subject.startswith(name))
    return dict(zip(("color", "marker"), next(styles, (INK, "x")), strict=True))


def _scale(ax: Axes, field: str, keys: int) -> None:
    """Decades, or powers of 32 for bytes, and room for the key above the lines."""
    from matplotlib.ticker import LogLocator, NullLocator

    ax.set_yscale("log", **({} if field == "ms" else {"base": 2}))
    if field != "ms":
        ax.yaxis.set_major_locator(LogLocator(32))
        ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(_time if field == "ms" else _memory)
    low, high = ax.get_ylim()
    share = KEY * (keys + 0.5)
    ax.set_ylim(low, high * (high / low) ** (share / (1 - share)))


def _tokens(n: float, _: float) -> str:
    return f"{n / 1e6:g}M" if n >= 1e6 else f"{n / 1e3:g}k"


def _time(ms: float, _: float) -> str:
    return f"{ms / 1e3:g} s" if ms >= 1e3 else f"{ms:g} ms"


def _memory(mib: float, _: float) -> str:
    for unit, size in (("GiB", 2**10), ("MiB", 1), ("KiB", 2**-10)):
        if mib >= size:
            return f"{mib / size:g} {unit}"
    return f"{mib * 2**20:g} B"


# ---- backends ----------------------------------------------------------------------------------------

PROBLEMS = 12  # in a picture; a file has the most telling first
BARS = {
    'gnaflex, "cuda"': QUERY_COLOR,
    'gnaflex, "flash"': VIOLET,
    'gnaflex, "flex"': COLORS[3],
    'gnaflex, "sdpa"': COLORS[2],
    "FlexAttention, create_block_mask": COLORS[1],
    "NATTEN": GREY,
}
SHORTEST = 0.2  # speed-up that has a bar of its length; slower ones would squeeze the others
INSIDE = 1.8  # speed-up whose bar has room for its figure
BAR, HEAD = 0.16, 0.34  # inches: of a bar, and of a problem's name with the space above it


def backends_figure(found: Results) -> Figure:
    """Forward: the speed-up of every provider over the best dense attention, and what whole tiles allow."""
    known = ((facts, _bars(problem, found.timings)) for problem, facts in found.facts.items())
    groups = [(facts, bars) for facts, bars in known if bars]
    if not groups:
        raise Empty("the file has no speed-up over dense attention")
    shown = groups[:PROBLEMS]
    of = f", the first {len(shown)} of {len(groups)} problems" if len(groups) > len(shown) else ""
    title = f"Forward: speed-up over the best dense attention{of}"
    picture, ax = _canvas(title, found, sum(BAR * len(bars) + HEAD for _, bars in shown) + 1.5)
    y, names = 0.0, dict[float, str]()
    for facts, bars in shown:
        names |= _group(ax, y + HEAD, facts, bars)
        y += HEAD + BAR * len(bars)
    ax.set_ylim(y + 0.06, 0.06)
    ax.set_yticks([*names], [*names.values()])
    values = [x for facts, bars in shown for x in (facts["work_speedup"], *bars.values())]
    _speed_axis(ax, min(1.0, max(SHORTEST, min(values))), max(values))
    return picture


def _bars(problem: str, timings: Iterable[Row]) -> dict[str, float]:
    """Forward speed-ups by provider, in the order of BARS."""
    known = {
        row["provider"]: row["speedup"]
        for row in timings
        if row["problem"] == problem and row["direction"] == "forward" and "speedup" in row
    }
    order = [*BARS, *sorted(known.keys() - BARS.keys())]
    return {name: known[name] for name in order if name in known}


def _group(ax: Axes, top: float, facts: Row, bars: dict[str, float]) -> dict[float, str]:
    """A problem's bars from 1 on, on a band that ends at what is achievable; their names by y, which is in
    inches, downwards."""
    most, height = facts["work_speedup"], BAR * len(bars)
    ax.barh(top, most - 1, height, left=1, align="edge", color=COLORS[0])
    ax.plot([most, most], [top, top + height], color=INK, linewidth=1.8)
    head = f"{facts['problem']}  ({facts['tokens']:,} tokens, achievable {most:.3g})"
    ax.text(0.004, top - 0.08, head, transform=ax.get_yaxis_transform(), **_words(8))
    names = {}
    for at, (provider, value) in enumerate(bars.items()):
        middle = top + BAR * (at + 0.5)
        names[middle] = provider.removesuffix(", create_block_mask")
        _bar(ax, middle, value, BARS.get(provider, INK))
    return names


def _bar(ax: Axes, y: float, value: float, color: str) -> None:
    end = max(value, SHORTEST)
    ax.barh(y, end - 1, 0.8 * BAR, left=1, color=color)
    if value >= INSIDE:
        words: dict[str, Any] = {"fontsize": 7.5, "color": _on(color), "va": "center_baseline"}
        ax.annotate(f"{value:.3g}", (end, y), (-3, 0), textcoords="offset points", ha="right", **words)
        return
    side, align = (3, "left") if value >= 1 else (-3, "right")
    text = f"{value:.3g}" if value >= SHORTEST else f"\N{LEFTWARDS ARROW} {value:.2g}"
    ax.annotate(text, (end, y), (side, 0), textcoords="offset points", ha=align, **_words(7.5))


def _on(color: str) -> str:
    """What is readable on a colour."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(color)
    return INK if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"


def _words(size: float) -> dict[str, Any]:
    """Of text that lines must not strike through."""
    from matplotlib.patheffects import withStroke

    halo = withStroke(linewidth=2, foreground="white")
    return {"fontsize": size, "color": INK, "va": "center_baseline", "path_effects": [halo]}


def _speed_axis(ax: Axes, low: float, high: float) -> None:
    """Logarithmic, with room for the figures at the ends of the longest bars."""
    from matplotlib.ticker import LogLocator, NullLocator

    _bare(ax)
    ax.axvline(1, color=INK, linewidth=1)
    room = (high / low) ** 0.08
    ax.set(xscale="log", xlim=(low / room, high * room))
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.tick_params(axis="x", top=True, labeltop=True)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    words = "times as fast as dense attention, mask included\ngrey, to the line: what whole tiles allow"
    ax.set_xlabel(words, fontsize=8.5, color=INK)


DRAW = {"growth": growth_figure, "backends": backends_figure}

if __name__ == "__main__":
    sys.exit(main())
