"""A GPU that FLASH serves, as tests without one see it: it takes lists and mask_mod at their word."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import AuxOutput

import gnaflex
from gnaflex import compiled, door, flash
from gnaflex.reference import reference_attention
from gnaflex.spec import GNA

DEVICE = torch.device("cuda", 0)
SPEC = GNA((8, 40), (3, 9))  # row-major, intervals
TILED = GNA((8, 16, 16), (4, 8, 8), (4, 8, 8))
DILATED = GNA((32, 32), (5, 6), dilation=(2, 2))
CAUSAL = GNA((4, 9, 16), (2, 5, 16), is_causal=(True, True, False))
LONG = GNA((600,), (64,), (32,))
INSTALL = "flash-attn-4 is not installed: pip install --pre flash-attn-4"
old_torch = tuple(map(int, torch.__version__.split(".")[:2])) < flash.NEEDS_TORCH


class Machine:
    """A GPU of a family that FLASH serves; ``calls`` are the arguments of those that ran, ``fails`` what they
    raise."""

    def __init__(self, monkeypatch, rows):
        self.rows, self.calls, self.fails = rows, [], None
        monkeypatch.setattr(flash, "obstacle", lambda device: "")
        monkeypatch.setattr(flash, "q_rows", lambda device: self.rows)
        monkeypatch.setattr(flash, "_broken", {})
        monkeypatch.setattr(compiled, "flex_attention", self.run)

    def run(self, q, k, v, score_mod, block_mask, scale, enable_gqa, kernel_options, aux):
        self.calls.append((block_mask, kernel_options))
        if kernel_options == flash.OPTION and self.fails:
            raise self.fails
        allowed = taken_at_its_word(block_mask, q.shape[0])
        out, lse = attend(*(x.float() for x in (q, k, v)), allowed, score_mod, scale)
        return out.to(q.dtype) if aux is None else (out.to(q.dtype), AuxOutput(lse=lse))

    @property
    def backends(self):
        return ["flash" if options == flash.OPTION else "flex" for _, options in self.calls]


def taken_at_its_word(bm, batch=1):
    """What FLASH computes of a mask: full blocks, and the mask_mod in the partial ones; [batch, 1, queries,
    keys]."""
    queries, keys = bm.seq_lengths
    rows, columns = bm.BLOCK_SIZE
    at = torch.arange(batch)[:, None, None, None], torch.tensor(0), torch.arange(queries)[:, None]
    allowed = bm.mask_mod(*at, torch.arange(keys)).expand(batch, 1, queries, keys)
    out = torch.zeros_like(allowed)
    for kind, full in (("kv", False), ("full_kv", True)):
        counts, indices = getattr(bm, f"{kind}_num_blocks")[0, 0], getattr(bm, f"{kind}_indices")[0, 0]
        for row, count in enumerate(counts.tolist()):
            for column in indices[row, :count].tolist():
                here = slice(row * rows, (row + 1) * rows), slice(column * columns, (column + 1) * columns)
                out[..., here[0], here[1]] = True if full else allowed[..., here[0], here[1]]
    return out


def attend(q, k, v, allowed, score_mod=None, scale=None):
    """Attention and its log-sum-exp in the dtype of q, keys of a group repeated; a row without keys is 0."""
    batch, heads, queries, keys = (torch.arange(n, device=q.device) for n in (*q.shape[:3], k.shape[2]))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if score_mod is not None:
        at = batch[:, None, None, None], heads[:, None, None], queries[:, None], keys
        scores = score_mod(scores, *at)
    scores = scores.masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1).nan_to_num() @ v, scores.logsumexp(-1)


@pytest.fixture(name="machine")
def blackwell_gpu(monkeypatch):
    door._problem.cache_clear()
    yield Machine(monkeypatch, flash.BLACKWELL)
    door._problem.cache_clear()


@pytest.fixture(name="hopper")
def hopper_gpu(machine):
    machine.rows = flash.HOPPER
    return machine


def mask(spec=SPEC, block_size=(256, 128), form="interval", **options):
    return gnaflex.block_mask(spec, block_size=block_size, form=form, device="cpu", **options)


def tensors(bm=None, dtype=torch.bfloat16, dim=64, value_dim=None, heads=2, kv_heads=2, device="cpu"):
    queries, keys = bm.seq_lengths if bm is not None else (320, 320)
    sizes = (heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim or dim)
    return [torch.randn(2, *size, device=device).to(dtype) for size in sizes]


def grids(spec, heads=2, kv_heads=2, dim=16, dtype=torch.bfloat16, device="cpu"):
    torch.manual_seed(0)
    counts = (heads, kv_heads, kv_heads)
    return [torch.randn(1, *spec.shape, n, dim, device=device).to(dtype) for n in counts]


def fields(spec):
    return {name: getattr(spec, name) for name in ("window", "stride", "dilation", "is_causal")}


def assert_within_budget(got, q, k, v, **problem):
    """Error against float64 at most twice that of the plain computation in the same dtype."""
    exactly = {name: x.double() if name.startswith("extra") else x for name, x in problem.items()}
    exact = reference_attention(*(x.double().cpu() for x in (q, k, v)), **exactly)
    plain = reference_attention(*(x.cpu() for x in (q, k, v)), **problem, compute_dtype=q.dtype)
    budget = 2 * (plain.double() - exact).abs().max() + 2 * torch.finfo(q.dtype).eps * exact.abs().max()
    assert (got.cpu().double() - exact).abs().max() <= budget
