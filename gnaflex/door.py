"""The door: ``flex_attention``, ``attention``, and ``explain``, which says what backend runs a call."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask
from torch.nn.attention.flex_attention import flex_attention as _torch_flex_attention

from gnaflex import flash, lanes
from gnaflex.advice import notes
from gnaflex.checks import autocast, check_call, check_grids, check_score_mod, extra_pair
from gnaflex.dispatch import (
    AUTO,
    BACKENDS,
    Call,
    Explanation,
    kernel_advice,
    kernel_lane,
    known,
    reasons_against,
    run,
)
from gnaflex.mask import ScoreMod
from gnaflex.origin import record_of
from gnaflex.routes import Problem, Route, attended
from gnaflex.spec import GNA, GNAError

traced_flex_attention: Any = _torch_flex_attention  # its overloads know no optional arguments


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict[str, Any] | None = None,
    *,
    return_aux: AuxRequest | None = None,
    backend: str = "auto",
) -> Any:
    """``torch.nn.attention.flex_attention.flex_attention``, compiled by itself and dispatched to the fastest
    backend that can run the call.

    Args:
        query: [batch, heads, tokens, head_dim]; key, value: the same with key heads (fewer with
            ``enable_gqa``) and, for the value, its own head_dim. Any strides. Tokens lie in the order of
            the mask; nothing is permuted.
        score_mod, block_mask, scale, enable_gqa, return_lse, kernel_options, return_aux: as in torch. Indices
            that a score_mod sees count in the order of the mask.
        backend: "auto", or one of "cuda", "flash" (FlexAttention's FLASH backend: flash-attn-4), "flex"
            (FlexAttention, compiled standalone), "sdpa" (the key box of every query tile gathered, then
            scaled_dot_product_attention) and "reference" (dense, float64). One asked for by name never falls
            back.

    Returns:
        The output in the dtype of the query (under autocast: the autocast dtype, as with SDPA); with
        ``return_lse`` also the log-sum-exp [batch, heads, tokens], natural logarithm, float32.

    Raises:
        GNAError: tensors and mask do not fit.
        NotImplementedError: the backend cannot run the call; the message lists every reason.

    Example:
        >>> import torch, gnaflex
        >>> bm = gnaflex.block_mask((8, 8), window=4, stride=4, device="cpu")
        >>> q, k, v = torch.randn(3, 1, 2, 64, 16).unbind(0)
        >>> gnaflex.flex_attention(q, k, v, block_mask=bm, backend="sdpa").shape
        torch.Size([1, 2, 64, 16])
    """
    if return_lse and return_aux is not None:
        raise GNAError("return_lse and return_aux exclude each other. Write return_aux=AuxRequest(lse=True).")
    plain = score_mod is None and return_aux is None and not kernel_options
    if plain and (lane := _lane(block_mask, (query, key, value), scale, enable_gqa, backend)):
        out, lse = lane(query, key, value)
        return (out, lse) if return_lse else out
    aux = AuxRequest(lse=True) if return_lse else return_aux
    query, key, value = autocast(query, key, value)
    record = None if block_mask is None else record_of(block_mask)
    call = Call(query, key, value, score_mod, block_mask, record, scale, enable_gqa, kernel_options, aux)
    check_call(call)
    out = _while_compiling(call, backend) if torch.compiler.is_dynamo_compiling() else run(call, backend)
    if return_lse:
        return out[0], out[1].lse
    return out


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | str | Sequence[int | str] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    extra_keys: Tensor | None = None,
    extra_values: Tensor | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Any:
    """Neighborhood attention on heads-last grids (NATTEN's layout), in the token order that costs least.

    Args:
        query: [batch, *shape, heads, head_dim]; key, value: the same, with fewer heads for GQA and, for the
            value, its own head_dim.
        window, stride, dilation, is_causal: the problem, as in :class:`GNA`; the shape is the tensors'.
        scale: of the scores; None is ``head_dim ** -0.5``.
        score_mod: FlexAttention's; it sees row-major token indices, extra keys behind the grid's.
        extra_keys, extra_values: [batch, extra, heads of the key, head_dim] and the like for the value: keys
            that every query sees beside its window (NATTEN's ``additional_keys``), in the same softmax.
        backend: as in :func:`flex_attention`.
        return_lse: also return the log-sum-exp [batch, *shape, heads], natural logarithm, float32.

    Returns:
        [batch, *shape, heads, head_dim of the value], in the dtype of the query.

    Raises:
        GNAError: the problem or the tensors are refused.
        NotImplementedError: the backend cannot run the call; the message lists every reason.

    Example:
        >>> import torch, gnaflex
        >>> q, k, v = torch.randn(3, 1, 8, 8, 2, 16).unbind(0)
        >>> gnaflex.attention(q, k, v, window=(4, 4), stride=2, backend="sdpa").shape
        torch.Size([1, 8, 8, 2, 16])
    """
    if torch.compiler.is_dynamo_compiling():
        return _attention_while_compiling(
            query, key, value, extra_keys, extra_values, (window, stride, dilation, is_causal),
            scale, score_mod, backend, return_lse,
        )  # fmt: skip
    given, form = (query, key, value), (window, stride, dilation, is_causal)
    plain = score_mod is None and extra_keys is None and extra_values is None
    if plain and (lane := _lane(_grids, given, scale, form, backend)):
        out, lse = lane(*given)
        out = out.transpose(1, 2).reshape(query.shape)
        return (out, lse.transpose(1, 2).reshape(query.shape[:-1])) if return_lse else out
    query, key, value, *extra = autocast(*given, *extra_pair(key, value, extra_keys, extra_values))
    shape = query.shape
    check_grids(query, key, value)
    known(backend)
    count = extra[0].shape[1] if extra else 0
    spec = GNA(shape[1:-2], *form) if not lanes.is_plain(form) else None
    problem = _problem(count, shape[1:-2], *form) if spec is None else Problem(spec, extra_kv=count)
    if score_mod is not None:
        check_score_mod(score_mod, (problem.row_major.order,), query.shape[-2])
    aux = AuxRequest(lse=True) if return_lse else None

    def call_in(order: Route) -> Call:
        q, k, v = order.heads_first(query, key, value, *extra)
        gqa = query.shape[-2] != key.shape[-2]
        return Call(q, k, v, score_mod, None, order.record, scale, gqa, None, aux)

    order, name, call, out = attended(problem, backend, score_mod, query.device, call_in)
    if (
        backend == "auto"
        and name == "cuda"
        and plain
        and [x.data_ptr() for x in given] == [x.data_ptr() for x in _tensors(call)]
    ):
        lanes.keep(_grids, given, scale, form, kernel_lane(call))
    if aux is None:
        return order.heads_last(out, shape)
    return order.heads_last(out[0], shape), order.heads_last(out[1].lse[..., None], shape)[..., 0]


_grids = lanes.Owner()  # of the lanes of heads-last grids


def _tensors(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    return call.query, call.key, call.value


def _lane(
    owner: Any, tensors: tuple[Tensor, Tensor, Tensor], scale: float | None, form: Hashable, backend: str
) -> lanes.Ready | None:
    """A kernel that ran such a call before, for eager calls that may take one."""
    if owner is None or torch.compiler.is_dynamo_compiling() or backend not in ("auto", "cuda"):
        return None
    return lanes.ready(owner, tensors, scale, form)


@lru_cache(maxsize=64)
def _problem(
    extra_kv: int, shape: tuple[int, ...], window: Any, stride: Any, dilation: Any, is_causal: Any
) -> Problem:
    return Problem(GNA(shape, window, stride, dilation, is_causal), extra_kv=extra_kv)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask | None = None,
    *,
    score_mod: ScoreMod | None = None,
    return_lse: bool = False,
) -> Explanation:
    """Which backend :func:`flex_attention` takes for these tensors, why not each of the others, and what the
    mask asks for: its tokens, how many blocks are full and partial, what keeps blocks from being full, the
    memory of lists per head, and an order that touches far fewer blocks, if there is one.

    Args are those of :func:`flex_attention`; nothing runs.

    Example:
        >>> import torch, gnaflex
        >>> bm = gnaflex.block_mask((8, 8), window=4, device="cpu")
        >>> q = torch.randn(1, 2, 64, 16, requires_grad=True)
        >>> print(gnaflex.explain(q, q, q, bm))
        backend: sdpa
          cuda: it needs a Hopper or Blackwell data-centre GPU (compute capability 9.0, 10.0, 10.3), the \
query is on cpu; it computes in bfloat16 and float16: the query is float32; head_dim must be 64 or 128: got \
16; GNA(shape=(8, 8), window=(4, 4)) needs masks inside tiles, whatever boxes of tokens the kernel takes; it \
has no backward: forward and backward go to FlexAttention together
          flash: it needs an NVIDIA GPU of the Blackwell or Hopper family, the query is on cpu; it computes\
 in bfloat16 and float16: the query is float32; it takes masks of intervals or tables: this one is \
form="packed". Write gnaflex.block_mask(..., form="interval"); it takes blocks of (256, 128) tokens: those \
of the mask have (128, 128). Write gnaflex.block_mask(..., block_size=(256, 128)); "auto" does not take it:\
 only trying tells whether its backward compiles, which comes too late to take another
          flex: FlexAttention has no backward on cpu
          reference: runs, but comes later
        mask: GNA(shape=(8, 8), window=(4, 4)), row-major; of 1 blocks of 128 x 128 0 are full, 1 partial
    """
    query, key, value = autocast(query, key, value)
    record = None if block_mask is None else record_of(block_mask)
    aux = AuxRequest(lse=True) if return_lse else None
    gqa = query.shape[1] != key.shape[1]
    call = Call(query, key, value, score_mod, block_mask, record, None, gqa, None, aux)
    check_call(call)
    reasons = reasons_against(call, BACKENDS)
    said: tuple[str, ...] = ()
    if record is not None and block_mask is not None:
        said = *notes(record), *kernel_advice(record, query.device)
    return Explanation(next((name for name in AUTO if not reasons[name]), None), reasons, said)


# ---- inside a user's torch.compile -------------------------------------------------------------------


def _while_compiling(call: Call, backend: str) -> Any:
    """On a GPU FlexAttention is traced into the user's graph, unless a kernel may run the call: then, as on a
    CPU, where a graph that holds anything else does not build, it becomes one opaque operator."""
    plain = call.score_mod is None and call.kernel_options is None and call.record is not None
    if plain and call.query.device.type == "cuda":
        from gnaflex.operators import may_take_kernel

        plain = backend != "flex" and (backend != "auto" or may_take_kernel(call))
    if not plain:
        options = flash.options_of(call) if backend == "flash" else call.kernel_options
        return traced_flex_attention(
            *call[:3],
            score_mod=call.score_mod,
            block_mask=call.block_mask,
            scale=call.scale,
            enable_gqa=call.enable_gqa,
            kernel_options=options,
            return_aux=call.aux,
        )
    assert call.record is not None
    assert call.block_mask is not None
    cuts = call.record.cuts
    if cuts is not None and cuts.where is not None:
        raise NotImplementedError(
            "a mask with where= cannot be traced by torch.compile on this device.\n"
            "  Call gnaflex.flex_attention outside the compiled function."
        )
    from gnaflex import operators  # 8 ms that only compiled functions need

    code: str = call.block_mask.mask_mod.gnaflex_code  # type: ignore[attr-defined]
    out, lse = operators.attend(
        call.query, call.key, call.value, cuts and cuts.text_valid, cuts and cuts.padding,
        code, bool(call.query.stride(1) < call.query.stride(2)), call.scale, call.aux is not None, backend,
    )  # fmt: skip
    return (out, AuxOutput(lse=lse)) if call.aux is not None else out


def _attention_while_compiling(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extra_keys: Tensor | None,
    extra_values: Tensor | None,
    problem: tuple[Any, ...],
    scale: float | None,
    score_mod: ScoreMod | None,
    backend: str,
    return_lse: bool,
) -> Any:
    if score_mod is not None:
        raise NotImplementedError(
            "gnaflex.attention with a score_mod cannot be traced by torch.compile.\n"
            "  Call it outside the compiled function, or use gnaflex.flex_attention with block_mask()."
        )
    from gnaflex import operators

    query, key, value, *extra = autocast(query, key, value, *extra_pair(key, value, extra_keys, extra_values))
    more: list[Any] = extra or [None, None]
    rank = query.dim() - 3
    fields = [operators.per_axis(value, rank) for value in problem]
    out, lse = operators.attend_grid(query, key, value, *more, *fields, scale, return_lse, backend)
    return (out, lse) if return_lse else out
