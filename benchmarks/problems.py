"""The problems that backends are compared on, as data: most telling first, each with a small likeness.

The full ones are those of models; a CPU takes their likenesses: fewer tokens, one head of at most 64
channels, windows and strides in whole tiles where the full ones are, so that what is perfectly block-sparse
stays so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from gnaflex import paper
from gnaflex.paper import CONFIGURATIONS, Model
from gnaflex.planner import Plan, plan
from gnaflex.spec import GNA

BLOCK = 128  # rows and columns of a dense kernel's tiles, and of FlexAttention's


@dataclass(frozen=True)
class Problem:
    """One attention call of a model, batch 1; ``layers`` calls in a row share its mask.

    ``prefix`` and ``suffix`` are text tokens, which see everything and which everything sees. ``trains`` says
    whether backward is measured too. ``small`` is the likeness, ``quick`` whether the shortest run has it.
    """

    name: str
    spec: GNA
    heads: int
    layers: int
    head_dim: int = 128
    prefix: int = 0
    suffix: int = 0
    trains: bool = False
    small: Problem | None = None
    quick: bool = False

    @property
    def tokens(self) -> int:
        """Of the grid and the text."""
        return self.spec.num_tokens + self.prefix + self.suffix

    @property
    def dense_pairs(self) -> int:
        """What a dense kernel computes per head, its tiles included."""
        return (_tiles(self.tokens, BLOCK) * BLOCK) ** 2

    def pairs(self, tiles: Plan) -> int:
        """What a kernel computes per head that takes boxes of a plan, and lines of text as long as its boxes
        have tokens."""
        rows = tiles.q_rows or math.prod(tiles.q_tile)
        columns = tiles.kv_rows or math.prod(tiles.kv_tile)
        lines, text_rows = (
            sum(_tiles(n, size) for n in (self.prefix, self.suffix)) for size in (columns, rows)
        )
        boxes = tiles.touched_tiles + tiles.query_tiles * lines
        return rows * columns * (boxes + text_rows * (_tiles(self.spec.num_tokens, columns) + lines))

    def by_pairs(self, tiles: Plan) -> float:
        """Dense pairs over those of a plan."""
        return self.dense_pairs / self.pairs(tiles)

    @cached_property
    def work_speedup(self) -> float:
        """The greatest that whole tiles allow: dense pairs over those of the best boxes of 128 tokens, key
        boxes anywhere (``gnaflex.plan(spec, kv_tiling="dynamic").work_speedup``, text included)."""
        return self.by_pairs(plan(self.spec, kv_tiling="dynamic"))

    @property
    def facts(self) -> dict[str, Any]:
        """For a results file."""
        spec = self.spec
        form = {name: list(getattr(spec, name)) for name in ("shape", "window", "stride", "dilation")}
        text = {name: getattr(self, name) for name in ("prefix", "suffix") if getattr(self, name)}
        if any(spec.is_causal):
            form["is_causal"] = list(spec.is_causal)
        return form | text | {"heads": self.heads, "head_dim": self.head_dim, "layers": self.layers}


def _tiles(n: int, size: int) -> int:
    return -(-n // size)


def _problem(
    name: str,
    shape: tuple[int, ...],
    window: Any,
    stride: Any = 1,
    small: tuple[Any, ...] = (),
    dilation: Any = 1,
    is_causal: bool = False,
    **more: Any,
) -> Problem:
    """``small`` is the shape, window and stride of the likeness; what is left out is that of the problem.
    ``quick`` and ``trains`` are of the likeness, too: a full problem always trains."""
    spec = GNA(shape, window, stride, dilation, is_causal)
    of_likeness = {flag: more.pop(flag, False) for flag in ("quick", "trains")}
    full = Problem(name, spec, **more, trains=True)
    if not small:
        return full
    form: tuple[Any, ...] = *small, *(window, stride)[len(small) - 1 :], dilation, is_causal
    text = {side: -(-getattr(full, side) // 4) for side in ("prefix", "suffix")}
    likeness = replace(full, spec=GNA(*form), heads=1, head_dim=min(full.head_dim, 64), **of_likeness, **text)
    return replace(full, small=likeness)


def _of_paper(model: Model, layers: int) -> dict[str, Any]:
    return {"heads": model.heads, "head_dim": model.head_dim, "layers": layers}


FLUX, HUNYUAN, COSMOS = _of_paper(paper.FLUX, 57), _of_paper(paper.HUNYUAN, 60), _of_paper(paper.COSMOS, 28)
WAN: dict[str, Any] = {"heads": 40, "layers": 40}  # of 14B
PREDICT2: dict[str, Any] = {"heads": 16, "layers": 28}  # of 2B
PAPER = {paper.FLUX: FLUX, paper.HUNYUAN: HUNYUAN, paper.COSMOS: COSMOS}

# The diffusion decoder of LTX-2.5 (diffusers 0.42.1: ltx2_diffusion_decoder.py) on 121 frames of 512 x 768:
# 16 latent frames and two ghosts, doubled but for the first; stage 5 on a tile of 69 x 64 x 96, where
# diffusers' own mask would take 167 GiB. head_dim 64, calls as many as a stage has blocks.
_LTX = (
    _problem("LTX-2.5 decoder, stage 5", (69, 64, 96), 11, small=((12, 24, 24),), heads=4, layers=8,
             head_dim=64, quick=True),
    _problem("LTX-2.5 decoder, stage 4", (69, 64, 96), (3, 5, 5), small=((5, 32, 48),), heads=8, layers=2,
             head_dim=64),
    _problem("LTX-2.5 decoder, stage 3", (35, 32, 48), (3, 5, 5), heads=8, layers=4, head_dim=64),
    _problem("LTX-2.5 decoder, stage 2", (18, 32, 48), (3, 7, 7), heads=16, layers=6,
             head_dim=64),
    _problem("LTX-2.5 decoder, stage 1", (18, 16, 24), (3, 7, 7), heads=32, layers=4, head_dim=64),
)  # fmt: skip

_HEADLINES = (
    _problem("HunyuanVideo", (30, 48, 80), (18, 24, 24), (16, 8, 8),
             small=((4, 48, 40), (2, 24, 24), (2, 8, 8)), trains=True, quick=True, **HUNYUAN),
    _problem("FLUX.1-dev 4K", (256, 256), (80, 80), (16, 16),
             small=((96, 80), (48, 48)), trains=True, quick=True, **FLUX),
    _problem("HunyuanVideo, default grid", (33, 45, 80), (18, 24, 24), (16, 8, 8),
             small=((5, 45, 32), (2, 24, 24), (2, 8, 8)), **HUNYUAN),
    _problem("Cosmos-7B", (16, 44, 80), (16, 24, 16), (1, 8, 16),
             small=((2, 44, 80), (2, 24, 16)), **COSMOS),
    _problem("HunyuanVideo, 256 text tokens", (30, 48, 80), (18, 24, 24), (16, 8, 8),
             small=((4, 48, 40), (2, 24, 24), (2, 8, 8)), suffix=256, **HUNYUAN),
    _problem("HunyuanVideo, stride 1", (30, 48, 80), (18, 24, 24),
             small=((4, 48, 40), (2, 24, 24)), trains=True, quick=True, **HUNYUAN),
)  # fmt: skip

_MODELS = (
    _problem("Wan 720p", (21, 45, 80), (12, 24, 24), (4, 8, 8),
             small=((4, 45, 40), (2, 24, 24), (2, 8, 8)), **WAN),
    _problem("Wan 480p", (21, 30, 52), (12, 16, 24), (4, 8, 8),
             small=((5, 30, 52), (2, 16, 24), (2, 8, 8)), **WAN),
    _problem("FLUX.1-dev 4K, 512 text tokens", (256, 256), (80, 80), (16, 16),
             prefix=512, **FLUX),
    _problem("FLUX.1-dev, 512 text tokens", (64, 64), (32, 32), (1, 1),
             small=((64, 64),), prefix=512, **FLUX),
    _problem("Swin-like, blocks of 16x16", (256, 256), (16, 16), (16, 16),
             small=((96, 80),), heads=8, layers=2, head_dim=64, trains=True),
    _problem("Swin, blocks of 7x7", (56, 56), (7, 7), (7, 7),
             small=((56, 56),), heads=3, layers=2, head_dim=32, trains=True),
    _problem("1-D 32k, window 2048", (32768,), 2048, small=((4096,), 256), heads=32, layers=32),
    _problem("1-D 32k, window 2048, stride 256", (32768,), 2048, 256, small=((4096,), 256, 128),
             heads=32, layers=32, trains=True),
    _problem("1-D 32k, window 2048, causal", (32768,), 2048, small=((4096,), 256), is_causal=True,
             heads=32, layers=32),
)  # fmt: skip

# The kinds of layers of Cosmos-Predict2 whose windows are sparse, on 24 latent frames; the letters are ours
_PREDICT2 = tuple(
    _problem(f"Cosmos-Predict2, layer {letter}", (24, 44, 80), window, stride,
             small=((2, 44, 80),) if letter < "C" else (), dilation=dilation, **PREDICT2)
    for letter, window, stride, dilation in (
        ("A", (-1, 4, 16), (1, 1, 1), (1, 11, 5)),
        ("B", (-1, 12, 16), (1, 4, 1), (1, 1, 5)),
        ("C", (-1, 12, 24), (1, 4, 8), 1),
        ("D", (-1, 20, 40), (1, 4, 8), 1),
        ("E", (-1, 28, 56), (1, 4, 8), 1),
    )
)  # fmt: skip


def _rest_of_the_paper() -> tuple[Problem, ...]:
    """The rows of the paper's table that are no headline."""
    there = {problem.spec for problem in _HEADLINES}
    rows = [(row.model, GNA(row.model.shape, row.window, row.stride)) for row in CONFIGURATIONS]
    return tuple(
        Problem(f"{model.name} {_by(spec.window)}, stride {_by(spec.stride)}", spec, **PAPER[model])
        for model, spec in rows
        if spec not in there
    )


def _by(extents: tuple[int, ...]) -> str:
    return "x".join(map(str, extents))


FULL = {
    one.name: one for one in (*_HEADLINES, _LTX[0], *_MODELS, *_LTX[1:], *_PREDICT2, *_rest_of_the_paper())
}
SMALL = {name: one.small for name, one in FULL.items() if one.small is not None}
QUICK = {name: one for name, one in SMALL.items() if one.quick}
SETS = {"full": FULL, "small": SMALL, "quick": QUICK}
