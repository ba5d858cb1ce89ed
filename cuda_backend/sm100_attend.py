"""Forward attention on Blackwell (sm_100a): two boxes of queries over the key tiles of both.

Who does what, and who waits for whom, is said in sm100_roles.py; this is how: the block, its loads, products
and stores. What is done to scores and output in tensor memory is in sm100_softmax.py.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.memory
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync, tcgen05
from gnaflex.cuda_backend.attend import translated
from gnaflex.cuda_backend.config import NOTE_BYTES
from gnaflex.cuda_backend.items import Item, Pair, sees, slot, tile_of
from gnaflex.cuda_backend.protocol import HALVES
from gnaflex.cuda_backend.sm100_roles import BARRIERS, GROUP, Roles
from gnaflex.cuda_backend.sm100_softmax import O_AT, S_AT, Softmax
from gnaflex.cuda_backend.tile_walk import Q_ROWS
from gnaflex.cuda_backend.views import Grid, box_copy, view

CORRECT, MULTIPLY, LOAD, STORE = 8, 12, 13, 14  # first warps of the roles; weigh has 0 to 7
THREADS = 16 * 32
REGISTERS = {"weigh": 200, "correct": 64, "others": 48}  # 128 * (2 * 200 + 64 + 48) = 65,536
COLUMNS = 512  # of tensor memory: all there are


class Attend100(Roles, Softmax):  # type: ignore[misc, unused-ignore]
    """The kernel of a configuration."""

    BARRIERS = BARRIERS
    threads = THREADS
    load, multiply, release_keys, weigh, correct, store = (
        translated(program)
        for program in (
            *(Roles.load, Roles.multiply, Roles.release_keys),
            *(Roles.weigh, Roles.correct, Roles.store),
        )
    )

    def stores(self, o: cute.Tensor, grid: Grid, layouts: Any, texts: Any, keys: Any) -> Any:
        """Tensor maps of boxes of the grid, and of text before and behind it; each ends with its own."""
        op = cpasync.CopyBulkTensorTileS2GOp()
        box, line = layouts

        def of(where: Grid, layout: Any, shape: Any) -> Any:
            x, factors = view(o, where, self.D)
            return (*cpasync.make_tiled_tma_atom(op, x, layout, (shape, self.D)), factors)

        by_box = of(grid, box, self.q_box)
        if not self.text:
            return by_box, None, None
        prefix, suffix, extra = texts[:3]
        behind = keys - suffix - extra
        lines = (
            Grid((cutlass.max(n, Int32(1)),), (1,), (), (), start)
            for n, start in ((prefix, 0), (suffix, behind))
        )
        return by_box, *(of(one, line, (Q_ROWS,)) for one in lines)

    @cute.kernel
    def kernel(self, maps: Any, tensors: Any, numbers: Any) -> None:
        """A block: its share of the work, one pair after another."""

        lQ, lK, lV = self.layouts()

        @cute.struct
        class Shared:
            bars: cute.struct.MemRange[Int64, self.number_of_barriers]
            tmem: Int32
            notes: cute.struct.Align[cute.struct.MemRange[Float32, NOTE_BYTES // 4], 1024]
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, 2 * cute.cosize(lQ)], 1024]
            o: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(lQ)], 1024]
            kv: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(lK)], 1024]

        shared = cutlass.memory.SmemAllocator().allocate(Shared)
        both = cute.tile_to_shape(self.smem_atoms()[0], (Q_ROWS, self.D, 2), order=(0, 1, 2))
        self.sQ = shared.q.get_tensor(both.outer, swizzle=both.inner)
        self.sO = shared.o.get_tensor(lQ.outer, swizzle=lQ.inner)
        self.sK = shared.kv.get_tensor(lK.outer, swizzle=lK.inner)
        self.sV = shared.kv.get_tensor(lV.outer, swizzle=lV.inner)
        self.notes = shared.notes.get_tensor(cute.make_layout((Q_ROWS, 2, 2)))  # row, what, half
        self.bars = shared.bars.data_ptr()
        self.take(maps, tensors, numbers)
        self.lane = cute.arch.thread_idx()[0] % GROUP

        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            with cute.arch.elect_one():
                self.init_barriers()
        cute.arch.mbarrier_init_fence()
        if warp == MULTIPLY:
            cute.arch.alloc_tmem(COLUMNS, shared.tmem)
        cute.arch.sync_threads()

        self.tmem_at = shared.tmem
        if warp < CORRECT:
            cute.arch.setmaxregister_increase(REGISTERS["weigh"])
            self.weigh_setup(warp // 4)
            self.weigh(warp // 4)
        elif warp < MULTIPLY:
            cute.arch.setmaxregister_decrease(REGISTERS["correct"])
            self.begin()
            self.correct()
        else:
            cute.arch.setmaxregister_decrease(REGISTERS["others"])
            if warp == MULTIPLY:
                self.multiply_setup()
                self.multiply()
            elif warp == LOAD:
                self.begin()
                self.load()
            elif warp == STORE:
                self.begin()
                self.store()
        cute.arch.sync_threads()
        if warp == MULTIPLY:
            cute.arch.relinquish_tmem_alloc_permit()
            self.begin()
            cute.arch.dealloc_tmem(self.tmem, COLUMNS)

    def begin(self) -> None:
        """What every role works out for itself: worked out once for all, it would take each the registers."""
        self.tmem = cute.arch.retrieve_tmem_ptr(Float32, 16, self.tmem_at)
        self.schedule = self.scheduled()

    # ---- what programs are written in ----------------------------------------------------------------

    def pair(self, turn: Any) -> Pair:
        """The boxes of both halves."""
        return Pair(self.schedule, self.number_of(turn))

    def half(self, turn: Any, h: Any) -> Item:
        """That of one."""
        return Item(self.schedule, 2 * self.number_of(turn) + h)

    def sees(self, pair: Pair, h: int, j: Any) -> Any:
        """Whether a half sees a tile of its pair."""
        return sees(pair, h, j)

    def tile_of(self, pair: Pair, h: int, j: Any) -> Any:
        """Which one of its own that is."""
        return tile_of(pair, h, j)

    def wait(self, name: str, n: Any, h: Any = 0) -> None:
        """Also for what tensor memory holds."""
        super().wait(name, n, h)
        cute.arch.inline_ptx("tcgen05.fence::after_thread_sync;")

    def arrive(self, name: str, n: Any, h: Any = 0) -> None:
        """Also for what was done to tensor memory."""
        cute.arch.inline_ptx("tcgen05.fence::before_thread_sync;")
        super().arrive(name, n, h)

    def commit(self, name: str, n: Any, h: Any = 0) -> None:
        """Arrive once all products issued so far are computed."""
        at, _ = self.place(name, n, h)
        with cute.arch.elect_one():
            tcgen05.commit(at)

    # ---- load ----------------------------------------------------------------------------------------

    def bring_queries(self, pair: Pair, h: int, q: Any) -> None:
        """A half's box."""
        bar, _ = self.place("q_full", q, h)
        self.bring_box_of_queries(pair.halves[h], self.sQ[None, None, h], bar)

    def bring_keys(self, pair: Pair, j: Any, kv: Any) -> None:
        """As boxes from the first half's first key on: the second's lie on the same lattice."""
        bar, _ = self.place("kv_full", kv)
        self.bring_tile("k", pair.halves[0], pair.boxes, j, self.sK[None, None, kv % self.stages], bar)

    def bring_values(self, pair: Pair, j: Any, kv: Any) -> None:
        """Likewise."""
        bar, _ = self.place("kv_full", kv)
        self.bring_tile("v", pair.halves[0], pair.boxes, j, self.sV[None, None, kv % self.stages], bar)

    # ---- multiply ------------------------------------------------------------------------------------

    def multiply_setup(self) -> None:
        """Descriptors of all operands."""
        self.begin()
        qk, pv = self.products()
        of_qk, of_pv = qk.get_slice(0), pv.get_slice(0)
        self.rQ = [qk.make_fragment_A(of_qk.partition_A(self.sQ[None, None, h])) for h in HALVES]
        self.rK = qk.make_fragment_B(of_qk.partition_B(self.sK))
        self.rV = pv.make_fragment_B(of_pv.partition_B(self.sV))
        weights = pv.make_fragment_A(pv.partition_shape_A((Q_ROWS, self.rows))).layout
        self.tP = [
            cute.make_tensor(cute.recast_ptr(self.tmem + at, dtype=self.dtype), weights) for at in S_AT
        ]
        self.tS = [self.scores_at(at, qk) for at in S_AT]
        self.tO = [self.output_at(at, pv) for at in O_AT]

    def scores(self, h: int, q: Any, kv: Any, s: Any) -> None:
        """S = Q K^T, issued."""
        qk, _ = self.products()
        rQ, rK = self.rQ[h], self.rK[None, None, None, kv % self.stages]
        for kb in range(cute.size(rQ, mode=[2])):
            qk.set(tcgen05.Field.ACCUMULATE, kb != 0)
            cute.gemm(qk, self.tS[h], rQ[None, None, kb], rK[None, None, kb], self.tS[h])

    def outputs(self, i: Any, h: int, s: Any, kv: Any, o: Any) -> None:
        """O += P V, issued; O = P V for the first tile of an item."""
        _, pv = self.products()
        tP, rV = self.tP[h], self.rV[None, None, None, kv % self.stages]
        for kb in range(cute.size(tP, mode=[2])):
            pv.set(tcgen05.Field.ACCUMULATE, True if kb else i != 0)
            cute.gemm(pv, self.tO[h], tP[None, None, kb], rV[None, None, kb], self.tO[h])

    # ---- store ---------------------------------------------------------------------------------------

    @cute.jit
    def store_box(self, pair: Any, h: cutlass.Constexpr, out: Any) -> None:
        """A half's rows: those that are no tokens are clipped, as each map ends where its tokens do."""
        item = pair.halves[h]
        by_box, by_prefix, by_suffix = self.to_memory
        suffix = self.keys - self.texts[1] - self.texts[2]
        boxed = cute.local_tile(self.sO, (self.q_tokens, self.D), (0, 0))
        if cutlass.const_expr(self.text):
            if not item.is_text:
                self.put(by_box, item, tuple(item.q0), self.q_box, boxed)
            elif item.is_behind:
                self.put(by_suffix, item, (item.first - suffix,), (Q_ROWS,), self.sO)
            else:
                self.put(by_prefix, item, (item.first,), (Q_ROWS,), self.sO)
        else:
            self.put(by_box, item, tuple(item.q0), self.q_box, boxed)

    def put(self, of: Any, item: Any, origin: Any, box: Any, smem: Any) -> None:
        """One copy by TMA."""
        atom, tensor, factors = of
        source, target = box_copy(
            atom, tensor, origin, slot(item, factors, item.head), smem, box, self.D, True
        )
        cute.copy(atom, source, target)

    def stored(self) -> None:
        """Until shared memory is read."""
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)
