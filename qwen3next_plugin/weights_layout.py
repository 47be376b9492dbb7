"""From the checkpoint's interleaved rows to flat ones, for weights and for the FP8 block scales beside them.

A Qwen3-Next checkpoint stores the rows of `in_proj_qkvz` key head by key head: q, k, then the v and the z of the
value heads that share it. Flat rows (all q, all k, all v, all z) need no split and concatenation in every step, and
the fused decode kernels want them so. The change is one permutation of rows, which also says what becomes of block
scales.
"""

import torch

from .errors import WeightError
from .spec import GdnSpec

FP8_BLOCK = 128


def qkvz_rows(gdn: GdnSpec) -> torch.Tensor:
    """int64 [2 * key_dim + 2 * value_dim]: the checkpoint row of ``in_proj_qkvz`` behind each flat row q|k|v|z."""
    value_width = gdn.heads_per_group * gdn.head_v_dim
    return _flat_rows(gdn.num_k_heads, [gdn.head_k_dim, gdn.head_k_dim, value_width, value_width])


def ba_rows(gdn: GdnSpec) -> torch.Tensor:
    """int64 [2 * num_v_heads]: the checkpoint row of ``in_proj_ba`` behind each flat row b|a."""
    return _flat_rows(gdn.num_k_heads, [gdn.heads_per_group, gdn.heads_per_group])


def _flat_rows(groups: int, widths: list[int]) -> torch.Tensor:
    rows = torch.arange(groups * sum(widths), device="cpu").view(groups, sum(widths))
    return torch.cat([part.reshape(-1) for part in rows.split(widths, dim=1)])


def deinterleave_qkvz(w: torch.Tensor, gdn: GdnSpec) -> torch.Tensor:
    """``in_proj_qkvz.weight`` [2 * key_dim + 2 * value_dim, H], any dtype, with its rows flat q|k|v|z; a copy."""
    return _take_rows(w, qkvz_rows(gdn), "linear_attn.in_proj_qkvz.weight")


def deinterleave_ba(w: torch.Tensor, gdn: GdnSpec) -> torch.Tensor:
    """``in_proj_ba.weight`` [2 * num_v_heads, H], any dtype, with its rows flat b|a; a copy."""
    return _take_rows(w, ba_rows(gdn), "linear_attn.in_proj_ba.weight")


def _take_rows(w: torch.Tensor, rows: torch.Tensor, name: str) -> torch.Tensor:
    if w.shape[0] != len(rows):
        raise WeightError(f"{name} has {w.shape[0]} rows: config.json's linear-attention heads make {len(rows)}.")
    return take_rows(w, rows, 0)


def take_rows(w: torch.Tensor, rows: torch.Tensor, dim: int) -> torch.Tensor:
    """``w.index_select(dim, rows)`` for any dtype: as bytes for FP8, which torch indexes on some devices only."""
    if w.element_size() > 1:
        return w.index_select(dim, rows.to(w.device))
    return w.view(torch.uint8).index_select(dim, rows.to(w.device)).view(w.dtype)


def deinterleave_qkvz_scales(scale_inv: torch.Tensor, gdn: GdnSpec, block_rows: int = FP8_BLOCK) -> torch.Tensor:
    """The block scales of ``in_proj_qkvz.weight`` for its flat rows: [ceil(rows / block_rows), blocks of columns].

    Exact or refused: raises WeightError where a flat block would mix rows of several checkpoint blocks, which cannot
    happen when the head dims are multiples of ``block_rows``.
    """
    return take_block_scales(scale_inv, qkvz_rows(gdn), block_rows, "linear_attn.in_proj_qkvz.weight")


def deinterleave_ba_scales(scale_inv: torch.Tensor, gdn: GdnSpec, block_rows: int = FP8_BLOCK) -> torch.Tensor:
    """The block scales of ``in_proj_ba.weight`` for its flat rows; exact or WeightError, as for qkvz."""
    return take_block_scales(scale_inv, ba_rows(gdn), block_rows, "linear_attn.in_proj_ba.weight")


def take_block_scales(
    scale_inv: torch.Tensor,
    rows: torch.Tensor,
    block_rows: int,
    name: str,
    dim: int = -2,
    new_block_rows: int | None = None,
) -> torch.Tensor:
    """The block scales that belong to ``weight.index_select(dim, rows)``.

    ``scale_inv`` has one entry for ``block_rows`` rows of its weight along ``dim``; what comes back has one for
    ``new_block_rows`` (as many, unless told), a finer grid repeating the old entries. Raises WeightError, naming
    ``name``, where a new block would hold rows of more than one old block, for one scale cannot serve both.
    """
    new_block_rows = new_block_rows or block_rows
    old_blocks = rows // block_rows
    source = old_blocks[::new_block_rows]
    if not torch.equal(source.repeat_interleave(new_block_rows)[: len(rows)], old_blocks):
        raise WeightError(
            f"{name} cannot be cut or re-laid in FP8 blocks of {block_rows}, since a block would mix heads or halves: "
            f"use head dims and slices that are multiples of {block_rows}, or an unquantised checkpoint."
        )
    return scale_inv.index_select(dim, source.to(scale_inv.device))
