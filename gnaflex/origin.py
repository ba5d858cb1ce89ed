"""What a ``BlockMask`` of ours was made from: the problem, and the order of its tokens."""

from __future__ import annotations

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from gnaflex.mask import MaskRecord
from gnaflex.reorder import from_order, to_order
from gnaflex.spec import GNA, GNAError


def record_of(bm: BlockMask) -> MaskRecord | None:
    """The record of a mask of ours, None for any other mask; refuses one that was resized or sliced."""
    if not isinstance(bm, BlockMask):
        raise GNAError(
            f"a BlockMask is needed: got {type(bm).__name__}. Write bm = gnaflex.block_mask(shape, window)."
        )
    record = getattr(bm.mask_mod, "gnaflex", None)
    if getattr(bm.mask_mod, "__name__", "") == "_sliced_mask_mod_error":
        raise GNAError(
            "this BlockMask was sliced, which loses its mask_mod (a rule of torch).\n"
            "  Use the mask itself: it holds for every batch entry and head."
        )
    if not isinstance(record, MaskRecord) or record.block_size is None:
        return None
    lengths = record.order.num_queries, record.order.num_keys
    rows, columns = (-(-n // size) for n, size in zip(lengths, record.block_size, strict=True))
    found = (tuple(bm.seq_lengths), tuple(bm.BLOCK_SIZE), tuple(bm.kv_num_blocks.shape))
    made = (lengths, record.block_size, (1, max(len(record.heads), 1), rows))
    if found != made or bm.kv_indices.shape[-1] > columns:
        raise GNAError(
            f"this BlockMask was changed after it was made: (seq_lengths, BLOCK_SIZE, lists) is {found}, it "
            f"was {made}.\n  Build one for the new size, in milliseconds: block_mask(...) or "
            "gnaflex.resize(bm, shape)."
        )
    return record


def own_record(bm: BlockMask) -> MaskRecord:
    """The record of a mask of ours; refuses any other."""
    record = record_of(bm)
    if record is None:
        raise GNAError(
            "this BlockMask was not made by gnaflex. Write bm = gnaflex.block_mask(shape, window, ...)."
        )
    return record


def spec_of(bm: BlockMask) -> GNA | tuple[GNA, ...]:
    """The problem that a BlockMask of :func:`block_mask` was compiled from; one per query head where they
    differ, one per grid of a packed mask.

    It survives ``bm.to(device)``, copies, pytree round trips and ``torch.compile``.

    Raises:
        GNAError: the mask was made by something else, or was resized or sliced since.

    Example:
        >>> import gnaflex
        >>> gnaflex.spec_of(gnaflex.block_mask((16, 16), window=8, stride=4, device="cpu"))
        GNA(shape=(16, 16), window=(8, 8), stride=(4, 4))
    """
    record = own_record(bm)
    if record.heads:
        return tuple(record.orders[which].spec for which in record.heads)
    specs = tuple(document.spec for document in record.order.documents)
    return specs[0] if len(specs) == 1 else specs


def permute(x: Tensor, bm: BlockMask, dim: int = -2) -> Tensor:
    """Row-major tokens to the order of a mask: x [..., tokens, head_dim] to [..., padded tokens, head_dim].

    Padding is zero. Differentiable; :func:`unpermute` is the exact inverse. A row-major mask changes nothing.

    Args:
        x: any dtype and device, tokens along ``dim``: the queries ``[prefix | grid | suffix]``, or the keys,
            ``extra_kv`` tokens longer; grid after grid where several are packed.
        bm: a mask of :func:`block_mask`.
        dim: where the tokens lie; -2 suits [batch, heads, tokens, head_dim].

    Raises:
        GNAError: the number of tokens does not fit the mask, or the mask is not gnaflex's.

    Example:
        >>> import torch, gnaflex
        >>> bm = gnaflex.block_mask((5, 6), window=3, q_tile=(2, 4), device="cpu")
        >>> x = torch.randn(1, 2, 30, 8)
        >>> y = gnaflex.permute(x, bm)
        >>> y.shape, torch.equal(gnaflex.unpermute(y, bm), x)
        (torch.Size([1, 2, 48, 8]), True)
    """
    return to_order(x, own_record(bm).order, dim)


def unpermute(x: Tensor, bm: BlockMask, dim: int = -2) -> Tensor:
    """The exact inverse of :func:`permute`: tokens in the order of a mask back to row-major, pads dropped.

    Example:
        >>> import torch, gnaflex
        >>> bm = gnaflex.block_mask((5, 6), window=3, q_tile=(2, 4), device="cpu")
        >>> gnaflex.unpermute(torch.zeros(1, 2, 48, 8), bm).shape
        torch.Size([1, 2, 30, 8])
    """
    return from_order(x, own_record(bm).order, dim)
