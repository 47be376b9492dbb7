"""The other parts of a layer: the convolution of a prompt, norms, the rotation, and the dense products."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.kernels.conv import causal_conv1d_prefill
from qwen3next_plugin.kernels.conv.reference import causal_conv
from qwen3next_plugin.kernels.gemm import (
    MAX_ROWS,
    block_fp8_matmul,
    dequantize_block,
    few_matmul,
    quantize_block,
    runs_few,
)
from qwen3next_plugin.kernels.norm import add_rms_norm
from qwen3next_plugin.kernels.norm import reference as norm_reference
from qwen3next_plugin.kernels.rope import qk_norm_rope_write
from qwen3next_plugin.kernels.rope import reference as rope_reference
from qwen3next_plugin.spec import AttentionSpec

from .cases import Case
from .gdn_work import GdnAbout, GdnInputs, gdn_parameters
from .work import Engine, Normal, Prepared, Work, copies_of

_CHECKED = 256
_POSITIONS = 4096
_PAGE_SIZE = 1056  # about what vLLM takes for this model: a page has the bytes of a recurrent state


@dataclass
class NormInputs:
    """x and residual [T, H]."""

    x: Tensor
    residual: Tensor


@dataclass
class NormAbout:
    """The zero-centred weight [H]."""

    weight: Tensor
    eps: float


@dataclass
class RopeInputs:
    """qkv [T, 2 * (NH + NKV) * D], keys and values of a cache [pages, page size, NKV, D] as the engine has it."""

    qkv: Tensor
    keys: Tensor
    values: Tensor


@dataclass
class RopeAbout:
    """Weights [D], cos | sin [P, rotary_dim] in float32, positions and slots [T]."""

    sizes: AttentionSpec
    q_weight: Tensor
    k_weight: Tensor
    cos_sin: Tensor
    positions: Tensor
    slots: Tensor
    eps: float


@dataclass
class DenseInputs:
    """x [M, K], weight [N, K], and for FP8 weights the factors of their blocks."""

    x: Tensor
    weight: Tensor
    scale_inv: Tensor | None

    @property
    def quantised(self) -> bool:
        """Whether the weight is, which the router's is not."""
        return self.scale_inv is not None


def layer_work(case: Case, spec: Qwen3NextSpec, engine: Engine, device: torch.device) -> Work:
    """A case of one of these operations."""
    normal = Normal(device)
    if case.op == "qk-norm-rope-write":
        return _rope(case, spec, normal, engine)
    return {"conv-prefill": _conv, "norm-add": _norm, "dense": _dense}[case.op](case, spec, normal)


def _first(out: Tensor) -> Tensor:
    return out[:_CHECKED]


def _conv(case: Case, spec: Qwen3NextSpec, normal: Normal) -> Work:
    sizes, tokens, device = spec.gdn, case.tokens, normal.device
    moved = tokens * 2 * sizes.conv_dim * 2

    def inputs() -> GdnInputs:
        states = normal(2, sizes.conv_dim, sizes.conv_kernel_size - 1)
        qkvz, out = normal(tokens, sizes.conv_dim + sizes.value_dim), normal(tokens, sizes.conv_dim)
        return GdnInputs(qkvz, qkvz[:, :0], states, states, out)

    copies = [inputs() for _ in range(copies_of(moved, 2 * moved, device))]
    slots = torch.ones(1, 1, dtype=torch.int32, device=device)
    starts = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    about = GdnAbout(sizes, gdn_parameters(sizes, spec.rms_norm_eps, normal), 1, tokens, slots, starts, slots[0])
    rows = about.prefill_rows()

    def convolve(one: GdnInputs) -> Tensor:
        causal_conv1d_prefill(
            one.qkvz[:, : sizes.conv_dim],
            about.parameters.conv_weight,
            None,
            one.conv_state,
            query_start=rows.query_start,
            query_end=rows.query_end,
            state_slots=rows.state_slots,
            has_initial_state=rows.has_initial_state,
            out=one.out,
        )
        return one.out

    x = copies[0].qkvz[:_CHECKED, : sizes.conv_dim]
    return Work(
        case,
        "the causal convolution of one prompt with SiLU, its state kept",
        moved,
        2 * tokens * sizes.conv_dim * sizes.conv_kernel_size,
        "bf16",
        copies,
        {"own": Prepared([partial(convolve, one) for one in copies])},
        {"": lambda: causal_conv(x.double()[None], about.parameters.conv_weight)[0]},
        _first,
        about=about,
    )


def _norm(case: Case, spec: Qwen3NextSpec, normal: Normal) -> Work:
    moved = case.tokens * spec.hidden_size * 2 * 4
    copies = [
        NormInputs(normal(case.tokens, spec.hidden_size), normal(case.tokens, spec.hidden_size))
        for _ in range(copies_of(moved, moved, normal.device))
    ]
    about = NormAbout(normal(spec.hidden_size, scale=0.1), spec.rms_norm_eps)
    first = copies[0]
    x, residual = first.x.clone(), first.residual.clone()

    def restore() -> None:  # engines' kernels write over their inputs
        first.x.copy_(x)
        first.residual.copy_(residual)

    def run(one: NormInputs) -> Tensor:
        return add_rms_norm(one.x, one.residual, about.weight, about.eps)[0]

    def expected() -> Tensor:
        total = (x + residual)[:_CHECKED].double()
        return norm_reference.rms_norm(total, about.weight, about.eps)

    return Work(
        case,
        "residual added, then the zero-centred norm",
        moved,
        0,
        "bf16",
        copies,
        {"own": Prepared([partial(run, one) for one in copies])},
        {"": expected},
        _first,
        restore,
        about,
    )


