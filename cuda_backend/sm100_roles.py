"""The roles of a Blackwell block and how they hand work to each other: data and programs, no cutlass.

A block takes pairs of boxes, "halves" of 128 query rows, over the key tiles of both. Keys and values share a
ring of stages: K V K V. Tensor memory holds scores and output of each half; weights lie over the scores.

| role | threads | does |
|---|---|---|
| load | one warp | brings queries, keys, values |
| multiply | one warp | issues S = Q K^T and O += P V |
| weigh | 128 for each half | scores to weights; notes for ``correct``: by what O changes, then the sums |
| correct | 128 | rescales O where the maximum grew, normalises it at the end, writes it to shared memory |
| store | one warp | stores it |
"""

from __future__ import annotations

from typing import Any

from gnaflex.cuda_backend import protocol
from gnaflex.cuda_backend.protocol import HALVES, Action, Barrier, Buffer
from gnaflex.cuda_backend.protocol import loop as range

GROUP = 128  # threads of a warp group

BARRIERS = {
    "q_full": Barrier("tma", halves=True),
    "q_empty": Barrier("mma", is_free=True),  # both halves
    "kv_full": Barrier("tma", places="stages"),
    "kv_empty": Barrier("mma", places="stages", is_free=True),
    "s_full": Barrier("mma", halves=True),
    "p_full": Barrier("threads", GROUP, halves=True),
    "o_ready": Barrier("threads", GROUP, halves=True),  # rescaled, or read to the end
    "o_full": Barrier("mma", halves=True),
    "note_full": Barrier("threads", GROUP, halves=True),
    "note_empty": Barrier("threads", GROUP, is_free=True, halves=True),
    "out_full": Barrier("threads", GROUP),
    "out_empty": Barrier("one", is_free=True),
}

BUFFERS = {
    "q": Buffer(halves=True),
    "kv": Buffer("stages"),
    "s": Buffer(halves=True),  # tensor memory: scores, then weights
    "o": Buffer(halves=True),  # tensor memory
    "note": Buffer(halves=True),
    "out": Buffer(),
}

ACTIONS = {
    "bring_queries": Action("tma", writes=("q",), full="q_full"),
    "bring_keys": Action("tma", writes=("kv",), full="kv_full"),
    "bring_values": Action("tma", writes=("kv",), full="kv_full"),
    "scores": Action("mma", reads=("q:bring_queries", "kv:bring_keys"), writes=("s",)),
    "outputs": Action("mma", reads=("s:leave_weights", "kv:bring_values", "o:rescale"), writes=("o",)),
    "read_scores": Action("threads", reads=("s:scores",)),
    "leave_change": Action("threads", writes=("note",)),
    "leave_weights": Action("threads", writes=("s",)),
    "leave_sums": Action("threads", writes=("note",)),
    "read_change": Action("threads", reads=("note:leave_change",)),
    "read_sums": Action("threads", reads=("note:leave_sums",)),
    "rescale": Action("threads", writes=("o",)),
    "finish": Action("threads", reads=("o:outputs",), writes=("out",)),
    "store_box": Action("store", reads=("out:finish",)),
}


