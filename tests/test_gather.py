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
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gnaflex import gather
from gnaflex.gather import attention
from gnaflex.layout import Layout, from_order, to_order
from gnaflex.reference import dense_mask, reference_attention
from gnaflex.spec import GNA, GNAError

SPEC = GNA((5, 7, 9), (3, 4, 6), (2, 1, 4), (1, 1, 1), (True, False, False))
DILATED = GNA((11, 13), (3, 4), (2, 3), (3, 2), (False, True))


def tensors(
    spec: GNA, batch=2, heads=2, kv_heads=2, dim=8, v_dim=8, dtype=torch.float64, seed=0
) -> list[Tensor]:
    """query, key, value, heads first, row-major."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (heads, dim), (kv_heads, dim), (kv_heads, v_dim)
    return [torch.randn(batch, h, spec.num_tokens, d, generator=generator, dtype=dtype) for h, d in sizes]


def oracle(spec: GNA, qkv: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """The reference's output and log-sum-exp, heads first, row-major."""
    grids = (x.transpose(1, 2).unflatten(1, spec.shape) for x in qkv)
    problem = spec.window, spec.stride, spec.dilation, spec.is_causal
    out, lse = reference_attention(*grids, *problem, return_lse=True, **options)
    return out.flatten(1, -3).transpose(1, 2), lse.flatten(1, -2).transpose(1, 2)


def random_layout(rng: random.Random, spec: GNA) -> Layout:
    if rng.random() < 0.4:
        return Layout(spec)
    kv_tile = tuple(rng.choice([1, 2, 3, 4]) for _ in spec.shape)
    return Layout(spec, tuple(t * rng.choice([1, 1, 2, 3]) for t in kv_tile), kv_tile)


def in_row_major(mod: Any, layout: Layout) -> Any:
    """``mod`` of row-major tokens as a score_mod of the layout's own."""
    if mod is None:
        return None
    token = torch.from_numpy(layout.row_major_tokens()[0])
    return lambda score, b, h, q_idx, kv_idx: mod(score, b, h, token[q_idx], token[kv_idx])


