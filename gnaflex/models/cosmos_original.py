"""Neighborhood attention for NVIDIA's own code of Cosmos-Predict1 and Cosmos-Transfer1, not for diffusers'.

Its blocks call ``attn.attn_op``, Transformer Engine's DotProductAttention, with tokens first. What is said of
that code was read in cosmos-predict1 at 4ed35fa and cosmos-transfer1 at 5005e82.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gnaflex.door import attention
from gnaflex.models.recipes import Neighborhood, Schedule
from gnaflex.spec import GNAError

log = logging.getLogger("gnaflex")

Grid = tuple[int, ...]
GridSource = Sequence[int] | Callable[[], Grid | None] | None

# What the original op may be told without a change of its result; None and False change nothing, either.
NEUTRAL = {"core_attention_bias_type": "no_bias", "attn_mask_type": "no_mask", "qkv_format": "sbhd"}
# What the original code sets on an attn_op from outside, for parallel runs.
SET_FROM_OUTSIDE = {"cp_group", "cp_ranks", "cp_stream", "sequence_parallel"}
# How released configurations build a self-attention; others call their op with other layouts.
OF_ATTENTION = {"backend": "transformer_engine", "qkv_format": "sbhd"}


class CosmosAttention(torch.nn.Module):
    """Neighborhood attention that is called and answers like the ``attn_op`` of an original Cosmos block.

    It has no parameters and no state. :func:`replace_attention` puts one into every layer of a network.

    Args:
        window, stride, dilation: as in :class:`gnaflex.GNA`, a scalar or one entry per axis of the grid; or a
            :class:`~gnaflex.models.recipes.Neighborhood` as the window, which says all of it.
        grid: (frames, height, width) of the tokens, or a function that returns it for the call under way, or
            None if there is none.
        dense: the op for all other calls: cross-attention, another number of tokens, a grid smaller than the
            window, context parallelism (a rank holds a part of the tokens). The logger "gnaflex" tells each
            reason once. Without ``dense`` they raise.
        backend: as in :func:`gnaflex.attention`.

    Raises:
        GNAError: the problem is not valid on the grid. In a call also: a bias, a mask or another option that
            may change the result; or it is a call for ``dense``, and there is none.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 4 * 6 * 8, 2, 3, 16).unbind(0)  # [tokens, batch, heads, head_dim]
        >>> CosmosAttention((2, 4, 4), stride=2, grid=(4, 6, 8), backend="sdpa")(q, k, v).shape
        torch.Size([192, 2, 48])
    """

    dense: Any  # a function or a module

    def __init__(
        self,
        window: int | Sequence[int] | Neighborhood,
        stride: int | Sequence[int] = 1,
        dilation: int | str | Sequence[int | str] = 1,
        *,
        grid: GridSource = None,
        dense: Callable[..., Tensor] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.__dict__["dense"] = dense  # no submodule: its state is where it was
        self.neighborhood = _neighborhood(window, stride, dilation)
        self.grid = _plain(grid)
        self.backend = backend
        self.reasons: set[str] = set()
        if isinstance(self.grid, tuple):
            self.neighborhood.on(self.grid)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *more: Any, **options: Any) -> Tensor:
        """Attention over tokens, as Transformer Engine's op in the format "sbhd".

        Args:
            query, key, value: [tokens, batch, heads, head_dim], tokens row-major over the grid.
            more, options: what else the original op takes, as far as it changes nothing here.

        Returns:
            [tokens, batch, heads * head_dim] in the dtype of the query.
        """
        grid: Grid = (self.grid() if callable(self.grid) else self.grid) or ()
        if reason := self._reason(len(query), len(key), grid):
            out: Tensor = self._instead(reason)(query, key, value, *more, **options)
            return out
        _refuse_options({**{f"argument {at}": one for at, one in enumerate(more, 4)}, **options})
        form = self.neighborhood if self.neighborhood.base is None else self.neighborhood.on(grid)
        q, k, v = (x.reshape(*grid, *x.shape[1:]).movedim(len(grid), 0) for x in (query, key, value))
        fields = form.window, form.stride, form.dilation, form.is_causal
        out = attention(q, k, v, *fields, backend=self.backend)
        return out.flatten(1, -3).transpose(0, 1).flatten(2)

    def _reason(self, queries: int, keys: int, grid: Grid) -> str:
        """Why a call is not one over the grid, or ""."""
        if queries != keys:
            return f"it is cross-attention, of {queries} queries and {keys} keys"
        group = getattr(self.dense, "cp_group", None)
        if group is not None and group.size() > 1:
            return f"context parallelism gives each of {group.size()} ranks a part of the tokens"
        if not grid:
            return "no token grid is known"
        if math.prod(grid) != queries:
            return f"it has {queries} tokens, the grid {'x'.join(map(str, grid))} has {math.prod(grid)}"
        return self.neighborhood.too_large(grid)

    def _instead(self, reason: str) -> Any:
        if self.dense is None:
            raise GNAError(
                f"CosmosAttention takes self-attention over one whole grid only: {reason}.\n"
                "  Give it the original op for all else: CosmosAttention(..., dense=attn.attn_op)."
            )
        if reason not in self.reasons:
            self.reasons.add(reason)
            log.warning("gnaflex: a call of CosmosAttention stays dense: %s", reason)
        return self.dense

    def set_context_parallel_group(self, *args: Any, **options: Any) -> None:
        """What the original code calls for context parallelism: ``dense`` is told, and runs what follows."""
        if self.dense is None:
            self._instead("it has no context parallelism of its own")
        self.dense.set_context_parallel_group(*args, **options)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SET_FROM_OUTSIDE and self.dense is not None:
            setattr(self.dense, name, value)
        else:
            super().__setattr__(name, value)


def _plain(value: Any) -> Any:
    """A sequence as a tuple, which can be remembered."""
    return tuple(value) if hasattr(value, "__len__") and not isinstance(value, str) else value


def _neighborhood(window: Any, *more: Any) -> Neighborhood:
    return window if isinstance(window, Neighborhood) else Neighborhood(*map(_plain, (window, *more)))


def _refuse_options(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        found = "a tensor" if isinstance(value, Tensor) else value
        if not (found is None or found is False or found == NEUTRAL.get(name)):
            raise GNAError(
                "CosmosAttention takes no bias, mask or other option that may change the result: got "
                f"{name} = {found!r}.\n  Leave it out, or call the original op: attn.attn_op.dense(...)."
            )


# ---- a whole network ---------------------------------------------------------------------------------


class Swap(ExitStack):
    """Self-attentions of a network that were replaced; :meth:`remove`, or leaving a ``with``, restores them.

    ``ops`` are the :class:`CosmosAttention` by the names of the modules that call them, ``fallbacks`` the
    reasons why calls stayed dense so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: dict[str, CosmosAttention] = {}
        self.fallbacks: set[str] = set()

    def remove(self) -> None:
        """Make the network what it was; a second time does nothing."""
        self.close()