class Roles:
    """The programs. A pair says how many ``tiles`` it has, how many of them each half sees (``counts``), and
    whether it does see any (``present``, 1 or 0); the first half always does."""

    @protocol.jit
    def load(self: Any) -> None:
        """Every tile of every pair, in the order in which ``multiply`` takes them."""
        n = self.number(0)
        for turn in range(self.turns(), unroll=1):
            pair = self.pair(turn)
            self.wait("q_empty", turn)
            self.bring_queries(pair, h=0, q=turn)
            for j in range(pair.tiles, unroll=1):
                self.wait("kv_empty", n)
                self.bring_keys(pair, j, kv=n)
                if j == 0:  # the first half can begin without them
                    self.bring_queries(pair, h=1, q=turn)
                self.wait("kv_empty", n + 1)
                self.bring_values(pair, j, kv=n + 1)
                n += 2

    @protocol.jit
    def multiply(self: Any) -> None:
        """S of a half's next tile right behind P V of this one, so that both are with the tensor cores while
        the other half weighs. A tile's V lies behind its K in the ring, then K of the next tile."""
        n = self.number(0)
        before = self.numbers(0, 0)  # tiles that the halves have seen in earlier pairs
        for turn in range(self.turns(), unroll=1):
            pair = self.pair(turn)
            self.wait("kv_full", n)
            for h in HALVES:
                self.wait("q_full", turn, h)
                if self.sees(pair, h, 0):
                    self.scores(h=h, q=turn, kv=n, s=before[h])
                    self.commit("s_full", before[h], h)
            self.release_keys(pair, self.number(0), n, turn)
            for j in range(pair.tiles, unroll=1):
                self.wait("kv_full", n + 1)
                if j + 1 < pair.tiles:
                    self.wait("kv_full", n + 2)
                for h in HALVES:
                    if self.sees(pair, h, j):
                        i = self.tile_of(pair, h, j)
                        m = before[h] + i
                        self.wait("p_full", m, h)
                        self.wait("o_ready", m, h)
                        self.outputs(i, h=h, s=m, kv=n + 1, o=m)
                        if i == pair.counts[h] - 1:
                            self.commit("o_full", turn, h)
                    if self.sees(pair, h, j + 1):
                        m = before[h] + self.tile_of(pair, h, j + 1)
                        self.scores(h=h, q=turn, kv=n + 2, s=m)
                        self.commit("s_full", m, h)
                self.commit("kv_empty", n + 1)
                if j + 1 < pair.tiles:
                    self.release_keys(pair, j + 1, n + 2, turn)
                n += 2
            for h in HALVES:  # not earlier: ``correct`` is in this pair since it gave the first half's O free
                if pair.present[h] == 0:
                    self.commit("o_full", turn, h)
            before = self.numbers(before[0] + pair.counts[0], before[1] + pair.counts[1])

    @protocol.jit
    def release_keys(self: Any, pair: Any, j: Any, n: Any, turn: Any) -> None:
        """All products with K of tile ``j`` are issued; with the last K, those with Q."""
        self.commit("kv_empty", n)
        if j == pair.tiles - 1:
            self.commit("q_empty", turn)

    @protocol.jit
    def weigh(self: Any, h: Any) -> None:
        """A note for every tile, whose number is therefore that of the tile and one more per pair."""
        s = self.number(0)
        for turn in range(self.turns(), unroll=1):
            item = self.half(turn, h)
            self.start()
            for i in range(item.tiles, unroll=1):
                self.wait("s_full", s, h)
                self.read_scores(item, i, h=h, s=s)
                self.wait("note_empty", s + turn, h)
                self.leave_change(h=h, note=s + turn)
                self.arrive("note_full", s + turn, h)
                self.leave_weights(h=h, s=s)
                self.arrive("p_full", s, h)
                self.sum_up()
                s += 1
            self.wait("note_empty", s + turn, h)
            self.leave_sums(h=h, note=s + turn)
            self.arrive("note_full", s + turn, h)

    @protocol.jit
    def correct(self: Any) -> None:
        """O of a half is not touched while P V is added to it: its scores of the next tile come after."""
        before = self.numbers(0, 0)
        outs = self.number(0)
        for turn in range(self.turns(), unroll=1):
            pair = self.pair(turn)
            for j in range(pair.tiles, unroll=1):
                for h in HALVES:
                    if self.sees(pair, h, j):
                        i = self.tile_of(pair, h, j)
                        m = before[h] + i
                        self.wait("note_full", m + turn, h)
                        change = self.read_change(h=h, note=m + turn)
                        self.arrive("note_empty", m + turn, h)
                        self.rescale(change, i, h=h, o=m)
                        self.arrive("o_ready", m, h)
            before = self.numbers(before[0] + pair.counts[0], before[1] + pair.counts[1])
            for h in HALVES:
                m = before[h] + turn
                self.wait("note_full", m, h)
                sums = self.read_sums(h=h, note=m)
                self.arrive("note_empty", m, h)
                self.wait("o_full", turn, h)
                if pair.present[h] == 1:
                    self.wait("out_empty", outs)
                    self.finish(pair, sums, h=h, o=before[h] - 1, out=outs)
                    self.arrive("out_full", outs)
                outs += pair.present[h]

    @protocol.jit
    def store(self: Any) -> None:
        """Output from shared memory; the place is free once the TMA unit has read it."""
        outs = self.number(0)
        for turn in range(self.turns(), unroll=1):
            pair = self.pair(turn)
            for h in HALVES:
                if pair.present[h] == 1:
                    self.wait("out_full", outs)
                    self.store_box(pair, h=h, out=outs)
                    self.stored()
                    self.arrive("out_empty", outs)
                outs += pair.present[h]
