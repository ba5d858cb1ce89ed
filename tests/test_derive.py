"""Packed grids, resized masks and shards: masks, block lists, attention."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from cases import random_spec
from joint import attend, block_diagonal, joint_mask, joint_order
from orders import blocked, random_tiles
from test_joint import (
    FORMS,
    LISTS,
    ROW_MAJOR,
    another,
    assert_block_for_block,
    assert_within_budget,
    attention,
    pictures,
    random_text,
    seen,
    some_pairs,
    tensors,
)
from torch.nn.attention.flex_attention import create_block_mask

import gnaflex
from gnaflex.reference import dense_mask
from gnaflex.spec import GNA, GNAError

# ---- packed grids ------------------------------------------------------------------------------------


def packed_mask(specs, tiles, prefix, suffix):
    """The dense mask over the places, and the row-major token of every place and whether it is a pad."""
    texts = list(zip(prefix, suffix, strict=True))
    masks = [joint_mask([[spec]], *tiles, *text)[0, 0] for spec, text in zip(specs, texts, strict=True)]
    first, tokens, pads = 0, [], []
    for spec, text in zip(specs, texts, strict=True):
        token, is_pad = joint_order([spec], *tiles, *text)
        tokens.append(first + token)
        pads.append(is_pad)
        first += spec.num_tokens + sum(text)
    return block_diagonal(masks), np.concatenate(tokens), np.concatenate(pads)


def random_packed(rng, tiled):
    """Grids (of one rank if tiled), their extra tokens, the tiles, and the keywords for all of it."""
    rank = rng.randint(1, 3)
    while True:
        specs = [random_spec(rng, rank if tiled else rng.randint(1, 4), 70) for _ in range(rng.randint(1, 4))]
        specs += rng.sample(specs, rng.randint(0, 1))
        tiles = random_tiles(rng, specs[0]) if tiled else ROW_MAJOR
        prefix, suffix = ([rng.choice([0, rng.randint(1, 9)]) for _ in specs] for _ in range(2))
        if rng.random() < 0.5:
            prefix, suffix = [prefix[0]] * len(specs), [suffix[0]] * len(specs)
        if sum(len(joint_order([spec], *tiles, 9, 9)[0]) for spec in specs) < 1500:
            break
    options = dict(zip(("q_tile", "kv_tile"), tiles, strict=True))
    if not tiled:
        options["block_size"] = rng.randint(1, 40), rng.randint(1, 40)
    for name, each in (("prefix", prefix), ("suffix", suffix)):
        options[name] = each[0] if len(set(each)) == 1 and rng.random() < 0.5 else each
    return specs, tiles, prefix, suffix, {**options, "device": "cpu"}


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_packed_masks(seed, tiled):
    """Ranks mixed, text per grid: mask, lists, offsets and order."""
    rng, expressed = random.Random(seed), set()
    for _ in range(12):
        specs, tiles, prefix, suffix, options = random_packed(rng, tiled)
        want, tokens, is_pad = packed_mask(specs, tiles, prefix, suffix)
        sizes = [spec.num_tokens + a + b for spec, a, b in zip(specs, prefix, suffix, strict=True)]
        for form in ("auto", *FORMS):
            try:
                bm, offsets = gnaflex.packed_block_mask(specs, form=form, **options)
            except GNAError:
                assert form in ("packed", "interval", "arith")
                continue
            expressed.add(form)
            assert np.array_equal(seen(bm)[0, 0], want), (form, specs, options)
            assert offsets == (0, *np.cumsum(sizes))
            assert gnaflex.spec_of(bm) == (tuple(specs) if len(specs) > 1 else specs[0])
        bm, _ = gnaflex.packed_block_mask(specs, **options)
        assert_block_for_block(bm)
        x = torch.randn(2, sum(sizes), 3)
        ordered = gnaflex.permute(x, bm)
        assert torch.equal(gnaflex.unpermute(ordered, bm), x)
        assert torch.equal(ordered, x[:, tokens] * ~torch.from_numpy(is_pad)[:, None])
        by_condition, _ = gnaflex.packed_block_mask(specs, where=some_pairs, **options)
        some = some_pairs(0, 0, *(torch.from_numpy(x) for x in (tokens[:, None], tokens))).numpy()
        assert np.array_equal(seen(by_condition)[0, 0], want & some)
        partial, full = pictures(by_condition)
        assert np.array_equal(partial, blocked(want, *bm.BLOCK_SIZE)[0])
        assert not full.any()
    assert expressed >= {"auto", "packed", "table", "interval"}


PACKED = {
    "row-major": ([GNA((4, 7), (3, 4), (2, 1)), GNA(13, 5, is_causal=True), GNA((2, 3, 4), 2)], {}),
    "tile-major": (
        [GNA((4, 7), (3, 4), (2, 1)), GNA((3, 5), 3), GNA((6, 6), 2, 1, (2, 3))],
        {"q_tile": (2, 4), "kv_tile": (2, 2)},
    ),
}


@pytest.mark.parametrize("order", PACKED)
@pytest.mark.parametrize("backend", ["flex", "sdpa", "reference"])
def test_packed_attention_is_that_of_every_grid(backend, order):
    specs, tiles = PACKED[order]
    block = {} if tiles else {"block_size": 32}
    bm, offsets = gnaflex.packed_block_mask(specs, prefix=3, suffix=2, device="cpu", **tiles, **block)
    q, k, v = tensors(offsets[-1], offsets[-1])
    if backend == "reference" and tiles:
        with pytest.raises(NotImplementedError, match="row-major masks only"):
            attention(bm, q, k, v, backend=backend)
        return
    out = attention(bm, q, k, v, backend=backend)
    for spec, first, last in zip(specs, offsets[:-1], offsets[1:], strict=True):
        one = (x[:, :, first:last] for x in (out, q, k, v))
        assert_within_budget(*one, joint_mask([[spec]], prefix=3, suffix=2))


@pytest.mark.parametrize(
    "backend, order", [("sdpa", "row-major"), ("sdpa", "tile-major"), ("reference", "row-major")]
)
def test_packed_gradients_are_those_of_every_grid(backend, order):
    specs, tiles = PACKED[order]
    texts = [(1, 2)] * 3 if backend == "reference" else [(1, 2), (0, 0), (5, 1)]
    prefix, suffix = map(list, zip(*texts, strict=True))
    bm, offsets = gnaflex.packed_block_mask(specs, prefix=prefix, suffix=suffix, device="cpu", **tiles)
    inputs = [x.requires_grad_() for x in tensors(offsets[-1], offsets[-1], dim=4, dtype=torch.float64)]
    got = attention(bm, *inputs, return_lse=True, backend=backend)
    parts = []
    for spec, text, first, last in zip(specs, texts, offsets[:-1], offsets[1:], strict=True):
        parts.append(attend(*(x[:, :, first:last] for x in inputs), joint_mask([[spec]], None, None, *text)))
    want = [torch.cat(part, 2) for part in zip(*parts, strict=True)]
    upstream = [torch.randn_like(x) for x in want]
    grads = [torch.autograd.grad(pair, inputs, upstream) for pair in (got, want)]
    for ours, theirs in zip((*got, *grads[0]), (*want, *grads[1]), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_packed_masks_know_the_coordinates_of_their_grids():
    """Biases and coordinates count in the grid of a token."""
    specs = [GNA((4, 7), 3), GNA((3, 5), (3, 2)), GNA((4, 7), 3)]
    table = torch.randn(4, 5, 5, generator=torch.Generator().manual_seed(0))
    bm, offsets = gnaflex.packed_block_mask(specs, prefix=2, q_tile=(2, 4), device="cpu")
    q, k, v = tensors(offsets[-1], offsets[-1])
    out = attention(bm, q, k, v, score_mod=gnaflex.relative_bias(bm, table), backend="sdpa")
    for spec, first, last in zip(specs, offsets[:-1], offsets[1:], strict=True):
        one = (x[:, :, first:last] for x in (out, q, k, v))
        bias = gnaflex.relative_bias(spec, table, prefix=2)
        assert_within_budget(*one, joint_mask([[spec]], prefix=2), bias)


def test_a_long_packed_mask_is_made_in_closed_form():
    """600,000 tokens, 3.6e11 pairs."""
    specs = [GNA((8, 32, 32), (4, 9, 9)), GNA((16, 24, 40), (4, 9, 9))] * 26
    bm, offsets = gnaflex.packed_block_mask(
        specs, prefix=64, q_tile=(2, 8, 8), device="cpu", full_width=False
    )
    assert offsets[-1] == 26 * (8 * 32 * 32 + 16 * 24 * 40 + 128)
    alone = [gnaflex.block_mask(spec, prefix=64, q_tile=(2, 8, 8), device="cpu") for spec in specs[:2]]
    listed = [(one.kv_num_blocks + one.full_kv_num_blocks).flatten().tolist() for one in alone]
    assert (bm.kv_num_blocks + bm.full_kv_num_blocks).flatten().tolist() == (listed[0] + listed[1]) * 26


@pytest.mark.parametrize(
    "specs, options, message",
    [
        ([], {}, r"takes a sequence of GNA: got \[\](.|\n)*Write packed_block_mask"),
        ([(8, 8)], {}, "takes a sequence of GNA"),
        ([GNA(8, 3)] * 2, {"prefix": [1]}, r"one per grid: got 1 for 2 grids.\n  Write prefix=\[0, 0\]"),
        ([GNA(8, 3)] * 2, {"suffix": [1, -2]}, "suffix must be a number of tokens >= 0: got -2"),
        ([GNA(8, 3), GNA((4, 4), 3)], {"q_tile": (4,)}, r"one positive extent per axis.* for 2 axes"),
        ([GNA(8, 3)] * 2, {"q_tile": (4,), "block_size": 128}, "block_size must agree with the tiles"),
    ],
)
def test_grids_that_cannot_be_packed(specs, options, message):
    with pytest.raises(GNAError, match=message):
        gnaflex.packed_block_mask(specs, device="cpu", **options)


def test_reference_refuses_grids_with_extra_tokens_of_their_own():
    bm, offsets = gnaflex.packed_block_mask([GNA(8, 3)] * 2, prefix=[1, 2], device="cpu")
    with pytest.raises(NotImplementedError, match="packed grids with the same extra tokens only"):
        attention(bm, *tensors(offsets[-1], offsets[-1]), backend="reference")


# ---- another shape -----------------------------------------------------------------------------------


def assert_same_mask(one, other, batch=1, heads=1):
    assert np.array_equal(seen(one, batch, heads), seen(other, batch, heads))
    assert (one.BLOCK_SIZE, one.seq_lengths) == (other.BLOCK_SIZE, other.seq_lengths)
    assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in LISTS)
    assert gnaflex.spec_of(one) == gnaflex.spec_of(other)


def grown(spec, shape):
    """The problem on another shape: axes that the window covers stay covered."""
    window, stride = list(spec.window), list(spec.stride)
    for a, (n, w, d) in enumerate(zip(spec.shape, spec.window, spec.dilation, strict=True)):
        if w == n // d:
            window[a] = shape[a] // d
            stride[a] = window[a] if spec.stride[a] == w else spec.stride[a]
    return GNA(shape, window, stride, spec.dilation, spec.is_causal)


@pytest.mark.parametrize("seed", range(3))
def test_resized_masks_keep_every_option(seed):
    """Tiles or block sizes, extra tokens, heads, conditions, form and width: as if made for the new shape."""
    rng = random.Random(seed)
    for _ in range(10):
        base = random_spec(rng, rng.randint(1, 3), 80)
        text, tiles = random_text(rng, 12), random_tiles(rng, base)
        tiled = rng.random() < 0.5
        options = {"block_size": (rng.randint(1, 40), rng.randint(1, 40))}
        if tiled:
            options = dict(zip(("q_tile", "kv_tile"), tiles, strict=True))
        options |= {"form": rng.choice(["auto", "table"]), "full_width": rng.choice([None, True, False])}
        runs = [n for n in text.values() if n]
        if runs and rng.random() < 0.5:
            options["text_valid"] = torch.tensor([[rng.randint(0, n) for n in runs] for _ in range(2)])
        if rng.random() < 0.3:
            options |= {"padding": torch.tensor([[n - 1 for n in base.shape]]), "where": some_pairs}
        heads = [base] if rng.random() < 0.5 else [base, another(rng, base, tiled), base]
        longest = [max(one.window[a] * one.dilation[a] for one in heads) for a in range(base.rank)]
        shape = tuple(rng.randint(n, n + 6) for n in longest)
        bm = gnaflex.block_mask(heads if len(heads) > 1 else base, device="cpu", **text, **options)
        new = [grown(one, shape) for one in heads]
        want = gnaflex.block_mask(new if len(new) > 1 else new[0], device="cpu", **text, **options)
        got = gnaflex.resize(bm, shape)
        assert_same_mask(got, want, 2, len(heads))
        assert got.mask_mod.gnaflex.form == want.mask_mod.gnaflex.form
        for name in options.keys() & {"text_valid", "padding", "where"}:
            assert getattr(got.mask_mod.gnaflex.cuts, name) is getattr(bm.mask_mod.gnaflex.cuts, name)
        back = [grown(one, base.shape) for one in new]  # a window may cover the other shape by chance
        want = gnaflex.block_mask(back if len(back) > 1 else back[0], device="cpu", **text, **options)
        assert_same_mask(gnaflex.resize(got, base.shape), want, 2, len(heads))


def test_axes_that_the_window_covers_stay_covered():
    cases = [
        (GNA((8, 12), (-1, 5)), (10, 6), GNA((10, 6), (10, 5))),
        (GNA((8, 12), (8, 5), (8, 2)), (6, 20), GNA((6, 20), (6, 5), (6, 2))),
        (GNA((8, 12), (8, 5), (3, 2)), (2, 20), GNA((2, 20), (2, 5), (2, 2))),
        (GNA((8, 12), (4, 3), 1, (2, 2)), (13, 12), GNA((13, 12), (6, 3), 1, (2, 2))),
        (GNA((8, 12), (-1, 5), is_causal=True), (9, 12), GNA((9, 12), (9, 5), is_causal=True)),
        (GNA(8, -1), 20, GNA(20, 20)),
        (GNA((8, 8), -1), 5, GNA((5, 5), 5)),
    ]
    for spec, shape, want in cases:
        assert gnaflex.spec_of(gnaflex.resize(gnaflex.block_mask(spec, device="cpu"), shape)) == want


def test_a_form_that_no_longer_fits_gives_way():
    bm = gnaflex.block_mask((2, 24), (2, 5), form="interval", device="cpu")
    assert gnaflex.resize(bm, (3, 24)).mask_mod.gnaflex.form == "interval"
    with pytest.raises(GNAError, match="up to 20 runs"):
        gnaflex.block_mask((20, 24), (20, 5), form="interval", device="cpu")
    got = gnaflex.resize(bm, (20, 24))
    assert np.array_equal(seen(got)[0, 0], dense_mask(GNA((20, 24), (20, 5))).numpy())


def test_masks_that_cannot_be_resized():
    bm = gnaflex.block_mask((8, 12), (3, 5), q_tile=(2, 4), device="cpu")
    with pytest.raises(GNAError, match=r"axis 0 has window\*dilation=3\*1=3 > length=2"):
        gnaflex.resize(bm, (2, 12))
    with pytest.raises(
        GNAError, match=r"keeps its axes: got 3 for rank 2(.|\n)*Write resize\(bm, \(8, 12\)\)"
    ):
        gnaflex.resize(bm, (8, 12, 4))
    message = r"only a mask of one whole grid can be resized(.|\n)*packed_block_mask\(specs\)"
    packed, _ = gnaflex.packed_block_mask([GNA(8, 3)] * 2, device="cpu")
    shard = gnaflex.shard(GNA(8, 3), 0, 0, 2, device="cpu").block_mask
    for other in (packed, shard):
        with pytest.raises(GNAError, match=message):
            gnaflex.resize(other, 9)
    foreign = create_block_mask(lambda b, h, q, k: q >= k, None, None, 64, 64, "cpu")
    with pytest.raises(GNAError, match="not made by gnaflex"):
        gnaflex.resize(foreign, (8, 8))


# ---- context parallelism -----------------------------------------------------------------------------


def shards(rng, spec):
    """Every rank's share of a problem on one of its axes."""
    axis = rng.randrange(spec.rank)
    units = -(-spec.shape[axis] // spec.dilation[axis])
    world = rng.choice([1, units, rng.randint(1, units)])
    given = rng.choice([axis, axis - spec.rank])
    for rank in range(world):
        block = rng.randint(1, 30), rng.randint(1, 30)
        yield (
            axis,
            gnaflex.shard(spec, given, rank, world, block_size=block, device="cpu"),
            (given, rank, world),
        )


@pytest.mark.parametrize("seed", range(4))
def test_shards_are_rows_and_columns_of_the_whole_mask(seed):
    """Queries follow one another and differ little; the mask is that of the whole; keys are the least run
    from a multiple of the dilation on."""
    rng, expressed = random.Random(seed), set()
    for _ in range(15):
        spec = random_spec(rng, rng.randint(1, 4), 200)
        whole, stop, sizes = dense_mask(spec).numpy().reshape(*spec.shape, *spec.shape), 0, []
        for axis, mine, arguments in shards(rng, spec):
            d, query, key, bm = spec.dilation[axis], mine.query, mine.key, mine.block_mask
            assert mine.axis == axis
            assert (query.start, query.step, key.step) == (stop, None, None)
            stop = query.stop
            sizes.append(-(-(query.stop - query.start) // d))
            rows = whole.take(range(query.start, query.stop), axis)
            queries = int(np.prod(rows.shape[: spec.rank]))
            needed = np.moveaxis(rows, spec.rank + axis, -1).reshape(-1, spec.shape[axis]).any(0).nonzero()[0]
            assert (key.start, key.stop) == (needed[0] // d * d, needed[-1] + 1), (spec, arguments)
            want = rows.take(range(key.start, key.stop), spec.rank + axis).reshape(queries, -1)
            assert want.sum() == rows.sum()
            assert np.array_equal(seen(bm)[0, 0], want), (spec, arguments)
            assert_block_for_block(bm)
            assert gnaflex.spec_of(bm) == spec
            for form in FORMS[:3]:
                try:
                    other = gnaflex.shard(spec, *arguments, form=form, device="cpu").block_mask
                except GNAError:
                    assert form == "interval"
                    continue
                expressed.add(form)
                assert np.array_equal(seen(other)[0, 0], want), (spec, arguments, form)
        assert stop == spec.shape[axis]
        assert max(sizes) - min(sizes) <= 1
    assert expressed == set(FORMS[:3])


SHARDED = [
    (GNA((12, 7), (5, 3), (2, 1), (1, 2)), 0, 3),
    (GNA((11, 6), (2, 4), (2, 3), (3, 1), (True, False)), 0, 2),
    (GNA((5, 14), (3, 9), (1, 4), is_causal=(False, True)), 1, 4),
]


def shares(spec, axis, world, q, k, v):
    """Local queries, keys and values of every rank, with their slices and mask."""
    for rank in range(world):
        mine = gnaflex.shard(spec, axis, rank, world, block_size=32, device="cpu")
        parts = []
        for x, some in ((q, mine.query), (k, mine.key), (v, mine.key)):
            grid = x.unflatten(2, spec.shape)
            parts.append(grid[(slice(None),) * (2 + axis) + (some,)].flatten(2, 1 + spec.rank))
        yield mine, parts


@pytest.mark.parametrize("spec, axis, world", SHARDED, ids=str)
def test_attention_of_shards_is_that_of_the_whole(spec, axis, world):
    """Outputs of the ranks side by side, with the log-sum-exp; gradients of the halo add up."""
    n = spec.num_tokens
    inputs = [x.requires_grad_() for x in tensors(n, n, dim=4, dtype=torch.float64)]
    want = attend(*inputs, joint_mask([[spec]]))
    outs, lses = [], []
    for mine, parts in shares(spec, axis, world, *inputs):
        out, lse = gnaflex.flex_attention(
            *parts, block_mask=mine.block_mask, enable_gqa=True, return_lse=True, backend="sdpa"
        )
        local = list(spec.shape)
        local[axis] = mine.query.stop - mine.query.start
        outs.append(out.unflatten(2, local))
        lses.append(lse.unflatten(2, local))
    got = [torch.cat(part, 2 + axis).flatten(2, 1 + spec.rank) for part in (outs, lses)]
    upstream = [torch.randn_like(x) for x in want]
    grads = [torch.autograd.grad(pair, inputs, upstream) for pair in (got, want)]
    for ours, theirs in zip((*got, *grads[0]), (*want, *grads[1]), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_shard_on_flex():
    """Fewer queries than keys, in blocks that neither fills; other backends say why not."""
    spec, axis, world = SHARDED[0]
    q, k, v = tensors(spec.num_tokens, spec.num_tokens)
    mine, parts = list(shares(spec, axis, world, q, k, v))[1]
    out = gnaflex.flex_attention(*parts, block_mask=mine.block_mask, enable_gqa=True, backend="flex")
    at = np.arange(spec.num_tokens).reshape(spec.shape)
    rows, columns = (np.take(at, range(s.start, s.stop), axis).ravel() for s in (mine.query, mine.key))
    assert_within_budget(out, *parts, dense_mask(spec)[rows][:, columns])
    torch.testing.assert_close(out, attend(q, k, v, joint_mask([[spec]]))[0][:, :, rows].float())
    with pytest.raises(NotImplementedError, match="whole grids, not shards"):
        gnaflex.flex_attention(*parts, block_mask=mine.block_mask, enable_gqa=True, backend="reference")


def test_biases_of_shards_count_in_the_whole_grid():
    spec, axis, world = SHARDED[1]
    q, k, v = tensors(spec.num_tokens, spec.num_tokens)
    table = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(0))
    bias = gnaflex.relative_bias(spec, table)
    want = attend(q, k, v, joint_mask([[spec]]), score_mod=bias)[0].unflatten(2, spec.shape)
    for mine, parts in shares(spec, axis, world, q, k, v):
        mod = gnaflex.relative_bias(mine.block_mask, table)
        out = gnaflex.flex_attention(*parts, mod, mine.block_mask, enable_gqa=True, backend="sdpa")
        torch.testing.assert_close(out, want[:, :, mine.query].flatten(2, 3).float())


@pytest.mark.parametrize(
    "axis, rank, world, message",
    [
        (2, 0, 1, "axis must be one of the grid's 2: got axis=2"),
        (-3, 0, 1, "got axis=-3"),
        (0, 2, 2, "shard needs 0 <= rank < world <= 4: got rank=2, world=2"),
        (0, -1, 2, "got rank=-1"),
        (0, 0, 0, "got rank=0, world=0"),
        (
            0,
            0,
            5,
            r"world <= 4: got rank=0, world=5.\n  Axis 0 has length=8, dilation=2. Use at most 4 ranks",
        ),
    ],
)
def test_shares_that_do_not_exist(axis, rank, world, message):
    with pytest.raises(GNAError, match=message):
        gnaflex.shard(GNA((8, 6), 3, 1, (2, 1)), axis, rank, world, device="cpu")
