"""The oracle: who sees whom as Python sets, and dense attention in float64. It is written from the
definition and shares only the spec with the fast path, so that agreement means something."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gnaflex.spec import GNA, Axis, GNAError

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_MAX_PAIRS = 4 * 10**9  # of a dense mask, at one byte each
_CHUNK_BYTES = 256 * 2**20  # of temporaries at a time
_TEMPORARIES = 5  # score-sized tensors that are alive at once, no autograd


class _Text(NamedTuple):
    """The numbers of extra tokens of every document: around its grid, and keys alone at its end."""

    prefix: int
    suffix: int
    extra_kv: int


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


def dense_mask(spec: GNA | Sequence[GNA], *, prefix: int = 0, suffix: int = 0, extra_kv: int = 0) -> Tensor:
    """The whole mask, for tests and pictures of small problems.

    Args:
        spec: the problem, or the grids of packed documents, which do not see one another.
        prefix, suffix: extra tokens before and behind every grid, which see all and are seen by all of it.
        extra_kv: keys without queries at the end of every document, which all of it sees.

    Returns:
        bool [queries, keys] on the CPU, row-major; True where the query (row) sees the key (column).

    Raises:
        GNAError: no document, a negative number of tokens, or more than 4e9 pairs.

    Example:
        >>> import gnaflex
        >>> from gnaflex.reference import dense_mask
        >>> dense_mask(gnaflex.GNA(4, window=2, stride=2)).int().tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
        >>> dense_mask([gnaflex.GNA(2, window=1)] * 2, extra_kv=1).int().tolist()
        [[1, 0, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 1], [0, 0, 0, 0, 1, 1]]
    """
    documents = (spec,) if isinstance(spec, GNA) else tuple(spec)
    text = _Text(prefix, suffix, extra_kv)
    queries, keys = _counts(documents, text)
    what = f"{queries:,} tokens" if queries == keys else f"{queries:,} queries and {keys:,} keys"
    rule = f"a dense mask must not exceed {_MAX_PAIRS:,} pairs: {what} make {queries * keys:,}"
    remedy = f"It needs {queries * keys / 1e9:.1f} GB. Use allowed_keys(spec, query)"
    _require(queries * keys <= _MAX_PAIRS, rule, remedy)
    return _mask_rows(documents, text, range(queries))


def _counts(documents: Sequence[GNA], text: _Text) -> tuple[int, int]:
    """The queries and the keys of all documents."""
    _require(len(documents) > 0, "there must be a document: got none", "Give the GNA of every grid")
    rule = f"prefix, suffix and extra_kv must be at least 0: got {tuple(text)}"
    _require(min(text) >= 0, rule, "Use the number of extra tokens, or 0")
    queries = sum(text.prefix + spec.num_tokens + text.suffix for spec in documents)
    return queries, queries + text.extra_kv * len(documents)


def _mask_rows(documents: Sequence[GNA], text: _Text, queries: range) -> Tensor:
    """The rows ``queries`` of the dense mask: bool [len(queries), keys] on the CPU."""
    mask = torch.zeros(len(queries), _counts(documents, text)[1], dtype=torch.bool, device="cpu")
    query = key = 0
    for spec in documents:
        num_queries, num_keys = _counts((spec,), text)
        place = torch.arange(queries.start, queries.stop, device="cpu") - query
        mask[(place >= 0) & (place < num_queries), key : key + num_keys] = True
        token, first_key = place - text.prefix, key + text.prefix
        of_grid = (token >= 0) & (token < spec.num_tokens)
        mask[of_grid, first_key : first_key + spec.num_tokens] = _grid_rows(spec, token[of_grid])
        query, key = query + num_queries, key + num_keys
    return mask


def _grid_rows(spec: GNA, tokens: Tensor) -> Tensor:
    """The rows ``tokens`` [n] of the mask of a grid: bool [n, num_tokens] on the CPU."""
    rows = torch.ones(len(tokens), 1, dtype=torch.bool, device="cpu")
    for axis, coordinates in zip(spec.axes, torch.unravel_index(tokens, spec.shape), strict=True):
        distinct, which = torch.unique(coordinates, return_inverse=True)
        sees = torch.zeros(len(distinct), axis.length, dtype=torch.bool, device="cpu")
        for row, coordinate in zip(sees, distinct.tolist(), strict=True):
            row[list(_axis_keys(axis, coordinate))] = True
        rows = (rows[:, :, None] & sees[which][:, None, :]).flatten(1)
    return rows


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    specs: Sequence[Sequence[GNA]],
    *,
    prefix: int = 0,
    suffix: int = 0,
    extra_kv: int = 0,
    text_valid: Tensor | None = None,
    padding: Tensor | None = None,
    where: MaskMod | None = None,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    return_lse: bool = False,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over token sequences done plainly: every score, the mask, a softmax.

    Args:
        query: [batch, query heads, queries, head_dim], row-major as in :func:`dense_mask`.
        key: [batch, key heads, keys, head_dim].
        value: [batch, key heads, keys, value head_dim].
        specs: one entry for all heads, or one per query head with the same shapes. An entry holds the grids
            of the packed documents, usually one.
        prefix, suffix, extra_kv: as in :func:`dense_mask`.
        text_valid: integer [batch, runs], a column for each of prefix, suffix and extra_kv that is not 0: the
            keys of a run from this one on are not seen. [batch] if there is one run; one row may serve all.
        padding: integer [batch, rank]: grid tokens with a coordinate at or past its extent neither see nor
            are seen; one row may serve all. This and text_valid need a single document.
        where: FlexAttention's ``mask_mod(b, h, q_idx, kv_idx)``, row-major: which of these pairs count.
        scale, score_mod, return_lse, compute_dtype: as in :func:`reference_attention`.

    Returns:
        [batch, query heads, queries, value head_dim] in the dtype of ``query``. With ``return_lse`` also the
        log-sum-exp [batch, query heads, queries]. A row without keys gives zeros and -inf. Dtypes and memory
        as in :func:`reference_attention`.

    Raises:
        GNAError: shapes, dtypes or devices do not fit.

    Example:
        >>> import gnaflex, torch
        >>> from gnaflex.reference import masked_attention
        >>> query, key, value = torch.randn(3, 1, 2, 5, 8).unbind()
        >>> masked_attention(query, key, value, [[gnaflex.GNA(4, window=2)]], prefix=1).shape
        torch.Size([1, 2, 5, 8])
    """
    text, heads = _Text(prefix, suffix, extra_kv), [tuple(documents) for documents in specs]
    _check_sequences(query, key, value, heads, text)
    q, k, v = (x.to(compute_dtype) for x in (query, key, value))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    row_bytes = max(k[..., 0].numel(), 1) * compute_dtype.itemsize * _TEMPORARIES
    step = max(_CHUNK_BYTES // row_bytes, 1)
    if text_valid is not None or padding is not None:
        asks, seen = _valid(heads[0], text, text_valid, padding, len(query))
    parts = []
    for rows in (range(q.shape[2])[at : at + step] for at in range(0, q.shape[2], step)):
        scores = q[:, :, rows.start : rows.stop] @ k.mT * factor
        masks = {documents: _mask_rows(documents, text, rows) for documents in set(heads)}
        mask = torch.stack([masks[documents] for documents in heads])
        if text_valid is not None or padding is not None:
            mask = mask & asks[:, None, rows.start : rows.stop, None] & seen[:, None, None]
        mask = mask.to(q.device)
        ranges = range(q.shape[0]), range(q.shape[1]), rows, range(k.shape[2])
        indices = [torch.arange(each.start, each.stop, device=q.device) for each in ranges]
        if where is not None and scores.numel():
            mask = mask & _mapped(where, (), indices)
        if score_mod is not None and scores.numel():
            scores = _mapped(score_mod, (scores,), indices).to(scores.dtype)
        parts.append(_attend(scores, mask, v))
    output, lse = (torch.cat(part, 2) for part in zip(*parts, strict=True))
    output, lse_dtype = output.to(query.dtype), torch.promote_types(query.dtype, torch.float32)
    return (output, lse.to(lse_dtype)) if return_lse else output


def _valid(
    documents: Sequence[GNA], text: _Text, text_valid: Tensor | None, padding: Tensor | None, batch: int
) -> tuple[Tensor, Tensor]:
    """Which queries ask, bool [batch, queries], and which keys are seen, bool [batch, keys]; on the CPU."""
    rule = f"text_valid and padding need one document: got {len(documents)}"
    _require(len(documents) == 1, rule, "Leave out the tokens that do not count")
    spec, runs = documents[0], [run for run in text if run]
    lengths = _rows_of_batch("text_valid", text_valid, runs, batch)
    extents = _rows_of_batch("padding", padding, spec.shape, batch)
    at = torch.stack(torch.unravel_index(torch.arange(spec.num_tokens, device="cpu"), spec.shape))
    grid, columns = (at < extents[:, :, None]).all(1), iter(lengths.unbind(1))
    prefix, suffix, extra_kv = (
        torch.arange(run, device="cpu") < next(columns)[:, None] if run else grid[:, :0] for run in text
    )
    asks = torch.cat([torch.ones_like(prefix), grid, torch.ones_like(suffix)], 1)
    return asks, torch.cat([prefix, grid, suffix, extra_kv], 1)


def _rows_of_batch(name: str, given: Tensor | None, default: Sequence[int], batch: int) -> Tensor:
    """What was given, or the default, for every batch entry: [batch, len(default)] on the CPU."""
    rows = torch.tensor([*default], device="cpu")[None] if given is None else given.cpu()
    rows = rows[:, None] if rows.ndim == 1 else rows
    rows = rows.expand(batch, -1) if rows.ndim == 2 and len(rows) == 1 else rows
    _check_shape(name, rows, (batch, len(default)), "the batch and the tokens")
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
    extra_keys: Tensor | None = None,
    extra_values: Tensor | None = None,
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
        extra_keys: [batch, extra, key heads, head_dim], seen by every query (NATTEN: ``additional_keys``).
        extra_values: [batch, extra, key heads, value head_dim], their values; the softmax is one.
        scale: factor of the scores before ``score_mod``; ``head_dim ** -0.5`` if None.
        score_mod: FlexAttention's ``score_mod(score, b, h, q_idx, kv_idx)``, row-major, extra keys counted
            behind the grid; the mask comes after.
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
    rule = f"query must be [batch, *shape, heads, head_dim]: got {query.ndim} dimensions < 4"
    _require(query.ndim >= 4, rule, f"query is {tuple(query.shape)}. Add what it lacks")
    _check_shape(
        "key", key, (*query.shape[:-2], *key.shape[-2:-1], query.shape[-1]), f"query {tuple(query.shape)}"
    )
    _check_shape("value", value, (*key.shape[:-1], *value.shape[-1:]), f"key {tuple(key.shape)}")
    spec = GNA(tuple(query.shape[1:-2]), window, stride, dilation, is_causal)
    q, k, v = (x.flatten(1, -3) for x in (query, key, value))
    if extra_keys is not None or extra_values is not None:
        k, v = _with_extra(k, v, extra_keys, extra_values)
    result = masked_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        [[spec]],
        extra_kv=k.shape[1] - spec.num_tokens,
        scale=scale,
        score_mod=score_mod,
        return_lse=True,
        compute_dtype=compute_dtype,
    )
    output, lse = (x.transpose(1, 2).unflatten(1, spec.shape) for x in result)
    return (output, lse) if return_lse else output


