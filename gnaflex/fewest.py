"""The fewest visited tiles over all tiles, for every combination of windows and strides at once; no torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from gnaflex.axis_tables import AxisTable, Side, part_of, split
from gnaflex.spec import Axis, GNAError
from gnaflex.window import IntArray

MOST_COMBINATIONS = 20_000_000  # combinations that a search holds at once


def check_combinations(counts: list[int], most: int) -> None:
    """Refuse more combinations than fit in memory; ``most`` is the longest window of the last axis."""
    if (size := math.prod(counts)) > MOST_COMBINATIONS:
        raise GNAError(
            f"too many combinations to hold: {size:,} > {MOST_COMBINATIONS:,}.\n"
            f"  Give fewer windows or strides. Write windows=range(4, {most + 1}, 4)."
        )


Bar: TypeAlias = "Callable[[Sequence[Any], str], Iterable[Any]]"


@contextmanager
def progress_bar(shown: bool) -> Iterator[Bar]:
    """A bar of rich, removed in the end, or none; call it with what to walk over and what to call that."""
    if not shown:
        yield lambda items, _: items
        return
    try:
        from rich.progress import Progress
    except ImportError as error:
        raise GNAError("a progress bar needs rich. Write pip install rich, or progress=False.") from error
    with Progress(transient=True) as bar:
        yield lambda items, what: bar.track(items, description=what)


class Classes(NamedTuple):
    """The options of an axis that see as many keys through the same window: what is left of them is the least
    number of visited tiles, [query extents, key extents, classes] (inf where none qualifies), and the option
    that visits so few, the smallest stride of several."""

    options: IntArray
    windows: IntArray
    allowed: Any
    visited: Any
    best: IntArray

    @staticmethod
    def of(
        axis: Axis, options: IntArray, sides: tuple[IntArray, IntArray], tiling: str, perfect: bool,
        each: bool, bar: Bar,
    ) -> Classes:  # fmt: skip
        """Those of ``options``, ordered by window and stride; ``each`` keeps strides apart."""
        found, first = [], 0
        for some in bar(split(axis, options, *sides), f"length {axis.length}"):
            found.append(_least(part_of(axis, some, *sides, tiling), first, len(options), perfect, each))
            first += len(some)
        labels, coded = (np.concatenate(column) for column in zip(*found, strict=True))
        labels, coded = _fewest_of(labels, coded)
        visited = (coded // len(options)).astype(float).transpose(1, 2, 0).copy()
        visited[coded.transpose(1, 2, 0) == NONE] = np.inf
        allowed = labels[:, -1].astype(float)
        return Classes(options, labels[:, 0], allowed, visited, (coded % len(options)).transpose(1, 2, 0))


NONE = np.iinfo(np.int64).max  # no option qualifies


def _least(
    table: AxisTable, first: int, options: int, perfect: bool, each: bool
) -> tuple[IntArray, IntArray]:
    """Labels of the classes in a part of a table, and visited tiles and option of the best, as one number."""
    number = np.arange(first, first + len(table.options))
    coded = table.visited * options + number[:, None, None]
    if perfect:
        coded[~table.perfect] = NONE
    columns = (table.options[:, 0], table.options[:, 1] * each, table.allowed)
    return _fewest_of(np.stack(columns, 1), coded)


def _fewest_of(labels: IntArray, coded: IntArray) -> tuple[IntArray, IntArray]:
    """The least of equal labels."""
    distinct, label = np.unique(labels, axis=0, return_inverse=True)
    order = np.argsort(label.ravel(), kind="stable")
    first = np.flatnonzero(np.diff(label.ravel()[order], prepend=-1))
    return distinct, np.minimum.reduceat(coded[order], first)


class Fewest:
    """Per combination of classes the fewest visited tiles over all tiles, axis by axis from the last one on:
    tiles share nothing between the axes but their tokens."""

    def __init__(self, classes: list[Classes], q: Side, kv: Side) -> None:
        self.classes, self.q, self.kv = classes, q, kv
        self.sizes = [len(one.allowed) for one in classes]
        self.cache: dict[Any, Any] = {}
        check_combinations(self.sizes, int(classes[-1].windows.max()))

    def all(self, bar: Bar) -> Any:
        """Those of whole problems."""
        least = np.full(math.prod(self.sizes), np.inf)
        for q in bar(self.q.fits(0, 1), "tiles"):
            np.minimum(least, self._with(0, 1, 1, q), out=least)
        return least

    def from_axis(self, a: int, q_before: int, kv_before: int) -> Any:
        """Those of the axes from ``a`` on, after extents of the given products."""
        if a == len(self.classes):
            return np.ones(1)
        fits = self.q.fits(a, q_before)
        last = a == len(self.classes) - 1
        key = (a, *fits, -1, *self.kv.fits(a, kv_before)) if last else (a, q_before, kv_before)
        if key not in self.cache:
            least = np.full(math.prod(self.sizes[a:]), np.inf)
            for q in fits:
                np.minimum(least, self._with(a, q_before, kv_before, q), out=least)
            self.cache[key] = least
        return self.cache[key]

    def _with(self, a: int, q_before: int, kv_before: int, q: int) -> Any:
        """The fewest with one query extent on an axis."""
        least = np.full(math.prod(self.sizes[a:]), np.inf)
        q_before = self.q.after(a, q_before, q)
        for kv in self.kv.fits(a, kv_before):
            rest = self.from_axis(a + 1, q_before, self.kv.after(a, kv_before, kv))
            here = np.multiply.outer(self.classes[a].visited[q, kv], rest).ravel()
            np.minimum(least, here, out=least)
        return least

    def tiles(self, which: Sequence[int]) -> list[tuple[int, int]]:
        """Per axis the extents that visit the fewest tiles, for one combination of classes."""
        out, q_before, kv_before = [], 1, 1
        for a in range(len(self.classes)):
            rest_at = (
                int(np.ravel_multi_index(tuple(which[a + 1 :]), self.sizes[a + 1 :])) if which[a + 1 :] else 0
            )
            best = (math.inf, 0, 0)
            for q, kv in itertools.product(self.q.fits(a, q_before), self.kv.fits(a, kv_before)):
                after = self.q.after(a, q_before, q), self.kv.after(a, kv_before, kv)
                rest = self.from_axis(a + 1, *after)[rest_at]
                best = min(best, (self.classes[a].visited[q, kv, which[a]] * rest, q, kv))
            out.append(best[1:])
            q_before, kv_before = self.q.after(a, q_before, best[1]), self.kv.after(a, kv_before, best[2])
        return out
