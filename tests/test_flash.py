"""FlexAttention's FLASH backend: which calls go to it, and why not the others."""

from __future__ import annotations

import importlib.util
import logging
import re
from types import SimpleNamespace

import pytest
import torch
from flash_machine import (  # noqa: F401 (fixtures)
    DEVICE,
    INSTALL,
    SPEC,
    TILED,
    assert_within_budget,
    blackwell_gpu,
    fields,
    grids,
    hopper_gpu,
    mask,
    tensors,
)
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask

import gnaflex
from gnaflex import dispatch, door, flash, operators
from gnaflex.spec import GNA

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
