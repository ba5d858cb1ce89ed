"""What explain says about a mask, and whether its advice holds."""

from __future__ import annotations

import random
import re

import pytest
import torch
from cases import random_spec
from orders import random_tiles
from test_joint import LISTS, another, random_conditions, random_text, some_pairs

import gnaflex
from gnaflex.advice import cheapest_layout
from gnaflex.spec import GNA
from gnaflex.tiles import allowed_pairs


def notes(bm, heads=1):
    queries, keys = (torch.empty(1, heads, n, 8) for n in bm.seq_lengths)
    return list(gnaflex.explain(queries, keys, keys, bm).notes)


def masks():
    spec, other = GNA((16, 24), 5), GNA((16, 24), 3)
    text = {"prefix": 40, "suffix": 7, "extra_kv": 3, "device": "cpu"}
    packed = [spec, GNA(8, 3)]
    yield (
        gnaflex.block_mask(spec, **text),
        "mask: GNA(shape=(16, 24), window=(5, 5)), row-major, prefix 40, suffix 7, extra_kv 3; "
        "of 16 blocks of 128 x 128 0 are full, 16 partial",
    )
    yield (
        gnaflex.block_mask(spec, q_tile=(4, 8), kv_tile=(2, 8), text_valid=[[1, 2, 3]], **text),
        "mask: GNA(shape=(16, 24), window=(5, 5)), tile-major (4, 8) over (2, 8), prefix 40, suffix 7, "
        "extra_kv 3; of 465 blocks of 32 x 16 72 are full, 173 partial",
        "conditions: text_valid, so that blocks of extra keys are partial, never full",
    )
    yield (
        gnaflex.block_mask(spec, padding=[[1, 2]], where=some_pairs, device="cpu"),
        "mask: GNA(shape=(16, 24), window=(5, 5)), row-major; of 9 blocks of 128 x 128 0 are full, 7 partial",
        "conditions: padding, where, so that every block is partial, never full",
    )
    yield (
        gnaflex.block_mask([spec, other, spec, spec], block_size=4, device="cpu"),
        "mask: 2 windows, row-major; of 36,864 blocks of 4 x 4 0 are full, 4,608 partial",
        "windows per head: 2 different ones over 4 heads; the block lists of a head take up to 0.1 MiB, "
        "those of all heads 0.6 MiB",
    )
    yield (
        gnaflex.packed_block_mask(packed, prefix=(3, 4), device="cpu")[0],
        "mask: 2 packed grids, 392 tokens, row-major, prefix [3, 4]; of 16 blocks of 128 x 128 0 are full, "
        "14 partial",
    )
    yield (
        gnaflex.packed_block_mask([spec, other], suffix=5, q_tile=(4, 8), device="cpu")[0],
        "mask: 2 packed grids, 768 tokens, tile-major (4, 8), suffix 5; of 676 blocks of 32 x 32 24 are "
        "full, 166 partial",
    )
    yield (
        gnaflex.shard(spec, 0, 1, 4, device="cpu").block_mask,
        "mask: GNA(shape=(16, 24), window=(5, 5)), row-major, queries 4 to 8 and keys 2 to 10 of axis 0; "
        "of 2 blocks of 128 x 128 0 are full, 2 partial",
    )


@pytest.mark.parametrize("number", range(7))
def test_golden(number):
    bm, *want = list(masks())[number]
    assert notes(bm, 4) == want


def test_notes_follow_the_backends():
    bm = gnaflex.block_mask((8, 8), 4, suffix=2, text_valid=[1], device="cpu")
    q = torch.empty(1, 1, 66, 8)
    text = str(gnaflex.explain(q, q, q, bm)).splitlines()
    assert text[0].startswith("backend: ")
    assert [line.split(":")[0] for line in text[-2:]] == ["mask", "conditions"]
    assert gnaflex.explain(q, q, q).notes == ()


