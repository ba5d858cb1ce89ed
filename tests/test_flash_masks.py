"""The masks that FLASH gets: by torch's own word, and on a GPU that it serves what every backend must do."""

from __future__ import annotations

import itertools
import math
import operator
import random

import pytest
import torch
from cases import random_spec
from flash_machine import (  # noqa: F401 (fixtures)
    CAUSAL,
    DEVICE,
    DILATED,
    LONG,
    SPEC,
    TILED,
    assert_within_budget,
    attend,
    blackwell_gpu,
    fields,
    grids,
    hopper_gpu,
    mask,
    old_torch,
    taken_at_its_word,
    tensors,
)
from torch._inductor.virtualized import V

import gnaflex
from gnaflex import compiled, door, flash
from gnaflex.forms import reason_against
from gnaflex.reference import dense_mask
from gnaflex.spec import GNA
from gnaflex.tiles import padded_tokens

# ---- the masks that attention makes ------------------------------------------------------------------


# problem, query rows, extra keys: the tiles and the form that it gets
CHOSEN = [
    (SPEC, 256, 0, None, "interval"),
    (CAUSAL, 256, 0, None, "interval"),
    (GNA((10, 12), (9, 3)), 256, 0, None, "table"),  # 9 runs
    (GNA((10, 12), (8, 3)), 256, 0, None, "interval"),
    (GNA((10, 12), (8, 3)), 256, 5, None, "table"),  # the extra keys are the ninth
    (LONG, 256, 5, None, "interval"),
    (TILED, 256, 0, ((4, 8, 8), (2, 8, 8)), "table"),
    (TILED, 256, 3, ((4, 8, 8), (2, 8, 8)), "table"),
    (DILATED, 256, 0, ((16, 16), (8, 16)), "table"),
    (TILED, 128, 0, ((2, 8, 8), (2, 8, 8)), "table"),
    (SPEC, 128, 0, None, "table"),
]


@pytest.mark.parametrize("spec, rows, extra, tiles, form", CHOSEN)
def test_the_mask_that_attention_makes(machine, spec, rows, extra, tiles, form):
    machine.rows = rows
    q, k, v = grids(spec, heads=4)
    more = {}
    if extra:
        more = {f"extra_{name}": torch.randn(1, extra, 2, 16).bfloat16() for name in ("keys", "values")}
    out, lse = gnaflex.attention(q, k, v, **fields(spec), **more, backend="flash", return_lse=True)
    assert_within_budget(out, q, k, v, **fields(spec), **more)
    assert lse.shape == q.shape[:-1]
    ((bm, _),) = machine.calls
    record = bm.mask_mod.gnaflex
    found = record.order.documents[0].layout.tiles_given
    assert (found, record.form, bm.BLOCK_SIZE) == (tiles or (None, None), form, (rows, 128))
    if rows == flash.BLACKWELL and not extra:
        gnaflex.attention(q, k, v, **fields(spec))
        assert machine.calls[1][0] is bm  # "auto" takes the same mask, made once


def test_a_score_mod_keeps_row_major_order(machine):
    def slope(score, b, h, q_idx, kv_idx):
        return score - (q_idx - kv_idx).abs() / 100

    grid = grids(TILED)
    got = gnaflex.attention(*grid, **fields(TILED), score_mod=slope, backend="flash")
    assert_within_budget(got, *grid, **fields(TILED), score_mod=slope)
    assert not machine.calls[0][0].mask_mod.gnaflex.order.is_tiled


def test_masks_are_the_definition():
    """Every order, form and block size that FLASH gets: causal axes, dilation, ragged grids."""
    rng, seen = random.Random(0), set()
    for rank in (1, 2, 3) * 25:
        spec, rows = random_spec(rng, rank, 700), rng.choice((flash.HOPPER, flash.BLACKWELL))
        _, q_tile, kv_tile = flash.best_tiles(spec, rows)
        orders = [{}, {"q_tile": q_tile, "kv_tile": kv_tile}]
        for tiles in orders[: 1 + (padded_tokens(spec, q_tile) < 3000)]:  # many dilation groups: all padding
            block_size = None if tiles else (rows, 128)
            bm = mask(spec, block_size, "table", **tiles)
            order = bm.mask_mod.gnaflex.order
            bm = mask(spec, block_size, form := flash.form_of((order,), rows), **tiles)
            assert (rows, 128) == bm.BLOCK_SIZE
            queries, is_pad = (torch.from_numpy(x) for x in order.tokens(keys=False))
            keys, no_key = (torch.from_numpy(x) for x in order.tokens(keys=True))
            want = dense_mask(spec)[queries][:, keys] & ~no_key
            assert torch.equal(taken_at_its_word(bm)[0, 0][~is_pad], want[~is_pad])
            seen.add((form, order.is_tiled, rows))
    assert {("interval", True, 256), ("interval", False, 256), ("table", True, 256)} < seen
    assert ("interval", False, 128) not in seen


