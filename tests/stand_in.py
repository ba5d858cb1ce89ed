"""A kernel of ours on the CPU: it reads the numbers of a launch as the GPU's does, addresses included."""

from __future__ import annotations

import ctypes
import itertools
import math

import torch
from gnaflex.cuda_backend.abi import PARTS, counts
from gnaflex.cuda_backend.config import BOXES_AT_ONCE, KernelConfig
from gnaflex.cuda_backend.tile_walk import Q_ROWS

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def at(address, dtype, shape, strides):
    """The tensor that lies at an address."""
    room = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    memory = (ctypes.c_char * (room * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


class StandIn:
    """What ``Launcher`` is called with, done in float64; ``calls`` keeps every launch's numbers by name."""

    def __init__(self, config: KernelConfig) -> None:
        self.config = config
        self.calls = []

    def __call__(self, *numbers):
        rest, given = list(numbers), {}
        for part, n in zip(PARTS, counts(self.config.rank), strict=True):
            given[part.name], rest = (rest[0] if part.numbers == 1 else tuple(rest[:n])), rest[n:]
        assert not rest
        self.calls.append(given)
        self.launch(**given)
        return 0

    def launch(
        self, q, k, v, o, lse, work, valid, stream, strides, sizes, lengths, steps, group_steps, groups,
        texts, start, blocks, scale_log2,
    ):  # fmt: skip
        config = self.config
        rank, dtype, D = config.rank, DTYPES[config.dtype], config.head_dim
        batch, heads, kv_heads, queries, keys, boxes, valid_step = sizes
        assert all(step % 8 == 0 for step in strides)
        assert all(address % 16 == 0 for address in (q, k, v, o))
        assert scale_log2 > 0
        assert blocks >= 1
        tokens = ((q, heads, queries), (k, kv_heads, keys), (v, kv_heads, keys), (o, heads, queries))
        Q, K, V, out = (
            at(address, dtype, (batch, h, n, D), (*strides[3 * i : 3 * i + 3], 1))
            for i, (address, h, n) in enumerate(tokens)
        )
        sums = at(lse, torch.float32, (batch, heads, queries), (heads * queries, queries, 1))
        work = at(work, torch.int32, (boxes, 3, rank), (3 * rank, rank, 1)).tolist()
        halves = BOXES_AT_ONCE[config.arch]
        assert boxes % halves == 0
        work = [one for i, one in enumerate(work) if i % halves == 0 or any(one[2])]  # a half may be none
        prefix, suffix, extra, *columns, are_queries, _rounds = texts
        grid = keys - prefix - suffix - extra
        first = (0, prefix + grid, prefix + grid + suffix)

        def rows(box, size, group):
            """Rows of the sequence of a box that starts at ``box``, its tokens off the grid left out."""
            base = start + sum(g * step for g, step in zip(group, group_steps, strict=True))
            axes = [range(lo, min(lo + n, end)) for lo, n, end in zip(box, size, lengths, strict=True)]
            return [
                base + sum(map(math.prod, zip(place, steps, strict=True)))
                for place in itertools.product(*axes)
            ]

        def attend(b, h, row, column):
            scores = (
                Q[b, h, row].double()
                @ K[b, h // (heads // kv_heads), column].double().T
                * scale_log2
                * math.log(2)
            )
            out[b, h, row] = (scores.softmax(-1) @ V[b, h // (heads // kv_heads), column].double()).to(dtype)
            sums[b, h, row] = scores.logsumexp(-1).float()

        for b, h in itertools.product(range(batch), range(heads)):
            text = []
            for begin, count, column in zip(first, (prefix, suffix, extra), columns, strict=True):
                if count:
                    known = at(valid + 4 * (b * valid_step + column), torch.int32, (1,), (1,)).item()
                    text += range(begin, begin + max(min(count, known), 0))
            for group in itertools.product(*map(range, groups)):
                for query, key, count in work:
                    attend(b, h, rows(query, config.q_box, group), rows(key, count, group) + text)
            if are_queries and prefix + suffix:
                everything = [*range(prefix, prefix + grid), *text]
                attend(b, h, [*range(prefix), *range(prefix + grid, prefix + grid + suffix)], everything)
        assert Q_ROWS == 128
