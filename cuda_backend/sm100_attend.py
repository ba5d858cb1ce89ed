"""Forward attention on Blackwell (sm_100a): two boxes of queries over the key tiles of both.

Who does what, and who waits for whom, is said in sm100_roles.py; this is how. Scores S and output O of both
halves fill tensor memory, one row per lane; weights lie over the scores, so that P V reads them from there
(tcgen05, "P in tensor memory"). A softmax thread has a whole row in registers. O is rescaled only when the
maximum of a row grew by more than 2^8, as FlashAttention-4 does; the sums follow the same reference.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.memory
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from gnaflex.cuda_backend.attend import LN_2, Attend, exp2, rounded, settle
from gnaflex.cuda_backend.config import GROWTH, NOTE_BYTES, KernelConfig
from gnaflex.cuda_backend.items import Item, Pair, sees, slot, tile_of
from gnaflex.cuda_backend.protocol import HALVES
from gnaflex.cuda_backend.sm100_roles import BARRIERS, GROUP, Roles
from gnaflex.cuda_backend.tile_walk import Q_ROWS
from gnaflex.cuda_backend.views import Grid, box_copy, view

CORRECT, MULTIPLY, LOAD, STORE = 8, 12, 13, 14  # first warps of the roles; weigh has 0 to 7
THREADS = 16 * 32
REGISTERS = {"weigh": 200, "correct": 64, "others": 48}  # 128 * (2 * 200 + 64 + 48) = 65,536
COLUMNS = 512  # of tensor memory: all there are
S_AT, O_AT = (0, 128), (256, 384)  # columns of each half
MAGIC = 12582912.0  # 1.5 * 2^23: a number added to it is rounded to an integer, in its low bits
LEAST = -125.0  # powers of two below are as good as 0
# 2^f on [-1/2, 1/2], least relative error (Remez): 7.5e-5, a fiftieth of bfloat16's rounding; 2.6e-6
POWERS = {
    "bfloat16": (0.9999280735394012, 0.6932609854606548, 0.24261112219321546, 0.05517166905792732),
    "float16": (
        *(0.999999261445712, 0.6931218147366899, 0.24024744827864145),
        *(0.055917860319385, 0.00957010191115053),
    ),
}
# one pair of weights in so many is a polynomial, others take the exponential unit; B300's is twice as fast
POLYNOMIALS = {"sm_100a": 4, "sm_103a": 0}


class Attend100(Roles, Attend):  # type: ignore[misc, unused-ignore]
    """The kernel of a configuration."""

    BARRIERS = BARRIERS
    halves = len(HALVES)
    threads = THREADS
    load, multiply, release_keys, weigh, correct, store = (
        cute.jit(program)
        for program in (
            *(Roles.load, Roles.multiply, Roles.release_keys),
            *(Roles.weigh, Roles.correct, Roles.store),
        )
    )

    def __init__(self, config: KernelConfig) -> None:
        super().__init__(config)
        self.chunk = 32 if self.rows % 32 == 0 else 16  # columns of weights that are written together

    def products(self) -> tuple[Any, Any]:
        """Q K^T and P V."""
        rows, channels = OperandMajorMode.K, OperandMajorMode.MN
        source, one = tcgen05.OperandSource, tcgen05.CtaGroup.ONE
        return (
            cute.make_tiled_mma(
                tcgen05.MmaF16BF16Op(
                    self.dtype, Float32, (Q_ROWS, self.rows, 16), one, source.SMEM, rows, rows
                )
            ),
            cute.make_tiled_mma(
                tcgen05.MmaF16BF16Op(
                    self.dtype, Float32, (Q_ROWS, self.D, 16), one, source.TMEM, rows, channels
                )
            ),
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
    def kernel(
        self,
        by_box: Any,
        by_line: Any,
        stores: Any,
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
        """A block: its share of the work, one pair after another."""

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
        self.by_box, self.by_line, self.to_memory = by_box, by_line, stores
        self.lse, self.grid, self.scale_log2, self.share = lse, grid, scale_log2, share
        self.work = work, o, counts, grid, texts, keys
        self.suffix_start = keys - texts[1] - texts[2]
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
        self.schedule = self.schedule_of(*self.work)

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

    def scores_at(self, column: Any, qk: Any) -> cute.Tensor:
        """S in tensor memory, as the product writes it."""
        layout = qk.make_fragment_C(qk.partition_shape_C((Q_ROWS, self.rows))).layout
        return cute.make_tensor(self.tmem + column, layout)

    def output_at(self, column: Any, pv: Any) -> cute.Tensor:
        """O in tensor memory, likewise."""
        layout = pv.make_fragment_C(pv.partition_shape_C((Q_ROWS, self.D))).layout
        return cute.make_tensor(self.tmem + column, layout)

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

    # ---- weigh ---------------------------------------------------------------------------------------

    def weigh_setup(self, h: Any) -> None:
        """Registers of a row of scores, and how they come from tensor memory and go back as weights."""
        self.begin()
        qk, _ = self.products()
        tS = self.scores_at(h * (S_AT[1] - S_AT[0]), qk)[(None, None), 0, 0]
        load = tcgen05.Ld32x32bOp(tcgen05.Repetition(self.chunk))
        copy = tcgen05.make_tmem_copy(cute.make_copy_atom(load, Float32), tS)
        self.read = copy, copy.get_slice(self.lane).partition_S(tS)
        shape = copy.get_slice(self.lane).partition_D(cute.make_identity_tensor(tS.shape)).shape
        whole = cute.make_rmem_tensor(shape, Float32)
        self.S_as_read, self.S = whole, cute.make_tensor(whole.iterator, cute.make_layout(self.rows))
        half = cute.make_layout((Q_ROWS, self.rows // 2))
        tP = cute.make_tensor(
            tS.iterator, cute.composition(tS.layout, half)
        )  # pairs of weights as one column
        store = tcgen05.St32x32bOp(tcgen05.Repetition(self.chunk // 2))
        copy = tcgen05.make_tmem_copy(cute.make_copy_atom(store, Float32), tP)
        target = copy.get_slice(self.lane).partition_D(tP)
        shape = copy.get_slice(self.lane).partition_S(cute.make_identity_tensor(tP.shape)).shape
        pairs = cute.make_rmem_tensor(shape, Float32)
        self.write = copy, pairs, target
        self.pairs = cute.make_tensor(
            cute.recast_ptr(pairs.iterator, dtype=Int32), cute.make_layout(self.rows // 2)
        )
        self.top, self.total, self.change = (cute.make_rmem_tensor((1,), Float32) for _ in range(3))

    def start(self) -> None:
        """A new item."""
        self.top[0], self.total[0] = -Float32.inf, Float32(0)

    def read_scores(self, item: Item, i: Any, h: Any, s: Any) -> None:
        """Scores of a row, those that are none hidden, and their maximum."""
        copy, source = self.read
        cute.copy(copy, source, self.S_as_read)
        cute.arch.fence_view_async_tmem_load()
        self.mask(item, i)
        self.raise_top()

    def hide(self, words: Any) -> None:
        """-inf where a key is none: bit ``c`` of the words says whether column ``c`` of the scores is one."""
        for c in range(self.rows):
            is_key = (words[c // 32] >> (c % 32)) & 1 != 0
            self.S[c] = cutlass.select_(is_key, self.S[c], -Float32.inf)

    def raise_top(self) -> None:
        """The reference of the row's weights: its maximum so far, but for small growth."""
        S = self.S
        most = [_max3(self.top[0], S[0], S[1]), _max3(S[2], S[3], S[4]), S[5], S[6]]
        for first in range(7, self.rows, 2):
            chain = first // 2 % 4
            second = S[first + 1] if first + 1 < self.rows else S[first]
            most[chain] = _max3(most[chain], S[first], second)
        new = cute.arch.fmax(_max3(most[0], most[1], most[2]), most[3])
        grows = (new - self.top[0]) * self.scale_log2
        is_far = grows > GROWTH[self.config.arch]  # from -inf, too
        self.change[0] = cutlass.select_(is_far, exp2(-grows), Float32(1))
        self.top[0] = cutlass.select_(is_far, new, self.top[0])

    def leave_change(self, h: Any, note: Any) -> None:
        """What all before must be multiplied by."""
        self.notes[self.lane, 0, h] = self.change[0]

    def leave_weights(self, h: Any, s: Any) -> None:
        """Weights in place of the scores, in registers and in tensor memory, a chunk of columns at a time."""
        copy, written, target = self.write
        settle(self.change[0])  # else ptxas (13.4) moves the exponentials before the note
        shift = -self.top[0] * self.scale_log2
        for chunk in range(self.rows // self.chunk):
            for at in range(chunk * self.chunk, (chunk + 1) * self.chunk, 2):
                both = self.weights((self.S[at], self.S[at + 1]), shift, at // 2)
                self.S[at], self.S[at + 1] = both
                self.pairs[at // 2] = rounded(*both, self.config.dtype)
            cute.copy(copy, written[None, None, chunk], target[None, None, chunk])
        cute.arch.fence_view_async_tmem_store()

    def weights(self, scores: Any, shift: Any, number: int) -> Any:
        """exp2(score * scale + shift), twice."""
        powers = cute.arch.fma_packed_f32x2(scores, (self.scale_log2,) * 2, (shift, shift))
        every = POLYNOMIALS[self.config.arch]
        if every and number % every == every - 1:
            return polynomial(powers, POWERS[self.config.dtype])
        return exp2(powers[0]), exp2(powers[1])

    def sum_up(self) -> None:
        """The row's sum of weights."""
        sums = [(self.total[0] * self.change[0], Float32(0)), *((Float32(0),) * 2 for _ in range(3))]
        for at in range(0, self.rows, 2):
            one = at // 2 % 4
            sums[one] = cute.arch.add_packed_f32x2(sums[one], (self.S[at], self.S[at + 1]))
        a, b = (cute.arch.add_packed_f32x2(sums[i], sums[i + 2]) for i in range(2))
        a = cute.arch.add_packed_f32x2(a, b)
        self.total[0] = a[0] + a[1]

    def leave_sums(self, h: Any, note: Any) -> None:
        """What the output is divided by, and the reference of the log-sum-exp."""
        self.notes[self.lane, 0, h] = self.total[0]
        self.notes[self.lane, 1, h] = self.top[0]

    # ---- correct -------------------------------------------------------------------------------------

    def read_change(self, h: int, note: Any) -> Any:
        """Of this thread's row."""
        return self.notes[self.lane, 0, h]

    def read_sums(self, h: int, note: Any) -> Any:
        """Of this thread's row: sum and reference."""
        return self.notes[self.lane, 0, h], self.notes[self.lane, 1, h]

    @cute.jit
    def rescale(self, change: Any, i: Any, h: cutlass.Constexpr, o: Any) -> None:
        """O by the change, where a row of the warp has one; the first tile overwrites it."""
        if i > 0:  # noqa: SIM102 (CuTe DSL would vote before it asks)
            if cute.arch.vote_any_sync(change < 1.0):
                self.scale_output(h, change)

    def output_chunks(self, h: int, operation: Any) -> tuple[Any, Any]:
        """A copy of 16 columns of O at a time, and O in such pieces."""
        _, pv = self.products()
        tO = self.output_at(O_AT[h], pv)[(None, None), 0, 0]
        pieces = cute.make_tensor(tO.iterator, cute.composition(tO.layout, cute.make_layout((Q_ROWS, 16))))
        copy = tcgen05.make_tmem_copy(cute.make_copy_atom(operation(tcgen05.Repetition(16)), Float32), pieces)
        return copy, pieces

    def scale_output(self, h: int, change: Any) -> None:
        """O by a number per row."""
        for at in range(0, self.D, 16):
            values = self.output_columns(h, at)
            for c in range(0, 16, 2):
                both = cute.arch.mul_packed_f32x2((values[c], values[c + 1]), (change, change))
                values[c], values[c + 1] = both
            copy, pieces = self.output_chunks(h, tcgen05.St32x32bOp)
            piece = cute.make_tensor(pieces.iterator + at, pieces.layout)
            mine = copy.get_slice(self.lane)
            shape = mine.partition_S(cute.make_identity_tensor(piece.shape)).shape
            source = cute.make_tensor(values.iterator, cute.make_layout(shape))
            cute.copy(copy, source, mine.partition_D(piece))
        cute.arch.fence_view_async_tmem_store()

    def output_columns(self, h: int, at: int) -> cute.Tensor:
        """16 columns of this thread's row of O."""
        copy, pieces = self.output_chunks(h, tcgen05.Ld32x32bOp)
        source = copy.get_slice(self.lane).partition_S(cute.make_tensor(pieces.iterator + at, pieces.layout))
        shape = copy.get_slice(self.lane).partition_D(cute.make_identity_tensor(pieces.shape)).shape
        values = cute.make_rmem_tensor(shape, Float32)
        cute.copy(copy, source, values)
        cute.arch.fence_view_async_tmem_load()
        return cute.make_tensor(values.iterator, cute.make_layout(16))

    @cute.jit
    def finish(self, pair: Any, sums: Any, h: cutlass.Constexpr, o: Any, out: Any) -> None:
        """Normalise, round, and lay out for the TMA unit; write the log-sum-exp of rows that are tokens."""
        total, top = sums
        item = pair.halves[h]
        inverse = cute.arch.rcp_approx(total)
        for at in range(0, self.D, 16):
            values = self.output_columns(h, at)
            pairs = cute.make_rmem_tensor((8,), Int32)
            for c in range(0, 16, 2):
                both = cute.arch.mul_packed_f32x2((values[c], values[c + 1]), (inverse, inverse))
                pairs[c // 2] = rounded(*both, self.config.dtype)
            row = cute.zipped_divide(self.sO[self.lane, None], (8,))
            for piece in range(2):
                words = cute.make_tensor(pairs.iterator + 4 * piece, cute.make_layout(4))
                numbers = cute.make_tensor(
                    cute.recast_ptr(words.iterator, dtype=self.dtype), cute.make_layout(8)
                )
                cute.autovec_copy(numbers, row[None, at // 8 + piece])
        cute.arch.fence_proxy("async.shared", space="cta")
        lse = self.lse
        is_token, token = self.token(self.lane, item, self.grid)
        if is_token:
            lse[item.batch, item.head, token] = (top * self.scale_log2 + cute.math.log2(total)) * LN_2

    # ---- store ---------------------------------------------------------------------------------------

    @cute.jit
    def store_box(self, pair: Any, h: cutlass.Constexpr, out: Any) -> None:
        """A half's rows: those that are no tokens are clipped, as each map ends where its tokens do."""
        item = pair.halves[h]
        by_box, by_prefix, by_suffix = self.to_memory
        boxed = cute.local_tile(self.sO, (self.q_tokens, self.D), (0, 0))
        if cutlass.const_expr(self.text):
            if not item.is_text:
                self.put(by_box, item, tuple(item.q0), self.q_box, boxed)
            elif item.is_behind:
                self.put(by_suffix, item, (item.first - self.suffix_start,), (Q_ROWS,), self.sO)
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


def _max3(a: Any, b: Any, c: Any) -> Any:
    """One instruction since sm_100."""
    return cute.arch.inline_ptx(
        "max.f32 {$w0}, {$r0}, {$r1}, {$r2};", write_only_types=[Float32], read_only_args=[a, b, c]
    )


def polynomial(powers: Any, of: tuple[float, ...]) -> Any:
    """2^x of two numbers without the exponential unit: 2^f of the distance to the nearest integer, whose
    exponent that integer is then added to."""
    powers = tuple(cute.arch.fmax(x, Float32(LEAST), nan=True) for x in powers)
    shifted = cute.arch.add_packed_f32x2(powers, (Float32(MAGIC),) * 2)
    nearest = cute.arch.add_packed_f32x2(shifted, (Float32(-MAGIC),) * 2)
    rest = cute.arch.sub_packed_f32x2(powers, nearest)
    value = (Float32(of[-1]),) * 2
    for one in of[-2::-1]:
        value = cute.arch.fma_packed_f32x2(value, rest, (Float32(one),) * 2)
    return tuple(map(_with_exponent, value, shifted))


def _with_exponent(value: Any, shifted: Any) -> Any:
    return cute.arch.inline_ptx(
        "{ .reg .b32 n, x; mov.b32 n, {$r1}; shl.b32 n, n, 23; mov.b32 x, {$r0}; add.s32 x, x, n; "
        "mov.b32 {$w0}, x; }",
        write_only_types=[Float32],
        read_only_args=[value, shifted],
    )
