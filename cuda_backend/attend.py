"""What the kernels share: the launch, tensor maps, loads of boxes and lines, barriers by name.

A kernel runs the programs of its roles module; the actions that these name are its methods.
"""

from __future__ import annotations

import functools
import math
import types
from typing import Any, NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync, warpgroup
from gnaflex.cuda_backend.config import BOXES_AT_ONCE, KernelConfig
from gnaflex.cuda_backend.items import Schedule, Texts, key_box, key_line, number_of, slot, turns
from gnaflex.cuda_backend.protocol import HALVES, Barrier, offsets
from gnaflex.cuda_backend.softmax import key_words
from gnaflex.cuda_backend.tile_walk import Q_ROWS, SPANS, TEXTS, unravel
from gnaflex.cuda_backend.views import Grid, box_copy, transposed, view


class Maps(NamedTuple):
    """Copy atoms and tensors of queries, keys and values, and what head, batch and group count in each."""

    q: Any
    k: Any
    v: Any


def translated(program: Any) -> Any:
    """A program for CuTe DSL, which rewrites a function in place: a copy, as tests run the original."""
    parts = program.__code__, program.__globals__, program.__name__, program.__defaults__, program.__closure__
    return cute.jit(functools.update_wrapper(types.FunctionType(*parts), program))


