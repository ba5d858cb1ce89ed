"""NeighborhoodAttention against the same weights in a direct computation, and against NATTEN's modules."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import math
import pickle
import re

import pytest
import torch
from torch.nn.functional import layer_norm, linear
from torch.utils._python_dispatch import TorchDispatchMode

import gnaflex
from gnaflex import GNAError, nn
from gnaflex.nn import NeighborhoodAttention
from gnaflex.reference import reference_attention

SHAPES = {1: (13,), 2: (7, 9), 3: (4, 5, 6)}
PROBLEMS = {
    "1-D": (1, (5,)),
    "1-D strided, causal": (1, 6, 3, 2, True),
    "2-D": (2, (3, 4)),
    "2-D strided": (2, (4, 5), (2, 3)),
    "2-D dilated, causal": (2, 3, 1, (2, 3), (False, True)),
    "2-D whole axis": (2, (-1, 2), 1, (1, 2)),
    "2-D widest": (2, (3, 2), 1, (1, "max")),
    "3-D": (3, 3),
    "3-D all": (3, (2, 3, 2), (1, 2, 1), (2, 1, 3), (True, False, False)),
}
EXACT = torch.float64


def made(problem, embed_dim=24, num_heads=4, dtype=EXACT, **options):
    """A module for a problem, its parameters away from zeros and ones, and an input."""
    rank, *args = PROBLEMS[problem]
    torch.manual_seed(0)
    module = NeighborhoodAttention(embed_dim, num_heads, *args, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module, torch.randn(2, *SHAPES[rank], embed_dim, dtype=dtype)


def directly(module, x, compute_dtype=EXACT, score_mod=None):
    """The module's attention done plainly, every step in ``compute_dtype``."""
    to = {name: p.to(compute_dtype) for name, p in module.named_parameters()}
    heads, kv_heads = module.num_heads, module.num_kv_heads
    qkv = linear(x.to(compute_dtype), to["qkv.weight"], to.get("qkv.bias"))
    d = module.embed_dim // heads
    q, k, v = (
        part.reshape(*x.shape[:-1], -1, d)
        for part in torch.tensor_split(qkv, (heads * d, (heads + kv_heads) * d), dim=-1)
    )
    q, k = (normed(module.qk_norm, one, to, name) for one, name in ((q, "q_norm"), (k, "k_norm")))
    problem = module.window, module.stride, module.dilation, module.is_causal
    out = reference_attention(
        q, k, v, *problem, scale=module.scale, score_mod=score_mod, compute_dtype=compute_dtype
    )
    return linear(out.flatten(-2), to["proj.weight"], to.get("proj.bias"))


def normed(kind, x, parameters, name):
    if kind is None:
        return x
    weight = parameters[f"{name}.weight"]
    if kind == "rms_norm":
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    return layer_norm(x, x.shape[-1:], weight, parameters[f"{name}.bias"], 1e-6)


def biased(module, shape):
    """The table looked up pair by pair, from coordinates; pairs outside any window read anything."""
    rank, table = len(shape), module.rpb
    steps = gnaflex.GNA(shape, module.window, module.stride, module.dilation).dilation
    middle = [extent // 2 for extent in table.shape[1:]]
    tokens = list(itertools.product(*map(range, shape)))
    index = torch.zeros(rank, len(tokens), len(tokens), dtype=torch.long)
    for (i, query), (j, key) in itertools.product(enumerate(tokens), repeat=2):
        for axis, (a, b, step) in enumerate(zip(query, key, steps, strict=True)):
            at = b // step - a // step + middle[axis]
            index[axis, i, j] = min(max(at, 0), 2 * middle[axis])
    dense = table.double()[(slice(None), *index)]
    return lambda score, b, h, q, k: score + dense[h, q, k]


def gradients(module, out, x):
    grad = torch.randn(out.shape, dtype=EXACT, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    names, leaves = zip(*module.named_parameters(), strict=True)
    return dict(zip(("x", *names), torch.autograd.grad(out, (x, *leaves), grad), strict=True))


def assert_same(ours, theirs):
    """Values and gradients of two ways to compute the same in float64."""
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


OPTIONS = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "one key head": {"num_kv_heads": 1, "qkv_bias": False},
    "rms_norm": {"qk_norm": "rms_norm", "proj_bias": False},
    "layer_norm, grouped": {"qk_norm": "layer_norm", "num_kv_heads": 2},
    "scale": {"scale": 0.21},
    "scale of 0": {"scale": 0.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_values_and_gradients(problem, options):
    module, x = made(problem, **options)
    assert module.scale == options.get("scale")
    x.requires_grad_()
    out, want = module(x), directly(module, x)
    assert out.shape == x.shape
    assert_same(out, want)
    assert_same(gradients(module, out, x), gradients(module, want, x))


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "qk_norm": "rms_norm"}], ids=["plain", "all"])
@pytest.mark.parametrize("problem", ["1-D", "2-D", "2-D strided", "2-D widest", "3-D all"])
def test_relative_bias(problem, options):
    module, x = made(problem, relative_bias=True, **options)
    x.requires_grad_()
    out = module(x)
    want = directly(module, x, score_mod=biased(module, x.shape[1:-1]))
    assert_same(out, want)
    assert (out - directly(module, x)).abs().max() > 1e-3
    assert_same(gradients(module, out, x), gradients(module, want, x))


