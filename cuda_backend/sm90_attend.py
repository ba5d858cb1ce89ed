"""Forward attention on Hopper (sm_90a): a box of queries over boxes of keys, straight from row-major tokens.

One block has 128 query rows and three warp groups. A producer warp brings boxes of Q, K and V into shared
memory by TMA, at any token as origin; two consumer groups of 64 rows each compute

    S = Q K^T;  m, l, P = softmax(S), running;  O = O * correction + P V

with S of the next tile on the tensor cores while P V of this one is. The groups take turns at issuing these
(FlashAttention-3, section 3.1), so that one's softmax runs while the other's products do. Outputs leave
through shared memory, row by row, as only the token's own coordinates say whether a row exists.

Extra (text) tokens lie before and behind the grid in the same sequence. Their keys come as line tiles: rows
of the whole sequence, by maps of rank 3, behind the boxes in the same loop; their queries are further work
items, 128 rows each, over line tiles of everything.

Barriers, per stage and shared by both groups: full (TMA's bytes), empty (one arrival per consumer thread).
Tile ``n`` of a block, counted over all its work, is in stage ``n % stages``, phase ``n // stages % 2``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.memory
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from gnaflex.cuda_backend.config import KernelConfig
from gnaflex.cuda_backend.tile_walk import Q_ROWS, SPANS, TEXTS, unravel

GROUP = 128  # threads of a warp group
CONSUMERS = 2 * GROUP
THREADS = CONSUMERS + GROUP
PRODUCER_WARP = CONSUMERS // 32
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240  # 128 * 24 + 256 * 240 <= 65,536
EPILOGUE_BARRIER = 1  # and the next, one for each consumer group
TURN_BARRIER = 3  # and the next: whose turn it is to issue matrix products
LN_2 = math.log(2)


# ---- views of row-major tokens -----------------------------------------------------------------------


@cute.jit
def _gcd(a: Int64, b: Int64) -> Int64:
    while b != 0:
        a, b = b, a % b
    return a


def _apart(number: Any, stride: Any) -> Int64:
    """A stride, or 0 where there is just one to stride over (which may carry any number)."""
    return Int64(cutlass.select_(number == 1, Int64(0), Int64(stride)))


class Grid:
    """The tokens of the dilation groups of a launch, per axis with the last axis fastest: tokens of a group,
    rows of the sequence from one to the next, and from one group to the next, the number of groups."""

    def __init__(self, lengths: Any, steps: Any, group_steps: Any, groups: Any, start: Any) -> None:
        self.lengths, self.steps, self.group_steps, self.groups = lengths, steps, group_steps, groups
        self.start = start  # the row of the first token of the first group


def view(x: cute.Tensor, grid: Grid, head_dim: int) -> tuple[cute.Tensor, tuple[Int32, ...]]:
    """[batch, heads, rows, head_dim] as (axes, head_dim, L), and what head, batch and group each count in L.

    CuTe folds modes by the first stride instead of their gcd (4.8.1), so L is folded here: one mode whose
    stride is the gcd of those of heads, batch and dilation groups.
    """
    shape, stride = x.shape, x.stride
    token = Int64(stride[2])
    apart = [_apart(shape[1], stride[1]), _apart(shape[0], stride[0])]
    apart += [_apart(n, step * token) for n, step in zip(grid.groups, grid.group_steps, strict=True)]
    unit = apart[0]
    for one in apart[1:]:
        unit = _gcd(unit, one)
    unit = cutlass.select_(unit == 0, Int64(head_dim), unit)
    factors = tuple(Int32(one // unit) for one in apart)
    counts = (shape[1], shape[0], *grid.groups)
    extent = Int32(1)
    for count, factor in zip(counts, factors, strict=True):
        extent += (count - 1) * factor
    axes = tuple(reversed(grid.lengths))
    strides = tuple(cute.assume(Int64(step) * token, divby=8) for step in reversed(grid.steps))
    start = cute.assume(Int64(grid.start) * token, divby=8)
    layout = cute.make_layout((axes, head_dim, extent), stride=(strides, 1, cute.assume(unit, divby=8)))
    return cute.make_tensor(x.iterator + start, layout), factors


def _transposed(x: cute.Tensor) -> cute.Tensor:
    return cute.make_tensor(x.iterator, cute.select(x.layout, mode=[1, 0, 2]))


def _box(
    atom: Any, tensor: Any, origin: Any, slot: Any, smem: Any, box: Any, head_dim: int, rows_first: bool
) -> Any:
    """Destination and source of the copy of a box; ``origin`` and ``box`` with the first axis fastest."""
    at: Any = (origin, 0)
    tile: Any = (box, head_dim)
    zero: Any = ((0,) * len(box), 0)
    if not rows_first:
        at, tile, zero = at[::-1], tile[::-1], zero[::-1]
    source = cute.local_tile(cute.domain_offset(at, tensor[None, None, slot]), tile, zero)
    return cpasync.tma_partition(
        atom, 0, cute.make_layout(1), cute.group_modes(smem, 0, 2), cute.group_modes(source, 0, 2)
    )


# ---- softmax in registers ----------------------------------------------------------------------------


@cute.jit
def hide(S: cute.Tensor, words: Any, columns: cutlass.Constexpr) -> None:
    """-inf where a key is none: bit ``c`` of the words says whether column ``c`` of the scores is one."""
    shift = cute.arch.lane_idx() % 4 * 2  # this thread's columns are 8 j + shift and the next
    for j in cutlass.range_constexpr(columns // 8):
        word = words[8 * j // 32] >> (shift + 8 * j % 32)
        for v in cutlass.range_constexpr(2):
            is_key = (word >> v) & 1 != 0
            for r in cutlass.range_constexpr(2):
                S[v, r, j] = cutlass.select_(is_key, S[v, r, j], -Float32.inf)


def key_words(left: Any, box: cutlass.Constexpr) -> Any:
    """Which rows of a tile are keys when ``left`` are left on every axis, as bits; the same in all lanes."""
    lane = cute.arch.lane_idx()
    words = []
    for first in range(0, math.prod(box), 32):
        place = unravel(lane + first, box)
        is_key = place[0] < left[0]
        for at, room in zip(place[1:], left[1:], strict=True):
            is_key = cutlass.and_(is_key, at < room)
        words.append(cute.arch.vote_ballot_sync(is_key))
    return words


def _exp2(x: Any) -> Any:
    """In PTX, so that it stays before the wait for P V that stands behind it."""
    return cute.arch.inline_ptx(
        "ex2.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x]
    )


def _settle(total: cute.Tensor) -> None:
    """Everything before here is done before anything behind: a branch on the sums, which are never negative.
    Else ptxas (13.4) moves the wait for P V in front of the exponentials, and the two do not overlap."""
    for r in range(2):
        cute.arch.inline_ptx(
            "{ .reg .pred p; setp.lt.f32 p, {$r0}, 0f00000000; @p trap; }", read_only_args=[total[r]]
        )


@cute.jit
def softmax(
    S: cute.Tensor,
    top: cute.Tensor,
    total: cute.Tensor,
    change: cute.Tensor,
    scale: Float32,
    columns: cutlass.Constexpr,
) -> None:
    """Scores to weights in place; the running maximum ``top`` and sum ``total`` of both rows of a thread
    follow, and ``change`` is what all before must be multiplied by. ``total`` is this thread's share."""
    for r in cutlass.range_constexpr(2):
        most = [top[r], S[0, r, 0]]
        for j in cutlass.range_constexpr(columns // 8):
            for v in cutlass.range_constexpr(2):
                most[v] = cute.arch.fmax(most[v], S[v, r, j])
        new = cute.arch.fmax(most[0], most[1])
        new = cute.arch.fmax(new, cute.arch.shuffle_sync_bfly(new, offset=1))
        new = cute.arch.fmax(new, cute.arch.shuffle_sync_bfly(new, offset=2))
        change[r] = _exp2((top[r] - new) * scale)
        top[r] = new
        shift = -new * scale
        sums = [Float32(0), Float32(0)]
        for j in cutlass.range_constexpr(columns // 8):
            for v in cutlass.range_constexpr(2):
                weight = _exp2(S[v, r, j] * scale + shift)
                S[v, r, j] = weight
                sums[v] = sums[v] + weight
        total[r] = total[r] * change[r] + sums[0] + sums[1]


# ---- barriers ----------------------------------------------------------------------------------------


class Barriers(NamedTuple):
    """Where the barriers of a block are; those of keys and values have one per stage."""

    q_full: Any
    q_empty: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any


def barriers(base: Any, stages: int) -> Barriers:
    """From the address of the first of 2 + 4 * stages."""
    return Barriers(base, base + 1, *(base + 2 + i * stages for i in range(4)))


def init(bars: Barriers, stages: int) -> None:
    """By one thread: TMA alone arrives at full ones, every consumer thread at empty ones."""
    for full, empty, number in zip(bars[::2], bars[1::2], (1, stages, stages), strict=True):
        for stage in range(number):
            cute.arch.mbarrier_init(full + stage, 1)
            cute.arch.mbarrier_init(empty + stage, CONSUMERS)


# ---- the work ----------------------------------------------------------------------------------------


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
    """What all blocks do: items, text queries first as they see most keys, then boxes of the work list."""

    def __init__(self, work: Any, places: Any, texts: Any, kernel: Any) -> None:
        self.work, self.places, self.texts, self.kernel = work, places, texts, kernel
        self.items = Int32(work.shape[0])
        for count in places:
            self.items *= count
        self.text_items = Int32(0)
        if texts is not None:
            self.text_items = texts.are_queries * (texts.tiles[0] + texts.tiles[1]) * places[0] * places[1]
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
        number, mine = number - schedule.text_items, number
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
        heads, texts, rows = schedule.places[0], schedule.texts, schedule.kernel.rows
        tiles = cutlass.max(texts.tiles[0] + texts.tiles[1], Int32(1))
        tile, slot = number % tiles, number // tiles
        behind = tile >= texts.tiles[0]
        first = cutlass.select_(behind, texts.starts[1] - texts.tiles[0] * Q_ROWS, Int32(0))
        self.is_text, self.first = is_text, first + tile * Q_ROWS
        self.end = cutlass.select_(behind, texts.starts[1] + texts.tokens[1], texts.tokens[0])
        self.head = cutlass.select_(is_text, slot % heads, self.head)
        self.batch = cutlass.select_(is_text, slot // heads, self.batch)
        self.boxes = cutlass.select_(is_text, Int32(0), self.boxes)
        self.runs = texts.runs(self.batch, is_text)
        self.lines = [(count + rows - 1) // rows for _, count in self.runs]
        self.tiles = self.boxes + self.lines[0] + self.lines[1] + self.lines[2] + self.lines[3]


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


# ---- the kernel --------------------------------------------------------------------------------------


class Maps(NamedTuple):
    """Copy atoms and tensors of queries, keys and values, and what head, batch and group count in each."""

    q: Any
    k: Any
    v: Any


class Attend:
    """The kernel of a configuration."""

    def __init__(self, config: KernelConfig) -> None:
        self.config = config
        self.dtype = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}[config.dtype]
        self.D, self.rows, self.stages, self.rank, self.text = (
            config.head_dim,
            config.kv_rows,
            config.stages,
            config.rank,
            config.text,
        )
        self.q_box, self.kv_box = config.q_box[::-1], config.kv_box[::-1]  # the first axis fastest, as CuTe's
        self.q_tokens = math.prod(self.q_box)

    @cute.jit
    def launch(
        self,
        q: cute.Pointer,
        k: cute.Pointer,
        v: cute.Pointer,
        o: cute.Pointer,
        lse: cute.Pointer,
        work: cute.Pointer,
        valid: cute.Pointer,
        stream: cuda.CUstream,
        strides: Any,
        sizes: Any,
        lengths: Any,
        steps: Any,
        group_steps: Any,
        groups: Any,
        texts: Any,
        start: Int32,
        blocks: Int32,
        scale_log2: Float32,
    ) -> None:
        """Attention of [batch, heads, rows, head_dim] over the boxes of ``work`` and the extra tokens; what
        the arguments mean is said in abi.py."""
        batch, heads, kv_heads, queries, keys, boxes, valid_step = sizes
        mQ, mK, mV, mO = (
            self.tokens(x, batch, number, rows, strides[3 * i : 3 * i + 3])
            for i, (x, number, rows) in enumerate(
                ((q, heads, queries), (k, kv_heads, keys), (v, kv_heads, keys), (o, heads, queries))
            )
        )
        shape = (batch, heads, queries)
        mL = cute.make_tensor(lse, cute.make_layout(shape, stride=(Int64(heads) * queries, queries, 1)))
        mW = cute.make_tensor(
            work, cute.make_layout((boxes, SPANS, self.rank), stride=(SPANS * self.rank, self.rank, 1))
        )
        counts = cute.make_tensor(valid, cute.make_layout((batch, TEXTS), stride=(valid_step, 1)))
        kind = warpgroup.SmemLayoutAtomKind
        by_row, by_channel = (
            warpgroup.make_smem_layout_atom(a, self.dtype) for a in (kind.K_SW128, kind.MN_SW128)
        )
        lQ = cute.tile_to_shape(by_row, (Q_ROWS, self.D), order=(0, 1))
        lQ_box = cute.tile_to_shape(by_row, (self.q_tokens, self.D), order=(0, 1))
        lK = cute.tile_to_shape(by_row, (self.rows, self.D, self.stages), order=(0, 1, 2))
        lV = cute.tile_to_shape(by_channel, (self.D, self.rows, self.stages), order=(1, 0, 2))
        grid = Grid(lengths, steps, group_steps, groups, start)
        smem = (lQ_box, lK, lV)
        by_box = self.maps((mQ, mK, mV), (grid, grid), smem, self.q_box, self.kv_box)
        by_line = None
        if cutlass.const_expr(self.text):
            whole = tuple(Grid((n,), (1,), (), (), 0) for n in (queries, keys))
            by_line = self.maps((mQ, mK, mV), whole, (lQ, lK, lV), (Q_ROWS,), (self.rows,))
        rows, channels = OperandMajorMode.K, OperandMajorMode.MN
        source = warpgroup.OperandSource
        qk, pv = (
            cute.make_tiled_mma(warpgroup.MmaF16BF16Op(self.dtype, Float32, shape, a, rows, b), (2, 1, 1))
            for shape, a, b in (
                ((64, self.rows, 16), source.SMEM, rows),
                ((64, self.D, 16), source.RMEM, channels),
            )
        )
        self.kernel(
            qk, pv, by_box, by_line, lQ, lK, lV, mO, mL, mW, counts,
            (lengths, steps, group_steps, groups, start), texts, keys, scale_log2, heads // kv_heads,
        ).launch(grid=(blocks, 1, 1), block=(THREADS, 1, 1), stream=stream, min_blocks_per_mp=1)  # fmt: skip

    def tokens(self, x: Any, batch: Any, heads: Any, rows: Any, strides: Any) -> cute.Tensor:
        """[batch, heads, rows, head_dim] at a pointer."""
        by = tuple(cute.assume(one, divby=8) for one in strides)
        return cute.make_tensor(x, cute.make_layout((batch, heads, rows, self.D), stride=(*by, 1)))

    def maps(self, tensors: Any, grids: Any, smem: Any, q_box: Any, kv_box: Any) -> Maps:
        """The tensor maps that bring boxes of these tensors into these layouts."""
        load = cpasync.CopyBulkTensorTileG2SOp()
        (xQ, fQ), (xK, fK), (xV, fV) = (
            view(x, grid, self.D) for x, grid in zip(tensors, (grids[0], grids[1], grids[1]), strict=True)
        )
        lQ, lK, lV = smem
        return Maps(
            (*cpasync.make_tiled_tma_atom(load, xQ, lQ, (q_box, self.D)), fQ),
            (*cpasync.make_tiled_tma_atom(load, xK, lK, (kv_box, self.D)), fK),
            (*cpasync.make_tiled_tma_atom(load, _transposed(xV), lV, (self.D, kv_box)), fV),
        )

    @cute.kernel
    def kernel(
        self,
        qk: cute.TiledMma,
        pv: cute.TiledMma,
        by_box: Any,
        by_line: Any,
        lQ: cute.ComposedLayout,
        lK: cute.ComposedLayout,
        lV: cute.ComposedLayout,
        o: cute.Tensor,
        lse: cute.Tensor,
        work: cute.Tensor,
        counts: cute.Tensor,
        grid: Any,
        texts: Any,
        keys: Int32,
        scale_log2: Float32,
        share: Int32,
    ) -> None:
        """A block: its share of the work, one item after another."""

        @cute.struct
        class Shared:
            bars: cute.struct.MemRange[Int64, 2 + 4 * self.stages]
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(lQ)], 1024]
            k: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(lK)], 1024]
            v: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(lV)], 1024]
            o: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(lQ)], 1024]

        shared = cutlass.memory.SmemAllocator().allocate(Shared)
        sQ = shared.q.get_tensor(lQ.outer, swizzle=lQ.inner)
        sK = shared.k.get_tensor(lK.outer, swizzle=lK.inner)
        sV = shared.v.get_tensor(lV.outer, swizzle=lV.inner)
        sO = shared.o.get_tensor(lQ.outer, swizzle=lQ.inner)
        bars = barriers(shared.bars.data_ptr(), self.stages)

        tid, _, _ = cute.arch.thread_idx()
        warp_number = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if tid == 0:
            init(bars, self.stages)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        extra = Texts(texts, keys, counts) if self.text else None
        schedule = Schedule(work, (o.shape[1], o.shape[0], *grid[3]), extra, self)
        if warp_number >= PRODUCER_WARP:
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            if warp_number == PRODUCER_WARP:
                self.produce(schedule, by_box, by_line, (sQ, sK, sV), bars, share)
        else:
            cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
            self.consume(schedule, qk, pv, (sQ, sK, sV, sO), bars, (o, lse, grid), tid, scale_log2)

    @cute.jit
    def produce(self, schedule: Any, by_box: Any, by_line: Any, smem: Any, bars: Any, share: Int32) -> None:
        """One warp: the tiles of every item, in the order in which the consumers take them."""
        sQ, sK, sV = smem
        sQ_box = cute.local_tile(sQ, (self.q_tokens, self.D), (0, 0))
        tile = Int32(0)
        first, _, _ = cute.arch.block_idx()
        every, _, _ = cute.arch.grid_dim()
        for turn in cutlass.range(turns(schedule, first, every), unroll=1):
            item = Item(schedule, number_of(schedule, first, every, turn))
            cute.arch.mbarrier_wait(bars.q_empty, (turn & 1) ^ 1)
            if cutlass.const_expr(self.text):
                if item.is_text:
                    self.bring_queries(by_line, item, (item.first,), sQ, (Q_ROWS,), bars)
                else:
                    self.bring_queries(by_box, item, tuple(item.q0), sQ_box, self.q_box, bars)
            else:
                self.bring_queries(by_box, item, tuple(item.q0), sQ_box, self.q_box, bars)
            for i in cutlass.range(item.boxes, unroll=1):
                origin, _ = key_box(item, i, self.kv_box)
                self.bring(by_box, item, origin, (sK, sV), self.kv_box, bars, tile, share)
                tile += 1
            if cutlass.const_expr(self.text):
                for i in cutlass.range(item.tiles - item.boxes, unroll=1):
                    row, _ = key_line(item, i, self.rows)
                    self.bring(by_line, item, (row,), (sK, sV), (self.rows,), bars, tile, share)
                    tile += 1

    @cute.jit
    def bring_queries(
        self, maps: Any, item: Any, origin: Any, smem: Any, box: cutlass.Constexpr, bars: Any
    ) -> None:
        """A box of queries; rows off the grid count as bytes too."""
        atom, tensor, factors = maps[0]
        target, source = _box(
            atom, tensor, origin, slot(item, factors, item.head), smem, box, self.D, rows_first=True
        )
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(bars.q_full, 2 * math.prod(box) * self.D)
        cute.copy(atom, source, target, tma_bar_ptr=bars.q_full)

    @cute.jit
    def bring(
        self,
        maps: Any,
        item: Any,
        origin: Any,
        smem: Any,
        box: cutlass.Constexpr,
        bars: Any,
        tile: Int32,
        share: Int32,
    ) -> None:
        """A tile of keys and one of values, each once its stage is free."""
        stage, phase = tile % self.stages, tile // self.stages & 1
        parts = (maps[1], smem[0], True, bars.k_full, bars.k_empty), (
            maps[2], smem[1], False, bars.v_full, bars.v_empty,
        )  # fmt: skip
        for (atom, tensor, factors), target, rows_first, full, empty in parts:
            place = slot(item, factors, item.head // share)
            into, source = _box(atom, tensor, origin, place, target, box, self.D, rows_first)
            cute.arch.mbarrier_wait(empty + stage, phase ^ 1)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full + stage, 2 * self.rows * self.D)
            cute.copy(atom, source, into[None, stage], tma_bar_ptr=full + stage)

    @cute.jit
    def consume(
        self, schedule: Any, qk: Any, pv: Any, smem: Any, bars: Any, out: Any, tid: Int32, scale_log2: Float32
    ) -> None:
        """Two warp groups, 64 query rows each."""
        sQ, sK, sV, sO = smem
        thread_qk, thread_pv = qk.get_slice(tid), pv.get_slice(tid)
        rQ = qk.make_fragment_A(thread_qk.partition_A(sQ))
        rK = qk.make_fragment_B(thread_qk.partition_B(sK))
        rV = pv.make_fragment_B(thread_pv.partition_B(sV))
        S = qk.make_fragment_C(qk.partition_shape_C((Q_ROWS, self.rows)))
        acc = pv.make_fragment_C(pv.partition_shape_C((Q_ROWS, self.D)))
        P = cute.make_rmem_tensor(pv.partition_shape_A((Q_ROWS, self.rows)), self.dtype)
        S3 = cute.make_tensor(S.iterator, cute.make_layout((2, 2, self.rows // 8)))
        acc3 = cute.make_tensor(acc.iterator, cute.make_layout((2, 2, self.D // 8)))
        pairs = cute.make_tensor(
            cute.recast_ptr(P.iterator, dtype=Int32), cute.make_layout((2, self.rows // 8))
        )
        top, total, change = (cute.make_rmem_tensor((2,), Float32) for _ in range(3))
        pv.set(warpgroup.Field.ACCUMULATE, True)
        tile = Int32(0)
        wg = tid // GROUP
        if wg == 1:
            self.pass_turn(wg)
        first, _, _ = cute.arch.block_idx()
        every, _, _ = cute.arch.grid_dim()
        for turn in cutlass.range(turns(schedule, first, every), unroll=1):
            item = Item(schedule, number_of(schedule, first, every, turn))
            acc.fill(0.0)
            top.fill(-Float32.inf)
            total.fill(0.0)

            cute.arch.mbarrier_wait(bars.q_full, turn & 1)
            stage, phase = tile % self.stages, tile // self.stages & 1
            cute.arch.mbarrier_wait(bars.k_full + stage, phase)
            self.scores(qk, S, rQ, rK, stage)
            warpgroup.wait_group(0)
            cute.arch.mbarrier_arrive(bars.k_empty + stage)
            self.mask(S3, Int32(0), item)
            softmax(S3, top, total, change, scale_log2, self.rows)
            self.round(S3, pairs)

            for i in cutlass.range(1, item.tiles, unroll=1):
                v_stage, v_phase = stage, phase
                tile += 1
                stage, phase = tile % self.stages, tile // self.stages & 1
                cute.arch.mbarrier_wait(bars.k_full + stage, phase)
                cute.arch.barrier(barrier_id=TURN_BARRIER + wg, number_of_threads=CONSUMERS)
                self.scores(qk, S, rQ, rK, stage)
                cute.arch.mbarrier_wait(bars.v_full + v_stage, v_phase)
                self.outputs(pv, acc, P, rV, v_stage)
                self.pass_turn(wg)
                warpgroup.wait_group(1)
                cute.arch.mbarrier_arrive(bars.k_empty + stage)
                self.mask(S3, i, item)
                softmax(S3, top, total, change, scale_log2, self.rows)
                _settle(total)
                warpgroup.wait_group(0)
                cute.arch.mbarrier_arrive(bars.v_empty + v_stage)
                for r in cutlass.range_constexpr(2):
                    for j in cutlass.range_constexpr(self.D // 8):
                        for v in cutlass.range_constexpr(2):
                            acc3[v, r, j] = acc3[v, r, j] * change[r]
                self.round(S3, pairs)

            cute.arch.mbarrier_arrive(bars.q_empty)
            cute.arch.mbarrier_wait(bars.v_full + stage, phase)
            self.outputs(pv, acc, P, rV, stage)
            warpgroup.wait_group(0)
            cute.arch.mbarrier_arrive(bars.v_empty + stage)
            tile += 1
            self.finish(pv, acc, acc3, sO, top, total, scale_log2, out, item, tid)

    def pass_turn(self, wg: Any) -> None:
        """The other group may issue. Both have as many turns: their tiles are the same."""
        cute.arch.barrier_arrive(barrier_id=TURN_BARRIER + 1 - wg, number_of_threads=CONSUMERS)

    @cute.jit
    def scores(self, qk: Any, S: Any, rQ: Any, rK: Any, stage: Int32) -> None:
        """S = Q K^T of a stage, issued."""
        warpgroup.fence()
        for kb in cutlass.range_constexpr(cute.size(rQ, mode=[2])):
            qk.set(warpgroup.Field.ACCUMULATE, kb != 0)
            cute.gemm(qk, S, rQ[None, None, kb], rK[None, None, kb, stage], S)
        warpgroup.commit_group()

    @cute.jit
    def outputs(self, pv: Any, acc: Any, P: Any, rV: Any, stage: Int32) -> None:
        """O += P V of a stage, issued."""
        warpgroup.fence()
        for kb in cutlass.range_constexpr(cute.size(P, mode=[2])):
            cute.gemm(pv, acc, P[None, None, kb], rV[None, None, kb, stage], acc)
        warpgroup.commit_group()

    @cute.jit
    def round(self, S3: cute.Tensor, pairs: cute.Tensor) -> None:
        """Weights to P: an A fragment has the order of a C fragment. In PTX, as the compiler would move the
        conversion past the next S = Q K^T, and ptxas then lets no two matrix instructions overlap."""
        name = {"bfloat16": "bf16x2", "float16": "f16x2"}[self.config.dtype]
        for j in cutlass.range_constexpr(self.rows // 8):
            for r in cutlass.range_constexpr(2):
                pairs[r, j] = cute.arch.inline_ptx(
                    f"cvt.rn.{name}.f32 {{$w0}}, {{$r0}}, {{$r1}};",
                    write_only_types=[Int32],
                    read_only_args=[S3[1, r, j], S3[0, r, j]],
                )

    @cute.jit
    def mask(self, S3: cute.Tensor, i: Int32, item: Any) -> None:
        """Hide what tile ``i`` of an item holds beyond its keys."""
        if cutlass.const_expr(self.text):
            if i < item.boxes:
                self.clip(S3, i, item)
            else:
                _, left = key_line(item, i - item.boxes, self.rows)
                if left < self.rows:
                    hide(S3, key_words((left,), (self.rows,)), self.rows)
        else:
            self.clip(S3, i, item)

    @cute.jit
    def clip(self, S3: cute.Tensor, i: Int32, item: Any) -> None:
        """Hide what tile ``i`` of the key box holds beyond it."""
        if item.clips:
            _, left = key_box(item, i, self.kv_box)
            hide(S3, key_words(left[::-1], self.config.kv_box), self.rows)

    @cute.jit
    def finish(
        self,
        pv: Any,
        acc: Any,
        acc3: Any,
        sO: Any,
        top: Any,
        total: Any,
        scale_log2: Float32,
        out: Any,
        item: Any,
        tid: Int32,
    ) -> None:
        """Normalise, and write the rows that are tokens, with their log-sum-exp."""
        o, lse, grid = out
        lane, wg = tid % 32, tid // GROUP
        for r in cutlass.range_constexpr(2):
            whole = total[r] + cute.arch.shuffle_sync_bfly(total[r], offset=1)
            whole += cute.arch.shuffle_sync_bfly(whole, offset=2)
            inverse = Float32(1) / whole
            for j in cutlass.range_constexpr(self.D // 8):
                for v in cutlass.range_constexpr(2):
                    acc3[v, r, j] = acc3[v, r, j] * inverse
            is_token, token = self.token(tid // 32 * 16 + lane // 4 + 8 * r, item, grid)
            if is_token and lane % 4 == 0:
                lse[item.batch, item.head, token] = (top[r] * scale_log2 + cute.math.log2(whole)) * LN_2
        rounded = cute.make_rmem_tensor_like(acc, self.dtype)
        rounded.store(acc.load().to(self.dtype))
        copy = cute.make_tiled_copy_C(cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.dtype), pv)
        mine = copy.get_slice(tid)
        cute.arch.barrier(barrier_id=EPILOGUE_BARRIER + wg, number_of_threads=GROUP)  # the last item is read
        cute.copy(copy, mine.retile(rounded), mine.partition_D(sO))
        cute.arch.barrier(barrier_id=EPILOGUE_BARRIER + wg, number_of_threads=GROUP)
        pieces = self.D // 8  # of 16 bytes in a row
        for turn in cutlass.range_constexpr(64 * pieces // GROUP):
            row = wg * 64 + turn * (GROUP // pieces) + tid % GROUP // pieces
            is_token, token = self.token(row, item, grid)
            if is_token:
                piece = tid % pieces
                source = cute.zipped_divide(sO[row, None], (8,))[None, piece]
                target = cute.zipped_divide(o[item.batch, item.head, token, None], (8,))[None, piece]
                cute.autovec_copy(source, target)

    def token(self, row: Any, item: Any, grid: Any) -> Any:
        """Whether a row of the queries is a token, and which row of the sequence."""
        lengths, steps, group_steps, _, token = grid
        for place, step in zip(item.groups, group_steps, strict=True):
            token += place * step
        place = unravel(row, self.config.q_box)
        is_token = row < self.q_tokens
        for a in range(self.rank):
            at = item.q0[self.rank - 1 - a] + place[a]
            is_token = cutlass.and_(is_token, at < lengths[a])
            token += at * steps[a]
        if self.text:
            line = item.first + row
            is_token = cutlass.select_(item.is_text, line < item.end, is_token)
            token = cutlass.select_(item.is_text, line, token)
        return is_token, token
