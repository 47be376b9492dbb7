"""INT4 and INT8 problems for the products and the mixture of experts, with their answers in float64."""

from dataclasses import dataclass
from typing import Any

import torch

from qwen3next_plugin.kernels import gemm, moe
from qwen3next_plugin.kernels.gemm import formats, integer

from .common import to64, tolerance

FORMATS = ("int4", "int4 zeros", "int8", "int8 activations")


def quantized(weight: torch.Tensor, form: str, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(weight, scale, zero) of float weights [..., N, K]; `form` is one of FORMATS."""
    if form.startswith("int4"):
        return integer.quantize_int4(weight, group, symmetric=form == "int4")
    return *integer.quantize_int8(weight, group), None


def limit(dtype: torch.dtype, form: str, backend: str, device: str, roundings: int = 2) -> float:
    """Allowed relative error; a value near the middle of two INT8 codes may take the other one."""
    plain = tolerance(dtype, roundings, backend, device)
    other = {torch.float32: 1e-3, torch.float16: 6e-3, torch.bfloat16: 1.5e-2}[dtype]
    return max(plain, other) if form == "int8 activations" else plain


@dataclass
class Product:
    """The arguments of quantized_matmul."""

    tensors: tuple[Any, ...]  # x, weight, scale, zero
    rounded: bool

    def run(self, backend: str | None) -> torch.Tensor:
        return gemm.quantized_matmul(*self.tensors, quantize_activations=self.rounded, backend=backend)

    def expected(self) -> torch.Tensor:
        x, weight, scale, zero = self.tensors
        values = formats.round_activations(x, weight, torch.float64) if self.rounded else x.double()
        return values @ formats.dequantize(weight, scale, zero, torch.float64).T


def product(
    sizes: tuple[int, int, int],
    form: str,
    group: int,
    dtype: torch.dtype,
    device: str,
    scales: torch.dtype | None = None,
) -> Product:
    """x [M, K], a column slice of a wider tensor, by [N, K]."""
    M, N, K = sizes
    x = torch.randn(M, K + 2, device=device).to(dtype)[:, 1:-1]
    weight = torch.randn(N, K, device=device) + 0.2
    return Product((x, *quantized(weight.to(scales or dtype), form, group)), form == "int8 activations")


@dataclass
class Experts:
    """The arguments of fused_moe."""

    tensors: tuple[Any, ...]  # x, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale
    zeros: dict[str, Any]
    rounded: bool

    def run(self, backend: str | None) -> torch.Tensor:
        return moe.fused_moe(*self.tensors, **self.zeros, quantize_activations=self.rounded, backend=backend)

    def expected(self) -> torch.Tensor:
        """In float64, from the dequantised weights; rounded activations as the reference rounds them."""
        x, w13, w2, router, ids, s13, s2 = self.tensors
        ids = torch.where((ids >= 0) & (ids < w2.shape[0]), ids, -1)
        x, router = to64((x, router))
        if self.rounded:
            return moe.reference.fused_moe(x, w13, w2, router, ids, s13, s2, True, **self.zeros)
        w13 = formats.dequantize(w13, s13, self.zeros["w13_zero"], torch.float64)
        w2 = formats.dequantize(w2, s2, self.zeros["w2_zero"], torch.float64)
        return moe.reference.fused_moe(x, w13, w2, router, ids)


def experts_case(
    ids: torch.Tensor,
    experts: int,
    hidden: int,
    inner: int,
    form: str,
    groups: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> Experts:
    """Groups of w13's columns (of `hidden`) and of w2's (of `inner`)."""
    tokens, top_k = ids.shape
    x = torch.randn(tokens, hidden + 6, device=ids.device).to(dtype)[:, 3:-3]
    w13 = (torch.randn(experts, 2 * inner, hidden, device=ids.device) / hidden**0.5).to(dtype)
    w2 = (torch.randn(experts, hidden, inner, device=ids.device) / inner**0.5).to(dtype)
    (q13, s13, z13), (q2, s2, z2) = quantized(w13, form, groups[0]), quantized(w2, form, groups[1])
    router = torch.rand(tokens, top_k, device=ids.device) + 0.1
    return Experts((x, q13, q2, router, ids, s13, s2), {"w13_zero": z13, "w2_zero": z2}, form == "int8 activations")
