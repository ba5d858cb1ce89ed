"""Forward attention on Hopper (sm_90a): a box of queries over boxes of keys, straight from row-major tokens.

Who does what, and who waits for whom, is said in sm90_roles.py; this is how. A block has 128 query rows; S, P
and O are in registers (wgmma). Outputs leave through shared memory, row by row, as only the token's own
coordinates say whether a row exists.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.memory
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import OperandMajorMode, warp, warpgroup
from gnaflex.cuda_backend.attend import Attend, translated
from gnaflex.cuda_backend.items import Item
from gnaflex.cuda_backend.sm90_roles import BARRIERS, CONSUMERS, GROUP, Roles
from gnaflex.cuda_backend.softmax import LN_2, exp2, rounded
from gnaflex.cuda_backend.tile_walk import Q_ROWS

PRODUCER_WARP = CONSUMERS // 32
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240  # 128 * 24 + 256 * 240 <= 65,536
EPILOGUE_BARRIER = 1  # and the next, one for each consumer group
TURN_BARRIER = 3  # and the next: whose turn it is to issue matrix products


class Attend90(Roles, Attend):  # type: ignore[misc, unused-ignore]
    """The kernel of a configuration."""

    BARRIERS = BARRIERS
    threads = CONSUMERS + GROUP
    load, attend = translated(Roles.load), translated(Roles.attend)

    @cute.kernel
    def kernel(self, maps: Any, tensors: Any, numbers: Any) -> None:
        """A block: its share of the work, one item after another."""

        lQ, lK, lV = self.layouts()

        @cute.struct
        class Shared:
            bars: cute.struct.MemRange[Int64, self.number_of_barriers]
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(lQ)], 1024]
            k: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(lK)], 1024]
            v: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(lV)], 1024]
            o: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(lQ)], 1024]

        shared = cutlass.memory.SmemAllocator().allocate(Shared)
        self.sQ = shared.q.get_tensor(lQ.outer, swizzle=lQ.inner)
        self.sK = shared.k.get_tensor(lK.outer, swizzle=lK.inner)
        self.sV = shared.v.get_tensor(lV.outer, swizzle=lV.inner)
        self.sO = shared.o.get_tensor(lQ.outer, swizzle=lQ.inner)
        self.bars = shared.bars.data_ptr()
        self.take(maps, tensors, numbers)
        self.schedule = self.scheduled()

        self.tid, _, _ = cute.arch.thread_idx()
        warp_number = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if self.tid == 0:
            self.init_barriers()
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        if warp_number >= PRODUCER_WARP:
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            if warp_number == PRODUCER_WARP:
                self.load()
        else:
            cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
            self.attend_setup()
            self.attend(self.tid // GROUP)

    # ---- what programs are written in ----------------------------------------------------------------

    def item(self, turn: Any) -> Item:
        """That of a turn."""
        return Item(self.schedule, self.number_of(turn))

    def wait_turn(self, h: Any) -> None:
        """Until the other group lets this one issue."""
        cute.arch.barrier(barrier_id=TURN_BARRIER + h, number_of_threads=CONSUMERS)

    def pass_turn(self, h: Any) -> None:
        """The other group may issue. Both have as many turns: their tiles are the same."""
        cute.arch.barrier_arrive(barrier_id=TURN_BARRIER + 1 - h, number_of_threads=CONSUMERS)

    def wait_products(self, left: int) -> None:
        """Until at most so many of this group's products are under way."""
        warpgroup.wait_group(left)

    # ---- load ----------------------------------------------------------------------------------------

    def bring_queries(self, item: Item, q: Any) -> None:
        """The item's box."""
        self.bring_box_of_queries(item, self.sQ, self.place("q_full", q)[0])

    def bring_keys(self, item: Item, i: Any, k: Any) -> None:
        """A tile of the item."""
        bar, _ = self.place("k_full", k)
        self.bring_tile("k", item, item.boxes, i, self.sK[None, None, k % self.stages], bar)

    def bring_values(self, item: Item, i: Any, v: Any) -> None:
        """Likewise."""
        bar, _ = self.place("v_full", v)
        self.bring_tile("v", item, item.boxes, i, self.sV[None, None, v % self.stages], bar)

    # ---- attend --------------------------------------------------------------------------------------

    def products(self) -> tuple[Any, Any]:
        """Q K^T and P V of both groups."""
        rows, channels = OperandMajorMode.K, OperandMajorMode.MN
        source = warpgroup.OperandSource
        qk, pv = (
            cute.make_tiled_mma(warpgroup.MmaF16BF16Op(self.dtype, Float32, shape, a, rows, b), (2, 1, 1))
            for shape, a, b in (
                ((64, self.rows, 16), source.SMEM, rows),
                ((64, self.D, 16), source.RMEM, channels),
            )
        )
        return qk, pv

    def attend_setup(self) -> None:
        """Descriptors of operands in shared memory; the others, and a thread's two rows, in registers."""
        qk, pv = self.products()
        of_qk, of_pv = qk.get_slice(self.tid), pv.get_slice(self.tid)
        self.rQ = qk.make_fragment_A(of_qk.partition_A(self.sQ))
        self.rK = qk.make_fragment_B(of_qk.partition_B(self.sK))
        self.rV = pv.make_fragment_B(of_pv.partition_B(self.sV))
        self.S = qk.make_fragment_C(qk.partition_shape_C((Q_ROWS, self.rows)))
        self.acc = pv.make_fragment_C(pv.partition_shape_C((Q_ROWS, self.D)))
        self.P = cute.make_rmem_tensor(pv.partition_shape_A((Q_ROWS, self.rows)), self.dtype)
        self.S3 = cute.make_tensor(self.S.iterator, cute.make_layout((2, 2, self.rows // 8)))
        self.acc3 = cute.make_tensor(self.acc.iterator, cute.make_layout((2, 2, self.D // 8)))
        self.pairs = cute.make_tensor(
            cute.recast_ptr(self.P.iterator, dtype=Int32), cute.make_layout((2, self.rows // 8))
        )
        self.top, self.total, self.change = (cute.make_rmem_tensor((2,), Float32) for _ in range(3))

    def start(self) -> None:
        """A new item."""
        self.acc.fill(0.0)
        self.top.fill(-Float32.inf)
        self.total.fill(0.0)

    def scores(self, h: Any, q: Any, k: Any, s: Any) -> None:
        """S = Q K^T, issued."""
        qk, _ = self.products()
        warpgroup.fence()
        for kb in range(cute.size(self.rQ, mode=[2])):
            qk.set(warpgroup.Field.ACCUMULATE, kb != 0)
            rK = self.rK[None, None, kb, k % self.stages]
            cute.gemm(qk, self.S, self.rQ[None, None, kb], rK, self.S)
        warpgroup.commit_group()

    def outputs(self, h: Any, v: Any, p: Any, o: Any) -> None:
        """O += P V, issued."""
        _, pv = self.products()
        pv.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.fence()
        for kb in range(cute.size(self.P, mode=[2])):
            rV = self.rV[None, None, kb, v % self.stages]
            cute.gemm(pv, self.acc, self.P[None, None, kb], rV, self.acc)
        warpgroup.commit_group()

    def weigh(self, item: Item, i: Any, h: Any, s: Any) -> None:
        """Scores to weights in place."""
        self.mask(item, i)
        self.softmax()

    def hide(self, words: Any) -> None:
        """-inf where a key is none: bit ``c`` of the words says whether column ``c`` of the scores is one."""
        S = self.S3
        shift = cute.arch.lane_idx() % 4 * 2  # this thread's columns are 8 j + shift and the next
        for j in range(self.rows // 8):
            word = words[8 * j // 32] >> (shift + 8 * j % 32)
            for v in range(2):
                is_key = (word >> v) & 1 != 0
                for r in range(2):
                    S[v, r, j] = cutlass.select_(is_key, S[v, r, j], -Float32.inf)

    def softmax(self) -> None:
        """The running maximum ``top`` and sum ``total`` of both rows of a thread follow, and ``change`` is
        what all before must be multiplied by. ``total`` is this thread's share."""
        S, top, total, change, scale = self.S3, self.top, self.total, self.change, self.scale_log2
        for r in range(2):
            most = [top[r], S[0, r, 0]]
            for j in range(self.rows // 8):
                for v in range(2):
                    most[v] = cute.arch.fmax(most[v], S[v, r, j])
            new = cute.arch.fmax(most[0], most[1])
            new = cute.arch.fmax(new, cute.arch.shuffle_sync_bfly(new, offset=1))
            new = cute.arch.fmax(new, cute.arch.shuffle_sync_bfly(new, offset=2))
            change[r] = exp2((top[r] - new) * scale)
            top[r] = new
            shift = -new * scale
            sums = [Float32(0), Float32(0)]
            for j in range(self.rows // 8):
                for v in range(2):
                    weight = exp2(S[v, r, j] * scale + shift)
                    S[v, r, j] = weight
                    sums[v] = sums[v] + weight
            total[r] = total[r] * change[r] + sums[0] + sums[1]

    def settle(self) -> None:
        """A branch on numbers that are never negative. Else ptxas (13.4) moves the wait for P V before the
        exponentials, and the two do not overlap."""
        for r in range(2):
            cute.arch.inline_ptx(
                "{ .reg .pred p; setp.lt.f32 p, {$r0}, 0f00000000; @p trap; }", read_only_args=[self.total[r]]
            )

    def rescale(self, h: Any, o: Any) -> None:
        """O by the change."""
        for r in range(2):
            for j in range(self.D // 8):
                for v in range(2):
                    self.acc3[v, r, j] = self.acc3[v, r, j] * self.change[r]

    def round(self, h: Any, s: Any, p: Any) -> None:
        """Weights to P: an A fragment has the order of a C fragment."""
        for j in range(self.rows // 8):
            for r in range(2):
                self.pairs[r, j] = rounded(self.S3[0, r, j], self.S3[1, r, j], self.config.dtype)

    @cute.jit
    def finish(self, item: Any, h: Any, o: Any) -> None:
        """Normalise, and write the rows that are tokens, with their log-sum-exp."""
        out, lse, grid, sO, acc3, tid = self.o, self.lse, self.grid, self.sO, self.acc3, self.tid
        lane = tid % 32
        for r in cutlass.range_constexpr(2):
            whole = self.total[r] + cute.arch.shuffle_sync_bfly(self.total[r], offset=1)
            whole += cute.arch.shuffle_sync_bfly(whole, offset=2)
            inverse = Float32(1) / whole
            for j in cutlass.range_constexpr(self.D // 8):
                for v in cutlass.range_constexpr(2):
                    acc3[v, r, j] = acc3[v, r, j] * inverse
            top = self.top[r]
            is_token, token = self.token(tid // 32 * 16 + lane // 4 + 8 * r, item, grid)
            if is_token and lane % 4 == 0:
                lse[item.batch, item.head, token] = (top * self.scale_log2 + cute.math.log2(whole)) * LN_2
        rounded_output = cute.make_rmem_tensor_like(self.acc, self.dtype)
        rounded_output.store(self.acc.load().to(self.dtype))
        _, pv = self.products()
        copy = cute.make_tiled_copy_C(cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.dtype), pv)
        mine = copy.get_slice(tid)
        cute.arch.barrier(barrier_id=EPILOGUE_BARRIER + h, number_of_threads=GROUP)  # the last item is read
        cute.copy(copy, mine.retile(rounded_output), mine.partition_D(sO))
        cute.arch.barrier(barrier_id=EPILOGUE_BARRIER + h, number_of_threads=GROUP)
        pieces = self.D // 8  # of 16 bytes in a row
        for turn in cutlass.range_constexpr(64 * pieces // GROUP):
            row = h * 64 + turn * (GROUP // pieces) + tid % GROUP // pieces
            is_token, token = self.token(row, item, grid)
            if is_token:
                piece = tid % pieces
                source = cute.zipped_divide(sO[row, None], (8,))[None, piece]
                target = cute.zipped_divide(out[item.batch, item.head, token, None], (8,))[None, piece]
                cute.autovec_copy(source, target)
