"""Which calls go to a kernel, and every reason why the others do not; lanes; the gate."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import importlib.util
import json
import subprocess
import sys
import threading

import pytest
import torch
from gnaflex.cuda_backend import cache, compile, gate, machine, nearest, proof
from gnaflex.cuda_backend.config import BOXES_AT_ONCE
from gnaflex.cuda_backend.fast_path import Problem
from gnaflex.cuda_backend.tile_walk import chosen
from hopper import blackwell, hopper  # noqa: F401
from stand_in import StandIn
from torch.autograd import forward_ad
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask

import gnaflex
from gnaflex import dispatch
from gnaflex.spec import GNA, GNAError

opened = gate._opened  # the fixture replaces it
BLOCKED, SLIDING, THIN = GNA((16, 16), 8, 8), GNA((16, 16), 8), GNA((16, 16), 8, (2, 4))
flex_attention = gnaflex.flex_attention


def calls_of(hopper):  # noqa: F811
    return [call for kernel in hopper.values() for call in kernel.calls]


def mask(spec=BLOCKED, **options):
    return gnaflex.block_mask(spec, device="cpu", **options)


def tensors(bm=None, dtype=torch.bfloat16, dim=64, heads=2, batch=1):
    queries, keys = bm.seq_lengths if bm is not None else (256, 256)
    return [torch.randn(batch, heads, n, dim).to(dtype) for n in (queries, keys, keys)]


def changed(**changes):
    """A call that a kernel would run but for changed tensors."""
    given = dict(zip("qkv", tensors(), strict=True))
    return [changes.get(name, lambda x: x)(x) for name, x in given.items()], mask(), {}


def masked(bm, **options):
    return tensors(bm), bm, options


def reasons_of(bm):
    return gnaflex.explain(*tensors(bm), bm).reasons["cuda"]


def odd_address(x):
    """The same, 2 bytes behind a multiple of 16."""
    room = torch.zeros(x.numel() + 8, dtype=x.dtype)
    first = next(i for i in range(8) if room[i:].data_ptr() % 16 == 2)
    return room[first : first + x.numel()].view(x.shape).copy_(x)


Sub = type("Sub", (torch.Tensor,), {})
# fmt: off
OBSTACLES = {  # a call, and the reason; "auto" takes flex, but for gradients, which it does not have on a CPU
    "dtype": (lambda: (tensors(dtype=torch.float32), mask(), {}),
              "it computes in bfloat16 and float16: the query is float32"),
    "head_dim": (lambda: (tensors(dim=32), mask(), {}), "head_dim must be 64 or 128: got 32"),
    "value": (lambda: changed(v=lambda v: torch.cat([v, v], -1)),
              "query and value must share head_dim: got 64 and 128"),
    "channels": (lambda: changed(q=lambda q: q.mT.contiguous().mT),
                 "the channels of the query must be contiguous: write query.contiguous()"),
    "stride": (lambda: changed(k=lambda k: torch.nn.functional.pad(k, (0, 4))[..., :64]),
               "strides of the key must be multiples of 8, got (34816, 17408, 68, 1): write "
               "key.contiguous()"),
    "address": (lambda: changed(v=odd_address),
                "the value must start at a multiple of 16 bytes: write value.clone()"),
    "repeated": (lambda: changed(k=lambda k: k[:, :, :1].expand_as(k)),
                 "the key repeats one token, which TMA cannot read: write key.contiguous()"),
    "subclass": (lambda: changed(q=lambda q: q.as_subclass(Sub)),
                 "it reads plain tensors: the query is a Sub"),
    "score_mod": (lambda: masked(mask(), score_mod=lambda score, *_: score), "it knows no score_mod"),
    "where": (lambda: masked(mask(where=lambda b, h, q, k: q >= k)),
              "the mask has where=, which asks for a test per pair"),
    "padding": (lambda: masked(mask(padding=[[9, 8]])),
                "the mask has padding=, which asks for a test per pair"),
    "heads": (lambda: masked(mask([BLOCKED, GNA((16, 16), 16)])), "windows differ among heads"),
    "packed": (lambda: masked(gnaflex.packed_block_mask([BLOCKED, BLOCKED], device="cpu")[0]),
               "several grids are packed"),
    "tiles": (lambda: masked(mask(q_tile=(8, 8))),
              "the mask is tile-major; kernels read row-major tokens as they lie: leave out q_tile and "
              "kv_tile"),
    "shard": (lambda: masked(gnaflex.shard(BLOCKED, 0, 0, 2, device="cpu").block_mask),
              "the mask is a shard of a grid"),
    "none": (lambda: (tensors(), None, {}), "the mask was not made by gnaflex, or there is none"),
    "foreign": (lambda: masked(create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 256, 256, device="cpu")),
                "the mask was not made by gnaflex, or there is none"),
    "gradient": (lambda: changed(v=lambda v: v.requires_grad_()),
                 "it has no backward: forward and backward go to FlexAttention together"),
    "sliding": (lambda: masked(mask(SLIDING)),
                f"{SLIDING} needs masks inside tiles, whatever boxes of tokens the kernel takes"),
}
# fmt: on


@pytest.mark.parametrize("name", OBSTACLES)
def test_an_obstacle(hopper, monkeypatch, name):  # noqa: F811
    make, reason = OBSTACLES[name]
    given, bm, options = make()
    for backend in dispatch.RUN:
        monkeypatch.setitem(dispatch.RUN, backend, lambda call, backend=backend: backend)
    taken = flex_attention(*given, block_mask=bm, **options)
    assert taken == ("sdpa" if name == "gradient" else "flex")
    assert not hopper  # no kernel is made for it
    found = gnaflex.explain(*given, bm, **options)
    assert (found.reasons["cuda"], found.backend) == ([reason], taken)
    with pytest.raises(NotImplementedError, match="backend 'cuda' cannot run this call") as refused:
        flex_attention(*given, block_mask=bm, **options, backend="cuda")
    assert f"  cuda: {reason}\n" in str(refused.value)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"return_aux": AuxRequest(max_scores=True)}, "it does not return max_scores"),
        ({"kernel_options": {"BLOCK_M": 64}}, "kernel_options are FlexAttention's"),
        ({"score_mod": lambda score, *_: score}, "it knows no score_mod"),
    ],
)
def test_arguments(hopper, options, reason):  # noqa: F811
    given = tensors(bm := mask())
    flex_attention(*given, block_mask=bm)  # a lane waits
    with pytest.raises(NotImplementedError, match=f"  cuda: {reason}\n"):
        flex_attention(*given, block_mask=bm, **options, backend="cuda")
    assert len(calls_of(hopper)) == 1


@pytest.mark.usefixtures("hopper")
def test_all_obstacles_are_listed():
    q, k, v = tensors(dtype=torch.float32, dim=32)
    q, v = q.mT.contiguous().mT, torch.cat([v, v, v[..., :1]], -1)[..., :33].requires_grad_()
    given = {"block_mask": mask(SLIDING), "score_mod": lambda score, *_: score}
    reasons = gnaflex.explain(q, k, v, **given).reasons["cuda"]
    words = {"bfloat16", "share head_dim", "64 or 128", "channels of the query", "strides of the value"}
    for word in words | {"score_mod", "no backward", "masks inside tiles"}:
        assert sum(word in reason for reason in reasons) == 1
    assert len(reasons) == 8
    with pytest.raises(NotImplementedError) as refused:
        flex_attention(q, k, v, **given, backend="cuda")
    assert f"  cuda: {'; '.join(reasons)}\n" in str(refused.value)


def test_no_gradient_is_wanted_under_no_grad(hopper):  # noqa: F811
    given = tensors(bm := mask())
    given[0].requires_grad_()
    with torch.no_grad():
        assert gnaflex.explain(*given, bm).backend == "cuda"
        assert not flex_attention(*given, block_mask=bm).requires_grad
    assert gnaflex.explain(*given, bm).backend == "sdpa"
    assert len(calls_of(hopper)) == 1


def test_thin_boxes_run_by_name_only(hopper):  # noqa: F811
    given = tensors(bm := mask(THIN))
    found = gnaflex.explain(*given, bm)
    assert found.backend == "flex"
    start = '"auto" does not take it: boxes of (2, 4) queries fill 8 of 128 rows'
    assert [reason[: len(start)] for reason in found.reasons["cuda"]] == [start]
    out = flex_attention(*given, block_mask=bm, backend="cuda")
    assert torch.equal(out, flex_attention(*given, block_mask=bm, backend="reference"))
    assert len(calls_of(hopper)) == 1


@pytest.mark.usefixtures("hopper")
def test_masks_that_were_changed_are_refused():
    gone = "not made by gnaflex" if torch.__version__.startswith("2.9.") else "sliced"
    for bm, why in ((mask()._adjust(128, 128), "changed after it was made"), (mask()[:, :, :1], gone)):
        with pytest.raises((GNAError, NotImplementedError), match=why):
            flex_attention(*tensors(bm), block_mask=bm, backend="cuda")


# ---- lanes: calls like one before --------------------------------------------------------------------


def test_no_call_takes_what_was_worked_out_for_another(hopper):  # noqa: F811
    bm = mask()
    for change in ({}, {"batch": 2}, {"heads": 4}, {"dim": 128}, {"dtype": torch.float16}):
        q, k, v = tensors(bm, **change)
        other, padded = (
            q.transpose(1, 2).contiguous().transpose(1, 2),
            torch.cat([k, k], -1)[..., : k.shape[3]],
        )
        for given in ((q, k, v), (other, k, v), (q, padded, v), (q, k, padded), (q, k[:, :1], v[:, :1])):
            for options in ({"scale": scale} for scale in (None, 0.3, -0.2, 0)):
                options |= {"block_mask": bm, "enable_gqa": True}
                out = flex_attention(*given, **options)
                torch.testing.assert_close(out, flex_attention(*given, **options, backend="reference"))
    assert len(calls_of(hopper)) == 100


def test_a_lane_serves_no_call_that_a_kernel_does_not_run(hopper):  # noqa: F811
    q, k, v = tensors(bm := mask())
    flex_attention(q, k, v, block_mask=bm)
    for wrong in ((q.half(), k, v), (q, k[:, :1], v)):
        with pytest.raises(GNAError, match="must share"):
            flex_attention(*wrong, block_mask=bm)
    with pytest.raises(NotImplementedError, match="multiple of 16 bytes"):
        flex_attention(odd_address(q), k, v, block_mask=bm, backend="cuda")
    flex_attention(q, k, v, block_mask=bm, backend="sdpa")
    assert len(calls_of(hopper)) == 1
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            assert flex_attention(q, k, v, block_mask=bm).dtype == dtype
    assert len(calls_of(hopper)) == 3


def test_auto_does_not_depend_on_calls_before(hopper):  # noqa: F811
    given = tensors(bm := mask(THIN))
    flex_attention(*given, block_mask=bm, backend="cuda")
    flex_attention(*given, block_mask=bm)
    assert len(calls_of(hopper)) == 1


def test_a_mask_with_lanes_can_be_copied(hopper):  # noqa: F811
    given = tensors(bm := mask(suffix=9, text_valid=torch.tensor([9])))
    flex_attention(*given, block_mask=bm)
    for kernel in hopper.values():
        kernel.lock = threading.Lock()  # as Launcher has
    other = copy.deepcopy(bm)
    other.mask_mod.gnaflex.cuts.text_valid.fill_(2)
    out = flex_attention(*given, block_mask=other)
    torch.testing.assert_close(out, flex_attention(*given, block_mask=other, backend="reference"))


@pytest.mark.usefixtures("hopper")
def test_derivatives_of_other_kinds_go_elsewhere():
    q, k, v = tensors(bm := mask())
    with forward_ad.dual_level(), pytest.raises(NotImplementedError):
        flex_attention(forward_ad.make_dual(q, q), k, v, block_mask=bm, backend="cuda")
    found = torch.func.grad(lambda x: flex_attention(x, k, v, block_mask=bm).float().sum())(q)
    assert found.shape == q.shape


def obstacle(monkeypatch, capability=(9, 0), cuda="13.0", spec="found"):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    return machine.obstacle.__wrapped__(torch.device("cuda", 1))


def test_machines(monkeypatch):
    monkeypatch.delenv("GNAFLEX_KERNELS", raising=False)
    needs = "it needs a Hopper or Blackwell data-centre GPU (compute capability 9.0, 10.0, 10.3)"
    assert reasons_of(mask()) == [f"{needs}, the query is on cpu"]
    assert reasons_of(mask(SLIDING)) == [f"{needs}, the query is on cpu", OBSTACLES["sliding"][1]]
    for known, arch in (((9, 0), "sm_90a"), ((10, 0), "sm_100a"), ((10, 3), "sm_103a")):
        assert obstacle(monkeypatch, known) == ""
        assert machine.architecture.__wrapped__(torch.device("cuda", 1)) == arch
    assert obstacle(monkeypatch, cuda=None) == f"{needs}, the query is on cuda:1"  # ROCm
    for other in ((8, 9), (9, 1), (10, 1), (11, 0), (12, 0)):
        assert obstacle(monkeypatch, other) == f"{needs}: cuda:1 has {other[0]}.{other[1]}"
    assert obstacle(monkeypatch, spec=None) == "CuTe DSL is not installed: pip install 'gnaflex[cuda]'"


def test_importing_and_calling_load_no_kernel():
    code = """
