"""Which part of the routed experts one rank holds, and how checkpoint tensors land in it, for both engines."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import WeightError
from .spec import Qwen3NextSpec
from .weights_shards import scale_block, shard_fused
from .weights_sources import Placement


@dataclass(frozen=True)
class ExpertShard:
    """The experts of rank `rank` of `size`.

    Tensor parallelism cuts every expert along its intermediate size; expert parallelism gives whole experts,
    [first_expert, first_expert + num_experts), to a rank. Raises WeightError where they do not divide evenly.
    """

    spec: Qwen3NextSpec
    rank: int
    size: int
    expert_parallel: bool = False

    def __post_init__(self) -> None:
        field = "num_experts" if self.expert_parallel else "moe_intermediate_size"
        total = self.spec.moe.num_experts if self.expert_parallel else self.spec.moe.intermediate_size
        if total % self.size:
            kind = "expert" if self.expert_parallel else "tensor"
            raise WeightError(
                f"{kind}-parallel size {self.size} does not divide {field} ({total}): use a size that divides it."
            )

    @property
    def num_experts(self) -> int:
        """Experts this rank holds (a part of)."""
        return self.spec.moe.num_experts // (self.size if self.expert_parallel else 1)

    @property
    def first_expert(self) -> int:
        """The checkpoint's number of this rank's expert 0."""
        return self.rank * self.num_experts if self.expert_parallel else 0

    @property
    def intermediate_size(self) -> int:
        """Intermediate columns of each expert that this rank holds."""
        return self.spec.moe.intermediate_size // (1 if self.expert_parallel else self.size)

    def scale_block(self, block: int) -> int:
        """Intermediate columns for one factor here, where a checkpoint has one for ``block`` (see there)."""
        return block if self.expert_parallel or self.size == 1 else scale_block(block, self.intermediate_size)

    def local_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Expert ids [M, k] as this rank counts them; -1 for experts of other ranks."""
        if self.num_experts == self.spec.moe.num_experts:
            return ids
        local = ids - self.first_expert
        return torch.where((local >= 0) & (local < self.num_experts), local, -1)

    def place(self, target: torch.Tensor, loaded: torch.Tensor, placement: Placement) -> None:
        """Copies one expert's matrix, or all experts' stacked, into this rank's tensor.

        target: w13 [E, 2I, H] or w2 [E, H, I] of this rank, or their scales; loaded: the whole model's tensor as
        `weights.fused_stream` yields it with `placement`.
        """
        last = self.first_expert + self.num_experts
        if placement.expert is None:
            target, mine = target[: self.num_experts], loaded[self.first_expert : last]
        elif self.first_expert <= placement.expert < last:
            target, mine = target[placement.expert - self.first_expert], loaded
        else:
            return
        self._copy(target, mine, placement)

    def place_shared(self, target: torch.Tensor, loaded: torch.Tensor, placement: Placement) -> None:
        """The same for a matrix of the shared expert that lies behind the routed ones, at ``target[num_experts]``."""
        self._copy(target[self.num_experts], loaded, placement)

    def _copy(self, target: torch.Tensor, mine: torch.Tensor, placement: Placement) -> None:
        if not self.expert_parallel:
            mine = shard_fused(placement, mine, self.spec, self.rank, self.size)
        if placement.shard is not None:
            rows = target.shape[-2] // 2
            target = target.narrow(-2, ("gate", "up").index(placement.shard) * rows, rows)
        target.copy_(mine)
