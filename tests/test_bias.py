"""Relative biases, functions of coordinates, mods brought into the order of a mask; against plain ones."""

from __future__ import annotations

import functools
import math
import random

import numpy as np
import pytest
import torch
from cases import random_spec
from joint import attend, grid_coordinates, joint_mask, joint_order, row_major_mask
from orders import random_tiles
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import gnaflex
from gnaflex.bias import bias_of, coordinate_score_mod, coordinates_of, in_order, relative_bias, to_places
from gnaflex.layout import Layout, Slab
from gnaflex.order import Document, Order
from gnaflex.origin import own_record
from gnaflex.spec import GNA, GNAError
from gnaflex.tables import Tables

CPU = torch.device("cpu")
TEXT = ("prefix", "suffix", "extra_kv")


def tables_of(*orders, heads=(), multiple=256):
    return Tables(orders, heads, CPU, multiple)


def order_of(documents, tiles=(None, None), text=(0, 0, 0), slab=None):
    extras = dict(zip(TEXT, text, strict=True))
    return Order(tuple(Document(Layout(spec, *tiles, slab), **extras) for spec in documents))


def evaluated(mod, heads, queries, keys, dtype=torch.float64):
    """What a score_mod makes of random scores, and these scores; [heads, queries, keys]."""
    score = torch.randn(heads, queries, keys, dtype=dtype)
    h, q, k = torch.meshgrid(*map(torch.arange, (heads, queries, keys)), indexing="ij")
    return mod(score, torch.zeros_like(h), h, q, k), score


def extents_of(specs, rng=None):
    """The least extents, or larger ones."""
    more = rng.choice([0, 0, 1, 3]) if rng else 0
    return tuple(2 * max(windows) - 1 + 2 * more for windows in zip(*(s.window for s in specs), strict=True))


def coordinates(documents, text=(0, 0, 0), keys=False):
    """Document and grid coordinates of every row-major token, -1 for extra tokens; int [tokens, 1 + rank]."""
    rows = []
    for number, spec in enumerate(documents):
        grid = np.stack([np.full(spec.num_tokens, number), *grid_coordinates(spec)], 1)
        before, behind = text[0], text[1] + (text[2] if keys else 0)
        rows.append(np.pad(grid, ((before, behind), (0, 0)), constant_values=-1))
    return np.concatenate(rows)


