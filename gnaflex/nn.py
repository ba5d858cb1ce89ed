"""Modules for a model of your own: neighborhood attention with its projections.

Parameters are named, shaped and packed as in NATTEN's NeighborhoodAttention1D, 2D and 3D, so that weights
load either way. One class serves every rank: a module takes it from its input.
"""

from __future__ import annotations

import re
from ast import literal_eval
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gnaflex.bias import relative_bias as bias_of_offsets
from gnaflex.dispatch import known
from gnaflex.door import attention
from gnaflex.spec import GNA, GNAError, whole

NORMS: dict[str, type[nn.RMSNorm] | type[nn.LayerNorm]] = {"rms_norm": nn.RMSNorm, "layer_norm": nn.LayerNorm}
NORM_EPS = 1e-6  # of video diffusion transformers; torch's own differs between the two norms
BIAS_STD = 0.02  # of new relative biases: that of Swin Transformer and NAT
_LONG = 2**62  # tokens of an axis on which every window fits


class NeighborhoodAttention(nn.Module):
    """Neighborhood self-attention with its projections, on heads-last grids of any rank.

    Args:
        embed_dim: channels of the input and the output, a multiple of ``num_heads``; a head has
            ``embed_dim // num_heads``.
        num_heads: heads of the query.
        window, stride, dilation, is_causal: the problem, as in :class:`gnaflex.GNA` (window: NATTEN's
            ``kernel_size``). Where each is a scalar, the module takes grids of any rank.
        num_kv_heads: heads of key and value, a divisor of ``num_heads`` (grouped-query attention); None is
            ``num_heads``.
        qk_norm: None, or "rms_norm" or "layer_norm" of every head of query and key, with learned factors
            [head_dim], eps 1e-6.
        qkv_bias, proj_bias: whether the projections add a bias.
        scale: of the scores; None is ``head_dim ** -0.5``.
        proj_drop: probability of zeroing an entry of the output, in training only.
        relative_bias: whether to learn a bias per head and relative position, as
            :func:`gnaflex.relative_bias` counts it. It needs a window with a number for every axis.
        backend: as in :func:`gnaflex.attention`.
        device, dtype: of the parameters.

    Parameters: ``qkv.weight`` [(num_heads + 2 * num_kv_heads) * head_dim, embed_dim] with ``qkv.bias``, all
    heads of the query first, then those of the key, then those of the value; ``proj.weight`` [embed_dim,
    embed_dim] with ``proj.bias``; with qk_norm ``q_norm.*`` and ``k_norm.*`` [head_dim]; with relative_bias
    ``rpb`` [num_heads, \\*(2 * window - 1)]. The defaults have those of NATTEN 0.21's modules, and ``rpb`` is
    that of the older ones that took a bias (NAT, DiNAT), whose windows are odd.

    With relative_bias, "cuda" cannot run and "flash" cannot train; on a CPU "flex" never trains. Asked for by
    name they raise; "auto" takes a backend that can. torch.compile sees attention as one opaque operator.

    Raises:
        GNAError: an argument is refused; rules of the problem that need the grid are checked in the call.

    Example:
        >>> import torch
        >>> from gnaflex.nn import NeighborhoodAttention
        >>> layer = NeighborhoodAttention(64, num_heads=4, window=(3, 5), num_kv_heads=2, qk_norm="rms_norm")
        >>> layer(torch.randn(2, 8, 8, 64)).shape  # [batch, *shape, embed_dim]
        torch.Size([2, 8, 8, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        window: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | str | Sequence[int | str] = 1,
        is_causal: bool | Sequence[bool] = False,
        *,
        num_kv_heads: int | None = None,
        qk_norm: str | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        scale: float | None = None,
        proj_drop: float = 0.0,
        relative_bias: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed_dim, self.num_heads, self.num_kv_heads = _head_counts(embed_dim, num_heads, num_kv_heads)
        self.head_dim = self.embed_dim // self.num_heads
        problem = map(_plain, (window, stride, dilation, is_causal))
        self.window, self.stride, self.dilation, self.is_causal = problem
        self.rank = _checked_rank(self._problem)
        known(backend)
        self.backend, self.scale, self.qk_norm = backend, scale, qk_norm
        outputs = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv = nn.Linear(self.embed_dim, outputs, bias=qkv_bias, **factory)
        self.q_norm, self.k_norm = (_norm(qk_norm, self.head_dim, factory) for _ in range(2))
        self.proj = nn.Linear(self.embed_dim, self.embed_dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.rpb: nn.Parameter | None = None
        if relative_bias:
            extents = _bias_extents(self.window, self.rank)
            self.rpb = nn.Parameter(torch.empty(self.num_heads, *extents, **factory))
        self.reset_parameters()

    @property
    def _problem(self) -> tuple[Any, Any, Any, Any]:
        return self.window, self.stride, self.dilation, self.is_causal

    def reset_parameters(self) -> None:
        """New values for ``rpb``: a normal distribution of standard deviation 0.02, cut off at 2."""
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=BIAS_STD)

    def forward(self, x: Tensor) -> Tensor:
        """Attention of every token of a grid to its window.

        Args:
            x: [batch, \\*shape, embed_dim].

        Returns:
            [batch, \\*shape, embed_dim], in the dtype of x; under autocast in the autocast dtype.

        Raises:
            GNAError: the grid does not fit the module, or the window does not fit the grid.
            NotImplementedError: the backend cannot run the call; the message lists every reason.
        """
        self._check(x)
        heads = self.num_heads, self.num_kv_heads, self.num_kv_heads
        query, key, value = self.qkv(x).unflatten(-1, (-1, self.head_dim)).split(heads, dim=-2)
        out = self._attend(_normed(query, self.q_norm), _normed(key, self.k_norm), value)
        projected: Tensor = self.proj_drop(self.proj(out.flatten(-2)))
        return projected

    def extra_repr(self) -> str:
        """The arguments, those that have their defaults left out."""
        defaults: dict[str, Any] = {"embed_dim": None, "num_heads": None, "window": None}
        defaults |= {"stride": 1, "dilation": 1, "is_causal": False, "num_kv_heads": self.num_heads}
        defaults |= {"qk_norm": None, "scale": None, "backend": "auto"}
        shown = {name: getattr(self, name) for name in defaults if getattr(self, name) != defaults[name]}
        shown |= {} if self.rpb is None else {"relative_bias": True}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def _check(self, x: Tensor) -> None:
        shape, axes = tuple(x.shape), x.ndim - 2
        if axes < 1 or self.rank not in (None, axes):
            remedy = f"NeighborhoodAttention(..., window={(7,) * axes}), say, for {axes} axes"
            if axes < (self.rank or 1):
                remedy = "x[None] for one entry of a batch, x.unflatten(1, shape) for tokens in a row"
            raise GNAError(
                f"x must be [batch, *shape, embed_dim] with {self.rank or 'any'} axes for "
                f"NeighborhoodAttention({self.extra_repr()}): got {max(axes, 0)}, x is {shape}.\n"
                f"  Write {remedy}."
            )
        if shape[-1] != self.embed_dim:
            is_first = shape[1] == self.embed_dim
            remedy = "x.movedim(1, -1)" if is_first else f"NeighborhoodAttention(embed_dim={shape[-1]}, ...)"
            raise GNAError(
                f"x must have embed_dim={self.embed_dim} channels on its last axis: got {shape[-1]}, x is "
                f"{shape}.\n  Write {remedy}."
            )

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.rpb is None or not torch.compiler.is_dynamo_compiling():
            return _attention(query, key, value, self.rpb, self._problem, self.scale, self.backend)
        rest = repr(self._problem), self.scale, self.backend
        return attend_biased(query, key, value, self.rpb, *rest)  # type: ignore[no-any-return]


def _normed(x: Tensor, norm: nn.RMSNorm | nn.LayerNorm | None) -> Tensor:
    """Computed in the dtype of the factors, which autocast leaves wider than x."""
    return x if norm is None else norm(x.to(norm.weight.dtype)).to(x.dtype)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor | None,
    problem: Any, scale: float | None, backend: str,
) -> Tensor:  # fmt: skip
    """:func:`gnaflex.attention`, with the relative bias of a table."""
    mod = None
    if table is not None:
        # contiguous: channels_last moves the table of a 3-D window, which has four dimensions
        mod = bias_of_offsets(GNA(query.shape[1:-2], *problem), table.contiguous())
    out: Tensor = attention(query, key, value, *problem, scale=scale, score_mod=mod, backend=backend)
    return out


# ---- arguments ---------------------------------------------------------------------------------------


def _head_counts(embed_dim: Any, num_heads: Any, num_kv_heads: Any) -> tuple[int, int, int]:
    channels, heads = whole("embed_dim", embed_dim), whole("num_heads", num_heads)
    kv_heads = heads if num_kv_heads is None else whole("num_kv_heads", num_kv_heads)
    if channels % heads:
        raise GNAError(
            f"embed_dim must be a multiple of num_heads: got embed_dim={channels}, num_heads={heads}.\n"
            f"  Write embed_dim={-(-channels // heads) * heads}, or a divisor of {channels} for num_heads."
        )
    if heads % kv_heads:
        nearest = max(n for n in range(1, min(kv_heads, heads) + 1) if heads % n == 0)
        raise GNAError(
            f"num_heads must be a multiple of num_kv_heads: got num_heads={heads}, num_kv_heads={kv_heads}.\n"
            f"  Write num_kv_heads={nearest}."
        )
    return channels, heads, kv_heads


def _plain(value: Any) -> Any:
    """Python's own numbers and tuples: they hash, and torch.compile takes them for constants."""
    value = value.tolist() if hasattr(value, "tolist") else value
    is_scalar = isinstance(value, str) or not isinstance(value, Sequence)
    return value if is_scalar else tuple(map(_plain, value))


