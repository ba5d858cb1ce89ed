"""FlexAttention's FLASH backend: which calls go to it and why not the others, the masks it gets; on a GPU
that it serves, what every backend must do.

Without such a GPU door and dispatch are walked: in its place stands what takes lists and mask_mod at their
word.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import math
import operator
import random
import re
from types import SimpleNamespace

import pytest
import torch
from cases import random_spec
from torch._inductor.virtualized import V
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, create_block_mask

import gnaflex
from gnaflex import compiled, dispatch, door, flash, operators
from gnaflex.forms import reason_against
from gnaflex.reference import dense_mask, reference_attention
from gnaflex.spec import GNA
from gnaflex.tiles import padded_tokens

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


@pytest.fixture
def machine(monkeypatch):
    door._problem.cache_clear()
    yield Machine(monkeypatch, flash.BLACKWELL)
    door._problem.cache_clear()


@pytest.fixture
def hopper(machine):
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


# ---- the machine -------------------------------------------------------------------------------------


def obstacle(monkeypatch, capability=(10, 0), torch_version="2.13.0", cuda="13.0", installed=True):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if installed else None)
    return flash.obstacle.__wrapped__(DEVICE)


def test_what_the_machine_lacks(monkeypatch):
    needs = "it needs an NVIDIA GPU of the Blackwell or Hopper family, the query is on"
    assert flash.obstacle(torch.device("cpu")) == f"{needs} cpu"
    assert not flash.leads(torch.device("cpu"))
    assert obstacle(monkeypatch, cuda=None) == f"{needs} cuda:0"  # ROCm
    for capability in ((9, 0), (10, 0), (10, 3), (11, 0)):
        assert obstacle(monkeypatch, capability) == ""
    for major, minor in ((8, 0), (12, 0)):
        needs = f"it needs a GPU of compute capability 10, 11 (Blackwell) or 9 (Hopper): cuda:0 has {major}."
        assert obstacle(monkeypatch, (major, minor)) == f"{needs}{minor}"
    for version in ("2.9.1", "2.12.1+cu130"):
        wants = f"it needs torch 2.13 or newer: this is {version}"
        assert obstacle(monkeypatch, torch_version=version) == wants
    assert obstacle(monkeypatch, torch_version="2.14.0a0+git12") == ""
    assert obstacle(monkeypatch, installed=False) == INSTALL


def test_an_older_flash_attn_that_does_not_load_counts_as_none(monkeypatch):
    assert obstacle(monkeypatch) == ""

    def find_spec(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    assert flash.obstacle.__wrapped__(DEVICE) == INSTALL


def test_query_rows_are_those_of_the_family(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for capability, rows in (((9, 0), 128), ((10, 3), 256), ((11, 0), 256)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, is_=capability: is_)
        assert flash.q_rows.__wrapped__(DEVICE) == rows
    assert flash.q_rows(torch.device("cpu")) == 256


def test_auto_asks_for_flash_between_cuda_and_flex():
    assert dispatch.AUTO == ("cuda", "flash", "flex", "sdpa")
    assert set(dispatch.AUTO) < set(dispatch.BACKENDS) == set(dispatch.RUN)


def test_a_cpu_refuses_by_name_and_lists_the_remedy():
    bm = mask()
    with pytest.raises(NotImplementedError, match="flash: it needs an NVIDIA GPU") as refused:
        gnaflex.flex_attention(*tensors(bm), block_mask=bm, backend="flash")
    assert str(refused.value).endswith('Write backend="flex".')
    with pytest.raises(NotImplementedError, match="flash: it needs an NVIDIA GPU"):
        gnaflex.attention(*grids(SPEC), **fields(SPEC), backend="flash")


# ---- reasons -----------------------------------------------------------------------------------------


PARAMETER = torch.nn.Parameter(torch.zeros(2))


def trains(score, b, h, q, k):
    return score + PARAMETER[h]


def plain(score, b, h, q, k):
    return score * 2


# name: tensors' options, mask's options, call's options, the reason
REASONS = {
    "dtype": ({"dtype": torch.float32}, {}, {}, "it computes in bfloat16 and float16: the query is float32"),
    "narrow": ({"dim": 8}, {}, {}, "head_dim must be a multiple of 8 from 16 to 128: got 8"),
    "wide": ({"value_dim": 136}, {}, {}, "head_dim must be a multiple of 8 from 16 to 128: got 136"),
    "odd": ({"dim": 20}, {}, {}, "head_dim must be a multiple of 8 from 16 to 128: got 20"),
    "packed": ({}, {"form": "packed"}, {},
               'it takes masks of intervals or tables: this one is form="packed". '
               'Write gnaflex.block_mask(..., form="interval")'),
    "many runs": ({}, {"spec": GNA((16, 20), (9, 3)), "form": "packed"}, {},
                  'it takes masks of intervals or tables: this one is form="packed". '
                  'Write gnaflex.block_mask(..., form="table")'),
    "blocks": ({}, {"block_size": 128}, {},
               "it takes blocks of (256, 128) tokens: those of the mask have (128, 128). "
               "Write gnaflex.block_mask(..., block_size=(256, 128))"),
    "keys": ({}, {"block_size": 256}, {},
             "it takes blocks of (256, 128) tokens: those of the mask have (256, 256). "
             "Write gnaflex.block_mask(..., block_size=(256, 128))"),
    "tiles": ({}, {"spec": TILED, "block_size": None, "form": "table", "q_tile": (2, 8, 8)}, {},
              "it takes blocks of (256, 128) tokens: those of the mask have (128, 128). "
              "Write gnaflex.block_mask(..., q_tile=(4, 8, 8), kv_tile=(2, 8, 8))"),
    "other backend": ({}, {}, {"kernel_options": {"BACKEND": "TRITON"}},
                      "kernel_options ask for BACKEND='TRITON'"),
    "options": ({}, {}, {"kernel_options": {"num_warps": 4, "BLOCK_M": 64}},
                "kernel_options BLOCK_M, num_warps are those of Triton's kernels: leave them out"),
    "max_scores": ({}, {}, {"return_aux": AuxRequest(max_scores=True)}, "it does not return max_scores"),
    "one text": ({}, {"suffix": 4, "text_valid": torch.tensor([[3]])}, {},
                 "text_valid of one row does not compile for it: "
                 "give a row for each of several batch entries"),
    "one padding": ({}, {"padding": torch.tensor([[8, 31]])}, {},
                    "padding of one row does not compile for it: "
                    "give a row for each of several batch entries"),
    "captured": ({}, {}, {"score_mod": trains},
                 "it has no gradients for tensors that a score_mod captures: .detach() them"),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_a_reason(machine, name):
    of_tensors, of_mask, options, reason = REASONS[name]
    bm = mask(**of_mask)
    given = tensors(bm, **of_tensors)
    with torch.no_grad(), pytest.raises(NotImplementedError) as refused:
        gnaflex.flex_attention(*given, block_mask=bm, **options, backend="flash")
    assert f"\n  flash: {reason}\n" in str(refused.value)
    assert not machine.calls


def test_every_reason_is_listed(machine):
    bm = mask(form="packed", block_size=128)
    given = tensors(bm, dim=20, dtype=torch.float32)
    reasons = gnaflex.explain(*given, bm, score_mod=trains).reasons["flash"]
    for word in ("bfloat16", "head_dim", "form=", "blocks of", ".detach()"):
        assert sum(word in reason for reason in reasons) == 1, word


def test_hopper_takes_blocks_of_128_queries(hopper):
    for block_size in ((128, 128), (256, 128)):
        bm = mask(block_size=block_size)
        gnaflex.flex_attention(*tensors(bm), block_mask=bm, backend="flash")
    assert hopper.backends == ["flash"] * 2
    bm = mask(block_size=64)
    with pytest.raises(NotImplementedError, match=re.escape("it takes blocks of (128, 128) tokens")):
        gnaflex.flex_attention(*tensors(bm), block_mask=bm, backend="flash")


def test_masks_of_others_are_refused(machine):
    bm = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 320, 320, "cpu", BLOCK_SIZE=(256, 128))
    with pytest.raises(NotImplementedError, match="not made by gnaflex: torch's own flex_attention takes it"):
        gnaflex.flex_attention(*tensors(), block_mask=bm, backend="flash")
    assert gnaflex.explain(*tensors()).backend == "flash"  # no mask at all


def test_empty_tensors_are_refused(machine):
    bm = mask()
    given = [x[:0] for x in tensors(bm)]
    assert "it takes no empty tensors" in gnaflex.explain(*given, bm).reasons["flash"]


def test_gradients(machine):
    q, k, v = tensors(bm := mask())
    q.requires_grad_()
    assert flash_reasons(q, k, v, bm) == [
        '"auto" does not take it: only trying tells whether its backward compiles, which comes too late to '
        "take another"
    ]
    lse = "it has no gradients through the log-sum-exp: leave return_lse out"
    assert flash_reasons(q, k, v, bm, return_lse=True)[0] == lse
    with torch.no_grad():
        assert flash_reasons(q, k, v, bm, return_lse=True) == []


def test_deterministic_gradients_are_refused(machine):
    q, k, v = tensors(bm := mask())
    q.requires_grad_()
    reason = "its backward with block lists is not deterministic, which torch was told to be"
    for switch, found in (({"mode": True}, True), ({"mode": True, "warn_only": True}, False)):
        try:
            torch.use_deterministic_algorithms(**switch)
            assert (reason in flash_reasons(q, k, v, bm)) == found
            assert reason not in flash_reasons(q, k, v)  # dense, it is
            assert reason not in flash_reasons(k, k, v, bm)
        finally:
            torch.use_deterministic_algorithms(False)


def flash_reasons(*given, **options):
    return gnaflex.explain(*given, **options).reasons["flash"]


# ---- what "auto" does --------------------------------------------------------------------------------


def test_auto_takes_flash_on_blackwell(machine):
    bm = mask()
    assert gnaflex.explain(*tensors(bm), bm).backend == "flash"
    gnaflex.flex_attention(*tensors(bm), block_mask=bm)
    default = gnaflex.block_mask(SPEC, device="cpu")
    gnaflex.flex_attention(*tensors(default), block_mask=default)
    padded = mask(padding=torch.tensor([[8, 31], [5, 40]]))
    gnaflex.flex_attention(*tensors(padded), block_mask=padded)
    assert machine.backends == ["flash", "flex", "flash"]


@pytest.mark.parametrize(
    "rows, of_mask, options, caution",
    [
        (128, {}, {}, "on Hopper it evaluates masks pair by pair"),
        (256, {}, {"score_mod": plain}, "only trying tells whether a score_mod compiles for it"),
        (256, {"where": lambda b, h, q, k: q >= k}, {}, "only trying tells whether where= compiles for it"),
    ],
)
def test_auto_goes_past_what_it_cannot_foresee(machine, rows, of_mask, options, caution):
    machine.rows = rows
    bm = mask(**of_mask)
    given = tensors(bm)
    (reason,) = gnaflex.explain(*given, bm, **options).reasons["flash"]
    assert reason.startswith(f'"auto" does not take it: {caution}')
    gnaflex.flex_attention(*given, block_mask=bm, **options)
    gnaflex.flex_attention(*given, block_mask=bm, **options, backend="flash")
    assert machine.backends == ["flex", "flash"]


def test_cuda_comes_first(machine, monkeypatch):
    """Of the grid's tokens as they lie, whatever order FLASH would get."""
    monkeypatch.setitem(dispatch._REASONS, "cuda", lambda call: iter(()))
    monkeypatch.setitem(dispatch.RUN, "cuda", lambda call: seen.append(call) or call.query)
    monkeypatch.setattr(door, "kernel_lane", lambda call: None)
    for spec in (SPEC, TILED):
        seen = []
        gnaflex.attention(*grids(spec), **fields(spec))
        assert [call.record.order.is_tiled for call in seen] == [False]
    assert not machine.calls