def test_counts_are_those_of_the_lists():
    rng = random.Random(0)
    for _ in range(30):
        base, text = random_spec(rng, rng.randint(1, 3), 200), random_text(rng, 20)
        tiled = rng.random() < 0.5
        q_tile, kv_tile = random_tiles(rng, base)
        order = {"q_tile": q_tile, "kv_tile": kv_tile} if tiled else {"block_size": rng.randint(1, 30)}
        specs = [base] if rng.random() < 0.5 else [base, another(rng, base, tiled), base]
        conditions = random_conditions(rng, base, text, 1)
        bm = gnaflex.block_mask(specs, device="cpu", **text, **order, **conditions)
        first = notes(bm, len(specs))[0]
        stated = re.search(r"of ([\d,]+) blocks of (\d+) x (\d+) ([\d,]+) are full, ([\d,]+) partial", first)
        blocks, *size, full, partial = (int(n.replace(",", "")) for n in stated.groups())
        assert tuple(size) == bm.BLOCK_SIZE
        assert full == bm.full_kv_num_blocks.sum()
        assert partial == bm.kv_num_blocks.sum()
        rows, columns = (-(-n // m) for n, m in zip(bm.seq_lengths, bm.BLOCK_SIZE, strict=True))
        assert blocks == rows * columns * (len(specs) if len(set(specs)) > 1 else 1)


def test_memory_of_windows_per_head():
    specs = [GNA((32, 64), w) for w in (3, 5, 7, 9, 3)]
    bm = gnaflex.block_mask(specs, block_size=8, device="cpu", full_width=True)
    held = sum(getattr(bm, name).nbytes for name in LISTS if name.endswith("indices")) / 2**20
    assert held == 5.0
    assert "a head take up to 1.0 MiB, those of all heads 5.0 MiB" in notes(bm, 5)[1]


# ---- the better order --------------------------------------------------------------------------------


def advice_of(bm):
    found = [note for note in notes(bm) if note.startswith("advice: ")]
    assert len(found) <= 1
    return found[0] if found else None


def listed(bm):
    return int(bm.kv_num_blocks.sum() + bm.full_kv_num_blocks.sum())


DILATED = GNA((64, 64), 9, dilation=4)


def test_the_advice_of_a_dilated_mask():
    assert advice_of(gnaflex.block_mask(DILATED, device="cpu")) == (
        "advice: row-major order touches 28% of the blocks for 2.0% of the pairs: dilation scatters the keys "
        "of a block; tile-major order touches 64 blocks, not 288. Write block_mask(..., q_tile=(8, 16)), "
        "permute(x, block_mask) and unpermute, or gnaflex.attention, which does so by itself"
    )


@pytest.mark.parametrize(
    "spec",
    [
        DILATED,
        GNA((4, 32, 48), (2, 5, 5), 1, (2, 4, 6)),
        GNA(4096, 64, dilation=32),
        GNA((64, 64), (64, 9)),
        GNA((64, 64), 16, 16),
        GNA((30, 48, 80), (18, 24, 24), (16, 8, 8)),
    ],
    ids=str,
)
def test_following_the_advice(spec):
    """Numbers are those of the masks themselves, and the cure is at least twice as good."""
    bm = gnaflex.block_mask(spec, device="cpu", full_width=False)
    advice = advice_of(bm)
    assert ("dilation scatters" in advice) == (max(spec.dilation) > 1)
    blocks, pairs = re.search(r"touches (\S+)% of the blocks for (\S+)% of the pairs", advice).groups()
    assert round(100 * listed(bm) / len(bm.kv_num_blocks[0, 0]) ** 2) == int(blocks)
    assert float(pairs) == pytest.approx(100 * allowed_pairs(spec) / spec.num_tokens**2, abs=0.06)
    after, before = (
        int(n.replace(",", "")) for n in re.search(r"touches ([\d,]+) blocks, not ([\d,]+)", advice).groups()
    )
    assert before == listed(bm)
    tile = tuple(map(int, re.search(r"q_tile=\(([\d, ]+?),?\)", advice).group(1).split(", ")))
    assert tile == cheapest_layout(spec).q_tile  # that of gnaflex.attention
    better = gnaflex.block_mask(spec, q_tile=tile, device="cpu", full_width=False)
    assert listed(better) == after
    assert 2 * after <= before
    assert advice_of(better) is None


def test_advice_of_masks_with_extra_tokens_and_conditions():
    """The grid alone counts."""
    for options in ({"prefix": 512}, {"extra_kv": 9, "where": some_pairs}, {"suffix": 9, "text_valid": [3]}):
        bm = gnaflex.block_mask(DILATED, device="cpu", **options)
        assert advice_of(bm) == advice_of(gnaflex.block_mask(DILATED, device="cpu"))


def test_masks_that_need_no_advice():
    half = gnaflex.shard(DILATED, 0, 0, 2, device="cpu").block_mask
    for bm in (
        gnaflex.block_mask((64, 64), 9, device="cpu"),
        gnaflex.block_mask((64, 64), (9, 64), device="cpu"),
        gnaflex.block_mask(4096, 128, 128, device="cpu"),
        gnaflex.block_mask((8, 8), 2, dilation=4, device="cpu"),
        gnaflex.block_mask(DILATED, q_tile=(8, 16), device="cpu"),
        gnaflex.packed_block_mask([DILATED] * 2, device="cpu")[0],
        half,
    ):
        assert advice_of(bm) is None
    bm = gnaflex.block_mask([DILATED, GNA((64, 64), 9)], device="cpu")
    assert not any(note.startswith("advice") for note in notes(bm, 2))