def replace_attention(
    net: torch.nn.Module,
    window: int | Sequence[int] | Neighborhood,
    stride: int | Sequence[int] = 1,
    dilation: int | str | Sequence[int | str] = 1,
    *,
    grid: GridSource = None,
    layers: Mapping[int, Mapping[str, Any] | Neighborhood | None] | None = None,
    backend: str = "auto",
) -> Swap:
    """Neighborhood attention in every self-attention of an original Cosmos network, or of several at once.

    The original ops stay in the tree of modules: ``state_dict``, ``load_state_dict`` and ``to`` see what they
    saw. Cross-attention is not touched.

    Args:
        net: a GeneralDIT (``pipeline.model.net``), a control encoder, or a module that holds both.
        window, stride, dilation, backend: as in :class:`CosmosAttention`. A network of several views
            (``n_views``) has a grid of four axes: (views, frames, height, width).
        grid: as in :class:`CosmosAttention`; None reads it from the network's calls.
        layers: other arguments for single layers, by number in the order of ``net.named_modules()`` (negative
            from the end): a dict of window, stride, dilation, or a Neighborhood; None keeps a layer dense.

    Raises:
        GNAError: no self-attention can be replaced, or not in this way; ``layers`` names what is not there.
    """
    attentions = _self_attentions(net)
    default = _neighborhood(window, stride, dilation)
    schedule = Schedule(layers={number: _of_layer(default, mine) for number, mine in (layers or {}).items()})
    schedule.check_layers(len(attentions))
    seen, swap = _Seen(max(getattr(module, "n_views", 1) for module in net.modules())), Swap()
    for number, (name, attn) in enumerate(attentions.items()):
        if (mine := schedule.of_layer(number, len(attentions), default)) is not None:
            swap.ops[name] = CosmosAttention(mine, grid=grid or seen, dense=attn.attn_op, backend=backend)
            swap.ops[name].reasons = swap.fallbacks  # 28 layers log a reason once
    for name, op in swap.ops.items():
        swap.callback(_put(attentions[name], op))
    for handle in seen.hooks(net, swap.ops):
        swap.callback(handle.remove)
    return swap