def test_kernel_options_are_passed_on(machine):
    bm = mask()
    gnaflex.flex_attention(*tensors(bm), block_mask=bm, kernel_options={"BACKEND": "FLASH"})
    gnaflex.flex_attention(*tensors(bm), block_mask=bm, backend="flash")
    assert [options for _, options in machine.calls] == [{"BACKEND": "FLASH"}] * 2


def test_a_failure_sends_auto_elsewhere_and_is_said_once(machine, caplog):
    machine.fails = RuntimeError("CuteDSL template failed\nand much more")
    bm, grid = mask(), grids(SPEC)
    with caplog.at_level(logging.WARNING, "gnaflex"):
        out = gnaflex.flex_attention(*tensors(bm, dim=16), block_mask=bm)
        gnaflex.flex_attention(*tensors(bm, dim=16), block_mask=bm)
        assert_within_budget(gnaflex.attention(*grid, **fields(SPEC)), *grid, **fields(SPEC))
    assert out.isfinite().all()
    assert machine.backends == ["flash", "flex", "flex", "flex"]
    (record,) = caplog.records
    assert record.getMessage().endswith('failed, "auto" goes on without it: CuteDSL template failed')
    assert "it failed before on such a call: CuteDSL" in flash_reasons(*tensors(bm, dim=16), bm)[0]
    assert flash_reasons(*tensors(bm, dim=32, value_dim=16), bm) == []  # of another kind


