"""The roles of a Hopper block and how they hand work to each other: data and programs, no cutlass.

| role | threads | does |
|---|---|---|
| load | one warp | brings queries, keys, values |
| attend | two groups of 128, each 64 rows of the box | S = Q K^T, weights, O += P V; all in registers |

The groups take turns at issuing products (FlashAttention-3, section 3.1), so that one's softmax runs while
the other's products do.
"""

from __future__ import annotations

from typing import Any

from gnaflex.cuda_backend import protocol
from gnaflex.cuda_backend.protocol import Action, Barrier, Buffer
from gnaflex.cuda_backend.protocol import loop as range

GROUP = 128  # threads of a warp group
CONSUMERS = 2 * GROUP

BARRIERS = {
    "q_full": Barrier("tma"),
    "q_empty": Barrier("threads", CONSUMERS, is_free=True),
    "k_full": Barrier("tma", places="stages"),
    "k_empty": Barrier("threads", CONSUMERS, "stages", is_free=True),
    "v_full": Barrier("tma", places="stages"),
    "v_empty": Barrier("threads", CONSUMERS, "stages", is_free=True),
    "turn": Barrier("named", CONSUMERS, halves=True),
}

BUFFERS = {
    "q": Buffer(),
    "k": Buffer("stages"),
    "v": Buffer("stages"),
    "s": Buffer(halves=True),  # these are registers of a group: scores, then weights
    "p": Buffer(halves=True),  # weights, rounded
    "o": Buffer(halves=True),
}

ACTIONS = {
    "bring_queries": Action("tma", writes=("q",), full="q_full"),
    "bring_keys": Action("tma", writes=("k",), full="k_full"),
    "bring_values": Action("tma", writes=("v",), full="v_full"),
    "scores": Action("wgmma", reads=("q:bring_queries", "k:bring_keys"), writes=("s",)),
    "weigh": Action("threads", reads=("s:scores",), writes=("s",)),
    "round": Action("threads", reads=("s:weigh",), writes=("p",)),
    "outputs": Action("wgmma", reads=("p:round", "v:bring_values"), writes=("o",)),
    "rescale": Action("threads", reads=("o:outputs",), writes=("o",)),
    "finish": Action("threads", reads=("o:outputs",)),
}


class Roles:
    """The programs. An item says how many ``tiles`` it has, at least one."""

    @protocol.jit
    def load(self: Any) -> None:
        """Every tile of every item, in the order in which ``attend`` takes them."""
        n = self.number(0)
        for turn in range(self.turns(), unroll=1):
            item = self.item(turn)
            self.wait("q_empty", turn)
            self.bring_queries(item, q=turn)
            for i in range(item.tiles, unroll=1):
                self.wait("k_empty", n)
                self.bring_keys(item, i, k=n)
                self.wait("v_empty", n)
                self.bring_values(item, i, v=n)
                n += 1

    @protocol.jit
    def attend(self: Any, h: Any) -> None:
        """S of the next tile on the tensor cores while P V of this one is."""
        n = self.number(0)
        if h == 1:
            self.pass_turn(h)
        for turn in range(self.turns(), unroll=1):
            item = self.item(turn)
            self.start()
            self.wait("q_full", turn)
            self.wait("k_full", n)
            self.scores(h=h, q=turn, k=n, s=n)
            self.wait_products(0)
            self.arrive("k_empty", n)
            self.weigh(item, self.number(0), h=h, s=n)
            self.round(h=h, s=n, p=n)
            for i in range(1, item.tiles, unroll=1):
                self.wait("k_full", n + 1)
                self.wait_turn(h)
                self.scores(h=h, q=turn, k=n + 1, s=n + 1)
                self.wait("v_full", n)
                self.outputs(h=h, v=n, p=n, o=n)
                self.pass_turn(h)
                self.wait_products(1)
                self.arrive("k_empty", n + 1)
                self.weigh(item, i, h=h, s=n + 1)
                self.settle()
                self.wait_products(0)
                self.arrive("v_empty", n)
                self.rescale(h=h, o=n)
                self.round(h=h, s=n + 1, p=n + 1)
                n += 1
            self.arrive("q_empty", turn)
            self.wait("v_full", n)
            self.outputs(h=h, v=n, p=n, o=n)
            self.wait_products(0)
            self.arrive("v_empty", n)
            self.finish(item, h=h, o=n)
            n += 1
