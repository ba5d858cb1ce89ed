"""Softmax and output of the Blackwell kernel: the actions of the roles ``weigh`` and ``correct``.

Scores S and output O of both halves fill tensor memory, one row per lane; weights lie over the scores, so
that P V reads them from there (tcgen05, "P in tensor memory"). A thread of ``weigh`` has a whole row in
registers. O is rescaled only when the maximum of a row grew by more than 2^8, as FlashAttention-4 does; the
sums follow the same reference.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import OperandMajorMode, tcgen05
from gnaflex.cuda_backend.attend import Attend
from gnaflex.cuda_backend.config import GROWTH, KernelConfig
from gnaflex.cuda_backend.items import Item
from gnaflex.cuda_backend.softmax import LN_2, exp2, rounded
from gnaflex.cuda_backend.tile_walk import Q_ROWS

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
# One pair of weights in so many is a polynomial, others take the exponential unit. That of Blackwell Ultra is
# twice as fast (NVIDIA, "Making softmax more efficient with Blackwell Ultra").
POLYNOMIALS = {"sm_100a": 4, "sm_103a": 0}


class Softmax(Attend):  # type: ignore[misc, unused-ignore]
    """What is done to tensor memory, but for the products. ``lane`` is a thread's row, ``notes`` [row, what,
    half] is shared memory."""

    begin: Any  # sets what follows
    tmem: Any
    lane: Any
    notes: Any
    sO: Any

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

    def scores_at(self, column: Any, qk: Any) -> cute.Tensor:
        """S in tensor memory, as the product writes it."""
        layout = qk.make_fragment_C(qk.partition_shape_C((Q_ROWS, self.rows))).layout
        return cute.make_tensor(self.tmem + column, layout)

    def output_at(self, column: Any, pv: Any) -> cute.Tensor:
        """O in tensor memory, likewise."""
        layout = pv.make_fragment_C(pv.partition_shape_C((Q_ROWS, self.D))).layout
        return cute.make_tensor(self.tmem + column, layout)

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
        tP = cute.make_tensor(tS.iterator, cute.composition(tS.layout, half))  # a column has two weights
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
        shift = -self.top[0] * self.scale_log2
        for chunk in range(self.rows // self.chunk):
            for at in range(chunk * self.chunk, (chunk + 1) * self.chunk, 2):
                both = self.weights((self.S[at], self.S[at + 1]), shift, at // 2)
                self.S[at], self.S[at + 1] = both
                self.pairs[at // 2] = rounded(both[0], both[1], self.config.dtype)
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
                pairs[c // 2] = rounded(both[0], both[1], self.config.dtype)
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
