"""Pictures: a photograph as attention inputs and back, the blocks of a mask, and drawings of both.

matplotlib is imported by the functions that draw with it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad, unfold

from gnaflex.figures import COLORS, QUERY_COLOR
from gnaflex.origin import own_record
from gnaflex.reference import allowed_keys

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PATCH = 5
KINDS = ("empty", "partial", "full")
BLOCK_COLORS = (COLORS[0], COLORS[1], COLORS[3])  # FlexAttention's lists know no clipped blocks
QUERY_PLACES = ((0.3, 0.42), (0.3, 0.82))  # parts of height and width: on the face, and beside it
LABEL = {"facecolor": "black", "edgecolor": "none", "alpha": 0.6, "pad": 2}
MAP_BLOCKS = 96  # columns of a block map that are drawn; more would blur at 300 pixels


# ---- a photograph in, pixels out ------------------------------------------------------------------------


def photograph(height: int, width: int) -> Tensor:
    """matplotlib's portrait of Grace Hopper cut to this size, [height, width, 3] in [0, 1]."""
    from matplotlib.cbook import get_sample_data
    from PIL import Image, ImageOps

    path = get_sample_data("grace_hopper.jpg", asfileobj=False)
    image = ImageOps.fit(Image.open(path).convert("RGB"), (width, height), centering=(0.5, 0.2))
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)


def psnr(image: Tensor, clean: Tensor) -> float:
    """Peak signal to noise ratio in dB, of values clamped to [0, 1]."""
    return -10 * math.log10((image.clamp(0, 1) - clean).square().mean().item())


