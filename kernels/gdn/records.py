"""What a verification of drafts leaves behind, so that the accepted tokens can be applied to a state later."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DraftRecords:
    """For every token of a row what it does to the row's two states, instead of the states after it.

    The state after a token is ``decay * S + write key^T`` with S the one before it, all in float32. A token's record
    hangs on the tokens before it alone, so a state moved by it does not depend on which tokens behind it were verified,
    or on how many are kept. The leading dimension is left out in the records of a single layer.

    inputs ``[layers, R, M, conv_dim]``, the convolution's inputs in the dtype of its state; keys
    ``[layers, R, M, HK, K]``, normalised; writes ``[layers, R, M, HV, V]``; decays ``[layers, R, M, HV]``.
    """

    inputs: Tensor
    keys: Tensor
    writes: Tensor
    decays: Tensor

    @classmethod
    def allocate(
        cls,
        layers: int,
        rows: int,
        tokens: int,
        *,
        num_k_heads: int,
        num_v_heads: int,
        head_k_dim: int,
        head_v_dim: int,
        input_dtype: torch.dtype,
        device: torch.device | str,
    ) -> DraftRecords:
        """Zeroed records of at most ``tokens`` tokens for ``rows`` rows."""
        shape = (layers, rows, tokens)
        conv_dim = 2 * num_k_heads * head_k_dim + num_v_heads * head_v_dim
        return cls(
            inputs=torch.zeros(*shape, conv_dim, dtype=input_dtype, device=device),
            keys=torch.zeros(*shape, num_k_heads, head_k_dim, dtype=torch.float32, device=device),
            writes=torch.zeros(*shape, num_v_heads, head_v_dim, dtype=torch.float32, device=device),
            decays=torch.zeros(*shape, num_v_heads, dtype=torch.float32, device=device),
        )

    def layer(self, index: int) -> DraftRecords:
        """The records of one layer."""
        return DraftRecords(self.inputs[index], self.keys[index], self.writes[index], self.decays[index])

    def tensors(self) -> tuple[Tensor, ...]:
        """inputs, keys, writes, decays."""
        return self.inputs, self.keys, self.writes, self.decays

    @property
    def nbytes(self) -> int:
        """Bytes of all four."""
        return sum(tensor.nbytes for tensor in self.tensors())
