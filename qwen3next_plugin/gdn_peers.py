"""What both engines' adapters do to offer prefill functions to our kernels' choice."""

from __future__ import annotations

import torch

from .errors import SettingsError
from .kernels.gdn.peer_flashinfer import NAME, flashinfer_peer
from .kernels.gdn.peers import OFFERS, HeadShape, Peer, try_offers
from .spec import GdnSpec


def offer_flashinfer() -> None:
    """Offers FlashInfer's prefill, which both engines require on a GPU, or notes why it cannot be had."""
    OFFERS.look_for(NAME, _flashinfer, "cannot be imported")


def _flashinfer() -> Peer:
    from flashinfer.gdn_prefill import chunk_gated_delta_rule

    return flashinfer_peer(chunk_gated_delta_rule)


def try_prefills(gdn: GdnSpec, ranks: int, dtype: torch.dtype, snapshot_grid: int | None = None) -> None:
    """Tries what was offered for one of ``ranks`` tensor-parallel ranks, on this process's GPU.

    snapshot_grid: after a multiple of how many tokens of a row prefills keep snapshots; None if they never do. Raises
    SettingsError if QWEN3NEXT_GDN_PREFILL names what is not there.
    """
    shape = HeadShape(gdn.num_k_heads // ranks, gdn.num_v_heads // ranks, gdn.head_k_dim, gdn.head_v_dim, dtype)
    try:
        try_offers(shape, torch.device("cuda", torch.cuda.current_device()), snapshot_grid)
    except ValueError as error:
        raise SettingsError(f"QWEN3NEXT_GDN_PREFILL: {error}.") from None