def boxes(tokens, rank):
    extents = [n for n in range(1, tokens + 1) if tokens % n == 0]
    return [one for one in itertools.product(extents, repeat=rank) if math.prod(one) == tokens]


def test_the_order_is_the_cheapest_by_the_lists_themselves():
    """A partial block whose pairs are masked one by one counts twice, a permuted token as 128 pairs."""
    for spec in (SPEC, LONG, DILATED, GNA((24, 40), (9, 3), (2, 3)), GNA((64, 64), (32, 32), (16, 16))):
        for rows in (flash.HOPPER, flash.BLACKWELL):
            nested = itertools.product(boxes(rows, spec.rank), boxes(128, spec.rank))
            tiles = [(q, kv) for q, kv in nested if not any(map(operator.mod, q, kv))]
            costs = {(None, None): cost(gnaflex.block_mask(spec, block_size=(rows, 128), device="cpu"))}
            for q, kv in tiles:
                costs[q, kv] = cost(gnaflex.block_mask(spec, q_tile=q, kv_tile=kv, device="cpu"), 128)
            found = flash.cheapest_layout(spec, rows)
            assert costs[found.q_tile, found.kv_tile] == min(costs.values())
            assert flash.best_tiles(spec, rows)[0] == min(costs[one] for one in tiles)


def cost(bm, per_token=0):
    packs = bm.BLOCK_SIZE[0] == 256 and reason_against("interval", bm.mask_mod.gnaflex.orders) is None
    blocks = int(bm.full_kv_num_blocks.sum()) + int(bm.kv_num_blocks.sum()) * (1 if packs else 2)
    return blocks * math.prod(bm.BLOCK_SIZE) + bm.seq_lengths[0] * per_token


def test_the_intervals_decide_the_order():
    """Fewer blocks in tile-major order, but each pair of them on its own."""
    spec = GNA((7, 512, 16), (3, 5, 16))
    assert flash.cheapest_layout(spec, flash.HOPPER).q_tile
    assert not flash.cheapest_layout(spec, flash.BLACKWELL).q_tile


# ---- torch's own word --------------------------------------------------------------------------------


@pytest.fixture
def lowered(monkeypatch):
    """``lowered(bm)``: the graph of a mask as torch lowers it, and the intervals that it packs from it."""
    from torch._inductor.kernel.flex import flex_attention, interval_mask_packing

    found = []

    def stop(query, key, value, subgraph, block_mask, *others):
        graph = block_mask[-1].graph_module
        found.append(interval_mask_packing.select_packed_mask_intervals(graph))
        assert V.graph is not None
        raise NotImplementedError("seen")

    def look(bm):
        found.clear()
        q, k, v = tensors(bm, dtype=torch.float32, dim=16)
        with pytest.raises(Exception, match="seen"):
            compiled.flex_attention(q, k, v, None, bm, None, False, None, None)
        return found[0]

    monkeypatch.setattr(flex_attention, "lower_cpu", stop)
    return look


@pytest.mark.skipif(old_torch, reason="torch packs intervals from 2.13 on")
def test_torch_packs_the_intervals(lowered):
    tiled = {"block_size": None, "q_tile": (256,), "kv_tile": (128,)}
    masks = [
        (mask(LONG), 1),
        (mask(LONG, **tiled), 1),
        (mask(SPEC), 8),
        (mask(CAUSAL, prefix=3, suffix=2), 8),
        (mask([SPEC, GNA((8, 40), (5, 9))]), 8),
    ]
    for bm, count in masks:
        intervals = lowered(bm)
        assert intervals is not None
        assert len(intervals) == count
        for one in intervals:
            assert "q_idx[0]" in one.render_upper()
            assert "kv_idx[0]" in one.render_lower()
    assert lowered(mask(SPEC, form="table")) is None