def check(
    spec: GNA, layout: Layout, qkv: list[Tensor], mod: Any = None, memory_bytes: int = 2**28, **options: Any
):
    """Output of both paths and log-sum-exp agree with the oracle on every real token."""
    want, want_lse = oracle(spec, qkv, score_mod=mod, **options)
    given = [to_order(x, layout) for x in qkv]
    options |= {"enable_gqa": True, "memory_bytes": memory_bytes, "score_mod": in_row_major(mod, layout)}
    plain = attention(*given, layout, **options)
    out, lse = attention(*given, layout, return_lse=True, **options)
    assert out.shape == plain.shape == (*given[0].shape[:3], given[2].shape[3])
    for got in (plain, out):
        torch.testing.assert_close(from_order(got, layout), want, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(from_order(lse, layout, -1), want_lse, atol=1e-12, rtol=1e-12)


def by_everything(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score * (1 + 0.1 * h) + torch.sin(q_idx * 0.7 + kv_idx * 0.3) + 0.2 * b


# ---- agreement ---------------------------------------------------------------------------------------


def test_every_small_problem_of_one_axis():
    for spec in all_1d(7):
        check(spec, Layout(spec), tensors(spec, batch=1, heads=1, kv_heads=1))


@pytest.mark.parametrize("seed", range(45))
def test_random_problems(seed):
    rng = random.Random(seed)
    spec = random_spec(rng, rng.randint(1, 4), 220)
    kv_heads = rng.choice([1, 2])
    qkv = tensors(spec, rng.choice([1, 2]), kv_heads * rng.choice([1, 3]), kv_heads, v_dim=rng.choice([8, 5]))
    memory_bytes = rng.choice([5_000, 30_000, 2**28])
    check(spec, random_layout(rng, spec), qkv, by_everything if seed % 3 == 0 else None, memory_bytes)


@pytest.mark.parametrize("tile", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("spec", [SPEC, DILATED], ids=["3d", "dilated"])
def test_every_tile_gives_the_same(spec, tile, monkeypatch):
    monkeypatch.setattr(gather, "_choose", lambda *_: (tile,) * spec.rank)
    for layout in (Layout(spec), Layout(spec, (4,) * spec.rank, (2,) * spec.rank)):
        check(spec, layout, tensors(spec))


def test_axes_of_one_token_and_many_axes():
    spec = GNA(
        (1, 3, 1, 2, 4, 2, 1), (1, 2, 1, 2, 3, 1, 1), 1, 1, (True, True, False, False, False, True, False)
    )
    check(spec, Layout(spec), tensors(spec))


def test_too_little_memory_takes_small_tiles_a_head_at_a_time():
    spec = GNA((4, 6), (2, 3), 1, (1, 2))
    check(spec, Layout(spec), tensors(spec), by_everything, memory_bytes=1)


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_scale(scale):
    check(SPEC, Layout(SPEC), tensors(SPEC), scale=scale)


@pytest.mark.parametrize("spec", [SPEC, DILATED], ids=["3d", "dilated"])
def test_a_padded_query_attends_with_the_window_it_copies(spec):
    layout = Layout(spec, (4,) * spec.rank, (2,) * spec.rank)
    q, k, v = (to_order(x, layout) for x in tensors(spec))
    tokens, is_pad = map(torch.from_numpy, layout.row_major_tokens())
    assert is_pad.any()
    q = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(1))
    scores = q @ from_order(k, layout).mT * 8**-0.5
    index = torch.arange(spec.num_tokens)
    heads = torch.arange(2)[:, None, None]
    scores = by_everything(scores, heads[..., None], heads, tokens[:, None], index)
    scores = scores.masked_fill(~dense_mask(spec)[tokens], -torch.inf)
    out, lse = attention(q, k, v, layout, score_mod=in_row_major(by_everything, layout), return_lse=True)
    torch.testing.assert_close(out, scores.softmax(-1) @ from_order(v, layout))
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_padded_keys_are_never_read():
    layout = Layout(DILATED, (4, 4), (2, 2))
    q, k, v = (to_order(x, layout) for x in tensors(DILATED))
    is_pad = torch.from_numpy(layout.row_major_tokens()[1])
    want = attention(q, k, v, layout)
    for x in (k, v):
        x[:, :, is_pad] = torch.nan
    assert torch.equal(attention(q, k, v, layout), want)


def test_a_row_without_keys_gives_zeros():
    blind = lambda score, b, h, q_idx, kv_idx: torch.where(q_idx == 3, -torch.inf, score)  # noqa: E731
    qkv = [x.requires_grad_() for x in tensors(SPEC)]
    out, lse = attention(*qkv, Layout(SPEC), score_mod=blind, return_lse=True)
    assert (out[:, :, 3] == 0).all()
    assert (lse[:, :, 3] == -torch.inf).all()
    (out.sum() + lse[:, :, 4:].sum()).backward()
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
    out, lse = attention(*qkv, Layout(DILATED), enable_gqa=True, score_mod=mod, return_lse=True)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    for a, b in zip(gradients(out.sin().sum(), qkv[2:]), gradients(want.sin().sum(), qkv[2:]), strict=True):
        torch.testing.assert_close(a, b)


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
@pytest.mark.parametrize("kind", ["row", "tile"])
@pytest.mark.parametrize("spec", [SPEC, DILATED], ids=["3d", "dilated"])
def test_gradients(spec, kind, mod, memory_bytes, recomputed):
    layout = Layout(spec) if kind == "row" else Layout(spec, (4,) * spec.rank, (2,) * spec.rank)
    qkv = [x.requires_grad_() for x in tensors(spec, heads=4, v_dim=6)]
    weight = torch.randn(2, 4, spec.num_tokens, 6, dtype=torch.float64)
    want, want_lse = oracle(spec, qkv, score_mod=mod)
    given = [to_order(x, layout) for x in qkv]
    options = {"enable_gqa": True, "score_mod": in_row_major(mod, layout), "memory_bytes": memory_bytes}
    out = from_order(attention(*given, layout, **options), layout)
    for a, b in zip(gradients((out * weight).sum(), qkv), gradients((want * weight).sum(), qkv), strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)
    want, want_lse = oracle(spec, qkv, score_mod=mod)
    out, lse = attention(*(to_order(x, layout) for x in qkv), layout, return_lse=True, **options)
    loss = (from_order(out, layout) * weight).sum() + from_order(lse, layout, -1).sin().sum()
    want_loss = (want * weight).sum() + want_lse.sin().sum()
    for a, b in zip(gradients(loss, qkv), gradients(want_loss, qkv), strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)
    assert bool(recomputed) == (memory_bytes < 2**28)


@pytest.mark.parametrize("memory_bytes", [1, 2**28], ids=["recomputed", "kept"])
def test_a_score_mod_may_train_its_parameters(memory_bytes):
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def mod(score, b, h, q_idx, kv_idx):
        return score + bias[h] * (q_idx - kv_idx)

    def without_indexing(score, b, h, q_idx, kv_idx):
        return score + (bias * (torch.arange(2) == h)).sum() * (q_idx - kv_idx)

    qkv = tensors(DILATED)
    out = attention(*qkv, Layout(DILATED), score_mod=mod, memory_bytes=memory_bytes)
    want, _ = oracle(DILATED, qkv, score_mod=without_indexing)
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), bias)[0] for x in (out, want)))