class Attend:
    """The kernel of a configuration: what does not depend on the architecture."""

    BARRIERS: dict[str, Barrier]
    threads: int
    kernel: Any
    hide: Any  # what stands in columns of S that are no keys
    schedule: Any  # of a block, like all that follows
    bars: Any

    def __init__(self, config: KernelConfig) -> None:
        self.config, self.halves = config, BOXES_AT_ONCE[config.arch]
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
        self.offsets, self.number_of_barriers = offsets(self.BARRIERS, self.places)

    # ---- on the host ---------------------------------------------------------------------------------

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
        lQ, lK, lV = self.layouts()
        lQ_box = cute.tile_to_shape(self.smem_atoms()[0], (self.q_tokens, self.D), order=(0, 1))
        grid = Grid(lengths, steps, group_steps, groups, start)
        by_box = self.maps((mQ, mK, mV), (grid, grid), (lQ_box, lK, lV), self.q_box, self.kv_box)
        by_line = None
        if cutlass.const_expr(self.text):
            by_line = self.maps(
                (mQ, mK, mV), (_line(queries, 0), _line(keys, 0)), (lQ, lK, lV), (Q_ROWS,), (self.rows,)
            )
        stores = self.stores(mO, grid, (lQ_box, lQ), texts, keys)
        self.kernel(
            (by_box, by_line, stores),
            (mO, mL, mW, counts),
            ((lengths, steps, group_steps, groups, start), texts, keys, scale_log2, heads // kv_heads),
        ).launch(grid=(blocks, 1, 1), block=(self.threads, 1, 1), stream=stream, min_blocks_per_mp=1)

    def tokens(self, x: Any, batch: Any, heads: Any, rows: Any, strides: Any) -> cute.Tensor:
        """[batch, heads, rows, head_dim] at a pointer."""
        by = tuple(cute.assume(one, divby=8) for one in strides)
        return cute.make_tensor(x, cute.make_layout((batch, heads, rows, self.D), stride=(*by, 1)))

    def smem_atoms(self) -> Any:
        """How tiles lie in shared memory for either product, the same for wgmma and tcgen05: 128-byte
        swizzle, rows of 64 channels."""
        kind = warpgroup.SmemLayoutAtomKind
        return tuple(warpgroup.make_smem_layout_atom(a, self.dtype) for a in (kind.K_SW128, kind.MN_SW128))

    def layouts(self) -> Any:
        """Of 128 rows of queries or outputs, and of all stages of keys and of values."""
        by_row, by_channel = self.smem_atoms()
        return (
            cute.tile_to_shape(by_row, (Q_ROWS, self.D), order=(0, 1)),
            cute.tile_to_shape(by_row, (self.rows, self.D, self.stages), order=(0, 1, 2)),
            cute.tile_to_shape(by_channel, (self.D, self.rows, self.stages), order=(1, 0, 2)),
        )

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
            (*cpasync.make_tiled_tma_atom(load, transposed(xV), lV, (self.D, kv_box)), fV),
        )

    def stores(self, o: cute.Tensor, grid: Grid, layouts: Any, texts: Any, keys: Any) -> Any:
        """Tensor maps that store boxes, where a kernel wants them."""
        return None

    # ---- a block and its work ------------------------------------------------------------------------

    def take(self, maps: Any, tensors: Any, numbers: Any) -> None:
        """The arguments of a kernel."""
        self.by_box, self.by_line, self.to_memory = maps
        self.o, self.lse, self.work, self.valid = tensors
        self.grid, self.texts, self.keys, self.scale_log2, self.share = numbers

    def scheduled(self) -> Schedule:
        """The work of all blocks."""
        extra = Texts(self.texts, self.keys, self.valid) if self.text else None
        return Schedule(self.work, (self.o.shape[1], self.o.shape[0], *self.grid[3]), extra, self)

    def turns(self) -> Any:
        """How many items this block has."""
        return turns(self.schedule, cute.arch.block_idx()[0], cute.arch.grid_dim()[0])

    def number_of(self, turn: Any) -> Any:
        """Which one is that of a turn."""
        return number_of(self.schedule, cute.arch.block_idx()[0], cute.arch.grid_dim()[0], turn)

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

    # ---- what programs are written in ----------------------------------------------------------------

    def places(self, number: int | str) -> int:
        """How many places a barrier or buffer has."""
        return int(getattr(self, number)) if isinstance(number, str) else number

    def number(self, n: int) -> Int32:
        """A counter."""
        return Int32(n)

    def numbers(self, *counts: Any) -> tuple[Int32, ...]:
        """One for each half."""
        return tuple(map(Int32, counts))

    def place(self, name: str, n: Any, h: Any = 0) -> tuple[Any, Any]:
        """The address of use ``n`` of a barrier, and the parity of its phase."""
        barrier = self.BARRIERS[name]
        places = self.places(barrier.places)
        return self.bars + (self.offsets[name] + h * places + n % places), n // places & 1

    def wait(self, name: str, n: Any, h: Any = 0) -> None:
        """Until phase ``n`` of a barrier is complete; where it starts out free, the one before."""
        at, parity = self.place(name, n, h)
        cute.arch.mbarrier_wait(at, parity ^ 1 if self.BARRIERS[name].is_free else parity)

    def arrive(self, name: str, n: Any, h: Any = 0) -> None:
        """By every thread of a role, or by one."""
        at, _ = self.place(name, n, h)
        if self.BARRIERS[name].by == "one":
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(at)
        else:
            cute.arch.mbarrier_arrive(at)

    def init_barriers(self) -> None:
        """By one thread, all of them."""
        for name in self.offsets:
            barrier = self.BARRIERS[name]
            for place in range(self.places(barrier.places) * (len(HALVES) if barrier.halves else 1)):
                cute.arch.mbarrier_init(self.bars + self.offsets[name] + place, barrier.arrivals)

    @cute.jit
    def mask(self, item: Any, i: Any) -> None:
        """Hide what tile ``i`` of an item holds beyond its keys."""
        if cutlass.const_expr(self.text):
            if i < item.boxes:
                self.clip(item, i)
            else:
                _, left = key_line(item, i - item.boxes, self.rows)
                if left < self.rows:
                    self.hide(key_words((left,), (self.rows,)))
        else:
            self.clip(item, i)

    @cute.jit
    def clip(self, item: Any, i: Any) -> None:
        """Hide what tile ``i`` of the key box holds beyond it."""
        if item.clips:
            _, left = key_box(item, i, self.kv_box)
            is_cut = left[0] < self.kv_box[0]
            for room, extent in zip(left[1:], self.kv_box[1:], strict=True):
                is_cut = cutlass.or_(is_cut, room < extent)
            if is_cut:
                self.hide(key_words(left[::-1], self.config.kv_box))

    # ---- loads ---------------------------------------------------------------------------------------

    @cute.jit
    def bring_box_of_queries(self, item: Any, smem: Any, bar: Any) -> None:
        """A box of queries, or 128 text queries; rows off the grid count as bytes too."""
        boxed = cute.local_tile(smem, (self.q_tokens, self.D), (0, 0))
        if cutlass.const_expr(self.text):
            if item.is_text:
                self.copy(self.by_line.q, item, item.head, (item.first,), (Q_ROWS,), smem, bar, True)
            else:
                self.copy(self.by_box.q, item, item.head, tuple(item.q0), self.q_box, boxed, bar, True)
        else:
            self.copy(self.by_box.q, item, item.head, tuple(item.q0), self.q_box, boxed, bar, True)

    @cute.jit
    def bring_tile(self, what: cutlass.Constexpr, item: Any, boxes: Any, j: Any, smem: Any, bar: Any) -> None:
        """Tile ``j`` of keys ("k") or values ("v"): a box of ``boxes``, then lines of text."""
        head = item.head // self.share
        if cutlass.const_expr(self.text):
            if j < boxes:
                origin, _ = key_box(item, j, self.kv_box)
                self.copy(getattr(self.by_box, what), item, head, origin, self.kv_box, smem, bar, what == "k")
            else:
                row, _ = key_line(item, j - boxes, self.rows)
                of_line = getattr(self.by_line, what)
                self.copy(of_line, item, head, (row,), (self.rows,), smem, bar, what == "k")
        else:
            origin, _ = key_box(item, j, self.kv_box)
            self.copy(getattr(self.by_box, what), item, head, origin, self.kv_box, smem, bar, what == "k")

    def copy(
        self, of: Any, item: Any, head: Any, origin: Any, box: Any, smem: Any, bar: Any, rows_first: bool
    ) -> None:
        """One copy by TMA, whose bytes complete a phase of ``bar``."""
        atom, tensor, factors = of
        target, source = box_copy(
            atom, tensor, origin, slot(item, factors, head), smem, box, self.D, rows_first
        )
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(bar, 2 * math.prod(box) * self.D)
        cute.copy(atom, source, target, tma_bar_ptr=bar)


def _line(tokens: Any, start: Any) -> Grid:
    """Tokens of the sequence, one after another."""
    return Grid((tokens,), (1,), (), (), start)
