"""The "sdpa" backend against the oracle: every order, dtype and option, gradients, memory."""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import all_1d, random_spec
from joint import attend
from orders import random_tiles
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gnaflex import gather, gather_tiles
from gnaflex.gather import attention
from gnaflex.layout import Layout, Slab
from gnaflex.order import Document, Order, order_of
from gnaflex.reference import dense_mask, reference_attention
from gnaflex.reorder import from_order, to_order
from gnaflex.spec import GNA, GNAError

SPEC = GNA((5, 7, 9), (3, 4, 6), (2, 1, 4), (1, 1, 1), (True, False, False))
DILATED = GNA((11, 13), (3, 4), (2, 3), (3, 2), (False, True))


def one_grid(spec: GNA, *tiles: tuple[int, ...]) -> Order:
    """One grid, row-major or with a query and a key tile."""
    return Order((Document(Layout(spec, *tiles)),))


def tensors(
    of: GNA | Order, batch=2, heads=2, kv_heads=2, dim=8, v_dim=8, dtype=torch.float64, seed=0
) -> list[Tensor]:
    """query, key, value, heads first, row-major."""
    generator = torch.Generator().manual_seed(seed)
    order = order_of(of) if isinstance(of, GNA) else of
    queries, keys = (order.row_major_starts(side)[-1] for side in (False, True))
    sizes = (heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, v_dim)
    return [torch.randn(batch, *size, generator=generator, dtype=dtype) for size in sizes]


def oracle(spec: GNA, qkv: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """The reference's output and log-sum-exp of one grid, heads first, row-major."""
    grids = (x.transpose(1, 2).unflatten(1, spec.shape) for x in qkv)
    problem = spec.window, spec.stride, spec.dilation, spec.is_causal
    out, lse = reference_attention(*grids, *problem, return_lse=True, **options)
    return out.flatten(1, -3).transpose(1, 2), lse.flatten(1, -2).transpose(1, 2)


def mask_of(order: Order) -> Tensor:
    """Who sees whom, bool [queries, keys], row-major: grids as the reference has it, everybody every extra
    token of the document, extra queries all of it."""
    blocks = []
    for document in order.documents:
        spec, slab = document.spec, document.layout.slab
        grid = dense_mask(spec).view(spec.shape * 2)
        if slab is not None:
            grid = grid.narrow(slab.axis, slab.q_start, slab.q_stop - slab.q_start)
            grid = grid.narrow(spec.rank + slab.axis, slab.kv_start, slab.kv_stop - slab.kv_start)
        grid = grid.flatten(0, spec.rank - 1).flatten(1)
        prefix, suffix, extra = document.prefix, document.suffix, document.extra_kv
        block = torch.ones(prefix + len(grid) + suffix, prefix + grid.shape[1] + suffix + extra)
        block[prefix : prefix + len(grid), prefix : prefix + grid.shape[1]] = grid
        blocks.append(block)
    return torch.block_diag(*blocks).bool()


def random_layout(rng: random.Random, spec: GNA) -> Layout:
    if rng.random() < 0.4:
        return Layout(spec)
    kv_tile = tuple(rng.choice([1, 2, 3, 4]) for _ in spec.shape)
    return Layout(spec, tuple(t * rng.choice([1, 1, 2, 3]) for t in kv_tile), kv_tile)


def random_extras(rng: random.Random) -> list[int]:
    """prefix, suffix and extra_kv."""
    return [rng.choice([0, 1, rng.randint(2, 20)]) for _ in range(3)]


def in_row_major(mod: Any, order: Order) -> Any:
    """``mod`` of row-major tokens as a score_mod of the order's places."""
    if mod is None:
        return None
    asks, seen = (torch.from_numpy(order.tokens(keys)[0]) for keys in (False, True))
    return lambda score, b, h, q_idx, kv_idx: mod(score, b, h, asks[q_idx], seen[kv_idx])


def placed(qkv: list[Tensor], order: Order) -> list[Tensor]:
    """The tensors in the order; pads of the query are noise, those of key and value NaN."""
    q, k, v = (to_order(x, order) for x in qkv)
    no_query, no_key = (torch.from_numpy(order.tokens(keys)[1])[:, None] for keys in (False, True))
    noise = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(1))
    return [torch.where(no_query, noise, q), *(torch.where(no_key, torch.nan, x) for x in (k, v))]