# ---- what every backend must do, on a GPU that FLASH serves ------------------------------------------


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """A GPU; or the CPU with its stand-in, which shows that the checks are right."""
    if request.param == "cpu":
        request.getfixturevalue("machine")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA GPU")
    if why := flash.obstacle(DEVICE):
        pytest.skip(why)
    door._problem.cache_clear()
    torch._dynamo.reset()
    return DEVICE


def suited(spec, device, **options):
    """A mask as FLASH wants it there."""
    rows = flash.q_rows(device)
    form = flash.form_of((gnaflex.block_mask(spec, device="cpu").mask_mod.gnaflex.order,), rows)
    return gnaflex.block_mask(spec, device=device, **{"block_size": (rows, 128), "form": form, **options})


def exactly(bm, q, k, v):
    """The same in float64, by the mask_mod alone."""
    batch = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
    queries, keys = (torch.arange(n, device=q.device) for n in bm.seq_lengths)
    allowed = bm.mask_mod(batch, torch.zeros_like(batch[0]), queries[:, None], keys)
    return attend(q.double(), k.double(), v.double(), allowed)


CONTRACT = [
    (SPEC, {}),
    (CAUSAL, {}),
    (LONG, {"prefix": 3, "suffix": 130}),
    (GNA((10, 12), (9, 3)), {}),
    (DILATED, {}),
    (SPEC, {"suffix": 9, "text_valid": torch.tensor([[4], [9]])}),
    (SPEC, {"padding": torch.tensor([[8, 31], [5, 40]])}),
    (SPEC, {"form": "table"}),
]


@pytest.mark.parametrize("spec, options", CONTRACT, ids=str)
@pytest.mark.parametrize("dtype, dim", [(torch.bfloat16, 128), (torch.float16, 64)])
def test_values(device, spec, options, dtype, dim):
    bm = suited(spec, device, **options)
    q, k, v = tensors(bm, dtype, dim, heads=4, device=device)
    out, lse = gnaflex.flex_attention(
        q, k, v, block_mask=bm, enable_gqa=True, return_lse=True, backend="flash"
    )
    want, want_lse = exactly(bm, q, k, v)
    budget = 4 * torch.finfo(dtype).eps * want.abs().max()
    assert (out.double() - want).abs().max() <= budget
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "spec", [SPEC, CAUSAL, TILED, DILATED, GNA((5, 12, 17), (3, 5, 9), (2, 3, 4))], ids=str
)
def test_grids(device, spec):
    for heads, kv_heads in ((2, 2), (6, 2)):
        q, k, v = grids(spec, heads, kv_heads, 64, device=device)
        got = gnaflex.attention(q, k, v, **fields(spec), backend="flash")
        assert got.dtype == q.dtype
        assert_within_budget(got, q, k, v, **fields(spec))


def test_a_score_mod(device):
    grid = grids(SPEC, dim=64, device=device)
    mod = {"score_mod": lambda score, b, h, q, k: score - (q - k) * 0.01}
    got = gnaflex.attention(*grid, **fields(SPEC), **mod, backend="flash")
    assert_within_budget(got, *grid, **fields(SPEC), **mod)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_gradients_on_a_gpu(device):
    bm = suited(SPEC, device)
    leaves = [x.requires_grad_() for x in tensors(bm, dim=64, device=device)]
    out = gnaflex.flex_attention(*leaves, block_mask=bm, backend="flash")
    weight = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, weight)
    wanted = torch.autograd.grad(exactly(bm, *leaves)[0], leaves, weight.double())
    for got, want in zip(found, wanted, strict=True):
        assert (got.double() - want.double()).abs().max() <= 8 * torch.finfo(got.dtype).eps * want.abs().max()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_auto_on_a_gpu(device):
    """Blackwell takes it for what no kernel of ours runs, inside a compiled function too."""
    given = tensors(bm := suited(GNA((10, 12), (9, 3)), device), dim=64, device=device)
    taken = "flash" if flash.leads(device) else "flex"
    assert gnaflex.explain(*given, bm).backend == taken
    out = gnaflex.flex_attention(*given, block_mask=bm)
    torch.testing.assert_close(torch.compile(gnaflex.flex_attention)(*given, block_mask=bm), out)
    assert not flash._broken
