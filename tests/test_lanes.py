"""Lanes serve only what the long way would do the same; a kernel that cannot be made ready harms no call."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from gnaflex.cuda_backend import cache, fast_path, gate, machine, proof
from hopper import hopper  # noqa: F401
from stand_in import StandIn
from torch._subclasses import FakeTensorMode
from torch.nn.attention.flex_attention import AuxRequest

import gnaflex
from gnaflex import lanes, operators
from gnaflex.dispatch import Call
from gnaflex.origin import record_of
from gnaflex.spec import GNAError

opened = gate._opened  # the fixture replaces it
flex_attention = gnaflex.flex_attention


def launches(hopper):  # noqa: F811
    return sum(len(kernel.calls) for kernel in hopper.values())


def mask(**options):
    return gnaflex.block_mask((16, 16), 8, 8, device="cpu", **options)


def tensors(tokens=256, dtype=torch.bfloat16):
    return [torch.randn(1, 2, tokens, 64, dtype=dtype) for _ in range(3)]


def kept(owner):
    return len(lanes._of_owner.get(owner, {}))


def test_a_lane_gives_what_the_long_way_gives(hopper):  # noqa: F811
    given, bm = tensors(), mask()
    first = flex_attention(*given, block_mask=bm, return_lse=True)
    assert kept(bm) == 1
    again = flex_attention(*given, block_mask=bm, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(flex_attention(*given, block_mask=bm), first[0])
    assert launches(hopper) == 3
    grids = [x.unflatten(2, (16, 16)).movedim(1, 3).contiguous() for x in given]
    one, two = (gnaflex.attention(*grids, 8, 8, return_lse=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(one[0].flatten(1, 2).transpose(1, 2), first[0])
    assert torch.equal(one[1].flatten(1, 2).transpose(1, 2), first[1])


@pytest.mark.usefixtures("hopper")
def test_wrong_arguments_are_said_to_be_wrong_though_there_are_lanes():
    given, bm = tensors(), mask()
    flex_attention(*given, block_mask=bm)
    for wrong in ((1, 2), "mask"):
        with pytest.raises(GNAError, match="a BlockMask is needed"):
            flex_attention(*given, block_mask=wrong)
    with pytest.raises(GNAError, match="attention takes tensors: got list"):
        flex_attention([1], *given[1:], block_mask=bm)
    with pytest.raises(GNAError, match="unknown backend 'cudnn'"):
        flex_attention(*given, block_mask=bm, backend="cudnn")
    grid = torch.randn(1, 16, 16, 2, 64, dtype=torch.bfloat16)
    gnaflex.attention(grid, grid, grid, 8, 8)
    with pytest.raises(GNAError, match="stride must not exceed window"):
        gnaflex.attention(grid, grid, grid, 8, 9)


def test_what_a_lane_cannot_tell_goes_the_long_way(hopper):  # noqa: F811
    given, bm = tensors(), mask()
    flex_attention(*given, block_mask=bm)
    scale = torch.tensor(0.1)
    one = flex_attention(*given, block_mask=bm, scale=scale)
    scale.fill_(0.4)
    assert not torch.equal(flex_attention(*given, block_mask=bm, scale=scale), one)
    with torch.autocast("cpu", dtype=torch.float16):
        assert flex_attention(*given, block_mask=bm).dtype == torch.float16
    before = launches(hopper)
    loss = flex_attention(given[0].requires_grad_(), *given[1:], block_mask=bm).float().sum()
    loss.backward()
    assert launches(hopper) == before
    assert given[0].grad.abs().max() > 0
    with torch.no_grad():
        flex_attention(*given, block_mask=bm)
    assert launches(hopper) == before + 1


@pytest.mark.usefixtures("hopper")
def test_windows_in_lists_have_no_lane_and_work():
    grid = torch.randn(1, 16, 16, 2, 64, dtype=torch.bfloat16)
    want = gnaflex.attention(grid, grid, grid, 8, 8)
    for _ in range(2):
        assert torch.equal(gnaflex.attention(grid, grid, grid, [8, 8], [8, 8]), want)


def test_lanes_are_few_and_the_oldest_goes(hopper, monkeypatch):  # noqa: F811
    monkeypatch.setattr(lanes, "MOST_LANES", 2)
    given, bm = tensors(), mask()
    for scale in (0.1, 0.2, 0.3, 0.1):
        flex_attention(*given, block_mask=bm, scale=scale)
        assert kept(bm) <= 2
    assert launches(hopper) == 4


@pytest.mark.usefixtures("hopper")
def test_lanes_keep_neither_masks_nor_tensors_alive():
    given, bm = tensors(), mask()
    flex_attention(*given, block_mask=bm)
    seen = weakref.ref(bm), weakref.ref(given[0])
    del given, bm
    gc.collect()
    assert [one() for one in seen] == [None, None]


# ---- a kernel that cannot be made ready ----------------------------------------------------------------


@pytest.fixture
def real_gate(hopper, monkeypatch):  # noqa: F811
    """The gate itself, with a compiler that is asked, and no child process."""
    asked = []
    monkeypatch.delenv("GNAFLEX_KERNELS", raising=False)
    monkeypatch.setattr(gate, "_opened", opened)
    monkeypatch.setattr(gate, "_broken", {})
    monkeypatch.setattr(machine, "name", lambda device: "NVIDIA H200 (sm_90)")
    monkeypatch.setattr(machine, "driver", lambda: "580.159.04")
    monkeypatch.setattr(proof, "recorded", lambda subject: proof.Verdict("failed", "clipped tiles: error 1"))
    monkeypatch.setattr(cache, "get", lambda config, build: asked.append(config) or b"code")
    monkeypatch.setattr(gate, "from_object", lambda code, rank: StandIn(asked[-1]))
    return asked


def test_trust_overrides_a_failure_on_record(real_gate, monkeypatch):
    monkeypatch.setenv("GNAFLEX_PROOF", "trust")
    bm = mask()
    assert gnaflex.explain(*tensors(), bm).backend == "cuda"
    assert real_gate


@pytest.mark.parametrize("switch, reason", [("never", "GNAFLEX_PROOF=never"), ("run", "clipped tiles")])
@pytest.mark.filterwarnings("ignore:GPU kernel:RuntimeWarning")
def test_nothing_is_compiled_for_a_kernel_that_may_not_run(real_gate, monkeypatch, switch, reason):
    monkeypatch.setenv("GNAFLEX_PROOF", switch)
    (why,) = gnaflex.explain(*tensors(), mask()).reasons["cuda"]
    assert reason in why
    assert not real_gate


def test_a_compiler_that_fails_is_asked_once_and_another_backend_serves(real_gate, monkeypatch, caplog):
    def fail(config, build):
        real_gate.append(config)
        raise RuntimeError("ptxas died\nmore")

    monkeypatch.setenv("GNAFLEX_PROOF", "trust")
    monkeypatch.setattr(cache, "get", fail)
    given, bm = tensors(), mask()
    want = flex_attention(*given, block_mask=bm, backend="reference")
    for _ in range(2):
        torch.testing.assert_close(flex_attention(*given, block_mask=bm), want, atol=0.02, rtol=0.02)
    assert len(real_gate) == 1
    assert "could not be made ready: ptxas died" in caplog.text
    with pytest.raises(NotImplementedError, match="could not be made ready: ptxas died"):
        flex_attention(*given, block_mask=bm, backend="cuda")


# ---- what lanes and kernels must leave to others -------------------------------------------------------


@pytest.mark.parametrize("scale", [-0.3, 0, 0.3])
def test_a_query_whose_heads_are_one(hopper, scale):  # noqa: F811
    """Its negative is laid out anew, and not as that of the same tensor seen as [batch, heads, tokens]."""
    grid, key = torch.randn(2, 1, 16, 16, 1, 64, dtype=torch.bfloat16).unbind(0)
    given = [x.expand(1, 16, 16, 2, 64) for x in (grid, key, key)]
    want = gnaflex.attention(*given, 8, 8, scale=scale, backend="reference")
    for _ in range(3):
        got = gnaflex.attention(*given, 8, 8, scale=scale)
        torch.testing.assert_close(got, want, atol=0.02, rtol=0.02)
    assert launches(hopper) == 3


@pytest.mark.usefixtures("hopper")
def test_windows_that_are_remembered_by_value_alone():
    grid = torch.randn(1, 16, 16, 2, 64, dtype=torch.bfloat16)
    gnaflex.attention(grid, grid, grid, 8, 8)
    with pytest.raises(GNAError, match="window must be an integer"):
        gnaflex.attention(grid, grid, grid, 8.0, 8)
    window = torch.tensor(8)
    first = gnaflex.attention(grid, grid, grid, window, 4)
    assert torch.equal(gnaflex.attention(grid, grid, grid, window, 4), first)
    window.fill_(16)
    assert not torch.equal(gnaflex.attention(grid, grid, grid, window, 4), first)


@pytest.mark.usefixtures("hopper")
def test_fewer_key_heads_ask_for_enable_gqa():
    q, k, v = torch.randn(1, 2, 256, 64).bfloat16(), *(torch.randn(1, 1, 256, 64).bfloat16() for _ in "kv")
    with pytest.raises(NotImplementedError, match="query and key have 2 and 1 heads: write enable_gqa=True"):
        flex_attention(q, k, v, block_mask=mask(), backend="cuda")


def test_tracers_see_no_kernel(hopper):  # noqa: F811
    given, bm = tensors(), mask()
    flex_attention(*given, block_mask=bm)
    before = launches(hopper)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert gnaflex.lanes.ready(bm, tuple(given), None, False) is None
        with pytest.raises(NotImplementedError, match="tracers look inside"):
            flex_attention(*given, block_mask=bm, backend="cuda")
    assert launches(hopper) == before


def test_the_cheap_reason_comes_before_a_compiler(real_gate, monkeypatch):
    """Thin boxes: "auto" does not take them, so nothing is compiled or proved to find that out."""
    monkeypatch.setenv("GNAFLEX_PROOF", "trust")
    thin = gnaflex.block_mask((16, 16), 8, (2, 4), device="cpu")
    flex_attention(*tensors(), block_mask=thin)
    assert not real_gate


def test_work_lists_are_not_made_while_a_graph_is_captured(hopper, monkeypatch):  # noqa: F811
    monkeypatch.setattr(fast_path, "_prepared", {})
    monkeypatch.setattr(machine, "is_capturing", lambda: True)
    given, bm = tensors(), mask()
    with pytest.raises(NotImplementedError, match="a CUDA graph is being captured: call it once before"):
        flex_attention(*given, block_mask=bm, backend="cuda")
    monkeypatch.setattr(machine, "is_capturing", lambda: False)
    flex_attention(*given, block_mask=bm, backend="cuda")
    monkeypatch.setattr(machine, "is_capturing", lambda: True)
    assert torch.isfinite(flex_attention(*given, block_mask=mask(), backend="cuda")).all()
    assert launches(hopper) == 2


def test_what_is_asked_while_compiling_for_a_gpu(hopper):  # noqa: F811
    """On a GPU a compiled function asks before it traces FlexAttention into its graph."""
    (q, k, v), bm = tensors(), mask()

    def asked(q, k, v, bm, **changes):
        call = Call(q, k, v, None, bm, record_of(bm), None, False, None, None)._replace(**changes)
        return operators.may_take_kernel(call)

    compiled = torch.compile(lambda q, k, v, bm: q + asked(q, k, v, bm), fullgraph=True)
    assert torch.equal(compiled(q, k, v, bm), q + 1)
    assert asked(q, k, v, bm)
    assert not asked(q.clone().requires_grad_(), k, v, bm)
    assert not asked(q, k, v, bm, aux=AuxRequest(max_scores=True))
    assert not asked(q.float(), k.float(), v.float(), bm)
    assert not asked(q, k, v, mask(padding=torch.tensor([[9, 9]])))
    assert not asked(q, k, v, gnaflex.block_mask((16, 16), 8, 1, device="cpu"))
    assert not asked(q, k, v, gnaflex.block_mask((16, 16), 8, (2, 4), device="cpu"))
    assert not hopper  # nothing was compiled or proved to know