def check(order: Order, qkv: list[Tensor], mod: Any = None, memory_bytes: int = 2**28, **options: Any):
    """Output of both paths and log-sum-exp agree with the oracle on every real token."""
    if order.is_plain:
        want, want_lse = oracle(order.spec, qkv, score_mod=mod, **options)
    else:
        want, want_lse = attend(*qkv, mask_of(order), score_mod=mod, **options)
    given = placed(qkv, order)
    options |= {"enable_gqa": True, "memory_bytes": memory_bytes, "score_mod": in_row_major(mod, order)}
    alone = attention(*given, order, **options)
    out, lse = attention(*given, order, return_lse=True, **options)
    assert out.shape == alone.shape == (*given[0].shape[:3], given[2].shape[3])
    assert lse.isfinite().all()  # those of padded queries too
    for got in (alone, out):
        assert got.isfinite().all()
        torch.testing.assert_close(from_order(got, order), want, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(from_order(lse, order, -1), want_lse, atol=1e-12, rtol=1e-12)


def by_everything(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score * (1 + 0.1 * h) + torch.sin(q_idx * 0.7 + kv_idx * 0.3) + 0.2 * b


# ---- agreement ---------------------------------------------------------------------------------------


def test_every_small_problem_of_one_axis():
    for spec in all_1d(7):
        check(one_grid(spec), tensors(spec, batch=1, heads=1, kv_heads=1))


@pytest.mark.parametrize("seed", range(45))
def test_random_problems(seed):
    rng = random.Random(seed)
    spec = random_spec(rng, rng.randint(1, 4), 220)
    kv_heads = rng.choice([1, 2])
    qkv = tensors(spec, rng.choice([1, 2]), kv_heads * rng.choice([1, 3]), kv_heads, v_dim=rng.choice([8, 5]))
    memory_bytes = rng.choice([5_000, 30_000, 2**28])
    order = Order((Document(random_layout(rng, spec)),))
    mod = by_everything if seed % 3 == 0 else None
    check(order, qkv, mod, max(memory_bytes, 300_000) if mod else memory_bytes)  # vmap takes 5 ms a call


@pytest.mark.parametrize("tile", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("spec", [SPEC, DILATED], ids=["3d", "dilated"])
def test_every_tile_gives_the_same(spec, tile, monkeypatch):
    monkeypatch.setattr(gather_tiles, "_choose", lambda *_: (tile,) * spec.rank)
    for tiles in ((), ((4,) * spec.rank, (2,) * spec.rank)):
        for order in (one_grid(spec, *tiles), Order((Document(Layout(spec, *tiles), 3, 2, 5),))):
            check(order, tensors(order))


def test_axes_of_one_token_and_many_axes():
    spec = GNA(
        (1, 3, 1, 2, 4, 2, 1), (1, 2, 1, 2, 3, 1, 1), 1, 1, (True, True, False, False, False, True, False)
    )
    check(one_grid(spec), tensors(spec))


def test_too_little_memory_takes_small_tiles_a_head_at_a_time():
    spec = GNA((4, 6), (2, 3), 1, (1, 2))
    check(one_grid(spec), tensors(spec), by_everything, memory_bytes=1)


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_scale(scale):
    check(one_grid(SPEC), tensors(SPEC), scale=scale)


@pytest.mark.parametrize("spec", [SPEC, DILATED], ids=["3d", "dilated"])
def test_a_padded_query_attends_with_the_window_it_copies(spec):
    order = one_grid(spec, (4,) * spec.rank, (2,) * spec.rank)
    q, k, v = (to_order(x, order) for x in tensors(spec))
    tokens, is_pad = map(torch.from_numpy, order.tokens(keys=False))
    assert is_pad.any()
    q = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(1))
    scores = q @ from_order(k, order).mT * 8**-0.5
    index = torch.arange(spec.num_tokens)
    heads = torch.arange(2)[:, None, None]
    scores = by_everything(scores, heads[..., None], heads, tokens[:, None], index)
    scores = scores.masked_fill(~dense_mask(spec)[tokens], -torch.inf)
    out, lse = attention(q, k, v, order, score_mod=in_row_major(by_everything, order), return_lse=True)
    torch.testing.assert_close(out, scores.softmax(-1) @ from_order(v, order))
    torch.testing.assert_close(lse, scores.logsumexp(-1))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e300])
