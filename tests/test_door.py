"""One contract for every backend; dispatch, explain, errors, threads, torch.compile, autocast."""

from __future__ import annotations

import threading

import pytest
import torch
from torch._dynamo.utils import counters

import gnaflex
from gnaflex import compiled, dispatch, door
from gnaflex.mask import decoded
from gnaflex.reference import reference_attention
from gnaflex.spec import GNA, GNAError

SHAPE = (4, 9, 11)
PROBLEMS = [
    {"window": (3, 5, 5)},
    {"window": (2, 4, 6), "stride": (2, 4, 3)},
    {"window": (4, 3, 7), "is_causal": (True, False, True)},
    {"window": (4, 9, 11)},
    {"window": 1},
    {"window": (2, 2, 3), "stride": (1, 2, 2), "dilation": (2, 4, 3)},
    {"window": (2, 3, 2), "dilation": "max", "is_causal": (False, True, False)},
]


def inputs(shape=SHAPE, batch=2, heads=4, kv_heads=2, dim=16, value_dim=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(heads, dim), (kv_heads, dim), (kv_heads, value_dim or dim)]
    return [torch.randn(batch, *shape, h, d, generator=generator).to(dtype) for h, d in sizes]


def flat(x):
    """Heads-last grid to [batch, heads, tokens, dim]."""
    return x.flatten(1, -3).transpose(1, 2)


def assert_within_budget(got, q, k, v, **problem):
    """Error against float64 at most twice that of the plain computation in the same dtype."""
    exact = reference_attention(q.double(), k.double(), v.double(), **problem)
    plain = reference_attention(q, k, v, **problem, compute_dtype=q.dtype)
    budget = 2 * (plain.double() - exact).abs().max() + 2 * torch.finfo(q.dtype).eps * exact.abs().max()
    assert (got.double() - exact).abs().max() <= budget


