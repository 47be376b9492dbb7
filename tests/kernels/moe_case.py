"""Arguments of the mixture of experts, and what it should give."""

from dataclasses import dataclass
from typing import Any

import torch

from qwen3next_plugin.kernels import gemm, moe

from .common import to64, tolerance


@dataclass
class Problem:
    """The arguments of fused_moe; `rounded` says whether activations are rounded to FP8 too."""

    tensors: tuple[Any, ...]  # x, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale
    rounded: bool

    def run(self, backend: str | None) -> torch.Tensor:
        return moe.fused_moe(*self.tensors, quantize_activations=self.rounded, backend=backend)

    def expected(self) -> torch.Tensor:
        x, w13, w2, weights, ids, s13, s2 = self.tensors
        held = (ids >= 0) & (ids < w2.shape[0])
        ids = torch.where(held, ids, -1)
        if s13 is None:
            w13, w2 = to64((w13, w2))
        return moe.reference.fused_moe(to64(x), w13, w2, to64(weights), ids, s13, s2, self.rounded)

    def limit(self, backend: str, device: str) -> float:
        dtype = self.tensors[0].dtype
        plain = tolerance(dtype, 3, backend, device)
        # rounding to FP8 follows a rounding to `dtype`: a value near the middle of two codes may take the other one
        return (
            max(plain, {torch.float32: 2e-3, torch.float16: 6e-3, torch.bfloat16: 4e-2}[dtype])
            if self.rounded
            else plain
        )


def problem(
    ids: torch.Tensor,
    experts: int,
    hidden: int,
    inner: int,
    weights: str = "float",
    dtype: torch.dtype = torch.float32,
    block: int = 128,
    inner_block: int | None = None,
) -> Problem:
    tokens, top_k = ids.shape
    device = ids.device
    x = torch.randn(tokens, hidden + 6, device=device).to(dtype)[:, 3:-3]
    w13 = (torch.randn(experts, 2 * inner, hidden, device=device) / hidden**0.5).to(dtype)
    w2 = (torch.randn(experts, hidden, inner, device=device) / inner**0.5).to(dtype)
    router = torch.rand(tokens, top_k, device=device) + 0.1
    if weights == "float":
        return Problem((x, w13, w2, router, ids, None, None), False)
    inner_block = inner_block or block
    halves, s13 = gemm.quantize_block(w13.unflatten(1, (2, -1)), (inner_block, block))
    q2, s2 = gemm.quantize_block(w2, (block, inner_block))
    tensors = (x, halves.flatten(1, 2), q2, router, ids, s13.flatten(1, 2), s2)
    return Problem(tensors, weights == "fp8 activations")


def random_ids(tokens: int, experts: int, top_k: int, device: str) -> torch.Tensor:
    return torch.rand(tokens, experts, device=device).argsort(dim=-1)[:, :top_k].to(torch.int32)
