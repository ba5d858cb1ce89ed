"""Attention as opaque torch operators, for use inside a user's ``torch.compile``.

The operators take the problem as text or integers and run the same code as an eager call. Their backward
recomputes the forward with gradients, by the backend that "auto" takes for training.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from gnaflex import flex
from gnaflex.cuts import Cuts
from gnaflex.mask import decoded
from gnaflex.origin import own_record
from gnaflex.spec import GNAError

MAX_DILATION = -1  # how dilation="max" travels


def per_axis(value: Any, rank: int) -> list[Any]:
    """One entry per axis; "max" and flags as integers."""
    entries = list(value) if isinstance(value, (tuple, list)) else [value] * rank
    return [MAX_DILATION if entry == "max" else int(entry) for entry in entries]


@lru_cache(maxsize=32)
def _mask(code: str, device: torch.device, has_text_valid: bool, has_padding: bool) -> BlockMask:
    """The mask that was encoded, its lengths zero until a call brings them."""
    record = decoded(code)
    document = record.order.documents[0]
    lengths = (len(document.texts) if has_text_valid else 0, document.spec.rank if has_padding else 0)
    if any(lengths):
        zeros = (torch.zeros(1, n, dtype=torch.int32, device=device) if n else None for n in lengths)
        text_valid, padding = zeros
        record = record.with_cuts(Cuts(text_valid, padding))
    from gnaflex.cuda_backend.machine import aside

    bm: BlockMask = aside(device, flex.compile_mask, record, device)
    return bm


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def kernel_may_run(code: str, device: str, dtype: str, *head_dims: int) -> bool:
    """Whether the problem, the device and the kind of tensors allow a CUTLASS kernel; asked while compiling,
    so by constants. ``code`` is the mask's (mask.encoded)."""
    from gnaflex.cuda_backend import known_reasons
    from gnaflex.dispatch import cheaper_masked

    record, on = decoded(code), torch.device(device)
    kind: torch.dtype = getattr(torch, dtype.removeprefix("torch."))
    reasons = known_reasons(record, on, kind, head_dims)
    return next(iter(reasons), None) is None and not cheaper_masked(record, record, on)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def flash_may_run(code: str, device: str, dtype: str, *head_dims: int) -> bool:
    """The same for FlexAttention's FLASH backend, where "auto" may take that."""
    from gnaflex import flash

    at, kind = torch.device(device), getattr(torch, dtype.removeprefix("torch."))
    return flash.leads(at) and next(flash.known_reasons(decoded(code), at, kind, head_dims), None) is None


def may_take_kernel(call: Any) -> bool:
    """Whether nothing that is known while compiling speaks against a kernel, ours or FLASH; the operator asks
    the rest."""
    cuts = call.record.cuts
    if cuts is not None and cuts.where is not None:
        return False
    if call.aux is not None and call.aux.max_scores:
        return False
    query, key, value = call.query, call.key, call.value
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return False
    code: str = call.block_mask.mask_mod.gnaflex_code
    constants = code, str(query.device), str(query.dtype), query.shape[-1], value.shape[-1]
    ours = cuts is None or cuts.padding is None
    return (ours and bool(kernel_may_run(*constants))) or bool(flash_may_run(*constants))


def _run(
    q: Tensor, k: Tensor, v: Tensor, text_valid: Tensor | None, padding: Tensor | None,
    code: str, scale: float | None, lse: bool, backend: str,
) -> Any:  # fmt: skip
    from gnaflex import door

    bm = _mask(code, q.device, text_valid is not None, padding is not None)
    if text_valid is not None or padding is not None:
        record = own_record(bm).with_cuts(Cuts(text_valid, padding))
        bm = flex.recompiled(bm, record)
    gqa = q.shape[1] != k.shape[1]
    return door.flex_attention(
        q, k, v, block_mask=bm, scale=scale, enable_gqa=gqa, return_lse=lse, backend=backend
    )


def _run_grid(
    q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None,
    window: list[int], stride: list[int], dilation: list[int], is_causal: list[int],
    scale: float | None, lse: bool, backend: str,
) -> Any:  # fmt: skip
    from gnaflex import door

    steps = tuple("max" if step == MAX_DILATION else step for step in dilation)
    flags = tuple(bool(flag) for flag in is_causal)
    return door.attention(
        q, k, v, tuple(window), tuple(stride), steps, flags, extra_keys=extra_k, extra_values=extra_v,
        scale=scale, return_lse=lse, backend=backend,
    )  # fmt: skip