def test_a_failure_on_grids_changes_the_order_too(machine):
    machine.fails = NotImplementedError("no such kernel")
    grid = grids(TILED)
    assert_within_budget(gnaflex.attention(*grid, **fields(TILED)), *grid, **fields(TILED))
    assert machine.backends == ["flash", "flex"]
    assert [bm.BLOCK_SIZE for bm, _ in machine.calls] == [(256, 128), (128, 128)]


def test_a_failure_by_name_is_raised(machine):
    machine.fails = RuntimeError("CuteDSL template failed")
    bm = mask()
    with pytest.raises(RuntimeError, match="CuteDSL"):
        gnaflex.flex_attention(*tensors(bm), block_mask=bm, backend="flash")
    with pytest.raises(RuntimeError, match="CuteDSL"):
        gnaflex.attention(*grids(SPEC), **fields(SPEC), backend="flash")
    assert machine.backends == ["flash"] * 2
    assert gnaflex.explain(*tensors(bm), bm).backend == "flash"


def test_a_lack_of_memory_is_raised(machine):
    machine.fails = torch.OutOfMemoryError("no memory")
    bm = mask()
    with pytest.raises(torch.OutOfMemoryError):
        gnaflex.flex_attention(*tensors(bm), block_mask=bm)
    with pytest.raises(torch.OutOfMemoryError):
        gnaflex.attention(*grids(SPEC), **fields(SPEC))
    assert machine.backends == ["flash"] * 2