def _checked_rank(problem: tuple[Any, ...]) -> int | None:
    """The rank that the arguments name, or None. Every rule that needs no grid is checked: on one so long
    that all windows fit."""
    ranks = [len(field) for field in problem if isinstance(field, tuple)]
    try:
        GNA((_LONG,) * max(ranks, default=1), *problem)
    except GNAError as error:
        here = re.sub(r"GNA\(shape=\([^)]*\), ", "NeighborhoodAttention(embed_dim, num_heads, ", str(error))
        raise GNAError(re.sub(r"\d{12,}", "-1", here)) from None  # a remedy of that length: the whole axis
    return ranks[0] if ranks else None


def _norm(kind: str | None, head_dim: int, factory: dict[str, Any]) -> nn.RMSNorm | nn.LayerNorm | None:
    if kind is not None and kind not in NORMS:
        raise GNAError(f'qk_norm must be None, "rms_norm" or "layer_norm": got {kind!r}. Write qk_norm=None.')
    return None if kind is None else NORMS[kind](head_dim, eps=NORM_EPS, **factory)


def _bias_extents(window: Any, rank: int | None) -> list[int]:
    """Of the table of a relative bias: offsets from ``1 - window`` to ``window - 1`` on every axis."""
    windows = window if isinstance(window, tuple) else (window,) * (rank or 0)
    if not windows or -1 in windows:
        raise GNAError(
            "relative_bias=True needs the window of every axis, which sizes its table: got "
            f"window={window}.\n  Write window=(7, 7) for two axes, say."
        )
    return [2 * entry - 1 for entry in windows]