def test_parameters():
    def shapes(**options):
        return {name: tuple(p.shape) for name, p in made("2-D", **options)[0].named_parameters()}

    linear = {"qkv.weight": (72, 24), "qkv.bias": (72,), "proj.weight": (24, 24), "proj.bias": (24,)}
    assert shapes() == linear
    grouped = {"qkv.weight": (36, 24), "proj.weight": (24, 24)}
    assert shapes(num_kv_heads=1, qkv_bias=False, proj_bias=False) == grouped
    assert shapes(qk_norm="rms_norm") == linear | {"q_norm.weight": (6,), "k_norm.weight": (6,)}
    both = {f"{name}_norm.{part}": (6,) for name in "qk" for part in ("weight", "bias")}
    assert shapes(qk_norm="layer_norm", relative_bias=True) == linear | both | {"rpb": (4, 5, 7)}


def test_new_modules():
    """The table is small but not zero; the rest is as torch makes a Linear."""
    torch.manual_seed(0)
    module = NeighborhoodAttention(32, 8, (9, 9), relative_bias=True)
    assert module.rpb.shape == (8, 17, 17)
    assert 0.015 < module.rpb.std() < 0.025
    torch.manual_seed(0)
    assert torch.equal(torch.nn.Linear(32, 96).weight, module.qkv.weight)
    before = module.rpb.clone()
    module.reset_parameters()
    assert not torch.equal(before, module.rpb)


def test_the_window_of_one_number_takes_the_rank_of_the_others():
    module = NeighborhoodAttention(8, 2, 3, is_causal=(True, False), relative_bias=True)
    assert module.rpb.shape == (2, 5, 5)


def test_one_module_takes_grids_of_every_rank():
    module = NeighborhoodAttention(8, 2, window=3, dtype=EXACT)
    for shape in ((5,), (4, 5), (3, 4, 3), (3, 3, 3, 4)):
        x = torch.randn(1, *shape, 8, dtype=EXACT)
        assert_same(module(x), directly(module, x))


def test_grouped_heads_are_repeated_heads():
    """Key head g serves query heads 2g and 2g + 1; the layout with as many key heads is NATTEN's."""
    few, x = made("2-D strided", num_kv_heads=2)
    many, _ = made("2-D strided")
    q, k, v = few.qkv.weight.split((24, 12, 12))
    b, c, d = few.qkv.bias.split((24, 12, 12))
    repeated = [part.unflatten(0, (2, 6)).repeat_interleave(2, 0).flatten(0, 1) for part in (k, v, c, d)]
    state = few.state_dict()
    state |= {"qkv.weight": torch.cat([q, *repeated[:2]]), "qkv.bias": torch.cat([b, *repeated[2:]])}
    many.load_state_dict(state)
    assert_same(few(x), many(x))


# ---- NATTEN, the peer --------------------------------------------------------------------------------

NATTEN_PROBLEMS = [name for name in PROBLEMS if "whole" not in name and "widest" not in name]