def test_padded_keys_are_never_read(poison):
    order = Order((Document(Layout(DILATED, (4, 4), (2, 2)), 3, 5, 1),))
    qkv = tensors(order)
    q, k, v = (to_order(x, order) for x in qkv)
    is_pad = torch.from_numpy(order.tokens(keys=True)[1])
    assert is_pad[order.documents[0].layout.num_keys :].sum() == 13 + 11 + 3
    poisoned = (torch.where(is_pad[:, None], poison, x) for x in (k, v))
    assert torch.equal(attention(q, *poisoned, order), attention(q, k, v, order))


@pytest.mark.parametrize("blind", [3, 60, 7], ids=["grid", "suffix", "prefix"])
def test_a_row_without_keys_gives_zeros(blind):
    order = order_of(GNA((5, 7), (3, 4)), prefix=8, suffix=20) if blind > 3 else one_grid(SPEC)
    mod = lambda score, b, h, q_idx, kv_idx: torch.where(q_idx == blind, -torch.inf, score)  # noqa: E731
    qkv = [x.requires_grad_() for x in tensors(order)]
    out, lse = attention(*qkv, order, score_mod=mod, return_lse=True)
    assert (out[:, :, blind] == 0).all()
    assert (lse[:, :, blind] == -torch.inf).all()
    (out.sum() + lse[:, :, blind + 1 :].sum()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in qkv)


@pytest.mark.parametrize(
    "mod",
    [
        lambda score, b, h, q_idx, kv_idx: score,
        lambda score, b, h, q_idx, kv_idx: score.tanh(),
        lambda score, b, h, q_idx, kv_idx: 0.1 * h - 0.01 * kv_idx,
        lambda score, b, h, q_idx, kv_idx: torch.zeros(()),
    ],
    ids=["same", "tanh", "index", "constant"],
)
def test_any_score_mod(mod):
    qkv = [x.requires_grad_() for x in tensors(DILATED, heads=4)]
    want, want_lse = oracle(DILATED, qkv, score_mod=mod)
    out, lse = attention(*qkv, one_grid(DILATED), enable_gqa=True, score_mod=mod, return_lse=True)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    for a, b in zip(gradients(out.sin().sum(), qkv[2:]), gradients(want.sin().sum(), qkv[2:]), strict=True):
        torch.testing.assert_close(a, b)


# ---- extra tokens, packed documents, slabs -----------------------------------------------------------


@pytest.mark.parametrize("seed", range(45))
def test_random_joint_problems(seed):
    rng = random.Random(seed)
    spec = random_spec(rng, rng.randint(1, 3), 150)
    tiles = () if rng.random() < 0.4 else random_tiles(rng, spec)
    order = Order((Document(Layout(spec, *tiles), *random_extras(rng)),))
    kv_heads = rng.choice([1, 2])
    qkv = tensors(
        order, rng.choice([1, 2]), kv_heads * rng.choice([1, 3]), kv_heads, v_dim=rng.choice([8, 5])
    )
    scale, memory_bytes = rng.choice([None, 0.7]), rng.choice([1, 5_000, 30_000, 2**28])
    mod = by_everything if seed % 3 == 0 else None
    check(order, qkv, mod, max(memory_bytes, 300_000) if mod else memory_bytes, scale=scale)


@pytest.mark.parametrize("extras", [(6, 0, 0), (0, 6, 0), (0, 0, 6), (1, 9, 4)], ids=str)
@pytest.mark.parametrize("tiles", [(), ((4, 6), (2, 3))], ids=["row", "tile"])
def test_every_run_of_extra_tokens(extras, tiles):
    order = Order((Document(Layout(DILATED, *tiles), *extras),))
    check(order, tensors(order, heads=4, kv_heads=2), by_everything)


