"""The integer code of the kernels, compiled for the CPU: what a launch would load, count and store.

Work items, tiles, tensor views and output rows are the kernel's own functions. What only a GPU has is spelled
out here: TMA's zeros beyond a tensor, and the vote of a warp over which rows of a tile are keys.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Float32, Int16, Int32, Int64
from gnaflex.cuda_backend.abi import PARTS, counts
from gnaflex.cuda_backend.compile import _arguments, kernel_of
from gnaflex.cuda_backend.config import KernelConfig
from gnaflex.cuda_backend.items import (
    Item,
    Pair,
    Schedule,
    Texts,
    key_box,
    key_line,
    number_of,
    sees,
    slot,
    tile_of,
    turns,
)
from gnaflex.cuda_backend.tile_walk import Q_ROWS, SPANS, TEXTS, unravel
from gnaflex.cuda_backend.views import Grid, view

KIND, ITEM, RESULT, TILE = 0, 1, 5, 6  # columns of a log
MARKS = slice(2, 5)  # and those between: token, head and batch entry of what is loaded, -1 for nothing
COLUMNS = 7
QUERY, KEY = 1, 2  # kinds
POINTERS = {"lse": (Float32, 4), "work": (Int32, 4), "valid": (Int32, 4)}  # else tokens, 16 bytes
NUMBERS = {"q": Int64, "i": Int32, "f": Float32}


def marked(batch: int, heads: int, tokens: int) -> torch.Tensor:
    """[batch, heads, tokens, 3] int16: token, head and batch entry, the first channels of what is walked."""
    each = [torch.arange(n, dtype=torch.int16) for n in (tokens, heads, batch)]
    shape = (batch, heads, tokens)
    return torch.stack([x.view(-1, *[1] * i).expand(shape) for i, x in enumerate(each)], -1)


class Walk:
    """Called like the kernel's ``launch``, with room for a log: [entries, COLUMNS] int32.

    An item has an entry for each of its ``Q_ROWS`` rows, whose result is the row of the log-sum-exp that it
    stores (-1: none), then one for each row of its tiles, whose result is 1 if it counts as a key, and the
    number of the tile among the item's. The halves of a pair are items; tiles are brought for both.
    """

    def __init__(self, config: KernelConfig) -> None:
        self.kernel, self.config = kernel_of(config), config
        log = cute.runtime.make_ptr(Int32, 16, cute.AddressSpace.gmem, assumed_align=4)
        self.compiled = cute.compile(self.walk, *_arguments(config, self.kernel.dtype), log, Int32(1))

    def __call__(self, *numbers: float, entries: int) -> torch.Tensor:
        log = torch.zeros(entries + 1, COLUMNS, dtype=torch.int32)
        self.compiled(*self.arguments(numbers), self.pointer(log.data_ptr(), Int32, 4), Int32(entries))
        assert not log[-1].any(), f"more than {entries} entries"
        return log[log[:, KIND] > 0]

    def arguments(self, numbers: tuple[float, ...]) -> list[Any]:
        """The numbers of a launch as CuTe DSL takes them."""
        rest, given = list(numbers), []
        for part, n in zip(PARTS, counts(self.config.rank), strict=True):
            mine, rest = rest[:n], rest[n:]
            if part.name == "stream":
                given.append(cute.runtime.make_fake_stream())
            elif part.code == "Q":
                given.append(self.pointer(mine[0], *POINTERS.get(part.name, (self.kernel.dtype, 16))))
            else:
                typed = tuple(map(NUMBERS[part.code], mine))
                given.append(typed[0] if part.numbers == 1 else typed)
        assert not rest
        return given

    def pointer(self, address: float, kind: Any, alignment: int) -> Any:
        return cute.runtime.make_ptr(kind, address, cute.AddressSpace.gmem, assumed_align=alignment)

    @cute.jit
    def walk(
        self, q: cute.Pointer, k: cute.Pointer, v: cute.Pointer, o: cute.Pointer, lse: cute.Pointer,
        work: cute.Pointer, valid: cute.Pointer, stream: Any, strides: Any, sizes: Any, lengths: Any,
        steps: Any, group_steps: Any, groups: Any, texts: Any, start: Int32, blocks: Int32,
        scale_log2: Float32, log: cute.Pointer, room: Int32,
    ):  # fmt: skip
        """All items of all blocks, by the tensors that ``Attend.launch`` makes of the same arguments."""
        kernel, rank = self.kernel, self.config.rank
        batch, heads, kv_heads, queries, keys, boxes, valid_step = sizes
        mQ = kernel.tokens(cute.recast_ptr(q, dtype=Int16), batch, heads, queries, strides[0:3])
        mK = kernel.tokens(cute.recast_ptr(k, dtype=Int16), batch, kv_heads, keys, strides[3:6])
        mW = cute.make_tensor(work, cute.make_layout((boxes, SPANS, rank), stride=(SPANS * rank, rank, 1)))
        known = cute.make_tensor(valid, cute.make_layout((batch, TEXTS), stride=(valid_step, 1)))
        out = cute.make_tensor(log, cute.make_layout((room + 1, COLUMNS), stride=(COLUMNS, 1)))
        grid = (lengths, steps, group_steps, groups, start)
        self.q_views, self.k_views = (
            (view(x, Grid(*grid), kernel.D), view(x, Grid((rows,), (1,), (), (), 0), kernel.D))
            for x, rows in ((mQ, queries), (mK, keys))
        )
        self.share = heads // kv_heads
        extra = Texts(texts, keys, known) if kernel.text else None
        schedule = Schedule(mW, (heads, batch, *groups), extra, kernel)
        n = Int32(0)
        for block in cutlass.range(blocks, unroll=1):
            for turn in cutlass.range(turns(schedule, block, blocks), unroll=1):
                number = number_of(schedule, block, blocks, turn)
                if cutlass.const_expr(kernel.halves == 1):
                    item = Item(schedule, number)
                    n = self.queries(out, n, item, number, grid, (heads, queries), room)
                    for i in cutlass.range(item.tiles, unroll=1):
                        n = self.tile(out, n, (item, item.boxes, i), (item, i), number, room)
                else:
                    pair = Pair(schedule, number)
                    for h in cutlass.range_constexpr(kernel.halves):
                        if pair.present[h] == 1:
                            item = pair.halves[h]
                            n = self.queries(out, n, item, 2 * number + h, grid, (heads, queries), room)
                    for j in cutlass.range(pair.tiles, unroll=1):
                        for h in cutlass.range_constexpr(kernel.halves):
                            if sees(pair, h, j):
                                brought = pair.halves[0], pair.boxes, j
                                mine = pair.halves[h], tile_of(pair, h, j)
                                n = self.tile(out, n, brought, mine, 2 * number + h, room)

    @cute.jit
    def queries(self, out: Any, n: Int32, item: Any, number: Any, grid: Any, shape: Any, room: Any):
        """The rows of an item."""
        heads, queries = shape
        for row in cutlass.range(Q_ROWS, unroll=1):
            out[n, KIND], out[n, ITEM] = Int32(QUERY), number
            is_token, token = self.token(row, item, grid)
            stored = (item.batch * heads + item.head) * queries + token
            out[n, RESULT] = cutlass.select_(is_token, stored, Int32(-1))
            self.load_query(out, n, item, row)
            n = cutlass.min(n + 1, room)
        return n

    @cute.jit
    def tile(self, out: Any, n: Int32, brought: Any, mine: Any, number: Any, room: Any):
        """The rows of a tile: which it is among those that are brought, and among the item's own."""
        for row in cutlass.range(self.kernel.rows, unroll=1):
            out[n, KIND], out[n, ITEM], out[n, TILE] = Int32(KEY), number, mine[1]
            self.load_key(out, n, brought, row)
            self.count_key(out, n, mine, row)
            n = cutlass.min(n + 1, room)
        return n

    def token(self, *arguments: Any) -> Any:
        """The kernel's; CuTe carries what methods are called on through a loop, all but ``self``."""
        return self.kernel.token(*arguments)

    @cute.jit
    def load_query(self, out: Any, n: Int32, item: Any, row: Int32):
        """As ``bring_box_of_queries`` brings a row: boxes may have fewer than 128."""
        by_box, by_line = self.q_views
        is_text = item.is_text if self.kernel.text else Boolean(False)
        if is_text:
            if cutlass.const_expr(self.kernel.text):
                self.load(out, n, by_line, (item.first + row,), item, item.head)
        else:
            place = unravel(row, self.config.q_box)[::-1]
            at = tuple(o + p for o, p in zip(item.q0, place, strict=True))
            self.load(out, n, by_box, at, item, item.head)
            if row >= self.kernel.q_tokens:
                for c in cutlass.range_constexpr(MARKS.start, MARKS.stop):
                    out[n, c] = Int32(-1)

    @cute.jit
    def load_key(self, out: Any, n: Int32, brought: Any, row: Int32):
        """As ``bring_tile`` brings a row."""
        item, boxes, i = brought
        by_box, by_line = self.k_views
        head = item.head // self.share
        if i < boxes:
            first, _ = key_box(item, i, self.kernel.kv_box)
            inside = unravel(row, self.config.kv_box)[::-1]
            at = tuple(f + p for f, p in zip(first, inside, strict=True))
            self.load(out, n, by_box, at, item, head)
        else:
            if cutlass.const_expr(self.kernel.text):
                start, _ = key_line(item, i - boxes, self.kernel.rows)
                self.load(out, n, by_line, (start + row,), item, head)

    @cute.jit
    def count_key(self, out: Any, n: Int32, mine: Any, row: Int32):
        """As ``mask`` hides a row of a tile."""
        item, i = mine
        if i < item.boxes:
            _, left = key_box(item, i, self.kernel.kv_box)
            inside = unravel(row, self.config.kv_box)[::-1]
            is_key = Boolean(True)
            for a in cutlass.range_constexpr(self.config.rank):
                is_key = cutlass.and_(is_key, inside[a] < left[a])
            out[n, RESULT] = Int32(cutlass.select_(item.clips, is_key, Boolean(True)))
        else:
            if cutlass.const_expr(self.kernel.text):
                _, left = key_line(item, i - item.boxes, self.kernel.rows)
                out[n, RESULT] = Int32(row < left)

    @cute.jit
    def load(self, out: Any, n: Int32, viewed: Any, at: Any, item: Any, head: Int32):
        """What TMA brings for a token: its marks, or zeros (-1 here) beyond the tensor of its map."""
        x, factors = viewed
        place = slot(item, factors, head)
        inside = cutlass.and_(place >= 0, place < x.shape[2])
        for a in cutlass.range_constexpr(len(at)):
            inside = cutlass.and_(inside, cutlass.and_(at[a] >= 0, at[a] < x.shape[0][a]))
        for c in cutlass.range_constexpr(MARKS.stop - MARKS.start):
            out[n, MARKS.start + c] = Int32(-1)
            if inside:
                out[n, MARKS.start + c] = Int32(x[at, c, place])