@pytest.fixture(scope="module")
def natten():
    return pytest.importorskip("natten", reason="natten is not installed")


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:return_lse")
@pytest.mark.parametrize("options", [{}, {"qkv_bias": False, "scale": 0.3}], ids=["defaults", "no bias"])
@pytest.mark.parametrize("problem", NATTEN_PROBLEMS)
def test_weights_travel_to_natten_and_back(natten, monkeypatch, problem, options):
    """The budget is twice the error of the plain computation in float32; a projection sums in any order."""
    flex_attention = torch.nn.attention.flex_attention
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    shared = {"dtype": torch.float32, "embed_dim": 32, "backend": "sdpa", **options}
    ours, x = made(problem, **shared)
    rank, window, *rest = PROBLEMS[problem]
    kind = (natten.NeighborhoodAttention1D, natten.NeighborhoodAttention2D, natten.NeighborhoodAttention3D)
    named = {"qk_scale" if name == "scale" else name: value for name, value in options.items()}
    theirs = kind[rank - 1](32, 4, window, *rest, **named)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    back, _ = made(problem, **shared)
    torch.nn.init.zeros_(back.qkv.weight)
    back.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        exact, plain = directly(ours, x), directly(ours, x, torch.float32)
        budget = 2 * (plain - exact).abs().max() + 2 * torch.finfo(torch.float32).eps * exact.abs().max()
        for module in (theirs, ours, back):
            assert (module(x) - exact).abs().max() <= budget


# ---- dtypes, devices, compilers, copies --------------------------------------------------------------

ALL = {"num_kv_heads": 2, "qk_norm": "rms_norm", "relative_bias": True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all"])
def test_narrow_dtypes(dtype, options):
    module, x = made("2-D", dtype=dtype, **options)
    mod = biased(module, x.shape[1:-1]) if options else None
    out, exact, plain = module(x), directly(module, x, score_mod=mod), directly(module, x, dtype, mod)
    assert out.dtype == dtype
    budget = 2 * (plain - exact).abs().max() + 2 * torch.finfo(dtype).eps * exact.abs().max()
    assert (out - exact).abs().max() <= budget


@pytest.mark.parametrize("options", [{}, ALL, {"qk_norm": "layer_norm"}], ids=["plain", "all", "layer_norm"])
@pytest.mark.filterwarnings("error:Mismatch dtype")
def test_autocast(options):
    """As exact as the plain computation in bfloat16; gradients come in the dtype of the parameters."""
    module, x = made("2-D", dtype=torch.float32, **options)
    mod = biased(module, x.shape[1:-1]) if "relative_bias" in options else None
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    exact, plain = directly(module, x, score_mod=mod), directly(module, x, torch.bfloat16, mod)
    budget = 2 * (plain - exact).abs().max() + 2 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (out - exact).abs().max() <= budget
    out.sum().backward()
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}


def test_norms_kept_wide_in_a_narrow_module():
    """Norms in float32 beside bfloat16, as many models are loaded."""
    module, x = made("2-D", dtype=torch.bfloat16, qk_norm="layer_norm")
    want = module(x)
    for norm in (module.q_norm, module.k_norm):
        norm.float()
    assert module(x).dtype == torch.bfloat16
    torch.testing.assert_close(module(x), want, rtol=0.02, atol=0.02)


def test_any_memory_format():
    """channels_last moves a table of four dimensions as if it were an image."""
    module, x = made("3-D all", relative_bias=True)
    want = module(x)
    module.to(memory_format=torch.channels_last)
    assert not module.rpb.is_contiguous()
    assert_same(module(x), want)


def test_empty_batches():
    for options in ({}, ALL):
        module, x = made("2-D", **options)
        out = module(x[:0])
        assert out.shape == x[:0].shape
        out.sum().backward()
        assert not module.qkv.weight.grad.any()


SDPA = {"backend": "sdpa"}  # compiles nothing of its own
COMPILED = {
    "plain": ("2-D strided", SDPA, False),
    "plain, autocast": ("2-D strided", SDPA, True),
    "all": ("3-D all", ALL | SDPA, False),
    "all, autocast": ("3-D all", ALL | SDPA, True),
    "max, scale": ("2-D widest", {"relative_bias": True, "scale": 0.9} | SDPA, False),
    "auto": ("2-D", ALL, False),
}


