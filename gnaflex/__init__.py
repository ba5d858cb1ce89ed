"""Generalized Neighborhood Attention compiled into PyTorch FlexAttention, exactly and in milliseconds."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

from gnaflex.bias import coordinate_score_mod, in_order, relative_bias
from gnaflex.derive import Shard, packed_block_mask, resize, shard, with_lengths
from gnaflex.door import attention, explain, flex_attention
from gnaflex.drawing import draw
from gnaflex.flex import block_mask
from gnaflex.mask import mask_mod, score_mod
from gnaflex.nearby import nearest
from gnaflex.origin import permute, spec_of, unpermute
from gnaflex.planner import Plan, plan
from gnaflex.reference import reference_attention
from gnaflex.searching import search
from gnaflex.spec import GNA, GNAError
from gnaflex.timing import Estimate, end_to_end, estimate
from gnaflex.window import source

__all__ = [  # noqa: RUF022 (plainly sorted)
    "Estimate",
    "GNA",
    "GNAError",
    "Plan",
    "Shard",
    "attention",
    "block_mask",
    "coordinate_score_mod",
    "draw",
    "end_to_end",
    "estimate",
    "explain",
    "flex_attention",
    "in_order",
    "mask_mod",
    "nearest",
    "packed_block_mask",
    "permute",
    "plan",
    "reference_attention",
    "relative_bias",
    "resize",
    "score_mod",
    "search",
    "shard",
    "source",
    "spec_of",
    "unpermute",
    "with_lengths",
]

_root = Path(__file__).parent.parent
if (_root / "pyproject.toml").is_file():  # a source tree, where gnaflex.cuda_backend lies beside this folder
    __path__.append(str(_root))


def __getattr__(name: str) -> ModuleType:
    """``gnaflex.models`` and ``gnaflex.nn``, imported where they are used first."""
    if name in ("models", "nn"):
        return import_module(f"gnaflex.{name}")
    raise AttributeError(f"module 'gnaflex' has no attribute {name!r}")