def test_what_inference_mode_cached_serves_training():
    spec = GNA((6, 10), (3, 5), (1, 2), (2, 1))
    qkv = tensors(spec)
    with torch.inference_mode():
        attention(*qkv, Layout(spec), return_lse=True)
        attention(*qkv, Layout(spec))
    qkv = [x.requires_grad_() for x in qkv]
    out, lse = attention(*qkv, Layout(spec), return_lse=True)
    assert len(gradients(out.sum() + lse.sum() + attention(*qkv, Layout(spec)).sum(), qkv)) == 3


# ---- tensors -----------------------------------------------------------------------------------------


def test_strided_inputs():
    q, k, v = tensors(SPEC)
    want = attention(q, k, v, Layout(SPEC))
    heads_last = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    channels_first = [x.mT.contiguous().mT for x in (q, k, v)]
    expanded = [x[:1].expand(3, -1, -1, -1) for x in (q, k, v)]
    torch.testing.assert_close(attention(*heads_last, Layout(SPEC)), want)
    torch.testing.assert_close(attention(*channels_first, Layout(SPEC)), want)
    torch.testing.assert_close(attention(*expanded, Layout(SPEC)), want[:1].expand(3, -1, -1, -1))


@pytest.mark.parametrize("mod", [None, by_everything], ids=["plain", "score_mod"])
def test_an_empty_batch(mod):
    q, k, v = (x.requires_grad_() for x in tensors(SPEC, batch=0, heads=4, v_dim=6))
    out, lse = attention(q, k, v, Layout(SPEC), enable_gqa=True, score_mod=mod, return_lse=True)
    plain = attention(q, k, v, Layout(SPEC), enable_gqa=True)
    assert out.shape == plain.shape == (0, 4, SPEC.num_tokens, 6)
    assert lse.shape == (0, 4, SPEC.num_tokens)
    assert gradients(out.sum() + plain.sum(), [q])[0].shape == q.shape


def test_heads_that_do_not_match_are_refused():
    q, k, v = tensors(SPEC, heads=4)
    with pytest.raises(GNAError, match="a multiple: got 4, 2, enable_gqa=False"):
        attention(q, k, v, Layout(SPEC))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", [SPEC, DILATED, GNA((16, 24), (5, 16), (1, 8))], ids=["3d", "dilated", "2d"])