def _rope(case: Case, spec: Qwen3NextSpec, normal: Normal, engine: Engine) -> Work:
    sizes, device = spec.attention, normal.device
    width = 2 * (sizes.num_heads + sizes.num_kv_heads) * sizes.head_dim
    moved = case.tokens * width * 2 * 2  # keys and values once: into the cache
    slots = -(-(case.tokens + 1) // _PAGE_SIZE) * _PAGE_SIZE

    def inputs() -> RopeInputs:
        if engine == "vllm":
            cache = normal(slots // _PAGE_SIZE, _PAGE_SIZE, sizes.num_kv_heads, 2 * sizes.head_dim)
            return RopeInputs(normal(case.tokens, width), *cache.split(sizes.head_dim, dim=-1))
        keys, values = (normal(1, slots, sizes.num_kv_heads, sizes.head_dim) for _ in range(2))
        return RopeInputs(normal(case.tokens, width), keys, values)

    copies = [inputs() for _ in range(copies_of(moved, moved, device))]
    angles = torch.rand(_POSITIONS, sizes.rotary_dim // 2, device=device) * 6.0
    about = RopeAbout(
        sizes,
        normal(sizes.head_dim, scale=0.1),
        normal(sizes.head_dim, scale=0.1),
        torch.cat([angles.cos(), angles.sin()], dim=-1),
        torch.arange(case.tokens, device=device).remainder(_POSITIONS),
        1 + normal.order(slots - 1)[: case.tokens],  # the first is for padding in both engines
        spec.rms_norm_eps,
    )
    heads: dict[str, Any] = {
        "num_heads": sizes.num_heads,
        "num_kv_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
    }
    constants = (about.q_weight, about.k_weight, about.cos_sin)
    gate = normal(case.tokens, sizes.num_heads * sizes.head_dim)

    def run(one: RopeInputs) -> Tensor:
        places = (gate, one.keys, one.values, about.slots)
        return qk_norm_rope_write(one.qkv, *constants, about.positions, *places, **heads, eps=about.eps)[0]

    def written(q: Tensor) -> Tensor:
        where = about.slots[:_CHECKED]
        cache = (part.flatten(0, 1)[where].flatten(1) for part in (copies[0].keys, copies[0].values))
        return torch.cat([q[:_CHECKED], *cache], dim=1)

    def expected() -> Tensor:
        some = copies[0].qkv[:_CHECKED].double()
        parts = rope_reference.qk_norm_rope(some, *constants, about.positions[:_CHECKED], **heads, eps=about.eps)
        return torch.cat(parts[:3], dim=1)

    def restore() -> None:
        copies[0].keys.zero_()
        copies[0].values.zero_()

    return Work(
        case,
        "q, k, v and gate apart, q and k normalised and turned, k and v written into the cache",
        moved,
        0,
        "bf16",
        copies,
        {"own": Prepared([partial(run, one) for one in copies])},
        {"": expected},
        written,
        restore,
        about,
    )


def dense_shape(spec: Qwen3NextSpec, name: str) -> tuple[int, int]:
    """Output and input columns of a dense layer."""
    g, attention = spec.gdn, spec.attention
    return {
        "qkvz": (g.conv_dim + g.value_dim, spec.hidden_size),
        "out": (spec.hidden_size, g.value_dim),
        "qkv": (2 * (attention.num_heads + attention.num_kv_heads) * attention.head_dim, spec.hidden_size),
        "o": (spec.hidden_size, attention.num_heads * attention.head_dim),
        "router": (spec.moe.num_experts, spec.hidden_size),
    }[name]


def _dense(case: Case, spec: Qwen3NextSpec, normal: Normal) -> Work:
    (columns, depth), fp8 = dense_shape(spec, case.variant), case.variant != "router"
    moved = columns * depth * (1 if fp8 else 2) + case.tokens * (columns + depth) * 2

    def inputs() -> DenseInputs:
        weight, scale = normal(columns, depth, scale=depth**-0.5), None
        if fp8:
            weight, scale = quantize_block(weight)
        return DenseInputs(normal(case.tokens, depth), weight, scale)

    copies = [inputs() for _ in range(copies_of(moved, moved, normal.device))]

    few = case.tokens <= MAX_ROWS

    def run(one: DenseInputs) -> Tensor:
        if few:
            return few_matmul(one.x, one.weight, one.scale_inv)
        if one.scale_inv is None:
            return functional.linear(one.x, one.weight)
        return block_fp8_matmul(one.x, one.weight, one.scale_inv)

    def expected() -> Tensor:
        one = copies[0]
        weight = one.weight.double()
        if one.scale_inv is not None:
            weight = dequantize_block(one.weight, one.scale_inv, torch.float64)
        return one.x.double() @ weight.T

    return Work(
        case,
        "a dense product, activations rounded by those who round them" if fp8 else "the router's product",
        moved,
        2 * case.tokens * columns * depth,
        "fp8" if fp8 and not few else "bf16",
        copies,
        {"own": Prepared([partial(run, one) for one in copies])},
        {"": expected},
        lambda out: out,
        engine_runs=not runs_few(
            case.tokens, copies[0].weight
        ),  # our layers take few rows alone (`qwen3next_plugin.layers_few`)
    )