def _both(
    out: Any, query: Tensor, inputs: Sequence[Tensor], lse: bool, heads_last: bool = False
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp (empty when not asked for) as the fakes have them, sharing nothing with the
    inputs; copied only where they are not so."""
    first, second = out if lse else (out, query.new_empty(0, dtype=torch.float32))
    taken = {x.untyped_storage().data_ptr() for x in inputs}
    wanted = _output(query, first.shape[-1], heads_last)
    storage = first.untyped_storage()
    if first.stride() != wanted.stride() or storage.data_ptr() in taken or storage.nbytes() != first.nbytes:
        first = wanted.copy_(first)
    return first, second.contiguous()


def _output(query: Tensor, channels: int, heads_last: bool) -> Tensor:
    """Dense; ``heads_last`` has the tokens of [batch, heads, tokens, head_dim] around the heads in memory."""
    if heads_last:
        batch, heads, tokens, _ = query.shape
        return query.new_empty((batch, tokens, heads, channels)).transpose(1, 2)
    return query.new_empty((*query.shape[:-1], channels))


def _fake(query: Tensor, value: Tensor, lse: bool, heads_last: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    shape = query.shape[:-1] if lse else (0,)
    return _output(query, value.shape[-1], heads_last), query.new_empty(shape, dtype=dtype)


def _autograd_inside_an_operator() -> Any:
    """The implementation of an operator runs below autograd; this lets it use autograd once more. Nothing
    else changes: autocast lies among the excluded keys too, and must stay there."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        excluded = excluded - torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def recomputed(run: Any, inputs: Sequence[Tensor], grads: Sequence[Tensor], lse: bool) -> list[Tensor]:
    """Gradients of the inputs by running the forward again with gradients."""
    with torch.enable_grad(), _autograd_inside_an_operator():
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = run(*leaves)
        outputs = list(out) if lse else [out]
        found = torch.autograd.grad(outputs, leaves, list(grads)[: len(outputs)])
        return [_own(x.contiguous()) for x in found]


def _own(x: Tensor) -> Tensor:
    """A tensor that shares no memory: the gradients of joined keys are parts of one."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


@torch.library.custom_op("gnaflex::attend", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, text_valid: Tensor | None, padding: Tensor | None,
    code: str, heads_last: bool, scale: float | None, lse: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """flex_attention of a mask of gnaflex as one operator; the second output is empty unless ``lse``."""
    out = _run(q, k, v, text_valid, padding, code, scale, lse, backend)
    return _both(out, q, (q, k, v), lse, heads_last)


@torch.library.custom_op("gnaflex::attend_backward", mutates_args=())
def attend_backward(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    text_valid: Tensor | None, padding: Tensor | None, code: str, heads_last: bool, scale: float | None,
    lse: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of :func:`attend`."""
    return recomputed(
        lambda a, b, c: _run(a, b, c, text_valid, padding, code, scale, lse, "auto"),
        (q, k, v),
        (grad, grad_lse),
        lse,
    )


@torch.library.custom_op("gnaflex::attend_grid", mutates_args=())
def attend_grid(
    q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None,
    window: list[int], stride: list[int], dilation: list[int], is_causal: list[int],
    scale: float | None, lse: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """attention on a heads-last grid as one operator; the second output is empty unless ``lse``."""
    rest = window, stride, dilation, is_causal, scale, lse, backend
    return _both(_run_grid(q, k, v, extra_k, extra_v, *rest), q, (q, k, v), lse)


@torch.library.custom_op("gnaflex::attend_grid_backward", mutates_args=())
def attend_grid_backward(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    extra_k: Tensor | None, extra_v: Tensor | None,
    window: list[int], stride: list[int], dilation: list[int], is_causal: list[int],
    scale: float | None, lse: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of :func:`attend_grid`."""
    rest: Any = window, stride, dilation, is_causal, scale, lse, "auto"
    if extra_k is None or extra_v is None:
        return recomputed(
            lambda a, b, c: _run_grid(a, b, c, None, None, *rest), (q, k, v), (grad, grad_lse), lse
        )
    inputs = q, k, v, extra_k, extra_v
    return recomputed(lambda *x: _run_grid(*x, *rest), inputs, (grad, grad_lse), lse)


def _register(forward: Any, backward: Any, rest: int) -> None:
    """Fakes and autograd of a pair of operators on q, k, v, two optional tensors, and ``rest`` arguments, the
    last of which are whether the log-sum-exp is wanted, and the backend. Gradients come back for q, k, v and,
    if there are as many, for the two."""

    def fake(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        return _fake(q, v, others[-2], forward is attend and others[3])

    def fake_backward(grad: Tensor, grad_lse: Tensor, *inputs: Any) -> list[Tensor]:
        differentiable = [x for x in inputs[:5] if x is not None and x.is_floating_point()]
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in differentiable]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.rest = inputs[5:-1]

    def differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        if ctx.rest[-1] and grad_lse is None:
            raise GNAError("the gradient of the log-sum-exp is missing")
        grads = backward(grad, grad_lse, *ctx.saved_tensors, *ctx.rest)
        return (*grads, *[None] * (5 + rest - len(grads)))

    forward.register_fake(fake)
    backward.register_fake(fake_backward)
    forward.register_autograd(differentiate, setup_context=setup_context)


_register(attend, attend_backward, 5)
_register(attend_grid, attend_grid_backward, 7)
