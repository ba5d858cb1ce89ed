"""Token orders spelled out token by token, and masks brought into them: the plain counterpart of Layout."""

from __future__ import annotations

import itertools

import numpy as np

from gnaflex.reference import dense_mask
from gnaflex.spec import GNA, Axis


def tile_major_tokens(spec: GNA, q_tile, kv_tile) -> tuple[np.ndarray, np.ndarray]:
    """Row-major token of every place (a pad: of the query it copies), and whether the place is a pad."""
    tokens, pads = [], []
    for group in itertools.product(*map(range, spec.dilation)):
        lengths = [axis.group_length(g) for axis, g in zip(spec.axes, group, strict=True)]
        q_tiles = [range(-(-n // t)) for n, t in zip(lengths, q_tile, strict=True)]
        kv_tiles = [range(q // k) for q, k in zip(q_tile, kv_tile, strict=True)]
        for q, k, t in itertools.product(
            itertools.product(*q_tiles), itertools.product(*kv_tiles), itertools.product(*map(range, kv_tile))
        ):
            inside = [a * x + b * y + z for a, x, b, y, z in zip(q, q_tile, k, kv_tile, t, strict=True)]
            at = [
                min(i, n - 1) * d + g
                for i, n, d, g in zip(inside, lengths, spec.dilation, group, strict=True)
            ]
            tokens.append(int(np.ravel_multi_index(at, spec.shape)))
            pads.append(any(i >= n for i, n in zip(inside, lengths, strict=True)))
    return np.array(tokens), np.array(pads)


def axis_pairs(axis: Axis, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The definition on one axis for arrays of queries and keys that broadcast."""
    length, w, s, d, is_causal = axis
    group, i, j = x % d, x // d, y // d
    n = -((group - length) // d)
    base = i - i % s
    if is_causal:
        leader = np.minimum(base + s - 1, n - 1)
        inside = (np.maximum(leader - w + 1, 0) <= j) & (j <= i)
    else:
        leader = np.minimum(base + s // 2, n - 1)
        lo = np.minimum(np.maximum(leader - w // 2, 0), n - w)
        inside = (lo <= j) & (j < lo + w)
    return inside & (y % d == group)


def ordered_mask(spec: GNA, q_tile=None, kv_tile=None) -> np.ndarray:
    """The dense mask over the places of an order: pads ask with the window they copy and are never seen."""
    mask = dense_mask(spec).numpy()
    if q_tile is None:
        return mask
    tokens, pads = tile_major_tokens(spec, q_tile, kv_tile)
    return mask[tokens][:, tokens] & ~pads


def blocked(mask: np.ndarray, q_block: int, kv_block: int) -> tuple[np.ndarray, np.ndarray]:
    """Touched and full blocks of a dense mask; blocks that reach past the end are never full."""
    rows, columns = -(-mask.shape[0] // q_block), -(-mask.shape[1] // kv_block)
    padded = np.zeros((rows * q_block, columns * kv_block), bool)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    cut = padded.reshape(rows, q_block, columns, kv_block)
    return cut.any((1, 3)), cut.all((1, 3))


def from_lists(counts, indices, columns: int) -> np.ndarray:
    """The dense [rows, columns] picture of block lists; checks that entries ascend and lie inside."""
    counts, indices = np.asarray(counts), np.asarray(indices)
    assert counts.dtype == indices.dtype == np.int32
    out = np.zeros((len(counts), columns), bool)
    for row, (count, entries) in enumerate(zip(counts, indices, strict=True)):
        entries = entries[:count]
        assert (np.diff(entries) > 0).all()
        out[row, entries] = True
    return out


def random_tiles(rng, spec: GNA) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A key tile, and a query tile that is a whole multiple of it (half the time the same); at most 2,000
    tokens with the padding they call for."""
    while True:
        kv_tile = tuple(rng.randint(1, 4) for _ in spec.shape)
        factors = [1] * spec.rank if rng.random() < 0.5 else [rng.choice([1, 2, 3]) for _ in spec.shape]
        q_tile = tuple(k * f for k, f in zip(kv_tile, factors, strict=True))
        groups = np.prod(spec.dilation)
        largest = [-(-axis.group_length(0) // t) * t for axis, t in zip(spec.axes, q_tile, strict=True)]
        if groups * np.prod(largest) <= 2000:
            return q_tile, kv_tile
