"""Extra tokens, windows per head and conditions: masks, block lists, attention on every backend."""

from __future__ import annotations

import copy
import random
import time

import numpy as np
import pytest
import torch
from cases import random_spec
from joint import attend, joint_mask, joint_order
from orders import blocked, from_lists, random_tiles
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import gnaflex
from gnaflex import compiled
from gnaflex.advice import cheapest_layout
from gnaflex.mask import decoded, encoded
from gnaflex.spec import GNA, GNAError

TEXT = ("prefix", "suffix", "extra_kv")
FORMS = ("packed", "table", "interval", "arith")
LISTS = [f"{kind}_{what}" for kind in ("kv", "full_kv", "q", "full_q") for what in ("num_blocks", "indices")]
ROW_MAJOR = (None, None)


def random_text(rng, most=40):
    return {name: rng.choice([0, rng.randint(1, most)]) for name in TEXT}


def random_orders(rng, spec):
    """The tiles of a row-major and of a tile-major order, and the keywords that ask for it."""
    yield ROW_MAJOR, {"block_size": (rng.randint(1, 50), rng.randint(1, 50))}
    tiles = random_tiles(rng, spec)
    yield tiles, dict(zip(("q_tile", "kv_tile"), tiles, strict=True))


def another(rng, spec, same_dilation):
    """Another problem on the same grid."""
    dilation = [d if same_dilation else rng.choice([1, d, rng.randint(1, n)]) for n, d in columns(spec)]
    window = [rng.randint(1, n // d) for n, d in zip(spec.shape, dilation, strict=True)]
    stride = [rng.randint(1, w) for w in window]
    return GNA(spec.shape, window, stride, dilation, [rng.random() < 0.3 for _ in window])


def columns(spec):
    return zip(spec.shape, spec.dilation, strict=True)


def random_conditions(rng, spec, text, batch):
    """text_valid, padding and where, each present half the time; lengths beyond a run and below zero too."""
    runs, out = [n for n in text.values() if n], {}
    if runs and rng.random() < 0.5:
        rows = [[rng.randint(-2, n + 3) for n in runs] for _ in range(rng.choice([1, batch]))]
        out["text_valid"] = torch.tensor(rows, dtype=rng.choice([torch.int32, torch.int64]))
    if rng.random() < 0.5:
        rows = [[rng.randint(0, n + 1) for n in spec.shape] for _ in range(rng.choice([1, batch]))]
        out["padding"] = torch.tensor(rows, dtype=torch.int32)
    if rng.random() < 0.5:
        out["where"] = some_pairs
    return out


def some_pairs(b, h, q_idx, kv_idx):
    """A condition that depends on everything, and empties every eleventh row."""
    return ((q_idx * 7 + kv_idx * 3 + b + 2 * h) % 5 != 0) & (q_idx % 11 != 3)


def seen(bm, batch=1, heads=1):
    """What the mask_mod lets through, bool [batch, heads, queries, keys]."""
    q, k = map(torch.arange, bm.seq_lengths)
    b, h = torch.arange(batch)[:, None, None, None], torch.arange(heads)[:, None, None]
    return bm.mask_mod(b, h, q[:, None], k).expand(batch, heads, *bm.seq_lengths).numpy()


def pictures(bm, head=0):
    """The partial and the full blocks of a head; the transposed lists must be the transposes."""
    rows, blocks = (-(-n // size) for n, size in zip(bm.seq_lengths, bm.BLOCK_SIZE, strict=True))
    out = []
    for kind in ("", "full_"):
        lists = [
            from_lists(
                *(getattr(bm, f"{kind}{side}_{what}")[0, head] for what in ("num_blocks", "indices")), n
            )
            for side, n in (("kv", blocks), ("q", rows))
        ]
        assert np.array_equal(lists[0], lists[1].T)
        out.append(lists[0])
    assert not (out[0] & out[1]).any()
    return out


def assert_block_for_block(bm: BlockMask):
    """The lists are those that create_block_mask makes of the mask_mod, forward and transposed."""
    heads = bm.kv_num_blocks.shape[1]
    theirs = create_block_mask(bm.mask_mod, None, heads, *bm.seq_lengths, "cpu", bm.BLOCK_SIZE)
    for head in range(heads):
        assert all(map(np.array_equal, pictures(bm, head), pictures(theirs, head)))


# ---- masks and lists ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_extra_tokens(seed):
    """Every form says what the definition says; the lists are create_block_mask's, block for block."""
    rng, expressed = random.Random(seed), set()
    for _ in range(12):
        spec, text = random_spec(rng, rng.randint(1, 4), 250), random_text(rng)
        for tiles, order in random_orders(rng, spec):
            want = joint_mask([[spec]], *tiles, **text)
            assert_block_for_block(gnaflex.block_mask(spec, device="cpu", **text, **order))
            for form in ("auto", *FORMS):
                try:
                    bm = gnaflex.block_mask(spec, device="cpu", form=form, **text, **order)
                except GNAError:
                    assert form in ("packed", "interval", "arith")
                    continue
                expressed.add((form, tiles is not ROW_MAJOR))
                assert np.array_equal(seen(bm), want), (form, spec, text, order)
    assert expressed >= {(form, tiled) for form in FORMS[:3] for tiled in (False, True)} | {("arith", False)}


@pytest.mark.parametrize(
    "tiles", [ROW_MAJOR, ((4, 8), (4, 8)), ((4, 16), (2, 8)), ((4, 32), (4, 32))], ids=str
)
@pytest.mark.parametrize("text", [(77, 0, 0), (77, 53, 0), (0, 53, 20), (77, 128, 300), (256, 256, 128)])
def test_blocks_that_straddle_text_and_grid(text, tiles):
    """prefix=77 with blocks of 128; the last spec has full blocks."""
    text = dict(zip(TEXT, text, strict=True))
    for spec in (
        GNA((9, 40), (5, 11), (2, 3), is_causal=(True, False)),
        GNA((9, 40), (3, 8), (1, 2), (3, 5)),
        GNA((9, 40), (9, 40)),
    ):
        bm = gnaflex.block_mask(spec, q_tile=tiles[0], kv_tile=tiles[1], device="cpu", **text)
        want = joint_mask([[spec]], *tiles, **text)[0, 0]
        assert np.array_equal(seen(bm)[0, 0], want)
        touched, full = blocked(want, *bm.BLOCK_SIZE)
        partial, whole = pictures(bm)
        assert np.array_equal(whole, full)
        assert np.array_equal(partial, touched & ~full)


@pytest.mark.parametrize("tile", [None, (8, 16)])
def test_flux(tile):
    """512 text tokens before 64 x 64 image tokens."""
    bm = gnaflex.block_mask((64, 64), (32, 32), (16, 16), prefix=512, q_tile=tile, device="cpu")
    assert bm.seq_lengths == (4608, 4608)
    assert_block_for_block(bm)
    assert pictures(bm)[1].any()


@pytest.mark.parametrize("tile", [None, (2, 8, 8)])
def test_text_costs_no_time(tile):
    """HunyuanVideo's 30 x 48 x 80 tokens with 256 text tokens behind, and without."""
    problem = {"shape": (30, 48, 80), "window": (18, 24, 24), "stride": (16, 8, 8), "q_tile": tile}
    seconds = {0: [], 256: []}
    for _ in range(5):
        for suffix, taken in seconds.items():
            start = time.perf_counter()
            gnaflex.block_mask(**problem, suffix=suffix, device="cpu", full_width=False)
            taken.append(time.perf_counter() - start)
    assert min(seconds[256]) < 4 * min(seconds[0]) + 0.01


@pytest.mark.parametrize("seed", range(3))
def test_windows_per_head(seed):
    """Equal and different specs, in every form: masks and lists, head by head."""
    rng, expressed = random.Random(seed), set()
    for _ in range(6):
        base, text = random_spec(rng, rng.randint(1, 3), 120), random_text(rng, 20)
        for tiles, order in random_orders(rng, base):
            kinds = [base, *(another(rng, base, tiles is not ROW_MAJOR) for _ in range(2))]
            specs = [rng.choice(kinds) for _ in range(4)]
            want = joint_mask([[spec] for spec in specs], *tiles, **text, heads=4)
            for form in ("auto", "table", "interval"):
                try:
                    bm = gnaflex.block_mask(specs, device="cpu", form=form, **text, **order)
                except GNAError:
                    assert form == "interval"
                    continue
                expressed.add(form)
                assert np.array_equal(seen(bm, heads=4), want), (form, specs, text, order)
                assert bm.kv_num_blocks.shape[1] == (1 if len(set(specs)) == 1 else 4)
            assert_block_for_block(gnaflex.block_mask(specs, device="cpu", **text, **order))
    assert expressed == {"auto", "table", "interval"}


def test_equal_windows_share_one_head_of_lists():
    spec = GNA((6, 10), 3)
    shared = gnaflex.block_mask([spec] * 8, device="cpu")
    alone = gnaflex.block_mask(spec, device="cpu")
    assert all(torch.equal(getattr(shared, name), getattr(alone, name)) for name in LISTS)
    assert gnaflex.spec_of(shared) == spec
    mixed = [spec, GNA((6, 10), (6, 3)), spec, spec]
    bm = gnaflex.block_mask(mixed, device="cpu")
    assert bm.shape == (1, 4, 60, 60)
    assert gnaflex.spec_of(bm) == tuple(mixed)


@pytest.mark.parametrize("seed", range(4))
def test_conditions(seed):
    """The mask is exact; lists are those of the uncut mask, but that blocks which may be cut are partial."""
    rng, batch, kinds = random.Random(seed), 2, set()
    for _ in range(12):
        base, text = random_spec(rng, rng.randint(1, 3), 120), random_text(rng, 20)
        for tiles, order in random_orders(rng, base):
            specs = [base] if rng.random() < 0.6 else [base, another(rng, base, tiles is not ROW_MAJOR)]
            conditions = random_conditions(rng, base, text, batch)
            kinds.add(frozenset(conditions))
            given = base if len(specs) == 1 else specs
            bm = gnaflex.block_mask(given, device="cpu", **text, **order, **conditions)
            problem = [[spec] for spec in specs], *tiles
            want = joint_mask(*problem, **text, batch=batch, heads=2, **conditions)
            assert np.array_equal(seen(bm, batch, 2), want), (specs, text, order, conditions)
            uncut = joint_mask(*problem, **text, heads=2)[0]
            key_tokens, key_pads = joint_order([base], *tiles, **text, keys=True)
            grid_token = key_tokens - text["prefix"]
            is_text = ((grid_token < 0) | (grid_token >= base.num_tokens)) & ~key_pads
            for head in range(bm.kv_num_blocks.shape[1]):
                touched, full = blocked(uncut[head], *bm.BLOCK_SIZE)
                if conditions.keys() & {"padding", "where"}:
                    full[:] = False
                elif conditions:
                    full &= ~blocked(is_text[None], 1, bm.BLOCK_SIZE[1])[0]
                partial, whole = pictures(bm, head)
                assert np.array_equal(whole, full), (specs, text, order, conditions)
                assert np.array_equal(partial, touched & ~full)
    assert len(kinds) >= 6


def test_where_sees_row_major_tokens_of_packed_heads_and_extras():
    """In tile-major order the indices that a condition gets are those of row-major tokens."""
    asked = []

    def where(b, h, q_idx, kv_idx):
        asked.append((q_idx.max().item(), kv_idx.max().item()))
        return (q_idx >= 2) & (kv_idx != 30)

    bm = gnaflex.block_mask((4, 7), 3, prefix=2, extra_kv=5, q_tile=(2, 4), where=where, device="cpu")
    got = seen(bm)[0, 0]
    (tokens, _), (key_tokens, _) = (
        joint_order([GNA((4, 7), 3)], (2, 4), (2, 4), 2, 0, 5, keys=keys) for keys in (False, True)
    )
    assert asked == [(29, 34)]
    assert not got[tokens < 2].any()
    assert not got[:, key_tokens == 30].any()
    assert got[tokens >= 2].any(1).all()


def test_padding_in_one_dimension_and_lengths_of_one_run():
    spec = GNA(12, 5)
    bm = gnaflex.block_mask(spec, suffix=4, text_valid=[1, 3], padding=[7, 12], device="cpu")
    want = joint_mask([[spec]], suffix=4, batch=2, text_valid=[1, 3], padding=[[7], [12]])
    assert np.array_equal(seen(bm, 2), want)


@pytest.mark.parametrize("tiles", [ROW_MAJOR, ((2, 4), (2, 4))])
def test_lengths_beyond_a_run_or_below_zero_expose_no_other_keys(tiles):
    spec, text = GNA((5, 6), 3), {"prefix": 3, "suffix": 5, "extra_kv": 2}
    options = {"q_tile": tiles[0], "device": "cpu", **text}
    all_of_it = joint_mask([[spec]], *tiles, **text)[0, 0]
    none_of_it = joint_mask([[spec]], *tiles, **text, text_valid=[[0, 0, 0]])[0, 0]
    for length, want in ((10**6, all_of_it), (2**31 - 1, all_of_it), (0, none_of_it), (-7, none_of_it)):
        lengths = torch.full((1, 3), length, dtype=torch.int32)
        assert np.array_equal(seen(gnaflex.block_mask(spec, text_valid=lengths, **options))[0, 0], want)
    for extents, batch_entry in (((10**6, 10**6), all_of_it), ((-3, 4), None)):
        got = seen(gnaflex.block_mask(spec, padding=torch.tensor([extents]), **options))[0, 0]
        want = joint_mask([[spec]], *tiles, **text, padding=[extents])[0, 0]
        assert np.array_equal(got, want if batch_entry is None else batch_entry)


@pytest.mark.parametrize("tiles", [ROW_MAJOR, ((2, 4), (2, 2))])
def test_lengths_changed_in_place_take_effect(tiles):
    spec, text = GNA((4, 6), 3), {"prefix": 4, "suffix": 3}
    lengths, extents = torch.tensor([[4, 3], [2, 0]]), torch.tensor([[4, 6]], dtype=torch.int32)
    options = {"text_valid": lengths, "padding": extents}
    bm = gnaflex.block_mask(spec, q_tile=tiles[0], kv_tile=tiles[1], device="cpu", **text, **options)
    for change in ([[1, 1], [0, 3]], [[4, 0], [3, 3]]):
        lengths.copy_(torch.tensor(change))
        extents -= 1
        assert np.array_equal(seen(bm, 2), joint_mask([[spec]], *tiles, **text, batch=2, **options))


@pytest.mark.parametrize("tiles", [ROW_MAJOR, ((2, 4), (2, 2))])
def test_with_lengths_shares_the_lists(tiles):
    spec, text, first = GNA((4, 6), 3), {"prefix": 4, "extra_kv": 3}, [[4, 3]]
    options = {"q_tile": tiles[0], "kv_tile": tiles[1], "device": "cpu", **text}
    bm = gnaflex.block_mask(spec, text_valid=first, padding=[[4, 6]], where=some_pairs, **options)
    lengths, extents = [[1, 0], [2, 3]], [[2, 6], [4, 1]]
    one = gnaflex.with_lengths(bm, text_valid=lengths)
    both = gnaflex.with_lengths(one, padding=extents)
    for other, new in (
        (bm, {"text_valid": first, "padding": [[4, 6]]}),
        (one, {"text_valid": lengths, "padding": [[4, 6]]}),
        (both, {"text_valid": lengths, "padding": extents}),
    ):
        assert all(getattr(other, name) is getattr(bm, name) for name in LISTS)
        want = joint_mask([[spec]], *tiles, **text, batch=2, **new, where=some_pairs)
        assert np.array_equal(seen(other, 2), want)
        assert gnaflex.spec_of(other) == spec
    with pytest.raises(GNAError, match=r"without padding(.|\n)*block_mask\(\.\.\., padding=\.\.\.\) once"):
        gnaflex.with_lengths(gnaflex.block_mask(spec, text_valid=first, **options), padding=extents)


@pytest.mark.parametrize("seed", range(2))
def test_permute_brings_extra_tokens_along(seed):
    """Queries and keys, text included; pads are zero, and unpermute is the inverse."""
    rng = random.Random(seed)
    for _ in range(15):
        spec, text = random_spec(rng, rng.randint(1, 3), 120), random_text(rng)
        for tiles, order in random_orders(rng, spec):
            bm = gnaflex.block_mask(spec, device="cpu", **text, **order)
            for keys in (False, True):
                tokens, pads = joint_order([spec], *tiles, **text, keys=keys)
                x = torch.randn(tokens.max() + 1, 2)
                ordered = gnaflex.permute(x, bm)
                assert torch.equal(ordered, x[tokens] * ~torch.from_numpy(pads)[:, None])
                assert torch.equal(gnaflex.unpermute(ordered, bm), x)
    bm = gnaflex.block_mask((4, 6), 3, prefix=2, extra_kv=3, q_tile=(2, 4), device="cpu")
    with pytest.raises(GNAError, match=r"permute takes 26 or 29 tokens along dim -2: got shape \(24, 2\)"):
        gnaflex.permute(torch.zeros(24, 2), bm)


def test_other_lengths_need_no_other_graph():
    """Nor if a list takes the place of a tensor."""
    given = torch.tensor([[1, 3]], dtype=torch.int32), torch.tensor([[4, 6]], dtype=torch.int32)
    bm = gnaflex.block_mask(
        (4, 6), 3, prefix=4, suffix=3, text_valid=given[0], padding=given[1], device="cpu"
    )
    for lengths, extents in ((given[0] + 1, given[1] - 1), (np.array([[2, 2]]), [[1, 1]])):
        other = gnaflex.with_lengths(bm, text_valid=lengths, padding=extents)
        assert compiled.structure_of(other.mask_mod) == compiled.structure_of(bm.mask_mod)


# ---- what travels ------------------------------------------------------------------------------------


def travellers():
    specs = [GNA((4, 6), 3), GNA((4, 6), (2, 5)), GNA((4, 6), 3)]
    text = {"prefix": 3, "suffix": 2, "device": "cpu"}
    cuts = {"text_valid": torch.tensor([[2, 1]]), "padding": torch.tensor([[3, 5]])}
    yield tuple(specs), gnaflex.block_mask(specs, **text)
    yield specs[0], gnaflex.block_mask(specs[0], q_tile=(2, 4), kv_tile=(2, 2), **text, **cuts)
    yield tuple(specs), gnaflex.block_mask(specs, q_tile=(2, 4), **text, **cuts, where=some_pairs)
    yield (specs[1], GNA(5, 2)), gnaflex.packed_block_mask([specs[1], GNA(5, 2)], device="cpu", prefix=2)[0]
    yield specs[1], gnaflex.shard(specs[1], 1, 1, 2, device="cpu").block_mask


def test_problem_and_conditions_travel():
    for spec, bm in travellers():
        again = [bm, bm.to("cpu"), copy.copy(bm), copy.deepcopy(bm), copy.copy(bm).to("meta").to("meta")]
        assert [gnaflex.spec_of(one) for one in again] == [spec] * 5
        assert all(np.array_equal(seen(one, 1, 3), seen(bm, 1, 3)) for one in again[:4])
        moved = list(compiled.captured_tensors(again[4].mask_mod))
        assert moved
        assert all(x.device.type == "meta" for x in moved)
        assert all(getattr(again[4], name).device.type == "meta" for name in LISTS)


def test_lengths_of_a_moved_mask():
    """Moving a mask takes its lengths along; on its own device it still reads the tensor that was given."""
    lengths = torch.tensor([3])
    bm = gnaflex.block_mask((4, 6), 3, suffix=3, text_valid=lengths, device="cpu")
    here = bm.to("cpu")
    lengths[0] = 1
    assert np.array_equal(seen(here), joint_mask([[GNA((4, 6), 3)]], suffix=3, text_valid=[1]))
    assert gnaflex.with_lengths(bm.to("meta"), text_valid=[2]).kv_indices.device.type == "meta"


def test_records_survive_encoding():
    for _, bm in travellers():
        record = bm.mask_mod.gnaflex
        assert decoded(encoded(record)) == record.with_cuts(None)
        assert encoded(decoded(bm.mask_mod.gnaflex_code)) == bm.mask_mod.gnaflex_code


def test_lengths_given_under_inference_mode_or_a_fake_mode_are_ordinary_tensors():
    """Then they can be changed, or read, later on."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    spec, want = GNA((4, 6), 3), joint_mask([[GNA((4, 6), 3)]], suffix=3, text_valid=[1], padding=[[3, 6]])
    for outside in (torch.inference_mode(), FakeTensorMode()):
        with outside:
            bm = gnaflex.block_mask(spec, suffix=3, text_valid=[1], padding=[[3, 6]], device="cpu")
        cuts = bm.mask_mod.gnaflex.cuts
        for x in (cuts.text_valid, cuts.padding):
            assert type(x) is torch.Tensor
            assert not x.is_inference()
        assert np.array_equal(seen(bm), want)


# ---- attention ---------------------------------------------------------------------------------------


def tensors(queries, keys, batch=2, heads=4, kv_heads=2, dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (heads, queries), (kv_heads, keys), (kv_heads, keys)
    return [
        torch.randn(batch, *size, dim, generator=generator, dtype=torch.float64).to(dtype) for size in sizes
    ]


def attention(bm, q, k, v, return_lse=False, **options):
    """Row-major tensors through a mask of any order."""
    q, k, v = (gnaflex.permute(x, bm) for x in (q, k, v))
    options |= {"enable_gqa": q.shape[1] != k.shape[1], "return_lse": return_lse}
    out = gnaflex.flex_attention(q, k, v, block_mask=bm, **options)
    if not return_lse:
        return gnaflex.unpermute(out, bm)
    return gnaflex.unpermute(out[0], bm), gnaflex.unpermute(out[1][..., None], bm)[..., 0]


def assert_within_budget(got, q, k, v, mask, score_mod=None):
    """Error against float64 at most twice that of the plain computation in the same dtype; empty rows 0."""
    exact, lse = attend(q, k, v, mask, score_mod=score_mod)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if score_mod is not None:
        scores = score_mod(scores, *torch.meshgrid(*map(torch.arange, scores.shape), indexing="ij"))
    weights = scores.masked_fill(~torch.as_tensor(mask), -torch.inf).softmax(-1).nan_to_num()
    plain = weights.to(q.dtype) @ v
    assert got.dtype == q.dtype
    budget = 2 * (plain.double() - exact).abs().max() + 2 * torch.finfo(q.dtype).eps * exact.abs().max()
    assert (got.double() - exact).abs().max() <= budget
    assert (got[lse == -torch.inf] == 0).all()


GRID = (5, 9)
HEADS = [GNA(GRID, (3, 5), (2, 1)), GNA(GRID, (5, 2), 1, 1, (True, False))]
HEADS = [HEADS[0], HEADS[1], HEADS[0], GNA(GRID, (2, 9), is_causal=(False, True))]
PLENTY = {"prefix": 7, "suffix": 5, "extra_kv": 3}
CUTS = {"text_valid": [[6, 0, 3], [1, 5, 2]], "padding": [[5, 9], [4, 7]], "where": some_pairs}
CONTRACT = {
    "text": (GNA(GRID, (2, 4), (1, 2), (2, 2), (True, False)), ROW_MAJOR, PLENTY, {}),
    "all, row-major": ([*HEADS[:3], GNA(GRID, 2, 2, (2, 3))], ROW_MAJOR, PLENTY, CUTS),
    "all, tile-major": (HEADS, ((4, 4), (2, 4)), PLENTY, CUTS),
}


@pytest.mark.parametrize("case", CONTRACT)
@pytest.mark.parametrize("backend", ["flex", "sdpa", "reference"])
def test_contract(backend, case):
    """Values on every backend that claims the call, GQA everywhere; empty rows give exactly 0."""
    given, tiles, text, cuts = CONTRACT[case]
    specs = given if isinstance(given, list) else [given]
    tile = dict(zip(("q_tile", "kv_tile"), tiles, strict=True))
    bm = gnaflex.block_mask(given, **tile, block_size=None if tiles[0] else 32, device="cpu", **text, **cuts)
    q, k, v = tensors(57, 60)
    if backend == "reference" and tiles is not ROW_MAJOR:
        with pytest.raises(NotImplementedError, match="row-major masks only"):
            attention(bm, q, k, v, backend=backend)
        return
    mask = joint_mask([[spec] for spec in specs], **text, batch=2, heads=4, **cuts)
    assert (not mask.any(-1).all()) == bool(cuts)
    assert_within_budget(attention(bm, q, k, v, backend=backend), q, k, v, mask)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_values_lse_and_gradients_of_random_masks(backend, seed):
    """Every feature in every order in float64; rows left empty give 0, -inf and gradients without NaN."""
    rng, empty = random.Random(seed), 0
    for number in range(8):
        base, text = random_spec(rng, rng.randint(1, 3), 80), random_text(rng, 12)
        for tiles, order in random_orders(rng, base):
            if backend == "reference" and tiles is not ROW_MAJOR:
                continue
            specs = [base]
            if rng.random() < 0.5:
                specs = [rng.choice([base, another(rng, base, tiles is not ROW_MAJOR)]) for _ in range(4)]
            cuts = random_conditions(rng, base, text, 2)
            bm = gnaflex.block_mask(specs, device="cpu", **text, **order, **cuts)
            mask = joint_mask([[spec] for spec in specs], **text, batch=2, heads=4, **cuts)
            kv_heads = rng.choice([1, 2, 4])
            qkv = tensors(*mask.shape[2:], kv_heads=kv_heads, dim=4, dtype=torch.float64, seed=number)
            one, two = ([x.clone().requires_grad_() for x in qkv] for _ in range(2))
            got, want = attention(bm, *one, return_lse=True, backend=backend), attend(*two, mask)
            blind = torch.from_numpy(~mask.any(-1))
            empty += blind.sum().item()
            assert torch.equal(got[1] == -torch.inf, blind)
            assert (got[0][blind] == 0).all()
            upstream = [torch.randn_like(x) for x in want]
            grads = [torch.autograd.grad(*pair, upstream) for pair in ((got, one), (want, two))]
            for ours, theirs in zip((*got, *grads[0]), (*want, *grads[1]), strict=True):
                torch.testing.assert_close(ours, theirs)
            plain = attention(bm, *qkv, backend=backend)
            torch.testing.assert_close(plain, want[0].detach())
    assert empty > 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype):
    spec = GNA((6, 8), (3, 5))
    cuts = {"text_valid": [[4, 2], [0, 3]], "where": some_pairs}
    mask = joint_mask([[spec]], prefix=4, suffix=3, batch=2, heads=4, **cuts)
    q, k, v = tensors(55, 55, dtype=dtype)
    for tile, backend in ((None, "sdpa"), ((2, 4), "sdpa"), (None, "reference")):
        bm = gnaflex.block_mask(spec, prefix=4, suffix=3, q_tile=tile, device="cpu", **cuts)
        assert_within_budget(attention(bm, q, k, v, backend=backend), q, k, v, mask)


def test_biases_with_extra_tokens_heads_and_conditions():
    """A score_mod made for the mask, beside all else, on the backends that need no compiler."""
    table = torch.randn(4, 9, 17, generator=torch.Generator().manual_seed(0))
    for case in ("all, row-major", "all, tile-major"):
        specs, tiles, text, cuts = CONTRACT[case]
        tile = dict(zip(("q_tile", "kv_tile"), tiles, strict=True))
        bm = gnaflex.block_mask(specs, **tile, device="cpu", **text, **cuts)
        q, k, v = tensors(57, 60)
        row_major = gnaflex.block_mask(specs, device="cpu", **text)
        mask = joint_mask([[spec] for spec in specs], **text, batch=2, heads=4, **cuts)
        for backend in ("sdpa", "reference")[: 1 if tiles[0] else 2]:
            got = attention(bm, q, k, v, score_mod=gnaflex.relative_bias(bm, table), backend=backend)
            assert_within_budget(got, q, k, v, mask, gnaflex.relative_bias(row_major, table))


# ---- extra keys of gnaflex.attention -----------------------------------------------------------------


def grids(shape, extra, batch=2, heads=4, kv_heads=2, dim=16, dtype=torch.float32, seed=1):
    """q, k, v and extra keys and values, heads last."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (*shape, heads), (*shape, kv_heads), (*shape, kv_heads), (extra, kv_heads), (extra, kv_heads)
    return [
        torch.randn(batch, *size, dim, generator=generator, dtype=torch.float64).to(dtype) for size in sizes
    ]


def flat(x, *more):
    """Heads-last grid, and extra tokens behind it, to [batch, heads, tokens, dim]."""
    return torch.cat([x.flatten(1, -3), *more], 1).transpose(1, 2)


def flattened(q, k, v, extra_k, extra_v):
    return flat(q), flat(k, extra_k), flat(v, extra_v)


PERMUTES = GNA((16, 32), (4, 8), 1, 2)


def problem_of(spec):
    return {
        "window": spec.window,
        "stride": spec.stride,
        "dilation": spec.dilation,
        "is_causal": spec.is_causal,
    }


ROWS = GNA((4, 7), (3, 5), (1, 2), is_causal=(True, False))


@pytest.mark.parametrize(
    "backend, spec",
    [("flex", PERMUTES), *((name, one) for name in ("sdpa", "reference") for one in (ROWS, PERMUTES))],
)
def test_extra_keys(backend, spec):
    assert (cheapest_layout(spec).q_tile is not None) == (spec is PERMUTES)
    q, k, v, *extra = grids(spec.shape, 9)
    names = {"extra_keys": extra[0], "extra_values": extra[1]}
    out = gnaflex.attention(q, k, v, **problem_of(spec), **names, backend=backend)
    assert out.shape == q.shape
    assert_within_budget(flat(out), *flattened(q, k, v, *extra), joint_mask([[spec]], extra_kv=9))


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("spec", [GNA((4, 7), (2, 3), 1, (2, 1)), PERMUTES], ids=str)
def test_extra_keys_lse_and_gradients(backend, spec):
    """One softmax: the log-sum-exp covers both; gradients reach the extra tensors."""
    inputs = [x.requires_grad_() for x in grids(spec.shape, 5, batch=1, dim=4, dtype=torch.float64)]
    want = attend(*flattened(*inputs), joint_mask([[spec]], extra_kv=5))
    q, k, v, extra_k, extra_v = inputs
    names = {"extra_keys": extra_k, "extra_values": extra_v}
    out, lse = gnaflex.attention(q, k, v, **problem_of(spec), **names, return_lse=True, backend=backend)
    assert lse.shape == q.shape[:-1]
    upstream = [torch.randn_like(x) for x in want]
    got = flat(out), lse.flatten(1, -2).transpose(1, 2)
    grads = [torch.autograd.grad(pair, inputs, upstream) for pair in (got, want)]
    for ours, theirs in zip((*got, *grads[0]), (*want, *grads[1]), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all((x != 0).any() for x in grads[0])


def test_score_mods_count_extra_keys_behind_the_grid():
    spec = GNA((4, 7), (3, 5))
    q, k, v, *extra = grids(spec.shape, 4)
    names = {"extra_keys": extra[0], "extra_values": extra[1]}

    def favours(score, b, h, q_idx, kv_idx):
        return score + (kv_idx >= 28) * (kv_idx - 26) * (h + 1) * 0.3 - q_idx * 0.01 * (kv_idx < 28)

    for backend in ("sdpa", "reference"):
        got = gnaflex.attention(q, k, v, **problem_of(spec), **names, score_mod=favours, backend=backend)
        mask = joint_mask([[spec]], extra_kv=4)
        assert_within_budget(flat(got), *flattened(q, k, v, *extra), mask, favours)


def test_autocast_takes_extra_keys_along():
    q, k, v, *extra = grids((4, 7), 3)
    with torch.autocast("cpu", torch.bfloat16):
        out = gnaflex.attention(q, k, v, 3, extra_keys=extra[0], extra_values=extra[1], backend="sdpa")
    narrow = flattened(*(x.bfloat16() for x in (q, k, v, *extra)))
    assert_within_budget(flat(out), *narrow, joint_mask([[GNA((4, 7), 3)]], extra_kv=3))


def test_no_extra_keys_at_all():
    q, k, v, *extra = grids((4, 7), 0)
    got = gnaflex.attention(q, k, v, 3, extra_keys=extra[0], extra_values=extra[1], backend="sdpa")
    assert torch.equal(got, gnaflex.attention(q, k, v, 3, backend="sdpa"))


# ---- inside torch.compile, and what it compiles ------------------------------------------------------


def test_extra_keys_inside_a_users_compiled_function():
    """Forward without gradients, and a training step."""
    spec = GNA((4, 7), (3, 5))
    inputs = grids(spec.shape, 3, batch=1)

    def block(q, k, v, extra_k, extra_v):
        names = {"extra_keys": extra_k, "extra_values": extra_v}
        out, lse = gnaflex.attention(q * 2, k, v, **problem_of(spec), **names, return_lse=True)
        return torch.nn.functional.gelu(out) + 1, lse

    compiled_block = torch.compile(block, fullgraph=True)
    with torch.no_grad():
        for ours, theirs in zip(compiled_block(*inputs), block(*inputs), strict=True):
            torch.testing.assert_close(ours, theirs)
    inputs = [x.requires_grad_() for x in inputs]
    upstream = [torch.randn_like(x) for x in block(*inputs)]
    grads = [torch.autograd.grad(run(*inputs), inputs, upstream) for run in (compiled_block, block)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)
    q, k, v, extra_k, extra_v = (x.detach() for x in inputs)
    out, lse = attend(*flattened(q * 2, k, v, extra_k, extra_v), joint_mask([[spec]], extra_kv=3))
    got, got_lse = compiled_block(*inputs)
    torch.testing.assert_close(flat(got).detach(), torch.nn.functional.gelu(out).float() + 1)
    torch.testing.assert_close(got_lse.flatten(1, 2).transpose(1, 2).detach(), lse.float())


def test_prompts_inside_a_users_compiled_function():
    """On a CPU the call is an opaque operator: it must read the lengths of the moment."""
    spec, text = GNA((4, 7), (3, 5)), {"prefix": 5, "suffix": 3}
    lengths = torch.tensor([[5, 3], [2, 1]], dtype=torch.int32)
    options = {"q_tile": (2, 4), "padding": [[4, 7], [3, 6]], "device": "cpu", **text}
    bm = gnaflex.block_mask(spec, text_valid=lengths, **options)
    q, k, v = tensors(36, 36)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def block(q, k, v, bm):
        out = gnaflex.flex_attention(q * 2, k, v, block_mask=bm, enable_gqa=True)
        return torch.nn.functional.gelu(out) + 1

    def check(bm, lengths):
        mask = joint_mask([[spec]], **text, batch=2, text_valid=lengths, padding=options["padding"])
        want = torch.nn.functional.gelu(attend(q * 2, k, v, mask)[0]).float() + 1
        got = gnaflex.unpermute(block(*(gnaflex.permute(x, bm) for x in (q, k, v)), bm), bm)
        torch.testing.assert_close(got, want)

    check(bm, lengths)
    lengths.copy_(torch.tensor([[0, 2], [4, 0]]))
    check(bm, lengths)
    graphs = counters["stats"]["unique_graphs"]
    lengths.copy_(torch.tensor([[5, 1], [0, 0]]))
    check(bm, lengths)
    other = torch.tensor([[3, 3], [1, 0]], dtype=torch.int32)
    check(gnaflex.with_lengths(bm, text_valid=other), other)
    assert counters["stats"]["unique_graphs"] == graphs


def test_training_with_prompts_inside_a_users_compiled_function():
    spec, lengths = GNA((4, 7), (3, 5)), torch.tensor([3, 1])
    heads = [spec, GNA((4, 7), 2), spec, spec]
    bm = gnaflex.block_mask(heads, suffix=3, text_valid=lengths, device="cpu")
    inputs = [x.requires_grad_() for x in tensors(31, 31, dtype=torch.float64)]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(q, k, v):
        out, lse = gnaflex.flex_attention(q * 2, k, v, block_mask=bm, enable_gqa=True, return_lse=True)
        return (out**2).sum() + lse.sum()

    for change in ([3, 1], [0, 2]):
        lengths.copy_(torch.tensor(change))
        mask = joint_mask([[one] for one in heads], suffix=3, batch=2, heads=4, text_valid=change)
        out, lse = attend(inputs[0] * 2, *inputs[1:], mask)
        want = torch.autograd.grad((out**2).sum() + lse.sum(), inputs)
        for ours, theirs in zip(torch.autograd.grad(loss(*inputs), inputs), want, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_where_inside_a_users_compiled_function_is_refused():
    bm = gnaflex.block_mask((4, 7), 3, where=some_pairs, device="cpu")

    @torch.compile(fullgraph=True, backend="eager")
    def block(q, k, v):
        return gnaflex.flex_attention(q, k, v, block_mask=bm, enable_gqa=True)

    with pytest.raises(Exception, match="where= cannot be traced"):
        block(*tensors(28, 28))


@pytest.mark.parametrize("tile", [None, (4, 4)])
def test_one_graph_for_ten_windows_prompts_and_biases(tile):
    """Another window, prompt and bias on one grid compiles nothing, given anew or changed in place."""
    shape, text = (6, 10), {"prefix": 6, "suffix": 4}
    q, k, v = tensors(70, 70, heads=2)
    seen_graphs, rng = [], random.Random(0)
    lengths = torch.tensor([[6, 4], [6, 4]], dtype=torch.int32)
    block = {} if tile else {"block_size": 32}
    for number in range(10):
        window = rng.randint(1, 6), rng.randint(1, 10)
        spec = GNA(
            shape, window, [rng.randint(1, w) for w in window], is_causal=(number % 3 == 0, number % 4 == 1)
        )
        lengths.copy_(torch.tensor([[rng.randint(0, 6), rng.randint(0, 4)] for _ in range(2)]))
        bm = gnaflex.block_mask(spec, q_tile=tile, text_valid=lengths, **text, **block, device="cpu")
        if number % 2:
            bm = gnaflex.with_lengths(bm, text_valid=lengths.clone())
        table = torch.randn(2, 11, 19, generator=torch.Generator().manual_seed(number))
        before = len(compiled._graphs), counters["stats"]["unique_graphs"]
        got = attention(bm, q, k, v, score_mod=gnaflex.relative_bias(bm, table), backend="flex")
        after = len(compiled._graphs), counters["stats"]["unique_graphs"]
        seen_graphs.append(tuple(now - then for now, then in zip(after, before, strict=True)))
        mask = joint_mask([[spec]], **text, batch=2, heads=2, text_valid=lengths)
        bias = gnaflex.relative_bias(spec, table, **text)
        assert_within_budget(got, q, k, v, mask, bias)
    assert seen_graphs == [(1, 1)] + [(0, 0)] * 9


# ---- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"prefix": -1}, "prefix must be a number of tokens >= 0: got -1"),
        ({"suffix": 2.5}, "suffix must be an integer: got 2.5. Write suffix=256"),
        ({"extra_kv": True}, "extra_kv must be a number of tokens >= 0: got True"),
        ({"text_valid": [3]}, "text_valid needs extra tokens: got prefix=0, suffix=0, extra_kv=0"),
        ({"prefix": 4, "text_valid": [1.5]}, r"text_valid must be integers \[batch, 1\].*float32"),
        ({"prefix": 4, "text_valid": [True]}, r"text_valid must be integers \[batch, 1\].*bool"),
        ({"prefix": 4, "suffix": 4, "text_valid": [1, 2]}, r"integers \[batch, 2\].*got \(2,\)"),
        ({"prefix": 4, "text_valid": [[1, 2]]}, r"integers \[batch, 1\].*got \(1, 2\)"),
        ({"prefix": 4, "text_valid": 3}, r"integers \[batch, 1\].*got \(\)"),
        ({"padding": [[4]]}, r"padding must be integers \[batch, 2\], one per axis: got \(1, 1\)"),
        ({"padding": [4, 4]}, r"padding must be integers \[batch, 2\]"),
        ({"padding": torch.ones(2, 3, dtype=torch.int32).T}, r"padding must be contiguous.*\(1, 3\)"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(GNAError, match=r"(?s)" + message):
        gnaflex.block_mask(**{"shape": (8, 8), "window": 3, "device": "cpu", **kwargs})


def test_heads_that_do_not_fit_each_other():
    specs = [GNA((8, 8), 3), GNA((8, 8), 3, dilation=2)]
    assert gnaflex.block_mask(specs, device="cpu").shape == (1, 2, 64, 64)
    with pytest.raises(GNAError, match=r"all heads must share the dilation: got (.|\n)*Leave out q_tile"):
        gnaflex.block_mask(specs, q_tile=(4, 4), device="cpu")
    with pytest.raises(GNAError, match=r"head 1 has shape=\(8, 9\)(.|\n)*packed_block_mask\(specs\)"):
        gnaflex.block_mask([specs[0], GNA((8, 9), 3)], device="cpu")
    with pytest.raises(GNAError, match="a GNA is the whole problem"):
        gnaflex.block_mask(specs, window=3, device="cpu")


def test_calls_that_do_not_fit_the_mask():
    q, k, v = tensors(64, 64)
    by_head = gnaflex.block_mask([GNA((8, 8), 3), GNA((8, 8), 5)], device="cpu")
    with pytest.raises(GNAError, match=r"windows for 2 query heads, the query has 4.\n  Give block_mask one"):
        attention(by_head, q, k, v)
    for name, row in (("text_valid", [8]), ("padding", [7, 8])):
        bm = gnaflex.block_mask((7, 8), 3, suffix=8, **{name: [row] * 3}, device="cpu")
        with pytest.raises(
            GNAError, match=r"for a batch of 3, the query has 2.\n  Write gnaflex.with_lengths"
        ):
            attention(bm, q, k, v, backend="sdpa")
    one = gnaflex.block_mask((7, 8), 3, suffix=8, text_valid=[3], device="cpu")
    assert attention(one, q, k, v, backend="sdpa").shape == q.shape


def test_conditions_for_different_batches_are_refused():
    lengths, extents = [3, 3, 3], [[7, 8]]
    options = {"suffix": 8, "device": "cpu", "text_valid": lengths}
    bm = gnaflex.block_mask((7, 8), 3, padding=extents, **options)
    with pytest.raises(GNAError, match="batch"):
        gnaflex.with_lengths(bm, padding=extents * 2)
    with pytest.raises(GNAError, match="batch"):
        gnaflex.block_mask((7, 8), 3, padding=extents * 2, **options)


def test_score_mods_of_another_order_are_refused():
    spec, table = GNA((8, 8), 3), torch.zeros(1, 5, 5)
    q, k, v = tensors(64, 64)
    plain = gnaflex.block_mask(spec, device="cpu")
    tiled = gnaflex.block_mask(spec, q_tile=(4, 4), device="cpu")
    with_text = gnaflex.block_mask(GNA((7, 8), 3), suffix=8, device="cpu")
    other_window = gnaflex.block_mask(GNA((8, 8), 2), device="cpu")

    def near(score, b, h, q_coords, kv_coords):
        return score - (q_coords[0] - kv_coords[0]).abs()

    for make in (
        lambda source: gnaflex.relative_bias(source, table),
        lambda source: gnaflex.coordinate_score_mod(source, near),
    ):
        for bm, source in ((plain, tiled), (tiled, plain), (plain, with_text), (with_text, plain)):
            for backend in ("auto", "sdpa", "reference", "flex"):
                with pytest.raises(GNAError, match="count tokens in different orders"):
                    attention(bm, q, k, v, score_mod=make(source), backend=backend)
        assert attention(plain, q, k, v, score_mod=make(other_window), backend="sdpa").shape == q.shape


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_attention_refuses_score_mods_of_another_order(backend):
    """It takes row-major ones; one of a tile-major mask would add biases at wrong places."""
    spec, table = GNA((8, 8), 3), torch.zeros(1, 5, 5)
    q, k, v, *_ = grids((8, 8), 0)
    plain = gnaflex.relative_bias(spec, table)
    assert gnaflex.attention(q, k, v, 3, score_mod=plain, backend=backend).isfinite().all()
    for other in (
        gnaflex.relative_bias(gnaflex.block_mask(spec, q_tile=(4, 4), device="cpu"), table),
        gnaflex.relative_bias(spec, table, prefix=8),
    ):
        with pytest.raises(GNAError, match="orders"):
            gnaflex.attention(q, k, v, 3, score_mod=other, backend=backend)


def test_extra_keys_that_do_not_fit():
    q, k, v, extra_k, extra_v = grids((4, 7), 3)
    shapes = r"Give tensors of shapes \(2, 3, 2, 16\) and \(2, 3, 2, 16\)"
    for wrong in (
        {"extra_keys": extra_k},
        {"extra_values": extra_v},
        {"extra_keys": extra_k, "extra_values": extra_v[:, :2]},
        {"extra_keys": extra_k[:1], "extra_values": extra_v[:1]},
        {"extra_keys": extra_k[..., :8], "extra_values": extra_v},
        {"extra_keys": extra_k.repeat(1, 1, 2, 1), "extra_values": extra_v.repeat(1, 1, 2, 1)},
    ):
        with pytest.raises(GNAError, match=r"come together(.|\n)*" + shapes):
            gnaflex.attention(q, k, v, 3, **wrong)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
def test_extra_keys_of_another_dtype_are_refused(backend):
    """As reference_attention does; joined to the keys they would change the dtype of these."""
    q, k, v, *extra = grids((4, 7), 3)
    names = {"extra_keys": extra[0].double(), "extra_values": extra[1].double()}
    with pytest.raises(GNAError, match="dtype"):
        gnaflex.attention(q, k, v, 3, **names, backend=backend)


# ---- what is refused at the door ---------------------------------------------------------------------


def test_tensors_that_do_not_fit_each_other():
    """A kernel that reads key and value side by side would read past the end of the shorter one."""
    bm = gnaflex.block_mask((4, 8), 3, device="cpu")
    q = torch.randn(2, 4, 32, 8)
    for k, v in (
        (q, q[:, :, :20]),
        (q, torch.randn(2, 4, 40, 8)),
        (q, q[:, :2]),
        (q[:1], q[:1]),
        (torch.cat([q, q]), torch.cat([q, q])),
    ):
        for backend in ("auto", "flex", "sdpa"):
            with pytest.raises(GNAError, match="must share the batch, key and value the heads and tokens"):
                gnaflex.flex_attention(q, k, v, block_mask=bm, backend=backend)
    with pytest.raises(GNAError, match="must share one dtype"):
        gnaflex.flex_attention(q, q.half(), q, block_mask=bm)
    with pytest.raises(GNAError, match="must be floating point"):
        gnaflex.flex_attention(q.long(), q.long(), q.long(), block_mask=bm)
    with pytest.raises(GNAError, match="score_mod must be a function"):
        gnaflex.flex_attention(q, q, q, score_mod=3, block_mask=bm)
    with pytest.raises(GNAError, match="attention takes tensors: got ndarray"):
        gnaflex.attention(np.zeros((1, 4, 8, 2, 8)), np.zeros((1, 4, 8, 2, 8)), np.zeros((1, 4, 8, 2, 8)), 3)


def test_biases_made_for_other_heads_dilations_or_windows_are_refused():
    bm = gnaflex.block_mask((4, 8), 3, device="cpu")
    q = torch.randn(1, 4, 32, 8)
    for heads in (2, 8):
        mod = gnaflex.relative_bias(bm, torch.zeros(heads, 5, 5))
        with pytest.raises(GNAError, match=f"got {heads} for 4"):
            gnaflex.flex_attention(q, q, q, score_mod=mod, block_mask=bm, backend="sdpa")
    mod = gnaflex.relative_bias(GNA((4, 8), 3), torch.zeros(1, 5, 5))
    for other in (gnaflex.block_mask((4, 8), 2, dilation=2), gnaflex.block_mask((4, 8), (4, 7))):
        with pytest.raises(GNAError, match="this relative_bias was made for"):
            gnaflex.flex_attention(q, q, q, score_mod=mod, block_mask=other.to("cpu"), backend="sdpa")
    smaller = gnaflex.block_mask((4, 8), 2, device="cpu")
    assert gnaflex.flex_attention(q, q, q, score_mod=mod, block_mask=smaller, backend="sdpa").isfinite().all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda s: gnaflex.block_mask(s, where=3), "where must be a mask_mod"),
        (lambda s: gnaflex.block_mask(s, where=lambda b, h, q: q > 0), "where must be a mask_mod"),
        (lambda s: gnaflex.block_mask(s, where=lambda s, b, h, q, k: s), "where must be a mask_mod"),
        (lambda s: gnaflex.coordinate_score_mod(s, lambda s, b, h, q: s), "fn takes"),
        (lambda s: gnaflex.coordinate_score_mod(s, None), "fn takes"),
        (lambda s: gnaflex.block_mask(s, suffix=3, text_valid=[-1]), "must not be negative"),
        (lambda s: gnaflex.block_mask(s, suffix=3, text_valid="a"), "text_valid must be integers"),
        (lambda s: gnaflex.block_mask(s, block_size=64.0), "block_size must be a positive int, or two"),
        (lambda s: gnaflex.block_mask(s, block_size=(64.9, 64)), "block_size must be a positive int"),
        (lambda s: gnaflex.block_mask(s, q_tile=4), "q_tile must hold integers"),
        (lambda s: gnaflex.block_mask([s, 3]), "windows per head are a GNA for every query head"),
        (lambda s: gnaflex.shard(s, 0.0, 0, 2), "axis, rank and world must be integers"),
        (lambda s: gnaflex.shard((4, 8), 0, 0, 2), "shard takes a GNA: got tuple"),
        (lambda s: gnaflex.packed_block_mask(s), "packed_block_mask takes a sequence of GNA"),
        (lambda s: gnaflex.packed_block_mask(None), "packed_block_mask takes a sequence of GNA"),
        (lambda s: gnaflex.resize(s, (4, 4)), "a BlockMask is needed: got GNA"),
        (lambda s: gnaflex.with_lengths(s, text_valid=[1]), "a BlockMask is needed: got GNA"),
        (lambda s: gnaflex.in_order(s, lambda b, h, q, k: q > k), "a BlockMask is needed: got GNA"),
    ],
)  # fmt: skip
def test_plain_mistakes(make, message):
    with pytest.raises(GNAError, match=message):
        make(GNA((4, 8), 3))


def test_where_may_return_a_python_boolean_but_no_number():
    q = torch.randn(1, 2, 32, 8)
    bm = gnaflex.block_mask((4, 8), 3, where=lambda b, h, q, k: True, device="cpu")
    plain = gnaflex.block_mask((4, 8), 3, device="cpu")
    for backend in ("sdpa", "reference"):
        got, want = (gnaflex.flex_attention(q, q, q, block_mask=m, backend=backend) for m in (bm, plain))
        torch.testing.assert_close(got, want)
    wrong = gnaflex.block_mask((4, 8), 3, where=lambda b, h, q, k: q - k, device="cpu")
    with pytest.raises(GNAError, match="where must return booleans"):
        gnaflex.flex_attention(q, q, q, block_mask=wrong, backend="sdpa")


def test_numpy_integers_serve_everywhere():
    two = np.int64(2)
    bm = gnaflex.block_mask((4, 8), 3, block_size=np.int64(64), prefix=two, device="cpu")
    assert bm.BLOCK_SIZE == (64, 64)
    assert gnaflex.spec_of(gnaflex.resize(bm, np.int64(6))).shape == (6, 6)
    packed, offsets = gnaflex.packed_block_mask([GNA(4, 2), GNA(5, 2)], prefix=np.array([1, 2]), device="cpu")
    assert offsets == (0, 5, 12)
    assert packed.seq_lengths == (12, 12)