@pytest.mark.parametrize("problem, options, autocast", COMPILED.values(), ids=COMPILED)
def test_inside_a_users_compiled_function(problem, options, autocast):
    """One graph, forward and backward, with what an eager call gives."""
    module, x = made(problem, dtype=torch.float32, **options)
    x.requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    near = {"rtol": 0.02, "atol": 0.02} if autocast else {"rtol": 1e-4, "atol": 1e-5}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, want = compiled(x), module(x)
        assert out.dtype == want.dtype == (torch.bfloat16 if autocast else torch.float32)
        torch.testing.assert_close(out, want, **near)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), want, **near)
    if not autocast:
        got, right = gradients(module, out, x), gradients(module, want, x)
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


class Mode(TorchDispatchMode):
    """Changes nothing, but that operators run below it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_the_operator_is_sound():
    """torch's own checks: schema, fake tensors, autograd registration, tracing; and under dispatch modes."""
    q, k, v = (torch.randn(2, 4, 5, h, 4, dtype=EXACT, requires_grad=True) for h in (4, 2, 2))
    for problem, extent in (((3, 1, 1, False), 5), (((2, 2), (1, 2), (1, "max"), (True, False)), 3)):
        table = torch.randn(4, extent, extent, dtype=EXACT, requires_grad=True)
        args = (q, k, v, table, repr(problem), 0.4, "auto")
        torch.library.opcheck(nn.attend_biased, args)
        found = []
        for mode in (contextlib.nullcontext(), Mode()):
            with mode:
                out = nn.attend_biased(*args)
                found.append((out, *torch.autograd.grad(out.square().sum(), args[:4])))
        assert_same(*found)


def test_dropout_is_for_training():
    module, x = made("2-D", proj_drop=0.5)
    want = directly(module, x)
    torch.manual_seed(0)
    out = module(x)
    kept = out != 0
    assert 0.4 < kept.double().mean() < 0.6
    assert_same(out[kept], 2 * want[kept])
    assert_same(module.eval()(x), want)


@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all"])
def test_copies_and_files(options):
    module, x = made("3-D all", **options)
    want, file = module(x), io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False),
    ):  # fmt: skip
        assert torch.equal(copied(x), want)
        assert repr(copied) == repr(module)
    assert torch.equal(copied.qkv.weight, module.qkv.weight)
    assert copied.qkv.weight.data_ptr() != module.qkv.weight.data_ptr()


def test_meta_devices_and_dtypes():
    filled, x = made("2-D", **ALL)
    module = NeighborhoodAttention(24, 4, (3, 4), device="meta", dtype=torch.bfloat16, **ALL)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    module = module.to_empty(device="cpu").double()
    module.load_state_dict(filled.state_dict(), strict=True)
    assert torch.equal(module(x), filled(x))


def test_what_is_printed():
    plain = NeighborhoodAttention(8, 2, 3)
    assert plain.extra_repr() == "embed_dim=8, num_heads=2, window=3"
    every = NeighborhoodAttention(
        8, 4, [3, 5], torch.tensor([1, 2]), ("max", 1), (True, False), num_kv_heads=2, scale=0.5,
        qk_norm="layer_norm", relative_bias=True, backend="sdpa",
    )  # fmt: skip
    assert every.extra_repr() == (
        "embed_dim=8, num_heads=4, window=(3, 5), stride=(1, 2), dilation=('max', 1), "
        "is_causal=(True, False), num_kv_heads=2, qk_norm='layer_norm', scale=0.5, backend='sdpa', "
        "relative_bias=True"
    )
    again = eval(f"NeighborhoodAttention({every.extra_repr()})")
    assert again.extra_repr() == every.extra_repr()


# ---- errors ------------------------------------------------------------------------------------------