def _of_layer(default: Neighborhood, mine: Any) -> Neighborhood | None:
    """What ``layers`` says of a layer."""
    if mine is None or isinstance(mine, Neighborhood):
        return mine
    try:
        return replace(default, **{name: _plain(value) for name, value in dict(mine).items()})
    except TypeError as error:
        rule = f"layers takes None, a Neighborhood, or a dict of window, stride, dilation: got {mine!r}"
        raise GNAError(f"{rule}. Write dict(window=(16, 24, 16), stride=(1, 8, 16)), say.") from error


def _self_attentions(net: torch.nn.Module) -> dict[str, Any]:
    """The modules that call an ``attn_op`` for self-attention, by name in ``net``."""
    has_op = {name: one for name, one in net.named_modules() if hasattr(one, "attn_op")}
    found = {name: one for name, one in has_op.items() if getattr(one, "is_selfattn", False)}
    if not found:
        raise GNAError(
            "replace_attention needs modules with is_selfattn and attn_op, as original Cosmos networks have "
            f"them: {type(net).__name__} has none.\n  Write replace_attention(pipeline.model.net, ...), say."
        )
    for name, attn in found.items():
        if isinstance(attn.attn_op, CosmosAttention):
            raise GNAError(f"{name} is replaced already. Write swap.remove() before you replace it anew.")
        for field, needed in OF_ATTENTION.items():
            if (has := getattr(attn, field, needed)) != needed:
                rule = f"replace_attention needs {field}={needed!r}: {name} has {has!r}"
                raise GNAError(f"{rule}.\n  Build the network with {field}={needed!r}.")
    return found


def _put(attn: Any, op: CosmosAttention) -> Callable[[], None]:
    """Let ``attn.attn_op`` be ``op``, and return what undoes it: an attribute of the instance hides the
    submodule of the same name, which stays in the tree of modules."""
    before = {name: value for name, value in attn.__dict__.items() if name == "attn_op"}
    attn.__dict__["attn_op"] = op

    def undo() -> None:
        if attn.__dict__.get("attn_op") is op:  # else it was given another one since
            del attn.__dict__["attn_op"]
            attn.__dict__.update(before)

    return undo


class _Seen:
    """The token grid of the call under way, from hooks below the network: a control network calls ``forward``
    of its base network, past its hooks. Blocks tell it again when checkpointing runs them once more; the
    memory-saving blocks of the training code call no module that knows it, and need the embedder's."""

    def __init__(self, views: int) -> None:
        self.views = views
        self.grid: Grid | None = None

    def __call__(self) -> Grid | None:
        return self.grid

    def hooks(self, net: torch.nn.Module, attentions: Iterable[str]) -> Iterator[Any]:
        """Read the grid in ``net``; yields the handles of the hooks."""
        for name, module in net.named_modules():
            if name.split(".")[-1] == "x_embedder":
                yield module.register_forward_hook(self.after_embedding)
        for name in attentions:
            reader = net.get_submodule(name.rpartition(".")[0])
            yield reader.register_forward_pre_hook(self.before_attention, with_kwargs=True)

    def after_embedding(self, module: torch.nn.Module, args: Any, out: Tensor) -> None:
        """``out`` is [batch, frames, height, width, channels]."""
        self._keep(*out.shape[1:4])

    def before_attention(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        """``x`` is [frames, height, width, batch, channels]."""
        x = args[0] if args else kwargs["x"]
        if x.dim() == 5 and x.shape[1:3] != (1, 1):  # (1, 1) is sequence parallelism: tokens of a rank
            self._keep(*x.shape[:3])

    def _keep(self, frames: int, height: int, width: int) -> None:
        views = (self.views, frames // self.views) if self.views > 1 else (frames,)
        self.grid = (*views, height, width)
