"""Generalized Neighborhood Attention compiled into PyTorch FlexAttention, exactly and in milliseconds."""

from pathlib import Path

from gnaflex.door import attention, explain, flex_attention
from gnaflex.flex import block_mask, permute, spec_of, unpermute
from gnaflex.mask import mask_mod, score_mod
from gnaflex.reference import reference_attention
from gnaflex.spec import GNA, GNAError
from gnaflex.window import source

__all__ = [
    "GNA",
    "GNAError",
    "attention",
    "block_mask",
    "explain",
    "flex_attention",
    "mask_mod",
    "permute",
    "reference_attention",
    "score_mod",
    "source",
    "spec_of",
    "unpermute",
]

_root = Path(__file__).parent.parent
if (_root / "pyproject.toml").is_file():  # a source tree, where gnaflex.cuda_backend lies beside this folder
    __path__.append(str(_root))