REFUSED = [
    ((10, 4, 3), {}, "got embed_dim=10, num_heads=4.\n  Write embed_dim=12, or a divisor of 10"),
    ((12, 6, 3), {"num_kv_heads": 4}, "got num_heads=6, num_kv_heads=4.\n  Write num_kv_heads=3."),
    ((12, 6, 3), {"num_kv_heads": 12}, "got num_heads=6, num_kv_heads=12.\n  Write num_kv_heads=6."),
    ((12, 6, 3), {"num_kv_heads": 0}, "num_kv_heads must be an integer of at least 1"),
    ((12, 0, 3), {}, "num_heads must be an integer of at least 1: got num_heads=0"),
    ((12.0, 2, 3), {}, "embed_dim must be an integer of at least 1: got embed_dim=12.0"),
    ((12, 2, 3), {"qk_norm": "rms"}, "got 'rms'. Write qk_norm=None"),
    ((12, 2, 3), {"backend": "fna"}, "unknown backend 'fna'"),
    (
        (12, 2, (3, 4), (1, 5)),
        {},
        "axis 1 has stride=5 > window=4.\n  window=(3, 4), stride=(1, 5). "
        "Write NeighborhoodAttention(embed_dim, num_heads, window=(3, 4), stride=(1, 4)).",
    ),
    ((12, 2, 0, 1, 2), {}, "NeighborhoodAttention(embed_dim, num_heads, window=(-1,), dilation=(2,))"),
    ((12, 2, 3.5), {}, "window must be an integer, or -1 for the whole axis: axis 0 has window=3.5"),
    ((12, 2, 3, 1, 1, 1), {}, "is_causal must be True or False"),
    ((12, 2, (3, 3), (1, 1, 1)), {}, "window must have one entry per axis, or be a scalar: got 2 for rank 3"),
    ((12, 2, (3, 3, 3), (1, 1)), {}, "stride must have one entry per axis, or be a scalar: got 2 for rank 3"),
    ((12, 2, 3), {"relative_bias": True}, "got window=3.\n  Write window=(7, 7)"),
    ((12, 2, (3, -1)), {"relative_bias": True}, "needs the window of every axis"),
]


@pytest.mark.parametrize("args, options, message", REFUSED)
def test_modules_that_are_refused(args, options, message):
    with pytest.raises(GNAError, match=re.escape(message)):
        NeighborhoodAttention(*args, **options)


MISFITS = [
    ((3,), (5, 12), "with any axes for NeighborhoodAttention(embed_dim=12, num_heads=2, window=3): got 0, x"),
    ((3,), (5, 12), "x is (5, 12).\n  Write x[None] for one entry"),
    (
        ((3, 3),),
        (1, 25, 12),
        "with 2 axes for NeighborhoodAttention(embed_dim=12, num_heads=2, window=(3, 3))",
    ),
    (
        ((3, 3),),
        (1, 25, 12),
        "got 1, x is (1, 25, 12).\n  Write x[None] for one entry of a batch, x.unflatten",
    ),
    ((3, (1, 2)), (1, 4, 5, 6, 12), "Write NeighborhoodAttention(..., window=(7, 7, 7)), say, for 3 axes."),
    ((3,), (1, 12, 5, 6), "embed_dim=12 channels on its last axis: got 6, x is (1, 12, 5, 6)."),
    ((3,), (1, 12, 5, 6), "Write x.movedim(1, -1)."),
    ((3,), (1, 5, 6, 8), "got 8, x is (1, 5, 6, 8).\n  Write NeighborhoodAttention(embed_dim=8, ...)."),
    ((5,), (1, 9, 4, 12), "axis 1 has window*dilation=5*1=5 > length=4"),
]


@pytest.mark.parametrize("args, shape, message", MISFITS)
def test_inputs_that_are_refused(args, shape, message):
    with pytest.raises(GNAError, match=re.escape(message)):
        NeighborhoodAttention(12, 2, *args)(torch.zeros(shape))


def test_a_backend_by_name_never_falls_back():
    module, x = made("2-D", dtype=torch.float32, relative_bias=True, backend="flex")
    with pytest.raises(NotImplementedError, match="FlexAttention has no backward on cpu"):
        module(x)
    for backend in ("reference", "sdpa"):
        one = copy.deepcopy(module)
        one.backend = backend
        one(x).sum().backward()
        assert 0 < one.rpb.grad.norm() < math.inf