def _with_extra(
    key: Tensor, value: Tensor, extra_keys: Tensor | None, extra_values: Tensor | None
) -> tuple[Tensor, Tensor]:
    """key and value [batch, tokens, heads, channels] with the extra ones behind."""
    if extra_keys is None or extra_values is None:
        raise GNAError("extra_keys and extra_values come together: one is None.\n  Give both or neither.")
    _check_alike(key=key, extra_keys=extra_keys, extra_values=extra_values)
    count = extra_keys.shape[1:2]
    _check_shape("extra_keys", extra_keys, (len(key), *count, *key.shape[2:]), "key")
    _check_shape("extra_values", extra_values, (len(key), *count, *value.shape[2:]), "extra_keys and value")
    return torch.cat([key, extra_keys], 1), torch.cat([value, extra_values], 1)


def _mapped(mod: Callable[..., Tensor], scores: tuple[Tensor, ...], indices: Sequence[Tensor]) -> Tensor:
    """A ``score_mod`` of scores [B, H, rows, keys], or a ``mask_mod``, of all indices: [B, H, rows, keys]."""
    modded = mod
    for mapped in (3, 2, 1, 0):
        of_indices = (0 if index == mapped else None for index in range(4))
        modded = torch.vmap(modded, in_dims=(*(0 for _ in scores), *of_indices))
    try:
        return modded(*scores, *indices)
    except RuntimeError as error:  # torch 2.9 indexes no tensor by a mapped index, but as FlexAttention does
        if ".item()" not in str(error):
            raise
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    with TransformGetItemToIndex():
        return modded(*scores, *indices)


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


