"""The BlockMask contract: what torch does not check, what travels, what is refused."""

from __future__ import annotations

import copy
import pickle
import random
import subprocess
import sys

import pytest
import torch
from cases import random_spec
from orders import random_tiles
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils import _pytree as pytree

import gnaflex
from gnaflex.compiled import captured_tensors
from gnaflex.spec import GNA, GNAError

LISTS = [f"{kind}_{what}" for kind in ("kv", "full_kv", "q", "full_q") for what in ("num_blocks", "indices")]


def entries(counts, indices):
    return [row[:n].tolist() for n, row in zip(counts[0, 0].tolist(), indices[0, 0], strict=True)]


def assert_equal_blocks(ours: BlockMask, theirs: BlockMask):
    for counts, indices in zip(LISTS[::2], LISTS[1::2], strict=True):
        a = entries(getattr(ours, counts), getattr(ours, indices))
        assert a == entries(getattr(theirs, counts), getattr(theirs, indices)), counts
    assert ours.seq_lengths == theirs.seq_lengths
    assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE


@pytest.mark.parametrize("seed", range(4))
def test_block_for_block_what_create_block_mask_makes(seed):
    rng = random.Random(seed)
    for _ in range(25):
        spec = random_spec(rng, rng.randint(1, 4), 600)
        size = (rng.randint(1, 60), rng.randint(1, 60))
        tiles = random_tiles(rng, spec)
        for bm in (
            gnaflex.block_mask(spec, block_size=size, device="cpu"),
            gnaflex.block_mask(spec, q_tile=tiles[0], kv_tile=tiles[1], device="cpu"),
        ):
            theirs = create_block_mask(bm.mask_mod, None, None, *bm.seq_lengths, "cpu", bm.BLOCK_SIZE)
            assert_equal_blocks(bm, theirs)
            assert torch.equal(bm.to_dense(), theirs.to_dense())


def test_the_contract_of_the_tensors():
    bm = gnaflex.block_mask((6, 20, 20), (3, 7, 7), device="cpu")
    tensors = [getattr(bm, name) for name in LISTS]
    assert type(bm) is BlockMask
    assert all(x.dtype == torch.int32 and x.is_contiguous() and x.shape[:2] == (1, 1) for x in tensors)
    assert len({x.untyped_storage().data_ptr() for x in tensors}) == len(tensors)
    assert all(not x.is_inference() for x in tensors)
    assert bm.seq_lengths == (2400, 2400)
    assert bm.kv_indices.shape == bm.full_kv_indices.shape == (1, 1, 19, 19)
    narrow = gnaflex.block_mask((6, 20, 20), (3, 7, 7), device="cpu", full_width=False)
    assert narrow.kv_indices.shape[-1] == int(narrow.kv_num_blocks.max())
    assert narrow.full_kv_indices.shape[-1] == 1  # never narrower, even without full blocks


def test_no_row_is_empty():
    rng = random.Random(3)
    for _ in range(40):
        spec = random_spec(rng, rng.randint(1, 3), 300)
        q_tile, kv_tile = random_tiles(rng, spec)
        bm = gnaflex.block_mask(spec, q_tile=q_tile, kv_tile=kv_tile, device="cpu")
        at = torch.arange(bm.seq_lengths[0])
        zero = torch.zeros((), dtype=torch.long)
        assert bm.mask_mod(zero, zero, at[:, None], at).any(1).all()
        assert ((bm.kv_num_blocks + bm.full_kv_num_blocks) > 0).all()


def test_order_stays_row_major_unless_tiles_are_given():
    assert gnaflex.block_mask((8, 16, 16), (2, 4, 4), (2, 4, 4), device="cpu").seq_lengths == (2048, 2048)
    tiled = gnaflex.block_mask((7, 9), 3, dilation=(1, 2), q_tile=(4, 4), kv_tile=(2, 4), device="cpu")
    assert tiled.seq_lengths == (8 * (8 + 4),) * 2
    assert tiled.BLOCK_SIZE == (16, 8)
    one = gnaflex.block_mask((7, 9), 3, kv_tile=(2, 4), device="cpu")
    assert one.BLOCK_SIZE == (8, 8)


def test_the_problem_travels_with_the_mask():
    spec = GNA((4, 8, 8), (2, 4, 4), (1, 2, 2), is_causal=(True, False, False))
    for bm in (
        gnaflex.block_mask(spec, device="cpu"),
        gnaflex.block_mask(spec, q_tile=(1, 4, 4), device="cpu"),
    ):
        assert gnaflex.spec_of(bm) == spec
        assert gnaflex.spec_of(bm.to("cpu")) == spec
        assert gnaflex.spec_of(copy.copy(bm)) == gnaflex.spec_of(copy.deepcopy(bm)) == spec
        moved = copy.copy(bm).to("meta")
        assert gnaflex.spec_of(moved) == gnaflex.spec_of(moved.to("meta")) == spec
        assert moved.kv_indices.device.type == "meta"
        tables = list(captured_tensors(moved.mask_mod))
        assert tables
        assert all(table.device.type == "meta" for table in tables)
    assert pickle.loads(pickle.dumps(gnaflex.spec_of(bm))) == spec


