"""The integer code of the Hopper kernel itself, compiled for the CPU: what it would load, hide and store.

Work items, tiles, tensor views, predicates and output rows are the kernel's own functions; only TMA and the
vote over a warp are spelled out here.
"""

from __future__ import annotations

import math

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Int16, Int32
from gnaflex.cuda_backend.abi import PARTS, counts
from gnaflex.cuda_backend.compile import _arguments
from gnaflex.cuda_backend.sm90_attend import Attend, Grid, Item, Schedule, Texts, line, slot, view
from gnaflex.cuda_backend.tile_walk import Q_ROWS, SPANS, TEXTS, unravel

COLUMNS = (
    8  # of the log: kind, item, row of the tile, token, head, batch of what is loaded, token that is stored
)
QUERY, KEY = 1, 2


class Walk:
    """Called like the kernel's ``launch``; returns the log [entries, COLUMNS] of all blocks."""

    def __init__(self, config) -> None:
        self.kernel, self.config = Attend(config), config
        self.compiled = cute.compile(
            self.walk,
            *_arguments(config, self.kernel.dtype),
            cute.runtime.make_ptr(Int32, 16, cute.AddressSpace.gmem, assumed_align=4),
        )

    def __call__(self, *numbers, entries: int):
        log = torch.zeros(entries, COLUMNS, dtype=torch.int32)
        rest, given = list(numbers), []
        kinds = {"Q": None, "q": cutlass.Int64, "i": Int32, "f": cutlass.Float32}
        for part, n in zip(PARTS, counts(self.config.rank), strict=True):
            mine, rest = rest[:n], rest[n:]
            if part.name == "stream":
                import cuda.bindings.driver as cuda

                given.append(cuda.CUstream(0))
            elif part.code == "Q":
                given.append(
                    cute.runtime.make_ptr(
                        self.type_of(part.name),
                        mine[0],
                        cute.AddressSpace.gmem,
                        assumed_align=4 if part.name in ("lse", "work", "valid") else 16,
                    )
                )
            else:
                made = tuple(kinds[part.code](x) for x in mine)
                given.append(made[0] if part.numbers == 1 else made)
        self.compiled(
            *given, cute.runtime.make_ptr(Int32, log.data_ptr(), cute.AddressSpace.gmem, assumed_align=4)
        )
        n = int(log[0, -1])
        assert n <= entries
        return log[:n]

    def type_of(self, name):
        return {"lse": cutlass.Float32, "work": Int32, "valid": Int32}.get(name, self.kernel.dtype)

    @cute.jit
    def walk(
        self, q: cute.Pointer, k: cute.Pointer, v: cute.Pointer, o: cute.Pointer, lse: cute.Pointer,
        work: cute.Pointer, valid: cute.Pointer, stream: object, strides: object, sizes: object, lengths: object, steps: object,
        group_steps: object, groups: object, texts: object, start: Int32, blocks: Int32, scale_log2: cutlass.Float32,
        log: cute.Pointer,
    ):  # fmt: skip
        kernel = self.kernel
        batch, heads, kv_heads, queries, keys, boxes, valid_step = sizes
        mQ = kernel.tokens(cute.recast_ptr(q, dtype=Int16), batch, heads, queries, strides[0:3])
        mK = kernel.tokens(cute.recast_ptr(k, dtype=Int16), batch, kv_heads, keys, strides[3:6])
        rank = kernel.rank
        mW = cute.make_tensor(work, cute.make_layout((boxes, SPANS, rank), stride=(SPANS * rank, rank, 1)))
        known = cute.make_tensor(valid, cute.make_layout((batch, TEXTS), stride=(valid_step, 1)))
        out = cute.make_tensor(log, cute.make_layout((1 << 30, COLUMNS), stride=(COLUMNS, 1)))
        grid = (lengths, steps, group_steps, groups, start)
        (xQ, fQ), (xK, fK) = (view(x, Grid(*grid), kernel.D) for x in (mQ, mK))
        (lQ, gQ), (lK, gK) = (
            view(x, Grid((n,), (1,), (), (), 0), kernel.D) for x, n in ((mQ, queries), (mK, keys))
        )
        extra = Texts(texts, keys, known) if kernel.text else None
        schedule = Schedule(mW, (heads, batch, *groups), extra, kernel)
        share = heads // kv_heads
        n = Int32(0)
        for number in cutlass.range(schedule.items, unroll=1):
            item = Item(schedule, number)
            is_text = item.is_text if kernel.text else cutlass.Boolean(False)
            for row in cutlass.range(Q_ROWS, unroll=1):
                is_token, token = self.token(row, item, grid)
                out[n, 0] = Int32(QUERY)
                out[n, 1] = number
                out[n, 2] = row
                out[n, 6] = cutlass.select_(is_token, token, Int32(-1))
                if is_text:
                    if cutlass.const_expr(kernel.text):
                        self.read(out, n, lQ, (item.first + row,), (queries,), slot(item, gQ, item.head))
                else:
                    place = unravel(row, self.config.q_box)[::-1]
                    at = tuple(o + p for o, p in zip(item.q0, place, strict=True))
                    inside = cutlass.select_(row < kernel.q_tokens, Int32(0), Int32(1 << 30))
                    self.read(out, n, xQ, (at[0] + inside, *at[1:]), lengths[::-1], slot(item, fQ, item.head))
                n += 1
            for i in cutlass.range(item.tiles, unroll=1):
                for row in cutlass.range(kernel.rows, unroll=1):
                    out[n, 0] = Int32(KEY)
                    out[n, 1] = number
                    out[n, 2] = row
                    if i < item.boxes:
                        place = unravel(i, tuple(item.counts[::-1]))[::-1]
                        inside = unravel(row, self.config.kv_box)[::-1]
                        seen = row >= 0
                        for a in cutlass.range_constexpr(rank):
                            left = item.keys[a] - place[a] * kernel.kv_box[a]
                            seen = cutlass.and_(seen, inside[a] < left)
                        at = tuple(
                            o + p * size + r
                            for o, p, size, r in zip(item.k0, place, kernel.kv_box, inside, strict=True)
                        )
                        self.read(out, n, xK, at, lengths[::-1], slot(item, fK, item.head // share))
                        out[n, 6] = Int32(seen)
                    else:
                        if cutlass.const_expr(kernel.text):
                            first, left = line(item, i - item.boxes, kernel.rows)
                            self.read(out, n, lK, (first + row,), (keys,), slot(item, gK, item.head // share))
                            out[n, 6] = Int32(row < left)
                    n += 1
        out[0, COLUMNS - 1] = n

    def token(self, *arguments):
        """The kernel's; CuTe carries what methods are called on through a loop, but self."""
        return self.kernel.token(*arguments)

    @cute.jit
    def read(self, out: object, n: Int32, x: object, at: object, lengths: object, place: Int32):
        """What TMA brings for a token of a box: its own marks, zero beyond the grid."""
        inside = at[0] >= 0
        for a in cutlass.range_constexpr(len(at)):
            inside = cutlass.and_(inside, at[a] < lengths[a])
        for c in cutlass.range_constexpr(3):
            out[n, 3 + c] = Int32(-1)
        if inside:
            for c in cutlass.range_constexpr(3):
                out[n, 3 + c] = Int32(x[at, c, place])


def marked(batch, heads, tokens, head_dim, dtype, heads_last):
    """[batch, heads, tokens, head_dim] whose first channels are the bits of token, head and batch entry."""
    marks = torch.zeros(batch, heads, tokens, head_dim, dtype=torch.int16)
    marks[..., 0] = torch.arange(tokens, dtype=torch.int16)
    marks[..., 1] = torch.arange(heads, dtype=torch.int16)[:, None]
    marks[..., 2] = torch.arange(batch, dtype=torch.int16)[:, None, None]
    x = marks.view(dtype)
    return x.transpose(1, 2).contiguous().transpose(1, 2) if heads_last else x


assert math.prod((QUERY, KEY)) == 2