def test_a_failure_of_another_backend_is_raised(hopper, monkeypatch):
    monkeypatch.setitem(dispatch.RUN, "flex", lambda call: 1 / 0)
    bm = mask()
    with pytest.raises(ZeroDivisionError):
        gnaflex.flex_attention(*tensors(bm), block_mask=bm)


def test_inside_a_compiled_function_auto_may_take_it(machine, monkeypatch):
    q, k, v = tensors(bm := mask())

    def may(bm, q=q):
        call = dispatch.Call(q, k, v, None, bm, bm.mask_mod.gnaflex, None, False, None, None)
        return operators.may_take_kernel(call)

    assert may(bm)
    assert may(mask(padding=torch.tensor([[8, 30]])))
    assert not may(mask(block_size=128))
    assert not may(mask(where=lambda b, h, q, k: q >= k))
    assert not may(bm, q.float())
    assert not may(bm, q.clone().requires_grad_())
    machine.rows = flash.HOPPER
    assert not may(mask(block_size=128))
    monkeypatch.setattr(operators, "kernel_may_run", lambda *constants: True)
    assert may(mask(block_size=128))
    assert not may(mask(padding=torch.tensor([[8, 30]])))  # which no kernel of ours knows


def test_inside_a_compiled_function_a_name_never_falls_back():
    bm = mask()
    given = tensors(bm)
    with pytest.raises(Exception, match="needs an NVIDIA GPU"):
        torch.compile(gnaflex.flex_attention, fullgraph=True)(*given, plain, bm, backend="flash")
    with pytest.raises(Exception, match="needs an NVIDIA GPU"):
        torch.compile(gnaflex.flex_attention, fullgraph=True)(*given, block_mask=bm, backend="flash")


def test_a_traced_call_asks_torch_for_it():
    q, k, v = (SimpleNamespace(device=DEVICE) for _ in range(3))
    call = dispatch.Call(q, k, v, plain, None, None, None, False, {"BLOCK_M": 1}, None)
    assert flash.options_of(call) == {"BLOCK_M": 1, "BACKEND": "FLASH"}


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
