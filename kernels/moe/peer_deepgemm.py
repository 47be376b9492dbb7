"""DeepGEMM's grouped product as a :class:`.Peer`. The functions are handed in: nothing is imported here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from .peers import Peer, PeerCall

NAME = "deepgemm"


def deepgemm_peer(product: Callable[..., Any], aligned: Callable[[int], AbstractContextManager[None]]) -> Peer:
    """``m_grouped_fp8_gemm_nt_contiguous``, and an engine's scope in which DeepGEMM's tiles have a given height.

    On compute capability 9.0 it takes factors as they are here: those of rows column by column, those of weights by
    blocks. It is told where each expert's rows end (``use_psum_layout``) rather than each row's expert, of which it
    would load the unused ones behind the last expert too. It compiles at its first call for weights of a shape, anew
    where another number of rows makes it choose other tiles.
    """

    def run(call: PeerCall) -> None:
        with aligned(call.alignment):
            product(
                (call.rows, call.factors),
                (call.weight, call.weight_factors),
                call.out,
                call.ends,
                use_psum_layout=True,
            )

    return Peer(NAME, run)
