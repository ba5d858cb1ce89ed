"""Attention as opaque torch operators, for use inside a user's ``torch.compile``.

The operators take the problem as integers and run the same code as an eager call. Their backward recomputes
the forward with gradients, by the backend that "auto" takes for training.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from gnaflex.flex import compile_mask
from gnaflex.layout import Layout
from gnaflex.mask import MaskRecord, choose_form
from gnaflex.spec import GNA, GNAError

MAX_DILATION = -1  # how dilation="max" travels


def per_axis(value: Any, rank: int) -> list[Any]:
    """One entry per axis; "max" and flags as integers."""
    entries = list(value) if isinstance(value, (tuple, list)) else [value] * rank
    return [MAX_DILATION if entry == "max" else int(entry) for entry in entries]


def encoded(record: MaskRecord) -> list[int]:
    """A record as integers: rank, tiled or not, block size, the problem, the tiles."""
    spec, layout = record.layout.spec, record.layout
    rows = [spec.shape, spec.window, spec.stride, spec.dilation, spec.is_causal]
    if layout.q_tile is not None:
        rows += layout.tiles
    assert record.block_size is not None
    return [
        spec.rank,
        int(layout.q_tile is not None),
        *record.block_size,
        *(int(n) for row in rows for n in row),
    ]


def decoded(code: Sequence[int]) -> MaskRecord:
    """The record that :func:`encoded` wrote."""
    rank, is_tiled, *block = code[:4]
    rows = [tuple(code[4 + at * rank : 4 + (at + 1) * rank]) for at in range(7 if is_tiled else 5)]
    spec = GNA(rows[0], rows[1], rows[2], rows[3], tuple(bool(flag) for flag in rows[4]))
    layout = Layout(spec, *rows[5:])
    return MaskRecord(layout, choose_form(layout, "auto"), (block[0], block[1]))


@lru_cache(maxsize=32)
def _mask(code: tuple[int, ...], device: torch.device) -> BlockMask:
    return compile_mask(decoded(code), device)


def _run(
    q: Tensor, k: Tensor, v: Tensor, code: Sequence[int], scale: float | None, lse: bool, backend: str
) -> Any:
    from gnaflex import door

    bm = _mask(tuple(code), q.device)
    gqa = q.shape[1] != k.shape[1]
    return door.flex_attention(
        q, k, v, block_mask=bm, scale=scale, enable_gqa=gqa, return_lse=lse, backend=backend
    )


def _run_grid(
    q: Tensor, k: Tensor, v: Tensor, window: list[int], stride: list[int], dilation: list[int],
    is_causal: list[int], scale: float | None, lse: bool, backend: str,
) -> Any:  # fmt: skip
    from gnaflex import door

    steps = tuple("max" if step == MAX_DILATION else step for step in dilation)
    flags = tuple(bool(flag) for flag in is_causal)
    return door.attention(
        q, k, v, tuple(window), tuple(stride), steps, flags, scale=scale, return_lse=lse, backend=backend
    )


def _both(out: Any, query: Tensor, lse: bool) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp (empty when not asked for), contiguous, sharing nothing with the inputs."""
    first, second = out if lse else (out, query.new_empty(0, dtype=torch.float32))
    return first.clone(memory_format=torch.contiguous_format), second.contiguous()


def _fake(query: Tensor, value: Tensor, lse: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    shape = query.shape[:-1] if lse else (0,)
    return query.new_empty((*query.shape[:-1], value.shape[-1])), query.new_empty(shape, dtype=dtype)


def _autograd_inside_an_operator() -> Any:
    """The implementation of an operator runs below autograd; this lets it use autograd once more. Nothing
    else changes: autocast lies among the excluded keys too, and must stay there."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        excluded = excluded - torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def _recomputed(
    run: Any, q: Tensor, k: Tensor, v: Tensor, grads: Sequence[Tensor], lse: bool
) -> list[Tensor]:
    """Gradients of q, k, v by running the forward again with gradients."""
    with torch.enable_grad(), _autograd_inside_an_operator():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = run(*leaves)
        outputs = list(out) if lse else [out]
        return [x.contiguous() for x in torch.autograd.grad(outputs, leaves, list(grads)[: len(outputs)])]


@torch.library.custom_op("gnaflex::attend", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, code: list[int], scale: float | None, lse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """flex_attention of a mask of gnaflex as one operator; the second output is empty unless ``lse``."""
    return _both(_run(q, k, v, code, scale, lse, backend), q, lse)


@torch.library.custom_op("gnaflex::attend_backward", mutates_args=())
def attend_backward(
    grad: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    code: list[int],
    scale: float | None,
    lse: bool,
) -> list[Tensor]:
    """Gradients of :func:`attend`."""
    return _recomputed(
        lambda a, b, c: _run(a, b, c, code, scale, lse, "auto"), q, k, v, (grad, grad_lse), lse
    )


@torch.library.custom_op("gnaflex::attend_grid", mutates_args=())
def attend_grid(
    q: Tensor, k: Tensor, v: Tensor, window: list[int], stride: list[int], dilation: list[int],
    is_causal: list[int], scale: float | None, lse: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """attention on a heads-last grid as one operator; the second output is empty unless ``lse``."""
    return _both(_run_grid(q, k, v, window, stride, dilation, is_causal, scale, lse, backend), q, lse)


@torch.library.custom_op("gnaflex::attend_grid_backward", mutates_args=())
def attend_grid_backward(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, window: list[int], stride: list[int],
    dilation: list[int], is_causal: list[int], scale: float | None, lse: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of :func:`attend_grid`."""
    return _recomputed(
        lambda a, b, c: _run_grid(a, b, c, window, stride, dilation, is_causal, scale, lse, "auto"),
        q,
        k,
        v,
        (grad, grad_lse),
        lse,
    )


def _register(forward: Any, backward: Any, problem: slice) -> None:
    """Fakes and autograd of a pair of operators; ``problem`` is where its integers lie among the inputs."""
    lse_at = problem.stop + 1

    def fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return _fake(q, v, rest[lse_at - 3])

    def fake_backward(
        grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
    ) -> list[Tensor]:
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.rest = inputs[problem.start : lse_at + 1]

    def differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        if ctx.rest[-1] and grad_lse is None:
            raise GNAError("the gradient of the log-sum-exp is missing")
        grads = backward(grad, grad_lse, *ctx.saved_tensors, *ctx.rest)
        return (*grads, *[None] * (len(ctx.rest) + 1))

    forward.register_fake(fake)
    backward.register_fake(fake_backward)
    forward.register_autograd(differentiate, setup_context=setup_context)


_register(attend, attend_backward, slice(3, 4))
_register(attend_grid, attend_grid_backward, slice(3, 7))
