"""Token orders: row-major, or tile-major with dilation groups gathered; permute and its exact inverse.

Tile-major order puts the dilation groups one after another, cuts each into query tiles (padded to whole
tiles), each query tile into key tiles, and lists the tokens of a key tile row-major.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gnaflex.spec import GNA, Axis, GNAError
from gnaflex.tiles import Tile, classes, groups, padded_tokens, relation
from gnaflex.window import IntArray


class AxisPlaces(NamedTuple):
    """The places of one axis in a token order, int64 [places] each.

    ``coordinate`` counts dilation group by group, so that a window is one interval ``[lo, hi)`` of it
    whatever the dilation. A pad has a coordinate that no window holds, and the token and the window of the
    last real place of its group.
    """

    coordinate: IntArray
    lo: IntArray
    hi: IntArray
    token: IntArray
    is_pad: IntArray


@dataclass(frozen=True)
class Layout:
    """The token order of a mask: tile-major with these tiles, or row-major when they are None."""

    spec: GNA
    q_tile: Tile | None = None
    kv_tile: Tile | None = None

    @cached_property
    def num_tokens(self) -> int:
        """Tokens in this order, padding included."""
        return self.spec.num_tokens if self.q_tile is None else padded_tokens(self.spec, self.q_tile)

    @cached_property
    def tiles(self) -> tuple[Tile, Tile]:
        """Query and key tile; row-major order counts as tiles of one token."""
        ones = (1,) * self.spec.rank
        return self.q_tile or ones, self.kv_tile or ones

    @cached_property
    def places(self) -> tuple[AxisPlaces, ...]:
        """The places of every axis."""
        return tuple(
            _axis_places(axis, None if self.q_tile is None else t)
            for axis, t in zip(self.spec.axes, self.tiles[0], strict=True)
        )

    def sum_over_axes(self, values: Sequence[IntArray]) -> IntArray:
        """Add up one value per place of every axis, for every token in this order."""
        if self.q_tile is None:
            return _grid_sum([value.reshape(1, 1, 1, -1) for value in values]).reshape(-1)
        q_tile, kv_tile = self.tiles
        parts = []
        for combination in classes(self.spec):
            cut = []
            for value, axis, group, q, kv in zip(
                values, self.spec.axes, combination, q_tile, kv_tile, strict=True
            ):
                size = -(-group.n // q) * q
                first = _axis_starts(axis, q)[group.members]
                segments = value[first[:, None] + np.arange(size)] if axis.dilation > 1 else value
                cut.append(segments.reshape(len(first), size // q, q // kv, kv))
            parts.append(_grid_sum(cut).reshape(math.prod(len(part) for part in cut), -1))
        if len(parts) == 1:
            return parts[0].reshape(-1)
        out = np.empty(self.num_tokens, values[0].dtype)
        for combination, part in zip(classes(self.spec), parts, strict=True):
            first = self._group_starts([group.members for group in combination])
            out[first[:, None] + np.arange(part.shape[1])] = part
        return out

    def _group_starts(self, members: Sequence[IntArray]) -> IntArray:
        """The first token of every dilation group of a combination of equal lengths."""
        lengths = [
            np.diff(_axis_starts(axis, q)) for axis, q in zip(self.spec.axes, self.tiles[0], strict=True)
        ]
        first = np.zeros(1, np.int64)
        outer = 1
        for a, chosen in enumerate(members):
            inner = math.prod(int(length.sum()) for length in lengths[a + 1 :])
            starts = _axis_starts(self.spec.axes[a], self.tiles[0][a])[chosen]
            first = np.add.outer(first, starts * outer * inner).ravel()
            outer *= int(lengths[a][chosen[0]])
        return first

    def row_major_tokens(self) -> tuple[IntArray, npt.NDArray[np.bool_]]:
        """For every token of this order its row-major index (a pad: that of the query it copies), and
        whether it is a pad; int64 and bool [num_tokens]."""
        shape = self.spec.shape
        tokens = self.sum_over_axes(
            [one.token * math.prod(shape[a + 1 :]) for a, one in enumerate(self.places)]
        )
        return tokens, self.sum_over_axes([one.is_pad for one in self.places]) > 0


def _grid_sum(cut: Sequence[IntArray]) -> IntArray:
    """Outer sum of [groups, q tiles, kv tiles, tokens] of every axis, axes innermost."""
    rank = len(cut)
    total: IntArray | None = None
    for a in range(rank - 1, -1, -1):  # the last axes first: the long final addition then has long rows
        shape = [1] * (4 * rank)
        shape[a::rank] = cut[a].shape
        spread = cut[a].reshape(shape)
        total = spread if total is None else spread + total
    assert total is not None
    return total


@lru_cache(maxsize=256)
def _axis_starts(axis: Axis, q_tile: int) -> IntArray:
    """The first place of every dilation group of an axis padded to whole tiles, and the end."""
    lengths = np.concatenate(
        [np.full(len(group.members), -(-group.n // q_tile) * q_tile) for group in groups(axis)]
    )
    return np.concatenate([[0], np.cumsum(lengths)])


@lru_cache(maxsize=256)
def _axis_places(axis: Axis, q_tile: int | None) -> AxisPlaces:
    parts = []
    starts = _axis_starts(axis, q_tile or 1)
    for group in groups(axis):
        pairs = relation(group.n, axis)
        size = group.n if q_tile is None else -(-group.n // q_tile) * q_tile
        place = np.arange(size)
        real = np.minimum(place, group.n - 1)
        start = starts[group.members][:, None]
        parts.append(
            np.stack(
                [
                    start + place,
                    start + pairs.lo[real],
                    start + pairs.hi[real],
                    group.members[:, None] + axis.dilation * real,
                    np.broadcast_to(place >= group.n, (len(group.members), size)),
                ]
            ).reshape(5, -1)
        )
    table = np.concatenate(parts, axis=1)
    if q_tile is None and axis.dilation > 1:
        table = table[:, np.argsort(table[3])]
    return AxisPlaces(*table)


# ---- permute -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Make tensors that can be kept: those made under inference_mode could not be used in training later on,
    those made while tracing are not real."""
    with torch.inference_mode(False), contextlib.ExitStack() as stack:
        if torch._C._len_torch_dispatch_stack():
            stack.enter_context(torch.utils._python_dispatch._disable_current_modes())
        yield