@pytest.mark.parametrize("seed", range(20))
def test_packed_documents_do_not_see_one_another(seed):
    rng = random.Random(seed)
    rank, tiled, extras = rng.randint(1, 3), rng.random() < 0.6, rng.random() < 0.6
    documents: list[Document] = []
    for _ in range(rng.randint(2, 4)):
        spec = random_spec(rng, rank, 80)
        tiles = random_tiles(rng, spec) if tiled else ()
        documents.append(Document(Layout(spec, *tiles), *(random_extras(rng) if extras else ())))
        documents += [rng.choice(documents)] * rng.choice([0, 0, 1, 2])
    order = Order(tuple(documents))
    mod, memory_bytes = rng.choice([None, by_everything]), rng.choice([500_000, 2**28])
    check(order, tensors(order, rng.choice([1, 2]), 4, 2), mod, memory_bytes)


def random_slab(rng: random.Random, spec: GNA) -> Slab:
    """Some queries of some axis, and the fewest keys that hold what they see."""
    at = rng.randrange(spec.rank)
    axis = spec.axes[at]
    start = rng.randrange(0, axis.length, axis.dilation)
    stop = rng.randint(start + 1, axis.length)
    seen = dense_mask(GNA(*axis))[start:stop].any(0).nonzero()
    first = int(seen.min()) // axis.dilation * axis.dilation
    return Slab(at, start, stop, first, int(seen.max()) + 1)


@pytest.mark.parametrize("seed", range(45))
def test_a_slab_gives_the_rows_of_the_whole(seed):
    rng = random.Random(seed)
    spec = random_spec(rng, rng.randint(1, 3), 220)
    slab, qkv = random_slab(rng, spec), tensors(spec, 2, 4, 2, v_dim=5)
    want = [x.unflatten(2, spec.shape) for x in oracle(spec, qkv)]
    want = [x.narrow(2 + slab.axis, slab.q_start, slab.q_stop - slab.q_start) for x in want]
    starts, stops = (slab.q_start, slab.kv_start, slab.kv_start), (slab.q_stop, slab.kv_stop, slab.kv_stop)
    grids = (x.unflatten(2, spec.shape) for x in qkv)
    cut = [x.narrow(2 + slab.axis, a, b - a) for x, a, b in zip(grids, starts, stops, strict=True)]
    cut = [x.flatten(2, 1 + spec.rank) for x in cut]
    order = Order((Document(Layout(spec, slab=slab)),))
    options = {"enable_gqa": True, "memory_bytes": rng.choice([5_000, 2**28])}
    for got, each in zip(attention(*cut, order, return_lse=True, **options), want, strict=True):
        each = each.flatten(2, 1 + spec.rank)
        torch.testing.assert_close(got, each, atol=1e-12, rtol=1e-12)
    check(order, cut, by_everything)


def test_slabs_may_be_packed():
    rng = random.Random(0)
    slabs = [Document(Layout(spec, slab=random_slab(rng, spec))) for spec in (SPEC, DILATED, DILATED)]
    order = Order((*slabs, Document(Layout(DILATED), 2, 3, 4), slabs[1]))
    check(order, tensors(order), by_everything)


# ---- gradients ---------------------------------------------------------------------------------------


