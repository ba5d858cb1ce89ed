"""The work of a launch: which items a block takes, and which boxes and lines of keys they see.

An item is a box of the work list, or 128 text queries, for one head of one batch entry. A block takes as
many at once as it has halves. All of it is integer arithmetic, which tests compile for the CPU.
"""

from __future__ import annotations

import math
from typing import Any

import cutlass
from cutlass import Int32
from gnaflex.cuda_backend.tile_walk import Q_ROWS, SPANS, unravel


class Texts:
    """Extra tokens of a launch: per run before the grid, behind it, and of keys alone its tokens and its
    column in ``valid`` [batch, columns], how many of them are keys; whether they are queries here too, and
    as many boxes take as long as 128 of these."""

    def __init__(self, numbers: Any, keys: Any, valid: Any) -> None:
        prefix, suffix, extra, *self.columns, self.are_queries, self.rounds = numbers
        self.tokens, self.valid = (prefix, suffix, extra), valid
        self.grid = keys - prefix - suffix - extra
        behind = prefix + self.grid
        self.starts = (0, behind, behind + suffix)
        self.tiles = tuple((n + Q_ROWS - 1) // Q_ROWS for n in (prefix, suffix))

    def runs(self, batch: Any, is_text: Any) -> Any:
        """First row and number of keys of every run that an item sees by lines: a text query the grid too."""
        runs = [(self.tokens[0], cutlass.select_(is_text, self.grid, Int32(0)))]
        for start, count, column in zip(self.starts, self.tokens, self.columns, strict=True):
            runs.append((Int32(start), cutlass.max(cutlass.min(count, self.valid[batch, column]), Int32(0))))
        return runs


class Schedule:
    """What all blocks do: text queries first as they see most keys, then boxes of the work list. ``items``
    and ``text_items`` count those that a block takes together as one."""

    def __init__(self, work: Any, places: Any, texts: Any, kernel: Any) -> None:
        self.work, self.places, self.texts, self.kernel = work, places, texts, kernel
        self.items = Int32(work.shape[0] // kernel.halves)
        for count in places:
            self.items *= count
        self.text_items = Int32(0)
        if texts is not None:
            together = (texts.tiles[0] + texts.tiles[1] + kernel.halves - 1) // kernel.halves
            self.text_items = texts.are_queries * together * places[0] * places[1]
            self.items += self.text_items


def turns(schedule: Schedule, block: Any, blocks: Any) -> Any:
    """How many items a block has: every ``blocks``-th one. Blocks with a text query more than others start on
    boxes that many rounds later, as text queries take far longer."""
    if schedule.texts is None:
        return (schedule.items - block + blocks - 1) // blocks
    texts, late, rounds = schedule.text_items, schedule.text_items % blocks, schedule.texts.rounds
    boxes, room = schedule.items - texts, blocks - late
    early = cutlass.max(boxes - (block - late) + room - 1, Int32(0)) // room
    early = cutlass.select_(block < late, Int32(0), cutlass.min(rounds, early))
    after = cutlass.max(boxes - rounds * room - block + blocks - 1, Int32(0)) // blocks
    return (texts - block + blocks - 1) // blocks + early + after


def number_of(schedule: Schedule, block: Any, blocks: Any, turn: Any) -> Any:
    """Which item that is, ``turn`` of a block."""
    if schedule.texts is None:
        return block + turn * blocks
    texts, late, rounds = schedule.text_items, schedule.text_items % blocks, schedule.texts.rounds
    at, room = turn - (texts - block + blocks - 1) // blocks, blocks - late
    together = at - cutlass.select_(block < late, Int32(0), rounds)  # rounds since all blocks take boxes
    box = cutlass.select_(together < 0, at * room + block - late, rounds * room + together * blocks + block)
    return cutlass.select_(at < 0, block + turn * blocks, texts + box)


class Item:
    """Item ``number``, a box of the work list or 128 text queries, with its keys: spans per axis with the
    first axis fastest; head, batch entry, groups. CuTe carries what methods are called on; so it has none."""

    def __init__(self, schedule: Schedule, number: Any) -> None:
        kernel, work, texts = schedule.kernel, schedule.work, schedule.texts
        number, mine = number - schedule.text_items * kernel.halves, number
        at = cutlass.max(number, Int32(0))
        box, slot = at % work.shape[0], at // work.shape[0]
        self.q0, self.k0, self.keys = (
            [work[box, span, axis] for axis in reversed(range(kernel.rank))] for span in range(SPANS)
        )
        self.head, self.batch, *self.groups = unravel(slot, schedule.places[::-1])[::-1]
        self.counts = [(n + size - 1) // size for n, size in zip(self.keys, kernel.kv_box, strict=True)]
        self.boxes = math.prod(self.counts[1:], start=self.counts[0])
        self.clips = self.keys[0] % kernel.kv_box[0] != 0
        for n, size in zip(self.keys[1:], kernel.kv_box[1:], strict=True):
            self.clips = cutlass.or_(self.clips, n % size != 0)
        self.tiles = self.boxes
        if texts is not None:
            self.as_text(number < 0, mine, schedule)

    def as_text(self, is_text: Any, number: Any, schedule: Schedule) -> None:
        """What differs where there is text; ``first`` and ``end`` are rows of the sequence."""
        heads, texts = schedule.places[0], schedule.texts
        rows, halves = schedule.kernel.rows, schedule.kernel.halves
        own = texts.tiles[0] + texts.tiles[1]
        tiles = cutlass.max((own + halves - 1) // halves * halves, Int32(1))
        tile, slot = number % tiles, number // tiles
        behind = tile >= texts.tiles[0]
        first = cutlass.select_(behind, texts.starts[1] - texts.tiles[0] * Q_ROWS, Int32(0))
        self.is_text, self.is_behind, self.first = is_text, behind, first + tile * Q_ROWS
        self.end = cutlass.select_(behind, texts.starts[1] + texts.tokens[1], texts.tokens[0])
        self.head = cutlass.select_(is_text, slot % heads, self.head)
        self.batch = cutlass.select_(is_text, slot // heads, self.batch)
        self.boxes = cutlass.select_(is_text, Int32(0), self.boxes)
        self.runs = texts.runs(self.batch, is_text)
        self.lines = [(count + rows - 1) // rows for _, count in self.runs]
        if halves > 1:  # one that has no partner
            is_none = cutlass.select_(is_text, tile >= own, self.keys[0] == 0)
            self.lines = [cutlass.select_(is_none, Int32(0), one) for one in self.lines]
        self.tiles = self.boxes + self.lines[0] + self.lines[1] + self.lines[2] + self.lines[3]


class Pair:
    """Items ``2 * number`` and the next, the halves of a block, over the same key tiles: those of the first,
    the second's so many later, then the lines of both. A half without tiles is none."""

    def __init__(self, schedule: Schedule, number: Any) -> None:
        self.halves = first, second = Item(schedule, 2 * number), Item(schedule, 2 * number + 1)
        layers = (second.k0[-1] - first.k0[-1]) // schedule.kernel.kv_box[-1]
        self.skips = Int32(0), layers * math.prod(first.counts[:-1])
        self.boxes = cutlass.max(first.boxes, self.skips[1] + second.boxes)
        self.tiles = self.boxes + first.tiles - first.boxes
        self.counts = first.tiles, second.tiles
        self.present = tuple(cutlass.min(n, Int32(1)) for n in self.counts)


def sees(pair: Any, h: int, j: Any) -> Any:
    """Whether tile ``j`` of a pair is one of a half's."""
    item, at = pair.halves[h], j - pair.skips[h]
    box = cutlass.and_(at >= 0, at < item.boxes)
    line = cutlass.and_(j >= pair.boxes, j < pair.boxes + item.tiles - item.boxes)
    return cutlass.or_(box, line)


def tile_of(pair: Any, h: int, j: Any) -> Any:
    """Which one, if it is."""
    return cutlass.select_(j < pair.boxes, j - pair.skips[h], j - pair.boxes + pair.halves[h].boxes)


def key_box(item: Any, i: Any, size: Any) -> Any:
    """The first key of box ``i`` and how many are left from there on; per axis, the first axis fastest."""
    place = unravel(i, tuple(item.counts[::-1]))[::-1]
    past = [at * extent for at, extent in zip(place, size, strict=True)]
    origin = tuple(first + more for first, more in zip(item.k0, past, strict=True))
    return origin, tuple(n - more for n, more in zip(item.keys, past, strict=True))


def key_line(item: Any, i: Any, rows: int) -> Any:
    """The first row of line tile ``i``, and how many keys are left from there on in its run."""
    (start, count), before = item.runs[0], item.lines[0]
    first, left = start + i * rows, count - i * rows
    for (start, count), tiles in zip(item.runs[1:], item.lines[1:], strict=True):
        here, past = i >= before, (i - before) * rows
        first = cutlass.select_(here, start + past, first)
        left = cutlass.select_(here, count - past, left)
        before += tiles
    return first, left


def slot(item: Any, factors: Any, head: Any) -> Any:
    """Where a head's tokens lie in the mode of heads, batch entries and groups."""
    place = head * factors[0] + item.batch * factors[1]
    for at, factor in zip(item.groups, factors[2:], strict=False):  # lines know no groups
        place += at * factor
    return place