# ---- inside a user's torch.compile: gnaflex.attention takes no score_mod there -----------------------------


@torch.library.custom_op("gnaflex::attend_biased", mutates_args=())
def attend_biased(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, problem: str, scale: float | None, backend: str
) -> Tensor:
    """Attention with a learned relative bias as one operator; the problem travels as text."""
    with _keys_of_plain_code():
        out = _attention(q, k, v, table, literal_eval(problem), scale, backend)
        return out.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("gnaflex::attend_biased_backward", mutates_args=())
def attend_biased_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor, problem: str, scale: float | None
) -> list[Tensor]:
    """Gradients of :func:`attend_biased`, by running it again with a backend that trains."""
    from gnaflex.operators import recomputed  # loads torch's compiler, which is there by now

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return _attention(query, key, value, bias, literal_eval(problem), scale, "auto")

    with _keys_of_plain_code():
        return recomputed(run, (q, k, v, table), (grad,), lse=False)


def _keys_of_plain_code() -> Any:
    """An operator runs without autograd's dispatch keys and, under a dispatch mode, without those of the vmap
    in "sdpa"; here they are back. Only autocast stays away: its work is done before."""
    kept = excluded = torch._C._dispatch_tls_local_exclude_set()
    for name, key in torch._C.DispatchKey.__members__.items():
        if excluded.has(key) and not name.startswith("Autocast"):
            kept = kept - torch._C.DispatchKeySet(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), kept)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.rest = inputs[4:6]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grads = attend_biased_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return *grads, None, None, None


attend_biased.register_fake(lambda q, k, v, *_: q.new_empty((*q.shape[:-1], v.shape[-1])))
attend_biased_backward.register_fake(lambda _, *given: [x.new_empty(x.shape) for x in given[:4]])
attend_biased.register_autograd(_differentiate, setup_context=_keep)
