"""Token orders, and permute with its inverse."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from cases import random_spec
from orders import random_tiles, tile_major_tokens

import gnaflex
from gnaflex.layout import Layout
from gnaflex.spec import GNA, GNAError


@pytest.mark.parametrize("seed", range(3))
def test_order_and_inverse(seed):
    rng = random.Random(seed)
    for _ in range(80):
        spec = random_spec(rng, rng.randint(1, 4), 200)
        q_tile, kv_tile = random_tiles(rng, spec)
        layout = Layout(spec, q_tile, kv_tile)
        tokens, pads = tile_major_tokens(spec, q_tile, kv_tile)
        got_tokens, got_pads = layout.row_major_tokens()
        assert np.array_equal(got_tokens, tokens)
        assert np.array_equal(got_pads, pads)
        assert layout.num_queries == len(tokens)

        bm = gnaflex.block_mask(spec, q_tile=q_tile, kv_tile=kv_tile, device="cpu")
        x = torch.randn(2, spec.num_tokens, 3)
        y = gnaflex.permute(x, bm)
        want = x[:, torch.from_numpy(tokens)].masked_fill(torch.from_numpy(pads)[:, None], 0)
        assert torch.equal(y, want)
        assert torch.equal(gnaflex.unpermute(y, bm), x)


def test_gradients_are_the_inverse_permutation():
    bm = gnaflex.block_mask((5, 7), 3, dilation=(1, 2), q_tile=(2, 4), device="cpu")
    x = torch.randn(1, 35, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gnaflex.permute(x, bm), x)
    y = gnaflex.permute(x, bm).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: gnaflex.unpermute(y, bm), y)
    assert torch.autograd.gradgradcheck(lambda x: gnaflex.permute(x, bm) ** 2, x)


def test_any_dim_and_dtype():
    bm = gnaflex.block_mask((5, 6), 3, q_tile=(2, 4), device="cpu")
    x = torch.arange(30)
    assert torch.equal(gnaflex.unpermute(gnaflex.permute(x, bm, 0), bm, 0), x)
    y = torch.randn(2, 30, 3, 4).to(torch.bfloat16).transpose(2, 3)
    assert torch.equal(gnaflex.unpermute(gnaflex.permute(y, bm, 1), bm, 1), y)


def test_row_major_changes_nothing():
    bm = gnaflex.block_mask((5, 6), 3, device="cpu")
    x = torch.randn(1, 30, 4)
    assert gnaflex.permute(x, bm) is x


def test_wrong_length_is_refused():
    bm = gnaflex.block_mask((5, 6), 3, q_tile=(2, 4), device="cpu")
    with pytest.raises(GNAError, match=r"permute takes 30 tokens along dim -2: got shape \(1, 48, 4\)"):
        gnaflex.permute(torch.zeros(1, 48, 4), bm)
    with pytest.raises(GNAError, match=r"unpermute takes 48 tokens"):
        gnaflex.unpermute(torch.zeros(1, 30, 4), bm)


def test_one_order_for_another_window():
    a, b = (Layout(GNA((8, 9), w), (2, 3), (2, 3)).row_major_tokens()[0] for w in (3, 8))
    assert np.array_equal(a, b)
