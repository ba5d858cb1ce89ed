"""Joint masks of real models at their full size: single queries against the oracle, single rows of blocks
against the mask."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from joint import joint_order

import gnaflex
from gnaflex.reference import allowed_keys
from gnaflex.spec import GNA

VIDEO = GNA((30, 48, 80), (18, 24, 24), (16, 8, 8))
IMAGE = GNA((256, 256), (80, 80), (16, 16))
CASES = {
    "HunyuanVideo, row-major": (VIDEO, {"suffix": 256}, {}),
    "HunyuanVideo, tile-major": (VIDEO, {"suffix": 256}, {"q_tile": (2, 8, 8), "kv_tile": (2, 8, 8)}),
    "HunyuanVideo's default grid": (
        GNA((33, 45, 80), (18, 24, 24)),
        {"suffix": 256},
        {"q_tile": (4, 8, 8), "kv_tile": (2, 8, 8)},
    ),
    "FLUX 1024": (GNA((64, 64), (32, 32)), {"prefix": 512}, {}),
    "FLUX 4096": (IMAGE, {"prefix": 512}, {}),
    "FLUX 4096, tile-major": (IMAGE, {"prefix": 512}, {"q_tile": (16, 8), "kv_tile": (16, 8)}),
    "no block boundary meets the grid": (GNA((256, 256), (80, 80)), {"prefix": 77}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_rows(name):
    spec, text, tiles = CASES[name]
    rng = random.Random(name)
    bm = gnaflex.block_mask(spec, **text, **tiles, device="cpu")
    tokens, _ = joint_order([spec], **tiles, **text)
    key_tokens, is_pad = joint_order([spec], **tiles, **text, keys=True)
    prefix = text.get("prefix", 0)
    in_grid = (key_tokens >= prefix) & (key_tokens < prefix + spec.num_tokens)
    zero, keys = torch.zeros((), dtype=torch.long), torch.arange(len(key_tokens))
    for place in [0, len(tokens) - 1, *(rng.randrange(len(tokens)) for _ in range(15))]:
        seen = bm.mask_mod(zero, zero, torch.tensor(place), keys).numpy()
        want = ~is_pad
        if 0 <= (query := int(tokens[place]) - prefix) < spec.num_tokens:
            allowed = np.array(sorted(allowed_keys(spec, query))) + prefix
            want &= ~in_grid | np.isin(key_tokens, allowed)
        assert np.array_equal(seen, want)
    rows = bm.kv_num_blocks.shape[-1]
    for row in [0, rows - 1, rows - 2, *(rng.randrange(rows) for _ in range(8))]:
        check_row_of_blocks(bm, row)


def check_row_of_blocks(bm, row):
    q_block, kv_block = bm.BLOCK_SIZE
    zero, keys = torch.zeros((), dtype=torch.long), torch.arange(bm.seq_lengths[1])
    queries = torch.arange(row * q_block, min((row + 1) * q_block, bm.seq_lengths[0]))
    columns = -(-len(keys) // kv_block)
    cut = np.zeros((q_block, columns * kv_block), bool)
    cut[: len(queries), : len(keys)] = bm.mask_mod(zero, zero, queries[:, None], keys)
    cut = cut.reshape(q_block, columns, kv_block)
    touched, full = cut.any((0, 2)), cut.all((0, 2))
    for kind, want in (("kv", touched & ~full), ("full_kv", full)):
        count = getattr(bm, f"{kind}_num_blocks")[0, 0, row]
        assert getattr(bm, f"{kind}_indices")[0, 0, row, :count].tolist() == np.flatnonzero(want).tolist()