def test_low_precision_is_as_good_as_plain_attention(spec, dtype):
    qkv = [x.to(dtype) for x in tensors(spec, dim=32, v_dim=32)]
    exact, exact_lse = oracle(spec, [x.double() for x in qkv])
    plain, _ = oracle(spec, qkv, compute_dtype=dtype)
    budget = 2 * (plain.double() - exact).abs().max()
    _, plain_lse = oracle(spec, qkv, compute_dtype=torch.float32)
    lse_budget = 2 * (plain_lse.double() - exact_lse).abs().max()
    out, lse = attention(*qkv, Layout(spec), return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert (lse.double() - exact_lse).abs().max() <= lse_budget
    for got in (out, attention(*qkv, Layout(spec))):
        assert (got.double() - exact).abs().max() <= budget


def test_autocast_leaves_the_log_sum_exp_alone():
    qkv = tensors(SPEC, dtype=torch.float32)
    _, want = attention(*qkv, Layout(SPEC), return_lse=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention(*qkv, Layout(SPEC), return_lse=True)[1], want)


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
def test_memory_is_bounded(memory_bytes, return_lse):
    spec = GNA((8, 32, 32), (4, 16, 16), (1, 4, 1))
    qkv = tensors(spec, 1, 2, 2, 16, 16, torch.float32)
    attention(*qkv, Layout(spec), return_lse=return_lse, memory_bytes=memory_bytes)
    with torch.no_grad(), PeakBytes(*qkv) as bytes_:
        attention(*qkv, Layout(spec), return_lse=return_lse, memory_bytes=memory_bytes)
    outputs = 3 * qkv[0].nbytes  # the tiles', one after another, and in the order of the layout
    assert bytes_.peak <= memory_bytes + outputs


def stats(layout: Layout, on: Callable[[Any], Any], memory_bytes: int = 2**28) -> list[Any]:
    q, k, v = tensors(layout.spec, 1, 1, 1, 64, 64, torch.float32)
    tile = gather._choose(layout, gather._load(k[0], v[0], 1, False, memory_bytes))
    return [on(kind) for kind in gather._tables(layout, tile, q.device).kinds]


def test_stride_groups_need_no_mask():
    spec = GNA((16, 24, 24), (8, 16, 12), (8, 8, 4))
    assert all(stats(Layout(spec), lambda kind: kind.mask(torch.float32, 1) is None))


def test_blocked_attention_gathers_exactly_the_pairs_it_needs():
    spec = GNA((16, 24), 8, 8)
    pairs = stats(Layout(spec), lambda kind: len(kind.first) * math.prod(kind.rows) * math.prod(kind.box))
    assert sum(pairs) == spec.num_tokens * 64


def test_groups_of_all_lengths_share_calls():
    spec = GNA((31, 28), (3, 4), (1, 2), (3, 5))
    kinds = stats(Layout(spec), lambda kind: len(kind.first))
    assert len(kinds) <= 16


def test_heads_take_turns_when_memory_is_short(monkeypatch):
    spec = GNA((6, 8), (3, 4))
    monkeypatch.setattr(gather, "_choose", lambda *_: spec.shape)
    heads: list[int] = []
    real = gather._Call._attend
    monkeypatch.setattr(
        gather._Call, "_attend", lambda self, q, k, *a: heads.append(len(k)) or real(self, q, k, *a)
    )
    check(spec, Layout(spec), tensors(spec, heads=6, kv_heads=3), by_everything, memory_bytes=1_100_000)
    assert max(heads) < 6
    assert sum(heads) % 6 == 0


def test_a_tile_fits_the_memory_if_any_does():
    spec = GNA((32, 32), (16, 16))
    sizes = stats(
        Layout(spec),
        lambda kind: math.prod(kind.box) * 4 * (128 + 2 * math.prod(kind.rows)),
        memory_bytes=2**18,
    )
    assert max(sizes) <= 2**18