def gradients(loss: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


@pytest.fixture
def recomputed(monkeypatch) -> list[Any]:
    """Grows with every call that the backward pass will recompute."""
    calls: list[Any] = []
    real = gather.checkpoint
    monkeypatch.setattr(gather, "checkpoint", lambda *a, **kw: calls.append(a) or real(*a, **kw))
    return calls


@pytest.mark.parametrize("memory_bytes", [200_000, 2**28], ids=["recomputed", "kept"])
@pytest.mark.parametrize("mod", [None, by_everything], ids=["plain", "score_mod"])
@pytest.mark.parametrize("extras", [(), (5, 3, 2)], ids=["grid", "joint"])
@pytest.mark.parametrize("kind", ["row", "tile"])
@pytest.mark.parametrize("spec", [SPEC, DILATED], ids=["3d", "dilated"])
def test_gradients(spec, kind, mod, extras, memory_bytes, recomputed):
    tiles = () if kind == "row" else ((4,) * spec.rank, (2,) * spec.rank)
    order = Order((Document(Layout(spec, *tiles), *extras),))
    qkv = [x.requires_grad_() for x in tensors(order, heads=4, v_dim=6)]
    weight = torch.randn(2, 4, qkv[0].shape[2], 6, dtype=torch.float64)
    want, want_lse = attend(*qkv, mask_of(order), score_mod=mod)
    options = {"enable_gqa": True, "score_mod": in_row_major(mod, order), "memory_bytes": memory_bytes}
    out = from_order(attention(*placed(qkv, order), order, **options), order)
    want_gradients = torch.autograd.grad((want * weight).sum(), qkv, retain_graph=True)
    for a, b in zip(gradients((out * weight).sum(), qkv), want_gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)
    out, lse = attention(*placed(qkv, order), order, return_lse=True, **options)
    loss = (from_order(out, order) * weight).sum() + from_order(lse, order, -1).sin().sum()
    want_loss = (want * weight).sum() + want_lse.sin().sum()
    for a, b in zip(gradients(loss, qkv), gradients(want_loss, qkv), strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)
    assert bool(recomputed) == (memory_bytes < 2**28)


def test_gradients_of_packed_documents_and_slabs():
    slab = Document(Layout(DILATED, slab=random_slab(random.Random(1), DILATED)))
    joint = Document(Layout(DILATED), 2, 3, 4)
    order = Order((slab, joint, slab, joint))
    qkv = [x.requires_grad_() for x in tensors(order)]
    want, want_lse = attend(*qkv, mask_of(order), score_mod=by_everything)
    out, lse = attention(*qkv, order, score_mod=by_everything, return_lse=True, memory_bytes=100_000)
    want_gradients = gradients(want.sin().sum() + want_lse.sin().sum(), qkv)
    for a, b in zip(gradients(out.sin().sum() + lse.sin().sum(), qkv), want_gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("memory_bytes", [1, 2**28], ids=["recomputed", "kept"])
def test_a_score_mod_may_train_its_parameters(memory_bytes):
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def mod(score, b, h, q_idx, kv_idx):
        return score + bias[h] * (q_idx - kv_idx)

    def without_indexing(score, b, h, q_idx, kv_idx):
        return score + (bias * (torch.arange(2) == h)).sum() * (q_idx - kv_idx)

    qkv = tensors(DILATED)
    out = attention(*qkv, one_grid(DILATED), score_mod=mod, memory_bytes=memory_bytes)
    want, _ = oracle(DILATED, qkv, score_mod=without_indexing)
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), bias)[0] for x in (out, want)))


@pytest.mark.parametrize("extras", [{}, {"prefix": 3, "extra_kv": 2}], ids=["grid", "joint"])
def test_what_inference_mode_cached_serves_training(extras):
    order = order_of(GNA((6, 10), (3, 5), (1, 2), (2, 1)), **extras)
    qkv = tensors(order)
    with torch.inference_mode():
        attention(*qkv, order, return_lse=True)
        attention(*qkv, order)
    qkv = [x.requires_grad_() for x in qkv]
    out, lse = attention(*qkv, order, return_lse=True)
    assert len(gradients(out.sum() + lse.sum() + attention(*qkv, order).sum(), qkv)) == 3


# ---- tensors -----------------------------------------------------------------------------------------


def test_strided_inputs():
    q, k, v = tensors(SPEC)
    want = attention(q, k, v, one_grid(SPEC))
    heads_last = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    channels_first = [x.mT.contiguous().mT for x in (q, k, v)]
    expanded = [x[:1].expand(3, -1, -1, -1) for x in (q, k, v)]
    torch.testing.assert_close(attention(*heads_last, one_grid(SPEC)), want)
    torch.testing.assert_close(attention(*channels_first, one_grid(SPEC)), want)
    torch.testing.assert_close(attention(*expanded, one_grid(SPEC)), want[:1].expand(3, -1, -1, -1))


