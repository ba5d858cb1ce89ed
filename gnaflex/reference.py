"""The oracle: who sees whom as Python sets, and dense attention in float64. It is written from the
definition and shares only the spec with the fast path, so that agreement means something."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gnaflex.spec import GNA, Axis, GNAError

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

_MAX_PAIRS = 4 * 10**9  # of a dense mask, at one byte each
_CHUNK_BYTES = 256 * 2**20  # of temporaries at a time
_TEMPORARIES = 5  # score-sized tensors that are alive at once, no autograd


def _axis_keys(axis: Axis, query: int) -> set[int]:
    """The coordinates that the query at coordinate ``query`` sees on one axis."""
    family = range(query % axis.dilation, axis.length, axis.dilation)
    me = family.index(query)
    first = me - me % axis.stride
    last = min(first + axis.stride, len(family)) - 1
    if axis.is_causal:
        return {family[place] for place in range(last - axis.window + 1, me + 1) if place >= 0}
    leader = min(first + axis.stride // 2, last)
    start = min(max(leader - axis.window // 2, 0), len(family) - axis.window)
    return set(family[start : start + axis.window])


def allowed_keys(spec: GNA, query: int) -> set[int]:
    """The tokens that one query token sees.

    Args:
        spec: the problem.
        query: a token, ``0 <= query < spec.num_tokens``, row-major (the last axis varies fastest).

    Returns:
        The row-major indices of its keys: ``prod(window)`` of them if no axis is causal, and never none.

    Raises:
        GNAError: ``query`` is no token of the grid.

    Example:
        >>> import gnaflex
        >>> from gnaflex.reference import allowed_keys
        >>> sorted(allowed_keys(gnaflex.GNA((4, 4), window=(2, 3), is_causal=(True, False)), 5))
        [0, 1, 2, 4, 5, 6]
    """
    rule = f"query must be a token of the grid: got query={query}, num_tokens={spec.num_tokens}"
    _require(0 <= query < spec.num_tokens, rule, f"Use a row-major index in range({spec.num_tokens})")
    steps = [math.prod(spec.shape[at + 1 :]) for at in range(spec.rank)]
    coordinates = [query // step % length for step, length in zip(steps, spec.shape, strict=True)]
    keys = itertools.product(*map(_axis_keys, spec.axes, coordinates))
    return {sum(step * at for step, at in zip(steps, key, strict=True)) for key in keys}


def dense_mask(spec: GNA) -> Tensor:
    """The whole mask, for tests and pictures of small problems.

    Returns:
        bool [num_tokens, num_tokens] on the CPU, row-major; True where the query (row) sees the key (column).

    Raises:
        GNAError: the mask has more than 4e9 pairs.

    Example:
        >>> import gnaflex
        >>> from gnaflex.reference import dense_mask
        >>> dense_mask(gnaflex.GNA(4, window=2, stride=2)).int().tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    """
    pairs = spec.num_tokens**2
    rule = f"a dense mask must not exceed {_MAX_PAIRS:,} pairs: {spec.num_tokens:,} tokens make {pairs:,}"
    _require(pairs <= _MAX_PAIRS, rule, f"It needs {pairs / 1e9:.1f} GB. Use allowed_keys(spec, query)")
    return _mask_rows(spec, range(spec.num_tokens))


def _mask_rows(spec: GNA, queries: range) -> Tensor:
    """The rows ``queries`` of the dense mask: bool [len(queries), num_tokens] on the CPU."""
    tokens = torch.arange(queries.start, queries.stop, device="cpu")
    rows = torch.ones(len(queries), 1, dtype=torch.bool, device="cpu")
    for axis, coordinates in zip(spec.axes, torch.unravel_index(tokens, spec.shape), strict=True):
        distinct, which = torch.unique(coordinates, return_inverse=True)
        sees = torch.zeros(len(distinct), axis.length, dtype=torch.bool, device="cpu")
        for row, coordinate in zip(sees, distinct.tolist(), strict=True):
            row[list(_axis_keys(axis, coordinate))] = True
        rows = (rows[:, :, None] & sees[which][:, None, :]).flatten(1)
    return rows


def reference_attention(
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
    return_lse: bool = False,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor]:
    """Generalized Neighborhood Attention done plainly: every score, the mask, a softmax.

    Args:
        query: [batch, *shape, query heads, head_dim], floating point; the grid has ``ndim - 3`` axes.
        key: [batch, *shape, key heads, head_dim]; query head ``h`` reads key head
            ``h // (query heads // key heads)``.
        value: [batch, *shape, key heads, value head_dim].
        window, stride, dilation, is_causal: as in :class:`gnaflex.GNA`.
        scale: factor of the scores before ``score_mod``; ``head_dim ** -0.5`` if None.
        score_mod: FlexAttention's ``score_mod(score, b, h, q_idx, kv_idx)``, row-major; the mask comes after.
        return_lse: also return the log-sum-exp of the masked scores.
        compute_dtype: dtype of every step; that of the inputs gives the plain computation of that dtype.

    Returns:
        [batch, *shape, query heads, value head_dim] in the dtype of ``query``. With ``return_lse`` also the
        log-sum-exp (natural log) [batch, *shape, query heads], float64 if the inputs are, else float32.
        A row that ``score_mod`` sends to -inf gives zeros and -inf. Scores take about 256 MB at a time
        (one query's, if that is more); autograd keeps all of them.

    Raises:
        GNAError: shapes, dtypes or devices do not fit, or the problem is not valid.

    Example:
        >>> import torch
        >>> from gnaflex.reference import reference_attention
        >>> query, key, value = torch.randn(3, 2, 6, 5, 4, 8).unbind()
        >>> reference_attention(query, key, value, window=(3, 2), dilation=(2, 1)).shape
        torch.Size([2, 6, 5, 4, 8])
    """
    _check_tensors(query, key, value)
    spec = GNA(tuple(query.shape[1:-2]), window, stride, dilation, is_causal)
    q, k, v = (x.flatten(1, -3).transpose(1, 2).to(compute_dtype) for x in (query, key, value))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    row_bytes = max(q[:, :, 0, 0].numel(), 1) * spec.num_tokens * compute_dtype.itemsize * _TEMPORARIES
    step = max(_CHUNK_BYTES // row_bytes, 1)
    chunks = [range(spec.num_tokens)[at : at + step] for at in range(0, spec.num_tokens, step)]
    parts = [_attend(_scores(q, k, factor, score_mod, rows), _mask_rows(spec, rows), v) for rows in chunks]
    output, lse = (torch.cat(part, 2).transpose(1, 2) for part in zip(*parts, strict=True))
    output = output.reshape(*query.shape[:-1], value.shape[-1]).to(query.dtype)
    lse = lse.reshape(query.shape[:-1]).to(torch.float64 if query.dtype == torch.float64 else torch.float32)
    return (output, lse) if return_lse else output


def _scores(q: Tensor, k: Tensor, factor: float, score_mod: ScoreMod | None, rows: range) -> Tensor:
    """The scores [B, H, rows, N] of the queries ``rows`` of q [B, H, N, D] with k [B, H, N, D]."""
    scores = q[:, :, rows.start : rows.stop] @ k.mT * factor
    if score_mod is None or not scores.numel():
        return scores
    modded = score_mod
    for mapped in (3, 2, 1, 0):
        modded = torch.vmap(modded, in_dims=(0, *(0 if index == mapped else None for index in range(4))))
    b, h, _, kv_idx = (torch.arange(size, device=q.device) for size in scores.shape)
    q_idx = torch.arange(rows.start, rows.stop, device=q.device)
    try:
        return modded(scores, b, h, q_idx, kv_idx).to(scores.dtype)
    except RuntimeError as error:  # torch 2.9 indexes no tensor by a mapped index, but as FlexAttention does
        if ".item()" not in str(error):
            raise
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    with TransformGetItemToIndex():
        return modded(scores, b, h, q_idx, kv_idx).to(scores.dtype)


def _attend(scores: Tensor, mask: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output [B, H, rows, D] and log-sum-exp [B, H, rows] of scores [B, H, rows, N] and v [B, H, N, D]."""
    scores = scores.masked_fill(~mask.to(scores.device), -torch.inf)
    top = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    unseeing = total == 0
    total = total.masked_fill(unseeing, 1)
    lse = (top + total.log()).masked_fill(unseeing, -torch.inf)
    return (weights / total) @ v, lse.squeeze(-1)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    q, k, v = (tuple(x.shape) for x in (query, key, value))
    rule = "query must be [batch, *shape, heads, head_dim]"
    _require(len(q) >= 4, f"{rule}: got {len(q)} dimensions < 4", f"query is {q}. Add what it lacks")
    for what in ("dtype", "device"):
        first, second, third = (getattr(x, what) for x in (query, key, value))
        rule = f"query, key and value must share one {what}: got {first}, {second} and {third}"
        _require(first == second == third, rule, f"Write key.to(query.{what}), value.to(query.{what})")
    rule = f"query, key and value must be floating point: got {query.dtype}"
    _require(query.is_floating_point(), rule, "Write query.float(), key.float(), value.float()")
    for name, got, fits in (("key", k, (*q[:-2], *k[-2:-1], q[-1])), ("value", v, (*k[:-1], *v[-1:]))):
        rule = f"key must fit query, and value key: {name} is {got}, query is {q}"
        _require(got == fits, rule, f"Use a {name} of shape {fits}")
    rule = f"query heads must be a multiple of key heads: got {q[-2]} and {k[-2]}"
    _require(k[-2] > 0 and q[-2] % k[-2] == 0, rule, f"Use a number of key heads that divides {q[-2]}")
    _require(q[-1] > 0, f"head_dim must be at least 1: got head_dim={q[-1]}", f"query is {q}. Add a channel")


def _require(holds: bool, rule: str, remedy: str) -> None:
    if not holds:
        raise GNAError(f"{rule}.\n  {remedy}.")