def plain_bias(documents, table, text=(0, 0, 0)):
    """The bias of every pair of row-major tokens, [heads, queries, keys]: 0 with extra tokens; NaN where the
    mask forbids two grid tokens."""
    q, k = (coordinates(documents, text, keys)[:, None] for keys in (False, True))
    k = k.swapaxes(0, 1)
    both = (q[..., 0] >= 0) & (k[..., 0] >= 0)
    seen = row_major_mask(documents, *text) & both
    out = np.where(both, np.nan, np.zeros((len(table), *both.shape)))
    for i, j in np.argwhere(seen):
        spec = documents[q[i, 0, 0]]
        offsets = k[0, j, 1:] // np.array(spec.dilation) - q[i, 0, 1:] // np.array(spec.dilation)
        index = [offset + extent // 2 for offset, extent in zip(offsets, table.shape[1:], strict=True)]
        assert min(index) >= 0
        out[:, i, j] = table[(slice(None), *index)]
    return torch.from_numpy(out)


def check_bias(mod, want, tokens, order):
    """``want`` is row-major; the pairs of places that the mask forbids may hold any finite score."""
    (q, _), (k, k_pad) = tokens
    got, score = evaluated(mod, len(want), order.num_queries, order.num_keys)
    want = want[:, torch.from_numpy(q)][..., torch.from_numpy(k)]
    matters = ~want.isnan() & ~torch.from_numpy(k_pad)
    assert matters.any()
    assert torch.equal(got[matters], (score + want)[matters])
    assert got.isfinite().all()


@pytest.mark.parametrize("seed", range(6))
def test_relative_bias_of_random_problems(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(25):
        rank = rng.choice([1, 2, 2, 3, 3, 4])
        documents = [random_spec(rng, rank, 60) for _ in range(rng.choice([1, 1, 2, 3]))]
        text = tuple(rng.choice([0, 0, 1, 5]) for _ in TEXT)
        tiles = rng.choice([(None, None), random_tiles(rng, documents[0])])
        order = order_of(documents, tiles, text)
        if order.num_queries > 1000:
            continue
        table = torch.randn(rng.choice([1, 3]), *extents_of(documents, rng), dtype=torch.double)
        want = plain_bias(documents, table.numpy(), text)
        tokens = [joint_order(documents, *tiles, *text, keys=keys) for keys in (False, True)]
        mod = bias_of(tables_of(order), table)
        check_bias(mod, want.expand(3, -1, -1), tokens, order)
        assert mod.gnaflex_order == (order,)


@pytest.mark.parametrize("seed", range(3))
def test_relative_bias_of_windows_per_head(seed):
    """With dilations of their own the heads need codes of their own."""
    rng = random.Random(seed)
    for _ in range(10):
        shape = tuple(rng.randint(4, 8) for _ in range(rng.choice([1, 2])))
        specs = []
        for _ in range(3):
            dilation = tuple(rng.randint(1, 3) for _ in shape)
            window = tuple(rng.randint(1, n // d) for n, d in zip(shape, dilation, strict=True))
            specs.append(GNA(shape, window, 1, dilation))
        heads = tuple(rng.randrange(3) for _ in range(5))
        orders = [order_of([spec], text=(1, 2, 3)) for spec in specs]
        table = torch.randn(5, *extents_of(specs), dtype=torch.double)
        mod = bias_of(tables_of(*orders, heads=heads), table)
        want = torch.cat(
            [plain_bias([specs[which]], table[h : h + 1].numpy(), (1, 2, 3)) for h, which in enumerate(heads)]
        )
        tokens = [joint_order(specs[:1], None, None, 1, 2, 3, keys=keys) for keys in (False, True)]
        check_bias(mod, want, tokens, orders[0])
        assert mod.gnaflex_order == tuple(orders)


def random_slab(rng, spec, axis):
    units = spec.shape[axis] // spec.dilation[axis]
    first, first_key = (rng.randrange(units) for _ in range(2))
    starts = first * spec.dilation[axis], first_key * spec.dilation[axis]
    stops = [rng.randint(start + 1, spec.shape[axis]) for start in starts]
    return Slab(axis, starts[0], stops[0], starts[1], stops[1])


@pytest.mark.parametrize("seed", range(3))
def test_slabs(seed):
    """The mods of a rank's share are those of the whole grid, restricted to its queries and keys."""
    rng = random.Random(seed)
    checked = 0
    for _ in range(30):
        spec = random_spec(rng, rng.randint(1, 3), 60)
        slab = random_slab(rng, spec, axis := rng.randrange(spec.rank))
        order = order_of([spec], slab=slab)
        at = grid_coordinates(spec)[axis]
        q = np.flatnonzero((at >= slab.q_start) & (at < slab.q_stop))
        k = np.flatnonzero((at >= slab.kv_start) & (at < slab.kv_stop))
        table = torch.randn(1, *extents_of([spec]), dtype=torch.double)
        want = plain_bias([spec], table.numpy())[:, q][..., k]
        got, score = evaluated(bias_of(tables_of(order), table), 1, len(q), len(k))
        seen = ~want.isnan()
        assert torch.equal(got[seen], (score + want)[seen])
        checked += int(seen.sum())

        got, _ = evaluated(coordinates_of(tables_of(order), coded(spec)), 1, len(q), len(k))
        assert torch.equal(got[0], torch.from_numpy(q[:, None] * 1000.0 + k))
    assert checked > 100


def test_masks_and_problems_give_the_same():
    spec = GNA((5, 7), (3, 4), (2, 1), (1, 1))
    table = torch.randn(2, 5, 7)
    row_major = gnaflex.block_mask(spec, prefix=2, extra_kv=3, device="cpu")
    of_mask, _ = evaluate_from_zero(relative_bias(row_major, table), 37, 40)
    of_spec, _ = evaluate_from_zero(relative_bias(spec, table, prefix=2, extra_kv=3), 37, 40)
    assert torch.equal(of_mask, of_spec)
    assert relative_bias(row_major, table).gnaflex_order == own_record(row_major).orders

    tiled = gnaflex.block_mask(spec, prefix=2, extra_kv=3, q_tile=(2, 4), device="cpu")
    in_tiles = in_order(tiled, relative_bias(spec, table, prefix=2, extra_kv=3))
    own = relative_bias(tiled, table)
    sizes = tiled.seq_lengths
    assert torch.equal(evaluate_from_zero(own, *sizes)[0], evaluate_from_zero(in_tiles, *sizes)[0])
    per_head = [GNA((5, 7), 3), GNA((5, 7), 2, dilation=2)]
    assert len(relative_bias(gnaflex.block_mask(per_head, device="cpu"), table).gnaflex_order) == 2


def evaluate_from_zero(mod, queries, keys, heads=2):
    return evaluated(lambda score, *at: mod(torch.zeros_like(score), *at), heads, queries, keys)


def test_places_behind_the_end_are_safe():
    """Kernels read up to the end of the last block."""
    table = torch.randn(2, 5, 5)
    bm = gnaflex.block_mask((10, 13), 3, suffix=1, device="cpu", block_size=(128, 384))
    padded = {256: relative_bias(GNA((10, 13), 3), table, suffix=1), 768: relative_bias(bm, table)}
    for places, mod in padded.items():
        assert evaluate_from_zero(mod, places, places)[0].isfinite().all()
    coordinate = coordinate_score_mod(GNA((10, 13), 3), coded(GNA((10, 13), 3)), device="cpu")
    assert evaluate_from_zero(coordinate, 256, 256)[0].max() <= 129 * 1000 + 129


# ---- the table as a parameter ------------------------------------------------------------------------


def joint_case(dtype=torch.double):
    """A small tile-major mask with text, and its dense form; queries, keys and values."""
    spec, tiles, text = GNA((5, 4), (3, 2), (1, 2), (1, 2), (True, False)), ((2, 2), (2, 1)), (2, 1, 1)
    bm = gnaflex.block_mask(
        spec, q_tile=tiles[0], kv_tile=tiles[1], **dict(zip(TEXT, text, strict=True)), device="cpu"
    )
    mask = joint_mask([[spec]], *tiles, *text)
    q, k, v = (torch.randn(1, 2, n, 4, dtype=dtype) for n in (mask.shape[-2], *mask.shape[-1:] * 2))
    return bm, mask, q, k, v


def test_gradients_to_the_table():
    bm, mask, q, k, v = joint_case()

    def attention(table, q):
        return attend(q, k, v, mask, score_mod=relative_bias(bm, table))[0]

    q.requires_grad_()
    for heads in (1, 2):
        table = torch.randn(heads, 5, 5, dtype=torch.double, requires_grad=True)
        assert torch.autograd.gradcheck(attention, (table, q))


def test_gradient_counts_pairs():
    """The gradient of the sum of all seen scores is the number of pairs at each offset."""
    spec = GNA(6, 3)
    table = torch.zeros(2, 7, requires_grad=True)
    seen = torch.from_numpy(row_major_mask([spec]))
    got, _ = evaluated(relative_bias(spec, table), 2, 6, 6)
    (got * seen).sum().backward()
    assert table.grad.tolist() == [[0, 1, 5, 6, 5, 1, 0]] * 2


@pytest.mark.parametrize("outside", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("heads", [1, 2])
def test_built_once_and_trained(outside, heads):
    spec = GNA(6, 3)
    table = torch.nn.Parameter(torch.randn(heads, 5))
    optimizer = torch.optim.SGD([table], lr=0.1)
    with outside():
        mod = relative_bias(spec, table)
    seen = torch.from_numpy(row_major_mask([spec]))
    for _ in range(3):
        optimizer.zero_grad()
        fresh, _ = evaluate_from_zero(relative_bias(spec, table), 6, 6)
        got, _ = evaluate_from_zero(mod, 6, 6)
        assert torch.equal(got, fresh)
        (got**2 * seen).sum().backward()
        assert table.grad.abs().sum() > 0
        before = table.detach().clone()
        optimizer.step()
        assert not torch.equal(before, table)


def test_entries_that_no_window_reaches_do_no_harm():
    bm, mask, q, k, v = joint_case()
    table = torch.full((2, 11, 9), torch.nan, dtype=torch.double)
    table[:, 3:8, 3:6] = torch.randn(2, 5, 3)
    table.requires_grad_()
    out, lse = attend(q, k, v, mask, score_mod=relative_bias(bm, table))
    narrow = relative_bias(bm, table.detach()[:, 3:8, 3:6].contiguous())
    assert torch.equal(out, attend(q, k, v, mask, score_mod=narrow)[0])
    assert lse.isfinite().all()
    out.sum().backward()
    assert table.grad.isfinite().all()
    assert torch.count_nonzero(table.grad[:, :3]) == 0


@pytest.mark.parametrize("of_table", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("of_score", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(of_table, of_score):
    """The score keeps its dtype; the table is rounded to it."""
    table = torch.randn(2, 3).to(of_table)
    got, score = evaluated(relative_bias(GNA(3, 2), table), 2, 3, 3, of_score)
    assert got.dtype == of_score
    assert torch.equal(got[:, 0, 1], score[:, 0, 1] + table[:, 2].to(of_score))


# ---- coordinates, and mods of row-major tokens -------------------------------------------------------


def coded(*documents):
    """Queries and keys as numbers; asserts that coordinates are those of a grid."""

    def fn(score, b, h, q, k):
        numbers = []
        for side in (q, k):
            number = torch.zeros_like(h)
            for axis, x in enumerate(side):
                assert x.dtype == torch.int32
                assert x.min() >= 0
                assert x.max() < max(spec.shape[axis] for spec in documents)
                number = number * documents[0].shape[axis] + x
            numbers.append(number)
        return score * 0 + numbers[0] * 1000 + numbers[1]

    return fn


@pytest.mark.parametrize("seed", range(4))
def test_coordinates_of_random_problems(seed):
    rng = random.Random(seed)
    for _ in range(25):
        documents = [random_spec(rng, rng.choice([1, 2, 3, 4]), 60)] * rng.choice([1, 1, 2])
        text = tuple(rng.choice([0, 0, 1, 5]) for _ in TEXT)
        tiles = rng.choice([(None, None), random_tiles(rng, documents[0])])
        order = order_of(documents, tiles, text)
        if order.num_queries > 1000:
            continue
        (q, _), (k, _) = (joint_order(documents, *tiles, *text, keys=keys) for keys in (False, True))
        numbers = []
        for keys, tokens in ((False, q), (True, k)):
            of_token = coordinates(documents, text, keys)[:, 1:]
            inside = np.ravel_multi_index(np.maximum(of_token, 0).T, documents[0].shape)
            numbers.append(np.where(of_token[:, 0] < 0, -1, inside)[tokens])
        both = (numbers[0][:, None] >= 0) & (numbers[1] >= 0)
        mod = coordinates_of(tables_of(order), coded(*documents))
        got, score = evaluated(mod, 2, order.num_queries, order.num_keys)
        want = torch.from_numpy(np.where(both, numbers[0][:, None] * 1000.0 + numbers[1], np.nan))
        assert torch.equal(got, torch.where(want.isnan(), score, want))
        assert mod.gnaflex_order == (order,)


@pytest.mark.parametrize("seed", range(4))
def test_mods_of_row_major_tokens_in_every_order(seed):
    rng = random.Random(seed)
    for _ in range(15):
        documents = [random_spec(rng, 2, 60) for _ in range(rng.choice([1, 1, 2]))]
        text = tuple(rng.choice([0, 1, 5]) for _ in TEXT)
        tiles = random_tiles(rng, documents[0])
        order = order_of(documents, tiles, text)
        if order.num_queries > 1000:
            continue
        (q, _), (k, k_pad) = (joint_order(documents, *tiles, *text, keys=keys) for keys in (False, True))
        mod = to_places(order, lambda score, b, h, q, k: score * 0 + q * 1000 + k, CPU)
        got, _ = evaluated(mod, 1, len(q), len(k))
        assert torch.equal(got[0], torch.from_numpy(q[:, None] * 1000.0 + k))

        allowed = to_places(order, lambda b, h, q, k: (q * 7 + k) % 3 == 0, CPU)
        zero = torch.zeros((), dtype=torch.long)
        got = allowed(zero, zero, torch.arange(len(q))[:, None], torch.arange(len(k)))
        assert np.array_equal(got.numpy(), ((q[:, None] * 7 + k) % 3 == 0) & ~k_pad)

        row_major = order_of(documents, text=text)
        assert to_places(row_major, mod, CPU) is mod


def test_in_order_tells_mods_apart_by_their_parameters():
    tiled = gnaflex.block_mask((4, 4), 2, q_tile=(2, 2), device="cpu")

    def scaled(score, b, h, q_idx, kv_idx, scale=2.0):
        return score * scale

    def masked(strictly, b, h, q_idx, kv_idx):
        return (q_idx > kv_idx) if strictly else (q_idx >= kv_idx)

    assert in_order(tiled, scaled)(torch.ones(1), *[torch.zeros((), dtype=torch.long)] * 4).item() == 2
    mod = in_order(tiled, functools.partial(masked, True))
    dense = create_block_mask(mod, 1, 1, 16, 16, device="cpu", BLOCK_SIZE=1).to_dense()[0, 0].bool()
    places, _ = joint_order([GNA((4, 4), 2)], (2, 2), (2, 2))
    assert np.array_equal(dense.numpy(), places[:, None] > places)
    for wrong in (lambda q, k: q, lambda *all: all[0], lambda a, b, c, *, d: a, torch.Tensor.add):
        with pytest.raises(GNAError, match=r"a mod takes \(score, b, h, q_idx, kv_idx\) or"):
            in_order(tiled, wrong)
    with pytest.raises(GNAError, match="relative_bias_mod is in the order of a mask already"):
        in_order(tiled, relative_bias(tiled, torch.zeros(1, 3, 3)))
    row_major = gnaflex.block_mask((4, 4), 2, device="cpu")
    assert in_order(row_major, scaled) is scaled


# ---- compiled ----------------------------------------------------------------------------------------


def compiled(calls):
    """Outputs of compiled FlexAttention, and how many graphs they took."""
    torch._dynamo.reset()
    counters.clear()
    run = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    with torch.no_grad():
        out = [run(q, k, v, score_mod=mod, block_mask=bm) for q, k, v, mod, bm in calls]
    return out, counters["stats"]["unique_graphs"]


def flex_case(bm, heads=2):
    queries, keys = bm.seq_lengths
    q, k, v = (torch.randn(1, heads, n, 16) for n in (queries, keys, keys))
    return q, k, v


@pytest.mark.parametrize("tile", [None, (4, 8)])
def test_one_graph_for_ten_biases_and_ten_windows(tile):
    calls, want = [], []
    for window in range(2, 12):
        spec = GNA((12, 14), (window, 13 - window), is_causal=(window % 2 == 0, False))
        bm = gnaflex.block_mask(spec, q_tile=tile, suffix=3, block_size=None if tile else 32, device="cpu")
        mod = relative_bias(bm, torch.randn(2, 23, 23))
        qkv = flex_case(bm)
        calls.append((*qkv, mod, bm))
        want.append(attend(*qkv, joint_mask([[spec]], tile, tile, 0, 3), score_mod=mod)[0])
    got, graphs = compiled(calls)
    assert graphs == 1
    for one, right in zip(got, want, strict=True):
        torch.testing.assert_close(one, right.float(), atol=2e-5, rtol=1e-5)


def test_every_mod_compiles():
    def near(score, b, h, q, k):
        return score - 0.1 * ((q[0] - k[0]).abs() + (q[1] - k[1]).abs())

    def far(score, b, h, q_idx, kv_idx):
        return score + 0.01 * (q_idx - kv_idx).abs()

    spec = GNA((9, 10), 4, dilation=(1, 2))
    tile, per_head = (4, 4), [GNA((9, 10), 4, dilation=(1, 2)), GNA((9, 10), 3, dilation=(3, 1))]
    tiled = gnaflex.block_mask(spec, q_tile=tile, prefix=2, device="cpu")
    by_head = gnaflex.block_mask(per_head, device="cpu", block_size=32)
    calls = [
        (*flex_case(tiled), coordinate_score_mod(tiled, near), tiled),
        (*flex_case(tiled), in_order(tiled, far), tiled),
        (*flex_case(by_head), relative_bias(by_head, torch.randn(2, 7, 7)), by_head),
    ]
    masks = [joint_mask([[spec]], tile, tile, 2)] * 2
    masks.append(joint_mask([[one] for one in per_head], heads=2))
    got, _ = compiled(calls)
    for (q, k, v, mod, _), mask, one in zip(calls, masks, got, strict=True):
        torch.testing.assert_close(one, attend(q, k, v, mask, score_mod=mod)[0].float(), atol=2e-5, rtol=1e-5)


# ---- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, message",
    [
        ((2, 5, 4), r"axis 1 has 4 < 7.\n  window=\(3, 4\). Write torch.zeros\(heads, 5, 7\)"),
        ((2, 5, 8), "axis 1 has 8, which is even"),
        ((2, 3, 7), "axis 0 has 3 < 5"),
        ((5, 7), r"table must be \[heads, \*extents\], an extent per axis: got \(5, 7\) for 2 axes"),
        ((0, 5, 7), r"got \(0, 5, 7\)"),
    ],
)
def test_tables_that_do_not_fit(shape, message):
    with pytest.raises(GNAError, match=message):
        relative_bias(GNA((8, 8), (3, 4)), torch.zeros(shape))


def test_errors():
    spec, table = GNA((8, 8), 3), torch.zeros(2, 5, 5)
    bm = gnaflex.block_mask(spec, device="cpu")
    with pytest.raises(GNAError, match=r"floating point tensor: got torch.int64.\n  Write table.float"):
        relative_bias(spec, table.long())
    with pytest.raises(GNAError, match="floating point tensor: got list"):
        relative_bias(spec, [[0.0]])
    with pytest.raises(GNAError, match=r"contiguous: got strides \(1, 10, 2\)(.|\n)*table.contiguous\(\)"):
        relative_bias(spec, torch.zeros(5, 5, 2).permute(2, 0, 1))
    with pytest.raises(GNAError, match=r"got suffix=4 too.\n  Leave out suffix"):
        relative_bias(bm, table, suffix=4)
    with pytest.raises(GNAError, match="suffix must be a number of tokens >= 0: got -1"):
        relative_bias(spec, table, suffix=-1)
    with pytest.raises(GNAError, match=r'it is on cpu, they are on meta.\n .* table.to\("meta"\)'):
        relative_bias(spec, table, device="meta")
    with pytest.raises(GNAError, match="a problem or a mask is needed: got tuple"):
        coordinate_score_mod((8, 8), lambda score, *_: score)
    foreign = create_block_mask(lambda b, h, q, k: q >= k, None, None, 64, 64, device="cpu")
    with pytest.raises(GNAError, match="not made by gnaflex"):
        in_order(foreign, lambda b, h, q, k: q >= k)
    two = tables_of(order_of([spec]), order_of([GNA((8, 8), 5)]), heads=(0, 1, 1))
    with pytest.raises(GNAError, match=r"got 2 for 3 heads.\n  Write torch.zeros\(3, 9, 9\)"):
        bias_of(two, torch.zeros(2, 9, 9))
    with pytest.raises(GNAError, match=r"got ranks \[1, 2\]"):
        coordinates_of(tables_of(order_of([spec, GNA(8, 3)])), lambda score, *_: score)


def test_indices_that_overflow():
    """The largest index is the code of the last token and that of the middle of the table; both count."""
    fits, too_long = ((n, 1) for n in (2**17, 2**17 + 1))
    table = torch.zeros(1, 1, 2**14 - 1)
    assert math.prod(table.shape) * 2**17 < 2**31 - 1
    mod = relative_bias(GNA(fits, 1), table)
    last = torch.tensor(2**17 - 1)
    assert mod(torch.tensor(1.0), last, last * 0, last, last) == 1
    with pytest.raises(
        GNAError, match=r"must fit 32 bits: they reach \d+ > 2147483647.\n.*zeros\(heads, 1, 1\)"
    ):
        relative_bias(GNA(too_long, 1), torch.zeros(1, 1, 2**14 + 1))