def _check_sequences(
    query: Tensor, key: Tensor, value: Tensor, heads: Sequence[Sequence[GNA]], text: _Text
) -> None:
    _check_alike(query=query, key=key, value=value)
    rule = f"query, key and value must be floating point: got {query.dtype}"
    _require(query.is_floating_point(), rule, "Write query.float(), key.float(), value.float()")
    q, k, v = (tuple(x.shape) for x in (query, key, value))
    rule = f"query must be [batch, heads, tokens, head_dim]: got {len(q)} dimensions"
    _require(len(q) == 4, rule, f"query is {q}. Use 4 dimensions")
    shapes = {tuple(spec.shape for spec in documents) for documents in heads}
    rule = f"specs must have one entry, or one per query head: got {len(heads)} for {q[1]} heads"
    rule = f"{rule}, on {len(shapes)} kinds of grids"
    _require(len(heads) in (1, q[1]) and len(shapes) == 1, rule, "Give lists of GNA that share their shapes")
    queries, keys = _counts(heads[0], text)
    _check_shape("query", query, (*q[:2], queries, q[3]), "the tokens of specs, prefix and suffix")
    _check_shape("key", key, (q[0], *k[1:2], keys, q[3]), "query and the tokens with extra_kv")
    _check_shape("value", value, (*k[:3], *v[3:]), "key")
    rule = f"query heads must be a multiple of key heads: got {q[1]} and {k[1]}"
    _require(k[1] > 0 and q[1] % k[1] == 0, rule, f"Use a number of key heads that divides {q[1]}")
    _require(q[3] > 0, f"head_dim must be at least 1: got head_dim={q[3]}", "Add a channel")


def _check_alike(**tensors: Tensor) -> None:
    first, *others = tensors
    for what in ("dtype", "device"):
        *got, last = (str(getattr(x, what)) for x in tensors.values())
        names = f"{', '.join(list(tensors)[:-1])} and {others[-1]}"
        rule = f"{names} must share one {what}: got {', '.join(got)} and {last}"
        _require({*got} == {last}, rule, f"Write {', '.join(f'{x}.to({first}.{what})' for x in others)}")


def _check_shape(name: str, x: Tensor, fits: tuple[int, ...], to: str) -> None:
    rule = f"{name} must fit {to}: got {tuple(x.shape)}"
    _require(x.shape == fits, rule, f"Give {name} the shape {fits}")


def _require(holds: bool, rule: str, remedy: str) -> None:
    if not holds:
        raise GNAError(f"{rule}.\n  {remedy}.")
