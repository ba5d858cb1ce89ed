"""What a mask costs, by exact counts, and which token order would cost less."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from functools import lru_cache

from gnaflex import flex
from gnaflex.blocks import Cut
from gnaflex.layout import Layout
from gnaflex.mask import MaskRecord
from gnaflex.order import order_of
from gnaflex.spec import GNA
from gnaflex.tiles import allowed_pairs, padded_tokens, touched_blocks

# Permuting one token of q, k, v and o costs about as much as this many query-key pairs: 8 passes over its
# row at 10 GB/s against 4 FLOP per pair and channel at 100 GFLOP/s (two CPU cores; GPUs have a like ratio).
PERMUTE_PAIRS = 128

# A row-major mask that touches this many times the blocks of a tile-major one is worth a word.
WORTH_A_WORD = 2


def cheapest_layout(spec: GNA) -> Layout:
    """The token order with the least work, by exact counts of 128-token blocks and of permuted tokens; extra
    tokens cost the same in every order."""
    block = flex.DEFAULT_BLOCK
    row_major = MaskRecord((order_of(spec),), "table", (block, block))
    best, least = row_major.order.documents[0].layout, flex.listed_blocks(row_major) * block**2
    for tile in _boxes(block, spec.rank):
        if any(
            extent >= 2 * -(-n // d) for extent, n, d in zip(tile, spec.shape, spec.dilation, strict=True)
        ):
            continue  # half the tile would be padding: a narrower box does the same with less
        layout = Layout(spec, tile, tile)
        cost = touched_blocks(spec, tile, tile) * block**2 + layout.num_queries * PERMUTE_PAIRS
        if cost < least:
            best, least = layout, cost
    return best


def common_tile(specs: Mapping[GNA, int]) -> tuple[int, ...] | str:
    """The tile whose token order serves several problems on one grid with the least work, so many calls of
    each, their tokens permuted once for all; or why there is none. Tiles must leave no padding, which every
    other part of a model would compute on, too."""
    first = next(iter(specs))
    if len({spec.dilation for spec in specs}) > 1:
        return "its layers differ in dilation"
    block = flex.DEFAULT_BLOCK
    tiles = [
        tile
        for tile in _boxes(block, first.rank)
        if all(n % t == 0 for axis, t in zip(first.axes, tile, strict=True) for n in axis.group_lengths)
    ]
    if not tiles:
        return f"no box of {block} tokens divides {'x'.join(map(str, first.shape))}"
    work = {
        tile: sum(calls * touched_blocks(spec, tile, tile) for spec, calls in specs.items()) for tile in tiles
    }
    best = min(tiles, key=work.__getitem__)
    apart = sum(calls * _work_alone(spec) for spec, calls in specs.items())
    if work[best] * block**2 > apart:
        return f"the best box that divides it, {best}, is dearer than other boxes with a permutation each"
    return best


def _work_alone(spec: GNA) -> int:
    """Pairs of a call in its own cheapest order, its permutation included."""
    tile, block = cheapest_layout(spec).q_tile, flex.DEFAULT_BLOCK
    if tile is None:
        return flex.listed_blocks(MaskRecord((order_of(spec),), "table", (block, block))) * block**2
    return touched_blocks(spec, tile, tile) * block**2 + padded_tokens(spec, tile) * PERMUTE_PAIRS


@lru_cache(maxsize=16)
def _boxes(size: int, rank: int) -> tuple[tuple[int, ...], ...]:
    """Every box of ``size`` tokens."""
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    return tuple(box for box in itertools.product(divisors, repeat=rank) if math.prod(box) == size)


# ---- in words ----------------------------------------------------------------------------------------


def notes(record: MaskRecord) -> tuple[str, ...]:
    """What a user should know about a mask, a line each."""
    return (*_counts(record), *_conditions(record), *_better_order(record))


def _counts(record: MaskRecord) -> Iterator[str]:
    assert record.block_size is not None
    q_block, kv_block = record.block_size
    classes = [
        [int(one.counts.sum()) for one in flex.pending_lists(record, order, (False,))]
        for order in record.orders
    ]
    partial, full = (sum(classes[which][at] for which in record.heads or (0,)) for at in range(2))
    rows, columns = -(-record.order.num_queries // q_block), -(-record.order.num_keys // kv_block)
    total = rows * columns * max(len(record.heads), 1)
    yield (
        f"mask: {_tokens(record)}; of {total:,} blocks of {q_block} x {kv_block} {full:,} are full, "
        f"{partial:,} partial"
    )
    if record.heads:
        each = 16 * rows * columns / 2**20
        yield (
            f"windows per head: {len(record.orders)} different ones over {len(record.heads)} heads; the "
            f"block lists of a head take up to {each:.1f} MiB, those of all heads "
            f"{each * len(record.heads):.1f} MiB"
        )


def _tokens(record: MaskRecord) -> str:
    documents = record.order.documents
    parts = [repr(documents[0].spec) if len(record.orders) == 1 else f"{len(record.orders)} windows"]
    if len(documents) > 1:
        parts = [f"{len(documents)} packed grids, {sum(d.spec.num_tokens for d in documents):,} tokens"]
    layout = documents[0].layout
    over = f" over {layout.kv_tile}" if layout.kv_tile != layout.q_tile else ""
    parts.append(f"tile-major {layout.q_tile}{over}" if record.order.is_tiled else "row-major")
    for name in ("prefix", "suffix", "extra_kv"):
        tokens = [getattr(document, name) for document in documents]
        if any(tokens):
            parts.append(f"{name} {tokens[0] if len(set(tokens)) == 1 else tokens}")
    if layout.slab is not None:
        a, *ends = layout.slab
        parts.append(f"queries {ends[0]} to {ends[1]} and keys {ends[2]} to {ends[3]} of axis {a}")
    return ", ".join(parts)


def _conditions(record: MaskRecord) -> Iterator[str]:
    cuts = record.cuts
    if cuts is None:
        return
    names = [name for name in ("text_valid", "padding", "where") if getattr(cuts, name) is not None]
    blocks = "blocks of extra keys are" if cuts.cut is Cut.TEXT else "every block is"
    yield f"conditions: {', '.join(names)}, so that {blocks} partial, never full"


def _better_order(record: MaskRecord) -> Iterator[str]:
    """A row-major mask, most of all a dilated one, can touch many more blocks than its pairs need."""
    document = record.order.documents[0]
    single = len(record.orders) == len(record.order.documents) == 1 and document.layout.slab is None
    if record.order.is_tiled or not single:
        return
    spec, block = document.spec, flex.DEFAULT_BLOCK
    tile = cheapest_layout(spec).q_tile
    if tile is None:
        return
    listed = flex.listed_blocks(MaskRecord((order_of(spec),), "table", (block, block)))
    tiled = touched_blocks(spec, tile, tile)
    if listed >= WORTH_A_WORD * tiled:
        blocks = -(-spec.num_tokens // block)
        why = "dilation scatters the keys of a block; " if max(spec.dilation) > 1 else ""
        yield (
            f"advice: row-major order touches {listed / blocks**2:.0%} of the blocks for "
            f"{allowed_pairs(spec) / spec.num_tokens**2:.1%} of the pairs: {why}tile-major order touches "
            f"{tiled:,} blocks, not {listed:,}. Write block_mask(..., q_tile={tile}), permute(x, block_mask) "
            "and unpermute, or gnaflex.attention, which does so by itself"
        )