def test_the_problem_survives_pytrees_and_compilation():
    if not hasattr(BlockMask, "_flatten"):
        pytest.skip("this torch has no BlockMask pytree")
    if BlockMask not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(BlockMask, BlockMask._flatten, BlockMask._unflatten)
    bm = gnaflex.block_mask((8, 8), 3, device="cpu")
    again = pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, bm)
    assert gnaflex.spec_of(again) == gnaflex.spec_of(bm)

    @torch.compile(fullgraph=True, backend="eager")
    def through(bm, x):
        return bm, x + 1

    assert gnaflex.spec_of(through(bm, torch.zeros(1))[0]) == gnaflex.spec_of(bm)


def test_a_changed_mask_is_refused_with_the_reason():
    bm = gnaflex.block_mask((16, 16), 5, device="cpu")
    with pytest.raises(GNAError, match=r"changed after it was made.*\n.*Build one for"):
        gnaflex.spec_of(bm._adjust(128, 128))
    # torch 2.9 leaves no trace of slicing but a lost mask_mod
    with pytest.raises(
        GNAError, match="sliced" if not torch.__version__.startswith("2.9.") else "not made by gnaflex"
    ):
        gnaflex.spec_of(bm[0:1])
    with pytest.raises(GNAError, match="not made by gnaflex"):
        gnaflex.spec_of(create_block_mask(lambda b, h, q, k: q >= k, None, None, 128, 128, "cpu"))


def test_masks_built_under_inference_mode_serve_training():
    with torch.inference_mode():
        bm = gnaflex.block_mask((4, 8), 3, device="cpu")
        tiled = gnaflex.block_mask((4, 8), 3, q_tile=(3, 4), device="cpu")
        gnaflex.permute(torch.zeros(32, 1), tiled)
    x = torch.randn(1, 1, 32, 8, requires_grad=True)
    gnaflex.flex_attention(x, x, x, block_mask=bm).sum().backward()
    y = gnaflex.permute(x, tiled)
    gnaflex.unpermute(gnaflex.flex_attention(y, y, y, block_mask=tiled), tiled).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_masks_built_under_a_fake_mode_are_real():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        bm = gnaflex.block_mask((4, 8), 3, device="cpu")
    assert not isinstance(bm.kv_indices, FakeTensor)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"q_tile": (4, 6), "kv_tile": (4, 4)}, r"axis 1 has q_tile=6, kv_tile=4.*\n.*Write q_tile=\(4, 8\)"),
        ({"q_tile": (4,)}, r"one positive extent per axis: got q_tile=\(4,\) for 2 axes"),
        ({"q_tile": (4, 0)}, "one positive extent"),
        ({"q_tile": (2.5, 4)}, r"q_tile must hold integers: got q_tile=\(2.5, 4\)"),
        (
            {"q_tile": (4, 4), "block_size": 128},
            r"block_size must agree with the tiles: got 128.*16 tokens",
        ),
        ({"block_size": 0}, "block_size must be a positive int"),
        ({"window": (9, 3)}, r"axis 0 has window\*dilation=9\*1=9 > length=8"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(GNAError, match=r"(?s)" + message):
        gnaflex.block_mask(**{"shape": (8, 8), "window": 3, "device": "cpu", **kwargs})


def test_a_gna_is_the_whole_problem():
    with pytest.raises(GNAError, match="a GNA is the whole problem"):
        gnaflex.block_mask(GNA(8, 3), window=4)
    with pytest.raises(GNAError, match="window is missing"):
        gnaflex.block_mask((8, 8))


def test_memory_follows_the_listed_blocks():
    """A 1.2 M-token mask: building it takes a few times its lists, and less than one full-width list."""
    code = (
        "import resource, gnaflex\n"
        "gnaflex.block_mask((8, 8), 3, device='cpu')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "problem = dict(window=(16, 24, 24), q_tile=(2, 8, 8), device='cpu', full_width=False)\n"
        "bm = gnaflex.block_mask((128, 96, 96), **problem)\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "lists = bm.kv_indices, bm.full_kv_indices, bm.q_indices, bm.full_q_indices\n"
        "print(grown / 1024, sum(4 * one.numel() for one in lists) / 2**20)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, lists = map(float, done.stdout.split())
    assert grown < 5 * lists < 4 * 9216**2 / 2**20