@pytest.mark.parametrize("mod", [None, by_everything], ids=["plain", "score_mod"])
def test_an_empty_batch(mod):
    q, k, v = (x.requires_grad_() for x in tensors(SPEC, batch=0, heads=4, v_dim=6))
    out, lse = attention(q, k, v, one_grid(SPEC), enable_gqa=True, score_mod=mod, return_lse=True)
    plain = attention(q, k, v, one_grid(SPEC), enable_gqa=True)
    assert out.shape == plain.shape == (0, 4, SPEC.num_tokens, 6)
    assert lse.shape == (0, 4, SPEC.num_tokens)
    assert gradients(out.sum() + plain.sum(), [q])[0].shape == q.shape


def test_heads_that_do_not_match_are_refused():
    q, k, v = tensors(SPEC, heads=4)
    with pytest.raises(GNAError, match="a multiple: got 4, 2, enable_gqa=False"):
        attention(q, k, v, one_grid(SPEC))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", [SPEC, DILATED, GNA((16, 24), (5, 16), (1, 8))], ids=["3d", "dilated", "2d"])
def test_low_precision_is_as_good_as_plain_attention(spec, dtype):
    qkv = [x.to(dtype) for x in tensors(spec, dim=32, v_dim=32)]
    exact, exact_lse = oracle(spec, [x.double() for x in qkv])
    plain, _ = oracle(spec, qkv, compute_dtype=dtype)
    budget = 2 * (plain.double() - exact).abs().max()
    _, plain_lse = oracle(spec, qkv, compute_dtype=torch.float32)
    lse_budget = 2 * (plain_lse.double() - exact_lse).abs().max()
    out, lse = attention(*qkv, one_grid(spec), return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert (lse.double() - exact_lse).abs().max() <= lse_budget
    for got in (out, attention(*qkv, one_grid(spec))):
        assert (got.double() - exact).abs().max() <= budget


def test_autocast_leaves_the_log_sum_exp_alone():
    qkv = tensors(SPEC, dtype=torch.float32)
    _, want = attention(*qkv, one_grid(SPEC), return_lse=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention(*qkv, one_grid(SPEC), return_lse=True)[1], want)


# ---- memory and tiles --------------------------------------------------------------------------------


class PeakBytes(TorchDispatchMode):
    """The most bytes alive at once of all that is allocated inside."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = {x.untyped_storage().data_ptr() for x in given}
        self.alive: dict[int, list[int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.given:
                entry = self.alive.setdefault(x.untyped_storage().data_ptr(), [0, 0])
                entry[:] = entry[0] + 1, x.untyped_storage().nbytes()
                weakref.finalize(x, self._free, x.untyped_storage().data_ptr())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out

    def _free(self, storage: int) -> None:
        self.alive[storage][0] -= 1
        if not self.alive[storage][0]:
            del self.alive[storage]


@pytest.mark.parametrize("memory_bytes", [2**20, 2**23], ids=["1 MiB", "8 MiB"])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("extras", [{}, {"prefix": 150, "suffix": 3, "extra_kv": 20}], ids=["grid", "joint"])
def test_memory_is_bounded(extras, memory_bytes, return_lse):
    length = 8 if not extras else 3  # a row of extra queries holds the keys of the whole document
    order = order_of(GNA((length, 32, 32), (length // 2, 16, 16), (1, 4, 1)), **extras)
    qkv = tensors(order, 1, 2, 2, 16, 16, torch.float32)
    attention(*qkv, order, return_lse=return_lse, memory_bytes=memory_bytes)
    with torch.no_grad(), PeakBytes(*qkv) as bytes_:
        attention(*qkv, order, return_lse=return_lse, memory_bytes=memory_bytes)
    outputs = 3 * qkv[0].nbytes  # the tiles', one after another, and in the order of the layout
    assert bytes_.peak <= memory_bytes + outputs


def stats(order: Order, on: Callable[[Any], Any], memory_bytes: int = 2**28) -> list[Any]:
    """What ``on`` says of every kind of tiles."""
    q, k, v = tensors(order, 1, 1, 1, 64, 64, torch.float32)
    load = gather_tiles.load_of(k[0], v[0], 1, False, memory_bytes)
    cuts = tuple(gather_tiles.cut_of(document, load) for document in dict.fromkeys(order.documents))
    return [on(kind) for kinds in gather_tiles.kinds_of(order, cuts, q.device).kinds for kind in kinds]


def test_stride_groups_need_no_mask():
    spec = GNA((16, 24, 24), (8, 16, 12), (8, 8, 4))
    assert all(stats(one_grid(spec), lambda kind: kind.mask(torch.float32, 1) is None))


def test_blocked_attention_gathers_exactly_the_pairs_it_needs():
    spec = GNA((16, 24), 8, 8)
    pairs = stats(one_grid(spec), lambda kind: len(kind.first) * math.prod(kind.rows) * math.prod(kind.box))
    assert sum(pairs) == spec.num_tokens * 64


def test_groups_of_all_lengths_share_calls():
    spec = GNA((31, 28), (3, 4), (1, 2), (3, 5))
    kinds = stats(one_grid(spec), lambda kind: len(kind.first))
    assert len(kinds) <= 16


def test_equal_documents_share_calls():
    document = Document(Layout(DILATED), 3, 4, 5)
    alone, packed = (stats(Order((document,) * n), lambda kind: len(kind.first)) for n in (1, 3))
    assert packed == [3 * tiles for tiles in alone]


def test_extra_queries_go_together_where_memory_allows():
    order = order_of(GNA((16, 16), 5), prefix=100, suffix=50)
    rows = [stats(order, lambda kind: kind.queries.shape, memory_bytes)[-1] for memory_bytes in (2**28, 1)]
    assert rows[0] == (1, 150)
    assert 10 < rows[1][1] < 100  # not a row at a time, each of which would gather all keys


def test_extra_queries_do_not_part_the_heads_of_the_grid(monkeypatch):
    order = order_of(GNA((16, 16), 3), prefix=40)
    calls: list[tuple[int, int]] = []
    real = gather._Call._attend
    monkeypatch.setattr(
        gather._Call,
        "_attend",
        lambda self, q, k, v, h, kind, tiles: (
            calls.append((len(kind.step), len(k))) or real(self, q, k, v, h, kind, tiles)
        ),
    )
    check(order, tensors(order, 1, 4, 4), memory_bytes=600_000)
    assert {heads for box, heads in calls if box} == {4}
    assert max(heads for box, heads in calls if not box) < 4


def test_many_extra_keys_call_for_larger_tiles():
    order = order_of(GNA((64, 64), 5))
    _, k, v = tensors(order, 1, 1, 1, 64, 64, torch.float32)
    load = gather_tiles.load_of(k[0], v[0], 1, False, 2**28)
    few, many = (gather_tiles._choose(order.documents[0].layout, extra, load) for extra in (0, 5000))
    assert math.prod(many) > 4 * math.prod(few)


def test_heads_take_turns_when_memory_is_short(monkeypatch):
    spec = GNA((6, 8), (3, 4))
    monkeypatch.setattr(gather_tiles, "_choose", lambda *_: spec.shape)
    heads: list[int] = []
    real = gather._Call._attend
    monkeypatch.setattr(
        gather._Call, "_attend", lambda self, q, k, *a: heads.append(len(k)) or real(self, q, k, *a)
    )
    check(one_grid(spec), tensors(spec, heads=6, kv_heads=3), by_everything, memory_bytes=1_100_000)
    assert max(heads) < 6
    assert sum(heads) % 6 == 0


def test_a_tile_fits_the_memory_if_any_does():
    spec = GNA((32, 32), (16, 16))
    sizes = stats(
        one_grid(spec),
        lambda kind: math.prod(kind.box) * 4 * (128 + 2 * math.prod(kind.rows)),
        memory_bytes=2**18,
    )
    assert max(sizes) <= 2**18