@pytest.mark.parametrize("backend", ["flex", "sdpa", "reference"])
class TestContract:
    """What every backend must do wherever it claims a call."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_values(self, backend, dtype):
        q, k, v = inputs(dtype=dtype)
        for problem in PROBLEMS:
            got = gnaflex.attention(q, k, v, **problem, backend=backend)
            assert got.dtype == dtype
            assert got.shape == q.shape
            assert_within_budget(got, q, k, v, **problem)

    def test_row_major_masks(self, backend):
        q, k, v = inputs()
        for problem in PROBLEMS[:3]:
            bm = gnaflex.block_mask(SHAPE, **problem, device="cpu")
            out = gnaflex.flex_attention(
                flat(q), flat(k), flat(v), block_mask=bm, enable_gqa=True, backend=backend
            )
            assert_within_budget(out.transpose(1, 2).unflatten(1, SHAPE), q, k, v, **problem)

    def test_scale_and_value_dim(self, backend):
        q, k, v = inputs(value_dim=24)
        for scale in (0.0, 0.7):
            got = gnaflex.attention(q, k, v, (3, 5, 5), scale=scale, backend=backend)
            assert got.shape == (*q.shape[:-1], 24)
            assert_within_budget(got, q, k, v, window=(3, 5, 5), scale=scale)

    def test_non_contiguous(self, backend):
        q, k, v = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in inputs())
        assert not q.is_contiguous()
        assert_within_budget(
            gnaflex.attention(q, k, v, (3, 5, 5), backend=backend), q, k, v, window=(3, 5, 5)
        )

    def test_score_mod_sees_row_major_tokens(self, backend):
        q, k, v = inputs()
        slope = torch.tensor([0.5, 0.25, 0.125, 1.0])

        def alibi(score, b, h, q_idx, kv_idx):
            return score - slope[h] * (q_idx - kv_idx).abs() / 10

        got = gnaflex.attention(q, k, v, (3, 5, 5), score_mod=alibi, backend=backend)
        assert_within_budget(got, q, k, v, window=(3, 5, 5), score_mod=alibi)


@pytest.mark.parametrize("backend", ["flex", "sdpa"])
@pytest.mark.parametrize("tiles", [((2, 4, 4), (2, 4, 4)), ((4, 4, 8), (2, 4, 4))])
def test_tile_major_masks(backend, tiles):
    """Shapes that no tile divides, equal and nested tiles, padding and unequal dilation groups."""
    q, k, v = inputs()
    for problem in PROBLEMS[:2] + PROBLEMS[5:6]:
        bm = gnaflex.block_mask(SHAPE, **problem, q_tile=tiles[0], kv_tile=tiles[1], device="cpu")
        ordered = [gnaflex.permute(flat(x), bm) for x in (q, k, v)]
        out = gnaflex.flex_attention(*ordered, block_mask=bm, enable_gqa=True, backend=backend)
        assert torch.isfinite(out).all()
        out = gnaflex.unpermute(out, bm).transpose(1, 2).unflatten(1, SHAPE)
        assert_within_budget(out, q, k, v, **problem)


def test_attention_permutes_when_counts_say_so():
    shape, problem = (8, 32, 32), {"window": (4, 16, 16), "stride": (4, 8, 8)}
    route = door._problem(0, shape, *problem.values(), 1, False).cheapest
    assert route.order.is_tiled
    q, k, v = inputs(shape, batch=1, heads=1, kv_heads=1)
    assert_within_budget(gnaflex.attention(q, k, v, **problem, backend="flex"), q, k, v, **problem)
    assert not door._problem(0, (8, 40), (2, 3), 1, 1, False).cheapest.order.is_tiled


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
def test_lse_and_gradients(backend):
    q, k, v = (x.double().requires_grad_() for x in inputs(batch=1, dim=8))
    problem = PROBLEMS[5]
    want, want_lse = reference_attention(q, k, v, **problem, return_lse=True)
    weight, weight_lse = torch.randn_like(want), torch.randn_like(want_lse)
    want_grads = torch.autograd.grad((want * weight).sum() + (want_lse * weight_lse).sum(), (q, k, v))
    out, lse = gnaflex.attention(q, k, v, **problem, backend=backend, return_lse=True)
    assert lse.shape == q.shape[:-1]
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    grads = torch.autograd.grad((out * weight).sum() + (lse * weight_lse).sum(), (q, k, v))
    for got, expected in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got, expected)


def test_lse_of_flex_attention_is_torchs():
    q, k, v = (flat(x) for x in inputs())
    bm = gnaflex.block_mask(SHAPE, (3, 5, 5), device="cpu")
    out, lse = gnaflex.flex_attention(q, k, v, block_mask=bm, enable_gqa=True, return_lse=True)
    again, aux = gnaflex.flex_attention(
        q, k, v, block_mask=bm, enable_gqa=True, return_aux=dispatch.AuxRequest(lse=True)
    )
    theirs = torch.nn.attention.flex_attention.flex_attention(
        q, k, v, block_mask=bm, enable_gqa=True, return_lse=True
    )
    for ours in ((out, lse), (again, aux.lse)):
        torch.testing.assert_close(ours, theirs)


def test_another_problem_of_one_shape_compiles_nothing():
    """Windows, strides and causal flags share a graph; dilation adds one, for all dilations."""
    q, k, v = (flat(x) for x in inputs((6, 8, 10), heads=2))
    seen = []
    with torch.no_grad():
        for problem in (
            {"window": 3},
            {"window": (6, 8, 10)},
            {"window": (2, 5, 7), "stride": (2, 3, 4)},
            {"window": 4, "is_causal": True},
            {"window": 1},
            {"window": (5, 4, 2), "is_causal": (False, True, False)},
            {"window": 2, "dilation": (1, 2, 3)},
            {"window": 2, "dilation": 3},
            {"window": (3, 2, 2), "stride": 2, "dilation": (2, 4, 5), "is_causal": True},
        ):
            bm = gnaflex.block_mask((6, 8, 10), **problem, device="cpu")
            before = counters["stats"]["unique_graphs"]
            gnaflex.flex_attention(q, k, v, block_mask=bm, backend="flex")
            seen.append(counters["stats"]["unique_graphs"] - before)
    assert seen == [1, 0, 0, 0, 0, 0, 1, 0, 0]


def test_explicit_backends_never_fall_back():
    q, k, v = (flat(x).requires_grad_() for x in inputs())
    bm = gnaflex.block_mask(SHAPE, 3, device="cpu")
    with pytest.raises(
        NotImplementedError, match=r"(?s)'flex' cannot run.*no backward on cpu.*backend=\"sdpa\""
    ):
        gnaflex.flex_attention(q, k, v, block_mask=bm, enable_gqa=True, backend="flex")
    with pytest.raises(NotImplementedError, match=r"(?s)'cuda' cannot run.*data-centre GPU.*no backward"):
        gnaflex.flex_attention(q, k, v, block_mask=bm, enable_gqa=True, backend="cuda")
    with pytest.raises(NotImplementedError, match=r"not torch.float64"):
        gnaflex.attention(*(x.double() for x in inputs()), 3, backend="flex")
    out = gnaflex.flex_attention(q, k, v, block_mask=bm, enable_gqa=True)
    assert out.requires_grad


def test_no_grad_calls_take_flex_though_inputs_ask_for_gradients():
    q, k, v = (x.requires_grad_() for x in inputs())
    with torch.no_grad():
        got = gnaflex.attention(q, k, v, (3, 5, 5), backend="flex")
    assert not got.requires_grad
    assert_within_budget(got, *(x.detach() for x in (q, k, v)), window=(3, 5, 5))


def test_explain_golden():
    bm = gnaflex.block_mask(SHAPE, 3, device="cpu")
    q = torch.randn(1, 1, 396, 8)
    plain = gnaflex.explain(q, q, q, bm)
    assert plain.backend == "flex"
    assert str(plain).splitlines()[0] == "backend: flex"
    assert "  sdpa: runs, but comes later" in str(plain)
    assert "  reference: runs, but comes later" in str(plain)
    assert str(plain).splitlines()[-1].startswith("mask: GNA(shape=")
    training = gnaflex.explain(q.requires_grad_(), q, q, bm, return_lse=True)
    assert training.backend == "sdpa"
    assert training.reasons["flex"] == [
        "FlexAttention has no backward on cpu",
        "FlexAttention returns no log-sum-exp on cpu when compiled",
    ]


TABLE = torch.nn.Parameter(torch.zeros(2, 9))


def reads_a_global(score, b, h, q, k):
    return score + TABLE[h, (q - k).clamp(-4, 4) + 4]


class Bias(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(2, 9))

    def forward(self, score, b, h, q, k):
        return score + self.table[h, (q - k).clamp(-4, 4) + 4]


def test_score_mods_that_train_are_never_run_without_gradients():
    """However the mod reaches its parameters: FlexAttention on a CPU would drop their gradients."""
    bm = gnaflex.block_mask(16, 5, device="cpu")
    q, k, v = torch.randn(3, 1, 2, 16, 8)
    module = Bias()
    mods = [reads_a_global, module, module.forward, lambda *x: module(*x), lambda *x: reads_a_global(*x)]
    mods.append(gnaflex.relative_bias(bm, TABLE))
    for mod in mods:
        assert gnaflex.explain(q, k, v, bm, score_mod=mod).reasons["flex"] == [
            "FlexAttention has no backward on cpu"
        ]
        with pytest.raises(NotImplementedError, match="no backward"):
            gnaflex.flex_attention(q, k, v, score_mod=mod, block_mask=bm, backend="flex")
        with torch.no_grad():
            assert gnaflex.explain(q, k, v, bm, score_mod=mod).backend == "flex"
    out = gnaflex.flex_attention(q, k, v, score_mod=mods[-1], block_mask=bm)
    (grad,) = torch.autograd.grad(out.square().sum(), TABLE)
    assert grad.abs().sum() > 0


def test_plain_torch_masks_and_no_mask_still_run():
    q, k, v = (flat(x) for x in inputs((16,), heads=2))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(gnaflex.flex_attention(q, k, v), want)
    torch.testing.assert_close(gnaflex.flex_attention(q, k, v, backend="sdpa"), want)
    create = torch.nn.attention.flex_attention.create_block_mask
    causal = create(lambda b, h, q, k: q >= k, None, None, 16, 16, "cpu")
    with pytest.raises(NotImplementedError, match="not made by gnaflex"):
        gnaflex.flex_attention(q, k, v, block_mask=causal, backend="sdpa")


def test_without_a_compiler_auto_takes_sdpa(monkeypatch):
    monkeypatch.setattr(compiled, "cpu_obstacle", lambda: "torch.compile finds no C++ compiler")
    q, k, v = inputs()
    assert_within_budget(gnaflex.attention(q, k, v, (3, 5, 5)), q, k, v, window=(3, 5, 5))
    with pytest.raises(NotImplementedError, match=r"no C\+\+ compiler"):
        gnaflex.attention(q, k, v, (3, 5, 5), backend="flex")


def test_masks_too_large_for_the_cpu_kernel_are_refused_with_the_memory():
    bm = gnaflex.block_mask((16, 16, 16), 3, device="cpu", full_width=False)
    q = torch.randn(1, 1, 4096, 8)
    with pytest.raises(NotImplementedError, match=r"full width, which take 0\.0 GiB for 4096 tokens"):
        gnaflex.flex_attention(q, q, q, block_mask=bm, backend="flex")
    grid = q.reshape(1, 16, 16, 16, 1, 8)
    for backend in ("auto", "sdpa"):
        out = gnaflex.flex_attention(q, q, q, block_mask=bm, backend=backend).reshape(grid.shape)
        assert_within_budget(out, grid, grid, grid, window=3)


def test_what_would_take_hours_is_refused():
    huge = torch.empty(1, 128, 96, 96, 1, 8).expand(300, -1, -1, -1, -1, -1)
    with pytest.raises(
        NotImplementedError, match=r"(?s)GiB for 1179648 tokens.*it would take about \d hours"
    ):
        gnaflex.attention(huge, huge, huge, (16, 24, 24))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v: (q[:, :, :-1], k, v), r"for 396 queries and 396 keys, the tensors have 395 and 396"),
        (lambda q, k, v: (q[0], k, v), "takes \\[batch, heads, tokens, head_dim\\]"),
        (
            lambda q, k, v: (q.to("meta"), k, v),
            r'the mask is on cpu, the query on meta.*\n.*block_mask.to\("meta"\)',
        ),
    ],
)
def test_tensors_that_do_not_fit_the_mask(change, message):
    bm = gnaflex.block_mask(SHAPE, 3, device="cpu")
    with pytest.raises(GNAError, match=message):
        gnaflex.flex_attention(*change(*(flat(x) for x in inputs())), block_mask=bm, enable_gqa=True)


def test_other_clear_errors():
    q, k, v = inputs()
    tiled = gnaflex.block_mask(SHAPE, 3, q_tile=(2, 4, 4), device="cpu")
    with pytest.raises(GNAError, match=r"gnaflex.permute\(x, block_mask\)"):
        gnaflex.flex_attention(flat(q), flat(k), flat(v), block_mask=tiled, enable_gqa=True)
    for call in (
        lambda: gnaflex.attention(q, k, v, 3, backend="fast"),
        lambda: gnaflex.flex_attention(flat(q), flat(k), flat(v), backend="fast"),
    ):
        with pytest.raises(GNAError, match=r"unknown backend 'fast'. Write backend=\"auto\""):
            call()
    with pytest.raises(GNAError, match="must share batch and grid"):
        gnaflex.attention(q, k[:, :3], v[:, :3], 3)
    with pytest.raises(GNAError, match="got 2 for rank 3"):
        gnaflex.attention(q, k, v, (3, 3))
    with pytest.raises(GNAError, match="multiple of key heads: got 3 and 2"):
        gnaflex.attention(q[..., :3, :], k, v, 3)
    with pytest.raises(GNAError, match="share head_dim: got 16 and 8"):
        gnaflex.flex_attention(flat(q), flat(k)[..., :8], flat(v), enable_gqa=True)
    with pytest.raises(GNAError, match="exclude each other"):
        gnaflex.flex_attention(flat(q), flat(k), flat(v), return_lse=True, return_aux=dispatch.AuxRequest())
    resized = gnaflex.block_mask((16, 16), 3, device="cpu")._adjust(128, 128)
    with pytest.raises(GNAError, match="changed after it was made"):
        gnaflex.flex_attention(*[torch.zeros(1, 1, 128, 8)] * 3, block_mask=resized)


def test_zero_batch_trains():
    q, k, v = (x[:0].requires_grad_() for x in inputs())
    out = gnaflex.attention(q, k, v, 3)
    assert out.shape == (0, *q.shape[1:])
    out.sum().backward()
    assert q.grad.shape == q.shape
    with torch.no_grad():
        assert gnaflex.attention(q, k, v, 3).shape == (0, *q.shape[1:])


def test_lists_serve_as_well_as_tuples():
    q, k, v = inputs()
    listed = gnaflex.attention(q, k, v, [3, 5, 5], [1, 2, 2], [1, 1, 2], [False, True, False], backend="sdpa")
    tupled = gnaflex.attention(q, k, v, (3, 5, 5), (1, 2, 2), (1, 1, 2), (False, True, False), backend="sdpa")
    assert torch.equal(listed, tupled)


def test_autocast_follows_sdpa():
    q, k, v = inputs(kv_heads=4)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = torch.nn.functional.scaled_dot_product_attention(flat(q), flat(k), flat(v))
        ours = gnaflex.attention(q, k, v, SHAPE, backend="sdpa")
        kept = gnaflex.attention(q.double(), k.double(), v.double(), 3, backend="sdpa")
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert kept.dtype == torch.float64


def test_inside_a_users_compiled_function():
    """A pointwise operation beside FlexAttention in one CPU graph does not build; an opaque operator does."""
    q, k, v = inputs()
    bm = gnaflex.block_mask(SHAPE, (3, 5, 5), device="cpu")

    @torch.compile(fullgraph=True)
    def block(q, k, v):
        grid = gnaflex.attention(q * 2, k, v, (3, 5, 5))
        lists = gnaflex.flex_attention(flat(q * 2), flat(k), flat(v), block_mask=bm, enable_gqa=True)
        return torch.nn.functional.gelu(grid) + 1, torch.nn.functional.gelu(lists) + 1

    want = torch.nn.functional.gelu(gnaflex.attention(q * 2, k, v, (3, 5, 5))) + 1
    grid, lists = block(q, k, v)
    torch.testing.assert_close(grid, want)
    torch.testing.assert_close(lists.transpose(1, 2).reshape(want.shape), want)


def test_training_inside_a_users_compiled_function():
    q, k, v = (x.requires_grad_() for x in inputs(batch=1))

    def loss(q, k, v):
        out, lse = gnaflex.attention(q * 2, k, v, (3, 5, 5), return_lse=True)
        return (out**2).sum() + (lse**2).sum()

    want = torch.autograd.grad(loss(q, k, v), (q, k, v))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(q, k, v), (q, k, v))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_operators_are_sound():
    """torch's own checks: schema, fake tensors, autograd registration, tracing."""
    from gnaflex import operators

    q, k, v = (
        x.requires_grad_() for x in inputs((3, 4), batch=1, heads=2, kv_heads=1, dim=4, dtype=torch.double)
    )
    extra = [torch.randn(1, 3, 1, 4, dtype=torch.double, requires_grad=True) for _ in range(2)]
    mod = gnaflex.block_mask((3, 4), (3, 2), device="cpu").mask_mod
    for heads_last in (False, True):
        args = (flat(q), flat(k), flat(v), None, None, mod.gnaflex_code, heads_last, None, True, "auto")
        torch.library.opcheck(operators.attend, args)
    lengths = torch.tensor([[3, 2]], dtype=torch.int32)
    args = (*args[:4], lengths, *args[5:])
    torch.library.opcheck(operators.attend, args)
    for more in ((None, None), extra):
        grid = (q, k, v, *more, [3, 2], [1, 2], [1, 2], [0, 1], 0.5, True, "auto")
        torch.library.opcheck(operators.attend_grid, grid)
    assert decoded(mod.gnaflex_code) == mod.gnaflex