def non_local_means(image: Tensor, bandwidth: float) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of attention with scale 1 that average pixels [height, width, 3] by the likeness of patches.

    The weights are exp(-|f_q - f_k|**2 / 2), f a patch over the bandwidth: as softmax is blind to |f_q|**2,
    they are those of the scores f_q . f_k - |f_k|**2 / 2, one more channel of q and k.
    """
    r = PATCH // 2
    patches = unfold(pad(image.permute(2, 0, 1)[None], (r, r, r, r), mode="reflect"), PATCH)[0].T
    near = torch.exp(-(torch.arange(-r, r + 1, device=image.device) ** 2) / 2)
    weight = (near[:, None] * near).flatten().repeat(3)
    f = (patches - patches.mean(0)) * (weight / weight.sum()).sqrt() / bandwidth
    q = torch.cat([f, torch.ones_like(f[:, :1])], 1)
    k = torch.cat([f, -f.square().sum(1, keepdim=True) / 2], 1)
    head_dim = -(-q.shape[1] // 16) * 16  # of the values too, or SDPA would hold all N x N scores
    q, k, v = (pad(x, (0, head_dim - x.shape[1]))[None, None] for x in (q, k, image.flatten(0, 1)))
    return q, k, v


def _with_pixels(image: Tensor, start: int, output: Tensor) -> Tensor:
    """An image [height, width, 3] with the pixels of an attention output put in from pixel ``start`` on."""
    pixels = image.reshape(-1, 3).clone()
    pixels[start : start + output.shape[2]] = output[0, 0, :, :3].cpu()
    return pixels.reshape(image.shape)


# ---- blocks ------------------------------------------------------------------------------------------


class BlockCounts(NamedTuple):
    """Blocks of a mask: those visited, those of them that need no masking, and all."""

    visited: int
    full: int
    total: int


def count_blocks(bm: BlockMask) -> BlockCounts:
    """How many blocks a mask visits."""
    full = 0 if bm.full_kv_num_blocks is None else int(bm.full_kv_num_blocks[0, 0].sum())
    rows, columns = (-(-tokens // size) for tokens, size in zip(bm.seq_lengths, bm.BLOCK_SIZE, strict=True))
    return BlockCounts(int(bm.kv_num_blocks[0, 0].sum()) + full, full, rows * columns)


def block_kinds(bm: BlockMask) -> NDArray[np.uint8]:
    """The blocks of the first batch entry and head as indices into KINDS, [query blocks, key blocks]."""
    rows, columns = (-(-tokens // size) for tokens, size in zip(bm.seq_lengths, bm.BLOCK_SIZE, strict=True))
    kinds = np.zeros((rows, columns), np.uint8)
    for kind, counts, indices in (
        (1, bm.kv_num_blocks, bm.kv_indices),
        (2, bm.full_kv_num_blocks, bm.full_kv_indices),
    ):
        if counts is not None and indices is not None:
            lists = indices[0, 0].cpu().numpy()
            for row, count, listed in zip(kinds, counts[0, 0].tolist(), lists, strict=True):
                row[listed[:count]] = kind
    return kinds


# ---- drawings ----------------------------------------------------------------------------------------


def denoising(
    path: Path,
    clean: Tensor,
    noisy: Tensor,
    outputs: dict[str, tuple[int, Tensor]],
    masks: dict[str, BlockMask],
) -> dict[str, float]:
    """Draw the photograph's demo: the images, two block maps, and what a query of either sees.

    Args:
        path: the PNG to write.
        clean, noisy: [height, width, 3] in [0, 1].
        outputs: of attention, [1, 1, pixels, head_dim] from some pixel on: those of the masks, and "dense".
        masks: two masks by title, tile-major over the pixels.

    Returns:
        PSNR in dB by title: of "noisy", and of the outputs where they are.
    """
    shown = {"noisy": noisy} | {name: _with_pixels(noisy, *part) for name, part in outputs.items()}
    ratios = {"noisy": psnr(noisy, clean)}
    for name, (start, output) in outputs.items():
        where = slice(start, start + output.shape[2])
        ratios[name] = psnr(*(x.reshape(-1, 3)[where] for x in (shown[name], clean)))
    _draw_denoising(path, clean, shown, ratios, masks)
    return ratios


def _draw_denoising(
    path: Path,
    clean: Tensor,
    shown: dict[str, Tensor],
    ratios: dict[str, float],
    masks: dict[str, BlockMask],
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tall = 2.78 * clean.shape[0] / clean.shape[1]  # inches, as all of these
    height = 0.5 + tall + 0.55 + tall + 0.7
    figure = Figure(figsize=(12, height), dpi=100, facecolor="white")
    margins = {"left": 0.02, "right": 0.99, "top": 1 - 0.5 / height, "bottom": 0.7 / height}
    axes = figure.subplots(2, 4, gridspec_kw=margins | {"wspace": 0.07, "hspace": 0.55 / tall}).ravel()
    names = {name: f"GNA {name}" if name in masks else name for name in shown}
    _image(axes[0], clean, "original\n")
    for ax, (name, image) in zip(axes[1:5], shown.items(), strict=True):
        _image(ax, image, f"{names[name]}\nPSNR {ratios[name]:.1f} dB")
    _image(axes[7], clean, "the keys of two queries,\nand the blocks that hold them")
    for ax, (name, bm), place in zip(axes[5:7], masks.items(), QUERY_PLACES, strict=True):
        _block_map(ax, bm, names[name], clean.shape[0] / clean.shape[1])
        _keys(axes[7], bm, place, names[name])
    figure.legend(handles=_color_key(), loc="lower center", ncols=4, frameon=False)
    FigureCanvasAgg(figure).print_figure(path)


def _color_key() -> list[Any]:
    from matplotlib.patches import Patch

    key = [
        Patch(facecolor=color, edgecolor="#8a929a", label=f"{kind} block")
        for kind, color in zip(KINDS, BLOCK_COLORS, strict=True)
    ]
    return [*key, Patch(facecolor="none", edgecolor=QUERY_COLOR, label="keys that the query (dot) sees")]


def _image(ax: Axes, image: Tensor, title: str) -> None:
    ax.imshow(image.clamp(0, 1).numpy(), interpolation="antialiased")
    ax.set_title(title, fontsize=10)
    ax.set_axis_off()


def _block_map(ax: Axes, bm: BlockMask, title: str, ratio: float) -> None:
    """The middle of the map, where no border shifts windows; ``ratio`` times as many rows as columns."""
    from matplotlib.colors import ListedColormap

    kinds = block_kinds(bm)
    columns = min(MAP_BLOCKS, int(len(kinds) / max(ratio, 1)))
    shape = int(columns * ratio), columns
    first = [(n - size) // 2 for n, size in zip(kinds.shape, shape, strict=True)]
    part = kinds[first[0] : first[0] + shape[0], first[1] : first[1] + shape[1]]
    extent = (first[1], first[1] + part.shape[1], first[0] + part.shape[0], first[0])
    ax.imshow(part, cmap=ListedColormap(BLOCK_COLORS), vmin=0, vmax=2, interpolation="nearest", extent=extent)
    counts = count_blocks(bm)
    visited = f"{counts.visited:,} of {counts.total:,} blocks, {counts.full:,} full"
    ax.set_title(f"{title}\n{visited}", fontsize=10)
    ax.set_xlabel(f"key blocks {extent[0]} to {extent[1] - 1} of {kinds.shape[1]}", fontsize=9)
    ax.set_ylabel(f"query blocks {extent[3]} to {extent[2] - 1}", fontsize=9)
    ax.set_xticks([])
    ax.set_yticks([])


def _keys(ax: Axes, bm: BlockMask, place: tuple[float, float], title: str) -> None:
    """One query, its window, and the key tiles that its query tile visits; no dilation."""
    layout = own_record(bm).order.documents[0].layout
    (height, width), tile = layout.spec.shape, layout.tiles[1]
    y, x = (int(part * length) for part, length in zip(place, (height, width), strict=True))
    columns = -(-width // tile[1])
    row = block_kinds(bm)[y // tile[0] * columns + x // tile[1]]
    for block in np.flatnonzero(row):
        corner = (block // columns * tile[0], block % columns * tile[1])
        _box(
            ax, corner, tile, facecolor=BLOCK_COLORS[row[block]], edgecolor="white", alpha=0.55, linewidth=0.6
        )
    keys = np.stack(np.unravel_index(sorted(allowed_keys(layout.spec, y * width + x)), (height, width)))
    _box(ax, keys.min(1), np.ptp(keys, 1) + 1, facecolor="none", edgecolor=QUERY_COLOR, linewidth=1.6)
    ax.plot(x, y, "o", color=QUERY_COLOR, markersize=4)
    below = min((y // tile[0] + 4) * tile[0] + 2, height - 12)
    ax.text(x, below, title.replace(", ", "\n"), color="white", fontsize=8, ha="center", va="top", bbox=LABEL)


def _box(ax: Axes, corner: Any, extents: Any, **style: Any) -> None:
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((corner[1] - 0.5, corner[0] - 0.5), extents[1], extents[0], **style))