@lru_cache(maxsize=32)
def _token_index(layout: Layout, device: torch.device) -> Tensor:
    """For every row-major token its place in the order, int64 [tokens] on ``device``."""
    tokens, is_pad = layout.row_major_tokens()
    place = np.empty(layout.spec.num_tokens, np.int64)
    place[tokens[~is_pad]] = np.flatnonzero(~is_pad)
    with real_tensors():
        return torch.from_numpy(place).to(device)


def to_order(x: Tensor, layout: Layout, dim: int = -2) -> Tensor:
    """Row-major tokens along ``dim`` to the order of ``layout``; pads are zero."""
    _check_length("permute", x, dim, layout.spec.num_tokens, layout)
    if layout.q_tile is None:
        return x
    shape = list(x.shape)
    shape[dim] = layout.num_tokens
    return x.new_zeros(shape).index_copy(dim, _token_index(layout, x.device), x)


def from_order(x: Tensor, layout: Layout, dim: int = -2) -> Tensor:
    """Tokens in the order of ``layout`` along ``dim`` back to row-major; pads are dropped."""
    _check_length("unpermute", x, dim, layout.num_tokens, layout)
    if layout.q_tile is None:
        return x
    return x.index_select(dim, _token_index(layout, x.device))


def _check_length(verb: str, x: Tensor, dim: int, expected: int, layout: Layout) -> None:
    if not -x.dim() <= dim < x.dim() or x.shape[dim] != expected:
        raise GNAError(
            f"{verb} takes {expected} tokens along dim {dim}: got shape {tuple(x.shape)}.\n"
            f"  The mask is {layout.spec!r} with q_tile={layout.q_tile}. Tensors are [..., tokens, head_dim];"
            f" pass dim= when the tokens lie elsewhere."
        )
