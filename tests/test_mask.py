"""mask_mods in every form and order, and score_mods, against the dense mask."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from cases import NATTEN_CASES, all_1d, causal_variants, random_spec
from orders import ordered_mask, random_tiles

import gnaflex
from gnaflex import compiled, forms, mask, packed
from gnaflex.forms import FORMS
from gnaflex.layout import Layout
from gnaflex.mask import MaskRecord
from gnaflex.order import Document, Order, order_of
from gnaflex.reference import dense_mask
from gnaflex.spec import GNA, GNAError

CPU = torch.device("cpu")


def evaluated(mod, tokens):
    at = torch.arange(tokens)
    zero = torch.zeros((), dtype=torch.long)
    return mod(zero, zero, at[:, None], at[None, :]).numpy()


def forms_of(*orders):
    return [form for form in FORMS if forms.reason_against(form, orders) is None]


def tiled(spec, q_tile, kv_tile):
    return Order((Document(Layout(spec, q_tile, kv_tile)),))


def test_every_1d_problem_up_to_10_in_every_form():
    seen = set()
    for spec in all_1d(10):
        want = dense_mask(spec).numpy()
        for form in forms_of(order_of(spec)):
            seen.add(form)
            assert np.array_equal(
                evaluated(gnaflex.mask_mod(spec, form, device="cpu"), spec.num_tokens), want
            )
    assert seen == set(FORMS)


@pytest.mark.parametrize("seed", range(4))
def test_random_problems_in_every_order_and_form(seed):
    rng = random.Random(seed)
    for _ in range(60):
        spec = random_spec(rng, rng.choice([2, 3, 4]), 250)
        tiles = random_tiles(rng, spec)
        for order, want in (
            (order_of(spec), ordered_mask(spec)),
            (tiled(spec, *tiles), ordered_mask(spec, *tiles)),
        ):
            for form in forms_of(order):
                mod = mask.build(MaskRecord((order,), form), CPU)
                assert np.array_equal(evaluated(mod, order.num_queries), want), (order, form)


@pytest.mark.parametrize("spec", [spec for spec in NATTEN_CASES if spec.num_tokens <= 2048], ids=repr)
def test_natten_cases(spec):
    rng = random.Random(repr(spec))
    for one in rng.sample(causal_variants(spec), 2):
        want = dense_mask(one).numpy()
        for form in forms_of(order_of(one)):
            mod = gnaflex.mask_mod(one, form, device="cpu")
            assert np.array_equal(evaluated(mod, one.num_tokens), want)


@pytest.mark.parametrize(
    "shape, tile",
    [((30, 48, 80), None), ((30, 48, 80), (2, 8, 8)), ((69, 64, 96), None), ((69, 64, 96), (4, 4, 8)),
     ((128, 96, 96), None), ((128, 96, 96), (2, 8, 8)), ((2**21 - 1,), None), ((3, 5, 7, 11, 13), None),
     ((97, 89, 83), (1, 16, 8)), ((1, 4000, 500), None)],
)  # fmt: skip
def test_packed_arithmetic_is_exact_for_every_token(shape, tile):
    """The key side of "packed" computes in float32; here it meets the integers for every token."""
    order = tiled(GNA(shape, 1), tile, tile)
    layout, fields = order.documents[0].layout, packed.Fields.of([order])
    segments = packed.key_segments([order], fields)
    assert segments is not None
    want = fields.pack(0, layout, [one.coordinate for one in layout.places])
    got = packed.packed_key(torch.arange(layout.num_keys).float(), segments)
    assert np.array_equal(got.to(torch.int32).numpy(), want)


def test_reciprocals_divide_exactly_up_to_the_bound():
    rng = random.Random(0)
    top = packed.EXACT_QUOTIENTS - 1
    for divisor in [*range(1, 200), *(rng.randint(200, top) for _ in range(300))]:
        edges = torch.tensor(
            [
                m * divisor + e
                for m in range(0, top // divisor + 1, max(1, top // divisor // 500))
                for e in (-1, 0, 1)
            ]
        )
        edges = torch.cat(
            [edges, torch.tensor([top // divisor * divisor - 1, top // divisor * divisor, top])]
        )
        edges = edges.clamp(0, top)
        got = torch.floor(edges.float() * packed._rounded_up(divisor)).long()
        assert torch.equal(got, edges // divisor), divisor


def test_score_mod_is_the_same_mask():
    spec = GNA((4, 5), (3, 2), is_causal=(False, True))
    at = torch.arange(20)
    zero = torch.zeros((), dtype=torch.long)
    score = torch.randn(20, 20)
    got = gnaflex.score_mod(spec, device="cpu")(score, zero, zero, at[:, None], at)
    assert torch.equal(got, score.masked_fill(~dense_mask(spec), -torch.inf))


def test_a_form_that_cannot_express_a_problem_raises():
    with pytest.raises(GNAError, match=r'form="interval" cannot express .* up to 9 runs of tokens > 8'):
        gnaflex.mask_mod(GNA((9, 9), (9, 3)), "interval", device="cpu")
    with pytest.raises(GNAError, match="written for row-major order"):
        gnaflex.block_mask((8, 8), 3, q_tile=(4, 4), form="arith", device="cpu")
    with pytest.raises(GNAError, match="form must be one of"):
        gnaflex.mask_mod(GNA(4, 2), "fast", device="cpu")


def test_packed_takes_64_bits_when_it_must_and_gives_up_beyond():
    wide = GNA((3,) * 12, 1)  # 36 bits
    mod = gnaflex.mask_mod(wide, device="cpu")
    assert mod.gnaflex.form == "packed"
    token = torch.tensor([0, 5, 3**12 - 1])
    assert torch.equal(mod(token, token, token[:, None], token), torch.eye(3, dtype=torch.bool))
    assert packed.Fields.of([order_of(GNA((2,) * 32, 1))]).bits == 64
    assert "64 bits" in forms.reason_against("packed", [order_of(GNA((2,) * 32, 1))])


def test_tables_reach_the_end_of_the_last_block():
    for form in ("packed", "table", "interval"):
        mod = gnaflex.mask_mod(GNA(300, 7), form, device="cpu")
        tables = list(compiled.captured_tensors(mod))
        assert tables
        assert all(table.shape[-1] == 512 for table in tables)


def test_every_form_has_the_structure_of_the_grid_alone():
    """The code and the shapes of the captured tensors are equal for every window, stride and causal flag."""
    windows = [
        GNA((4, 6), w, is_causal=c) for w in ((3, 3), (4, 6), (1, 2)) for c in ((False, True), (False,) * 2)
    ]
    for form in ("packed", "table", "interval"):
        seen = set()
        for spec in windows:
            mod = gnaflex.mask_mod(spec, form, device="cpu")
            seen.add(compiled.structure_of(mod))
        assert len(seen) == 1


def test_an_accelerator_that_is_built_in_but_not_there_is_not_used(monkeypatch):
    """A CUDA build of torch on a machine without a GPU names cuda as its accelerator."""

    def named(check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", named)
    assert mask.resolve_device(None) == CPU
    assert gnaflex.block_mask((8, 8), window=3).kv_indices.device == CPU