def test_threads_compile_and_run_at_once():
    errors = []

    def work(length):
        try:
            q, k, v = inputs((4, length), batch=1, heads=1, kv_heads=1)
            for _ in range(20):
                out = gnaflex.attention(q, k, v, 3, backend="flex")
            assert_within_budget(out, q, k, v, window=3)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(length,)) for length in (7, 8, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_graphs_are_bounded(monkeypatch):
    monkeypatch.setattr(compiled, "MOST_GRAPHS", 2)
    monkeypatch.setattr(compiled, "_new_graph", lambda: lambda *args: args[0])
    monkeypatch.setattr(compiled, "_graphs", type(compiled._graphs)())
    for length in (8, 9, 10):
        x = torch.zeros(1, 1, length, 4)
        compiled.flex_attention(x, x, x, None, None, None, False, None, None)
    assert len(compiled._graphs) == 2


def test_a_spec_serves_block_mask():
    spec = GNA((5, 6), 3)
    assert gnaflex.spec_of(gnaflex.block_mask(spec, device="cpu")) == spec


def test_one_tensor_may_be_query_key_and_value():
    """torch 2.9 cannot compile FlexAttention for a CPU then."""
    bm = gnaflex.block_mask((8, 16), window=3, device="cpu")
    x = torch.randn(1, 2, 128, 16)
    calls = [gnaflex.flex_attention(x, x, x, block_mask=bm, backend=name) for name in ("flex", "sdpa")]
    assert torch.allclose(*calls, atol=1e-5)
    twice = gnaflex.flex_attention(x, x + 1, x, block_mask=bm, backend="flex")
    assert torch.allclose(
        twice, gnaflex.flex_attention(x, x + 1, x, block_mask=bm, backend="sdpa"), atol=1e-5
    )
