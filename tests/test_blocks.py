"""Block lists in closed form, bit for bit against the dense mask; exact counts."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
from cases import NATTEN_CASES, all_1d, causal_variants, random_spec
from orders import axis_pairs, blocked, from_lists, ordered_mask, random_tiles

from gnaflex import tiles
from gnaflex.blocks import written
from gnaflex.layout import Layout
from gnaflex.order import Document, Order, order_of
from gnaflex.reference import dense_mask
from gnaflex.row_blocks import row_major
from gnaflex.spec import GNA
from gnaflex.tile_blocks import tile_major


def check(pending, mask, q_block, kv_block, full_width):
    """Forward lists, then transposed ones, against the blocks of a dense mask."""
    touched, full = blocked(mask, q_block, kv_block)
    lists = written(pending, [one.columns for one in pending] if full_width else None)
    for (partial_lists, full_lists), some, every in (
        (lists[:2], touched, full),
        (lists[2:], touched.T, full.T),
    ):
        columns = some.shape[1]
        assert np.array_equal(from_lists(*full_lists, columns), every)
        assert np.array_equal(from_lists(*partial_lists, columns), some & ~every)
        for one in (partial_lists, full_lists):
            assert one.indices.flags.c_contiguous
            assert one.indices.shape[1] == (columns if full_width else max(1, one.counts.max()))


def check_row_major(spec, q_block, kv_block, full_width=True):
    order = order_of(spec)
    pending = [*row_major(order, q_block, kv_block), *row_major(order, q_block, kv_block, True)]
    check(pending, dense_mask(spec).numpy(), q_block, kv_block, full_width)


def check_tile_major(spec, q_tile, kv_tile, full_width=True):
    order = Order((Document(Layout(spec, q_tile, kv_tile)),))
    pending = [*tile_major(order), *tile_major(order, True)]
    q_block, kv_block = int(np.prod(q_tile)), int(np.prod(kv_tile))
    mask = ordered_mask(spec, q_tile, kv_tile)
    check(pending, mask, q_block, kv_block, full_width)
    assert tiles.touched_blocks(spec, q_tile, kv_tile) == blocked(mask, q_block, kv_block)[0].sum()


@pytest.mark.parametrize("causal", [False, True])
def test_every_1d_problem_up_to_14(causal):
    seen = 0
    for spec in all_1d(14):
        if spec.is_causal != (causal,):
            continue
        seen += 1
        check_row_major(spec, 1 + seen % 5, 1 + seen % 3, bool(seen % 2))
        check_tile_major(spec, (2 * (1 + seen % 3),), (1 + seen % 3,), bool(seen % 2))
        check_tile_major(spec, (1 + seen % 4,), (1 + seen % 4,), bool(seen % 2))
    assert seen == 867


@pytest.mark.parametrize("seed", range(8))
def test_random_problems(seed):
    rng = random.Random(seed)
    for _ in range(150):
        spec = random_spec(rng, rng.choice([2, 2, 3, 3, 4]), 300)
        check_row_major(spec, rng.randint(1, 20), rng.randint(1, 20), rng.random() < 0.5)
        check_tile_major(spec, *random_tiles(rng, spec), rng.random() < 0.5)


@pytest.mark.parametrize("spec", [spec for spec in NATTEN_CASES if spec.num_tokens <= 4096], ids=repr)
def test_natten_cases(spec):
    rng = random.Random(repr(spec))
    variants = causal_variants(spec)
    for one in variants if spec.num_tokens <= 300 else [spec, *rng.sample(variants, 1)]:
        check_row_major(one, 128, 128)
        tile = tuple(rng.choice([1, 2, 4, 8]) for _ in spec.shape)
        check_tile_major(one, tile, tile, False)


LARGE = [
    GNA((30, 48, 80), (18, 24, 24), (16, 8, 8)),
    GNA((30, 48, 80), (18, 24, 24), is_causal=(True, False, False)),
    GNA((33, 45, 80), (18, 24, 24), (16, 8, 8)),
    GNA((16, 44, 80), (16, 4, 16), (1, 4, 1), (1, 11, 5)),
    GNA((21, 45, 81), (4, 7, 9), (3, 5, 2), (3, 2, 4), (False, True, False)),
    *[spec for spec in NATTEN_CASES if spec.num_tokens > 4096],
]


@pytest.mark.parametrize("spec", LARGE, ids=repr)
@pytest.mark.parametrize("order", ["row-major", "tile-major"])
def test_large_masks_by_block_rows(spec, order):
    """Sampled block rows, forward and transposed, pair by pair."""
    rng = random.Random(repr(spec))
    spec = rng.choice(causal_variants(spec))
    if order == "row-major":
        tokens, pads = np.arange(spec.num_tokens), np.zeros(spec.num_tokens, bool)
        make = functools.partial(row_major, order_of(spec), 128, 128)
    else:
        tile = {1: (128,), 2: (8, 16), 3: (2, 8, 8)}[spec.rank]
        tokens, pads = Layout(spec, tile, tile).row_major_tokens()
        make = functools.partial(tile_major, Order((Document(Layout(spec, tile, tile)),)))
    at = np.stack(np.unravel_index(tokens, spec.shape))
    rows, whole = -(-len(tokens) // 128), len(tokens) // 128
    for inverse in (False, True):
        partial, full = written(make(inverse))
        row = rng.randrange(rows)
        mine = slice(row * 128, (row + 1) * 128)
        seen = _pairs_of_rows(spec, at, mine, inverse) & (~pads if not inverse else ~pads[mine][:, None])
        cut = np.zeros((seen.shape[0], rows * 128), bool)
        cut[:, : len(tokens)] = seen
        cut = cut.reshape(-1, rows, 128)
        touched, every = cut.any((0, 2)), cut.all((0, 2)) & (np.arange(rows) < whole) & (row < whole)
        only = slice(row, row + 1)
        assert np.array_equal(from_lists(full.counts[only], full.indices[only], rows)[0], every)
        assert np.array_equal(
            from_lists(partial.counts[only], partial.indices[only], rows)[0], touched & ~every
        )


def _pairs_of_rows(spec, at, mine, inverse):
    out = np.ones((len(at[0][mine]), at.shape[1]), bool)
    for axis, coordinate in zip(spec.axes, at, strict=True):
        rows, columns = coordinate[mine][:, None], np.arange(axis.length)
        table = axis_pairs(axis, columns, rows) if inverse else axis_pairs(axis, rows, columns)
        out &= table[:, coordinate]
    return out


def test_the_axis_predicate_is_the_oracle():
    for spec in all_1d(9):
        x = np.arange(spec.num_tokens)
        assert np.array_equal(axis_pairs(spec.axes[0], x[:, None], x), dense_mask(spec).numpy())


def test_a_dilation_group_that_wraps_from_row_to_row():
    """Tokens 4 and 5 of a 5x5 grid end one row and begin the next, in one group: full blocks of two exist."""
    check_row_major(GNA((5, 5), (4, 2), (4, 2), (1, 2)), 2, 1)


def test_counts_of_the_definition():
    spec = GNA((30, 48, 80), (18, 24, 24), (16, 8, 8))
    assert tiles.allowed_pairs(spec) == spec.num_tokens * 18 * 24 * 24
    rng = random.Random(1)
    for _ in range(200):
        spec = random_spec(rng, rng.randint(1, 3), 200)
        assert tiles.allowed_pairs(spec) == int(dense_mask(spec).sum())


def test_touched_holds_the_touched_of_sub_tiles():
    rng = random.Random(2)
    for _ in range(200):
        spec = random_spec(rng, rng.randint(1, 3), 200)
        tile = tuple(rng.choice([2, 4]) for _ in spec.shape)
        half = tuple(t // 2 for t in tile)
        for axis, t, h in zip(spec.axes, tile, half, strict=True):
            for group in tiles.groups(axis):
                big = tiles.tile_ranges(group.n, axis, t, 1)
                small = tiles.tile_ranges(group.n, axis, h, 1)
                for at in range(len(small.touched_lo)):
                    assert big.touched_lo[at // 2] <= small.touched_lo[at]
                    assert big.touched_hi[at // 2] >= small.touched_hi[at]
