"""The order of all tokens of a mask: grids, and the extra (text, register) tokens around them; no torch.

A document is one grid with its extra tokens; documents do not see one another. Row-major, a document is
``[prefix | grid | suffix]``, and its keys end with ``extra_kv``. Tile-major, the grid comes first, padded to
whole tiles, and every run of extra tokens behind it is padded to whole blocks, so that none straddles two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gnaflex.layout import Layout
from gnaflex.spec import GNA
from gnaflex.window import IntArray

BoolArray = npt.NDArray[np.bool_]


class Text(NamedTuple):
    """A run of extra tokens: its first place, its tokens, its places with padding, its first row-major token,
    and whether they are queries too. Places and tokens count from the start of the document."""

    start: int
    tokens: int
    places: int
    row_major: int
    is_query: bool

    @property
    def stop(self) -> int:
        """The place after its last token."""
        return self.start + self.tokens


@dataclass(frozen=True)
class Document:
    """A grid, ``prefix`` and ``suffix`` tokens that see everything and that everything sees, and ``extra_kv``
    keys without queries that everything sees."""

    layout: Layout
    prefix: int = 0
    suffix: int = 0
    extra_kv: int = 0

    @property
    def spec(self) -> GNA:
        """The problem of the grid."""
        return self.layout.spec

    @property
    def is_tiled(self) -> bool:
        """Whether the order is tile-major."""
        return self.layout.q_tile is not None

    @cached_property
    def grid_start(self) -> int:
        """The first place of the grid."""
        return 0 if self.is_tiled else self.prefix

    @cached_property
    def texts(self) -> tuple[Text, ...]:
        """The runs of extra tokens that are not empty; queries come before keys alone."""
        layout = self.layout
        lengths = (self.prefix, self.suffix, self.extra_kv)
        behind = self.prefix + math.prod(layout.kv_shape)
        row_major = (0, behind, behind + self.suffix)
        starts: tuple[int, ...] = row_major
        places: tuple[int, ...] = lengths
        if self.is_tiled:
            q_block, kv_block = (math.prod(tile) for tile in layout.tiles)
            blocks = (q_block, q_block, kv_block)
            places = tuple(-(-n // block) * block for n, block in zip(lengths, blocks, strict=True))
            starts = tuple(itertools.accumulate(places[:2], initial=layout.num_keys))
        runs = map(Text, starts, lengths, places, row_major, (True, True, False))
        return tuple(run for run in runs if run.tokens)

    @cached_property
    def num_queries(self) -> int:
        """Query places."""
        return self.layout.num_queries + sum(text.places for text in self.texts if text.is_query)

    @cached_property
    def num_keys(self) -> int:
        """Key places."""
        return self.layout.num_keys + sum(text.places for text in self.texts)

    def row_major_count(self, keys: bool) -> int:
        """Tokens, without padding."""
        grid = math.prod(self.layout.kv_shape if keys else self.layout.q_shape)
        return grid + self.prefix + self.suffix + (self.extra_kv if keys else 0)

    def tokens(self, keys: bool) -> tuple[IntArray, BoolArray]:
        """Of every place its row-major token (a pad: that of the token it copies) and whether it is a pad."""
        count = self.num_keys if keys else self.num_queries
        if not self.is_tiled:
            return np.arange(count), np.zeros(count, bool)
        token, is_pad = np.empty(count, np.int64), np.empty(count, bool)
        grid = slice(self.grid_start, self.grid_start + self.layout.num_queries)
        token[grid], is_pad[grid] = self.layout.row_major_tokens()
        token[grid] += self.prefix
        for text in self.texts:
            if keys or text.is_query:
                at, places = np.arange(text.places), slice(text.start, text.start + text.places)
                token[places] = text.row_major + np.minimum(at, text.tokens - 1)
                is_pad[places] = at >= text.tokens
        return token, is_pad


@dataclass(frozen=True)
class Order:
    """All tokens of a mask: one document, or several packed one behind the other."""

    documents: tuple[Document, ...]

    @property
    def spec(self) -> GNA:
        """The problem of the only document."""
        (document,) = self.documents
        return document.spec

    @cached_property
    def is_tiled(self) -> bool:
        """Whether the order is tile-major."""
        return self.documents[0].is_tiled

    @property
    def is_plain(self) -> bool:
        """Whether it is one whole grid and nothing else."""
        return len(self.documents) == 1 and not self.has_text and self.documents[0].layout.slab is None

    @cached_property
    def geometry(self) -> Hashable:
        """What fixes which token lies where: everything but the windows."""
        return tuple(
            (d.spec.shape, d.spec.dilation if d.is_tiled else None, d.layout.tiles_given, d.layout.slab,
             d.prefix, d.suffix, d.extra_kv)
            for d in self.documents
        )  # fmt: skip

    @cached_property
    def has_text(self) -> bool:
        """Whether there are extra tokens."""
        return any(document.texts for document in self.documents)

    @cached_property
    def num_queries(self) -> int:
        """Query places of all documents."""
        return sum(document.num_queries for document in self.documents)

    @cached_property
    def num_keys(self) -> int:
        """Key places of all documents."""
        return sum(document.num_keys for document in self.documents)

    def starts(self, keys: bool) -> tuple[int, ...]:
        """The first place of every document, and the end."""
        sizes = (d.num_keys if keys else d.num_queries for d in self.documents)
        return tuple(itertools.accumulate(sizes, initial=0))

    def row_major_starts(self, keys: bool) -> tuple[int, ...]:
        """The first row-major token of every document, and the end."""
        sizes = (document.row_major_count(keys) for document in self.documents)
        return tuple(itertools.accumulate(sizes, initial=0))

    def tokens(self, keys: bool) -> tuple[IntArray, BoolArray]:
        """Of every place its row-major token (a pad: that of the token it copies) and whether it is a pad."""
        each = [document.tokens(keys) for document in self.documents]
        firsts = self.row_major_starts(keys)
        token = [one + first for (one, _), first in zip(each, firsts, strict=False)]
        return np.concatenate(token), np.concatenate([is_pad for _, is_pad in each])

    def coordinates(self, keys: bool, axis: int, text: int) -> IntArray:
        """Of every place its coordinate in the whole grid; ``text`` for extra tokens. int64 [places]."""

        def grid(number: int, document: Document) -> IntArray:
            layout, slab = document.layout, document.layout.slab
            tokens = [one.token for one in (layout.key_places if keys else layout.places)]
            if slab is not None and slab.axis == axis:
                tokens[axis] = tokens[axis] + (slab.kv_start if keys else slab.q_start)
            return layout.sum_over_axes([x if a == axis else x * 0 for a, x in enumerate(tokens)])

        return self.spread(keys, grid, lambda number, document: text)

    def spread(
        self,
        keys: bool,
        grid: Callable[[int, Document], IntArray],
        text: Callable[[int, Document], int],
        pad: int | None = None,
    ) -> IntArray:
        """One value per place: ``grid(number, document)`` gives those of a document's grid, ``text`` the one
        of its extra tokens, ``pad`` that of their padding (by default the same)."""
        if self.is_plain:
            return grid(0, self.documents[0])
        parts = []
        for number, document in enumerate(self.documents):
            values = grid(number, document)
            value = text(number, document) if document.texts else 0
            whole = np.full(document.num_keys if keys else document.num_queries, value, values.dtype)
            whole[document.grid_start : document.grid_start + len(values)] = values
            for run in document.texts:
                if pad is not None and (keys or run.is_query):
                    whole[run.stop : run.start + run.places] = pad
            parts.append(whole)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def order_of(spec: GNA, **extras: int) -> Order:
    """One document in row-major order."""
    return Order((Document(Layout(spec), **extras),))