import sys, torch, gnaflex
first, q = {*sys.modules}, torch.randn(1, 2, 64, 64, requires_grad=True)
bm = gnaflex.block_mask((8, 8), 4, 4, device="cpu")
gnaflex.flex_attention(q, q, q, block_mask=bm)
gnaflex.explain(q, q, q, bm)
kernels = "cutlass", "gnaflex.cuda_backend.sm90_attend", "gnaflex.cuda_backend.sm90_loads"
print([[x for x in kernels if x in loaded] for loaded in (first, sys.modules)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[], []]"


VIDEO = (18, 24, 24)


def explained(spec):
    """What is said of a mask, for tensors that cost little memory."""
    x = torch.empty(1, 1, spec.num_tokens, 64, dtype=torch.bfloat16)
    return gnaflex.explain(x, x, x, mask(spec))


@pytest.mark.parametrize("machine_like", ["hopper", "blackwell"])
@pytest.mark.parametrize(
    "spec",
    [
        *(GNA((frames, 45, 80), VIDEO, (16, 8, 8)) for frames in (33, 21)),
        GNA((30, 48, 80), VIDEO, (16, 8, 8)),  # HunyuanVideo
        GNA((256, 256), 80, 16),  # FLUX
        *(GNA((16, 44, 80), (frames, 24, 16), (1, 8, 16)) for frames in (16, 8)),  # Cosmos
        GNA((16, 44, 80), (8, 24, 16), (1, 8, 16), is_causal=(True, False, False)),
        GNA((30, 48, 80), VIDEO, (18, 8, 16), is_causal=(True, False, False)),
    ],
    ids=str,
)
def test_problems_that_must_qualify(machine_like, spec, request):
    request.getfixturevalue(machine_like)
    assert explained(spec).backend == "cuda"
    boxes = chosen(spec, BOXES_AT_ONCE[machine.architecture(torch.device("cpu"))])
    for extent, axis in zip(boxes.q_tile, spec.axes, strict=True):
        assert extent == 1 or not (axis.is_causal or axis.stride == 1 < axis.window < axis.length)


@pytest.mark.usefixtures("hopper")
def test_thin_boxes_are_worth_it_where_flexattention_is_slower(monkeypatch):
    spec = GNA((30, 48, 80), VIDEO, (2, 4, 2))
    x, bm = torch.empty(1, 1, spec.num_tokens, 64, dtype=torch.bfloat16), mask(spec)
    assert chosen(spec) == chosen(spec, 2)
    for arch, backend in (("sm_90a", "flex"), ("sm_100a", "cuda"), ("sm_103a", "cuda"), ("sm_90a", "flex")):
        monkeypatch.setattr(machine, "architecture", lambda device, arch=arch: arch)
        assert gnaflex.explain(x, x, x, bm).backend == backend


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("fields", [((30, 48, 80), VIDEO), ((21, 45, 80), VIDEO), ((64, 64), 24, (5, 9))])
def test_the_nearest_problem(fields):
    near = nearest(spec := GNA(*fields))
    assert (near.shape, near.window) == (spec.shape, spec.window)
    assert explained(near).backend == "cuda"
    found = explained(spec)
    assert found.backend == "flex"
    assert any(repr(near) in note for note in found.notes)


def test_what_is_nearest_to_itself_and_to_nothing():
    assert nearest(one := GNA((33, 45, 80), VIDEO, (16, 8, 8))) == one
    assert nearest(GNA((64, 64), 3)) is None


LINKED = """
char gnaflex_attend_function_name[] = "attend";
int devices;
void _mlir_gnaflex_attend_cuda_init(void **a) { *(int *)a[1] = 0; }
void _mlir_gnaflex_attend_cuda_load_to_device(void **a) { devices |= 1 << *(int *)a[1]; *(int *)a[2] = 0; }
void attend(void **a) {}
"""


@pytest.mark.parametrize("arch, devices", [("sm_90a", 0b100), ("sm_100a", 0b10010), ("sm_103a", 0b1000)])
def test_a_linked_kernel_is_loaded_where_it_can_run(arch, devices, monkeypatch, tmp_path):
    source, library = tmp_path / "kernel.c", tmp_path / f"{arch}.so"
    source.write_text(LINKED)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    found = ((8, 0), (10, 0), (9, 0), (10, 3), (10, 0), (12, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: found[number])
    assert compile.from_shared(library, 2, arch)
    assert ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "devices").value == devices


def test_a_linked_kernel_is_taken_first(monkeypatch, tmp_path):
    monkeypatch.setenv("GNAFLEX_KERNELS", str(tmp_path))
    monkeypatch.setattr(gate, "from_shared", lambda *given: given)
    config = Problem(BLOCKED).config("sm_100a", torch.float16, 64)
    (tmp_path / gate.linked_name(config)).touch()
    assert gate.load(config) == (tmp_path / gate.linked_name(config), 2, "sm_100a")


# ---- the gate ----------------------------------------------------------------------------------------


class Gate:
    """The real gate, without a compiler, a disk or a child process; ``log`` is who was asked what."""

    def __init__(self, patch):
        self.log, self.known, self.said = [], None, proof.Verdict("proved", "")
        patch.delenv("GNAFLEX_KERNELS", raising=False)
        patch.setattr(gate, "_opened", opened)
        patch.setattr(machine, "name", lambda device: "NVIDIA H200 (sm_90)")
        patch.setattr(machine, "driver", lambda: "580.159.04")
        patch.setattr(proof, "recorded", lambda subject: self.known)
        patch.setattr(proof, "now_is_no_time", lambda: "")
        patch.setattr(proof, "verdict", lambda *given: self.log.append(("verdict", *given)) or self.said)
        patch.setattr(cache, "get", lambda *given: self.log.append(("get", *given)) or b"code")
        patch.setattr(gate, "from_object", self.load)

    def load(self, code, rank):
        assert code == b"code"
        self.log.append(("load", rank))
        return StandIn(next(entry[1] for entry in self.log if entry[0] == "get"))

    def asked(self):
        return [entry[0] for entry in self.log]


@pytest.fixture
def real_gate(hopper, monkeypatch):  # noqa: F811
    return Gate(monkeypatch)


def test_a_kernel_is_compiled_then_proved_then_loaded_once(real_gate, hopper):  # noqa: F811
    given = tensors(bm := mask())
    out = flex_attention(*given, block_mask=bm)
    assert torch.equal(out, flex_attention(*given, block_mask=bm, backend="reference"))
    asked = real_gate.asked()
    assert (asked[0], asked[-1], asked.count("load")) == ("get", "load", 1)
    assert asked.index("verdict") < asked.index("load")
    assert reasons_of(bm) == reasons_of(mask()) == []
    assert real_gate.asked() == asked
    ((config, device),) = hopper
    assert (config.q_box, config.rank, device.type) == (chosen(BLOCKED).q_tile, 2, "cpu")
    subject, command = next(entry[1:] for entry in real_gate.log if entry[0] == "verdict")
    assert (*subject[:2], subject.variant) == ("NVIDIA H200 (sm_90)", "580.159.04", cache.key(config))
    assert json.loads(command[-2]) == json.loads(json.dumps(dataclasses.asdict(config)))
    assert command == [sys.executable, "-m", "gnaflex.trial", command[-2], "0"]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("outcome", ["failed", "inconclusive", "pending"])
def test_a_kernel_that_has_not_proved_itself(real_gate, outcome, known):
    proved, answer = real_gate.said, proof.Verdict(outcome, "dilation: error 1")
    real_gate.known, real_gate.said = (answer if known else None), answer
    given = tensors(bm := mask())
    assert reasons_of(bm) == ["its kernel has not proved itself on this machine: dilation: error 1"]
    assert real_gate.asked() == ([] if known else ["get", "verdict"])
    with pytest.raises(NotImplementedError, match="not proved itself"):
        flex_attention(*given, block_mask=bm, backend="cuda")
    real_gate.known, real_gate.said = None, proved  # the gate itself remembers none
    assert reasons_of(bm) == []


@pytest.mark.parametrize("known", [None, proof.Verdict("proved", "")])
def test_nothing_is_compiled_while_there_is_no_time(real_gate, monkeypatch, known):
    real_gate.known = known
    monkeypatch.setattr(proof, "now_is_no_time", lambda: "a CUDA graph is being captured")
    (reason,) = reasons_of(bm := mask())
    assert reason == "its kernel is not ready, and cannot be made ready now: a CUDA graph is being captured"
    assert real_gate.asked() == []
    real_gate.known = proof.Verdict("failed", "why")
    assert reasons_of(bm) == ["its kernel has not proved itself on this machine: why"]


@pytest.mark.parametrize("arch", ["hopper", "blackwell"])
def test_explain_says_what_is_known_of_the_kernels(arch, request):
    request.getfixturevalue(arch)
    name = {"hopper": "sm_90a", "blackwell": "sm_100a"}[arch]
    state = (
        f"kernels for {name}: compiled and checked statically, not run on a GPU by its authors; each proves"
    )
    assert any(note.startswith(state) for note in explained(GNA((6, 12, 20), (4, 8, 8), (2, 8, 8))).notes)
