"""Every Triton kernel that serving can launch is compiled before the server is ready.

Triton compiles a kernel when it is first launched, for its arguments' types, for constants among them, and for which
numbers and addresses are divisible by 16: seconds that a request would wait, or an error inside a graph's capture. So
each kind of layer's operations are called here with its own weights, which are only read, and a few tokens of zeros.
Rows of states are skipped ones (slot -1), of which the kernels read and write nothing. What grows with a step is no
argument that Triton specialises on, so few numbers of tokens stand for all of them; a test holds this against serving.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from itertools import count
from typing import Any

import torch
from torch import nn

from .kernels import compilations
from .kernels.dispatch import TRITON, choose
from .kernels.gemm import FP8, MAX_ROWS, block_fp8_matmul, quantize_tokens, quantized_matmul
from .kernels.moe import add_shared_expert, fused_moe, route
from .kernels.moe.config import forced
from .kernels.moe.ways import LONG_SCAN, MANY_PAIRS, SHORT_SCAN, Way, apart, ways_up_to
from .kernels.rope import qk_norm_rope, qk_norm_rope_write, sigmoid_gate
from .layers import GatedAttentionParts, GdnParts
from .layers_base import WeightHolder, ZeroCentredRMSNorm
from .layers_few import FewRows, few_rows_of
from .layers_fp8 import Fp8Columns, Fp8Rows
from .layers_integer import IntegerExperts, IntegerLinear
from .layers_moe import Experts, SparseMoE
from .warmup_gdn import launch_gdn
from .warmup_rows import SKIPPED, StepRows

_PAGE = 16
TOKENS = (1, 2, 4, 8, 16, 17, 32, 64, 65)
"""On both sides of every number of tokens where a kernel's constants change: tiles of rows are powers of two up to 16,
products have tiles of 16 rows up to 16 tokens, and FP8 activations are rounded from `gemm.policy.MIN_ROWS` on, row by
row up to 64."""


@dataclass(frozen=True)
class Serving:
    """What an engine will ask for.

    dtype: of activations; max_tokens: of one step, at most; top_k: experts that a token chooses, the shared one not
    counted; states: both of a layer, as its core gets them, or None for a layer to be left out; steps: each kind of
    step of a Gated DeltaNet layer; further: what is launched beside the layers.
    """

    dtype: torch.dtype
    device: torch.device
    max_tokens: int
    top_k: int
    states: Callable[[nn.Module], tuple[torch.Tensor, torch.Tensor] | None] = lambda layer: None
    steps: Callable[[nn.Module], Iterable[StepRows]] = lambda layer: ()
    further: Sequence[Callable[[], None]] = field(default=())

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)


@dataclass(frozen=True)
class WarmUp:
    """What was done: kinds of layers called, kernels compiled for them, and how long it took; and how many compilations
    were known afterwards."""

    layers: int
    compiled: int
    seconds: float
    known: int

    def __str__(self) -> str:
        return (
            f"Kernels are warm: {self.compiled} compiled or loaded for {self.layers} kinds of layers in "
            f"{self.seconds:.1f} s."
        )


def warm_up(models: Iterable[nn.Module], serving: Serving) -> WarmUp:
    """Call what the models' layers launch, each kind of layer once. Allocates scratch only, and gives it back.

    Where kernels do not run (`kernels.dispatch`), nothing is done.
    """
    start, before = time.monotonic(), len(compilations.compiled())
    if choose(serving.zeros(1), None) != TRITON:
        return WarmUp(0, 0, 0.0, before)
    compilations.observe()
    kinds: set[object] = set()
    modules = [module for model in models for module in model.modules()]
    with torch.no_grad(), compilations.expected():
        for module in modules:
            kind = _kind(module, serving)
            if kind not in kinds and _launch.dispatch(type(module)) is not _launch.dispatch(object):
                kinds.add(kind)
                _launch(module, serving)
        for few in few_rows_of(modules):
            kind = few.gated, few.normed, few.keeps, tuple(map(_form, few.tensors()))
            if kind not in kinds:
                kinds.add(kind)
                _few_rows(few, serving)
        for launch in serving.further:
            launch()
    if serving.device.type == "cuda":
        torch.cuda.synchronize(serving.device)
        torch.cuda.empty_cache()
    known = len(compilations.compiled())
    return WarmUp(len(kinds), known - before, time.monotonic() - start, known)


def serve(logger: logging.Logger, warmed: WarmUp) -> None:
    """The server is ready: compilations are warned of from now on, and those that its start had after the warm-up.

    Nothing where nothing was warmed, as on a CPU, which need not even have Triton.
    """
    if not warmed.layers:
        return
    missed = sorted({found.kernel for found in compilations.compiled()[warmed.known :]})
    if missed:
        logger.warning("Compiled after the warm-up, while the server started: %s. Please report it.", ", ".join(missed))
    compilations.serve(logger.warning)


def _kind(module: nn.Module, serving: Serving) -> object:
    """Modules of one kind launch the same: what Triton could specialise on is the same in both."""
    states = serving.states(module) or ()
    inner = [held.weight for held in module.children() if isinstance(held, WeightHolder)]
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False), *inner, *states]
    return type(module), tuple(map(_form, tensors))


def _form(tensor: torch.Tensor) -> object:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16 == 0


def _few_rows(few: FewRows, serving: Serving) -> None:
    """Products of few rows with the weights of an engine's layers, where they are ours."""
    columns = few.tensors()[0].shape[1]
    norm = ZeroCentredRMSNorm(columns, eps=1e-6).to(serving.device, serving.dtype)
    for tokens in range(1, MAX_ROWS + 1):
        x = serving.zeros(tokens, columns)
        if not few.runs(x, *few.layers):
            continue
        if not few.normed:
            few(x, serving.zeros(tokens, columns) if few.gated else None)
            continue
        for residual in (x,) if few.keeps else (x, None):  # a model's first layer has none
            few.of_norm(x, residual, norm, *few.layers)


@singledispatch
def _launch(module: nn.Module, serving: Serving) -> None:
    """Other modules launch nothing of ours."""


@_launch.register
def _(module: ZeroCentredRMSNorm, serving: Serving) -> None:
    for tokens in TOKENS:
        x = serving.zeros(tokens, module.weight.shape[0])
        module(x)
        module.add(x, x)


@_launch.register
def _(module: GatedAttentionParts, serving: Serving) -> None:
    width, heads = 2 * (module.num_heads + module.num_kv_heads) * module.head_dim, module.num_kv_heads
    # Whose strides are as even as those of any cache, which is all that Triton looks at.
    keys, values = serving.zeros(1, _PAGE, heads, 2 * module.head_dim).split(module.head_dim, dim=-1)
    for tokens in TOKENS:
        positions = serving.zeros(tokens, dtype=torch.int64)
        call = (serving.zeros(tokens, width), *module.constants(), positions)
        q, _, _, gate = qk_norm_rope(*call, **module.sizes, eps=module.eps)
        qk_norm_rope_write(*call, gate, keys, values, positions - 1, **module.sizes, eps=module.eps)
        sigmoid_gate(q, gate)


@_launch.register
def _(module: GdnParts, serving: Serving) -> None:
    launch_gdn(module, serving, TOKENS)


@_launch.register
def _(module: SparseMoE, serving: Serving) -> None:
    gate, moe = module.shared_expert_gate.weight, module.moe
    for tokens in TOKENS:
        x = serving.zeros(tokens, gate.shape[1])
        joined = (x, gate) if module.joined else (None, None)
        route(serving.zeros(tokens, moe.num_experts), moe.top_k, moe.norm_topk_prob, *joined)
        if not module.joined:
            add_shared_expert(x, x, x, gate)


@_launch.register
def _(module: Experts, serving: Serving) -> None:
    scales = (module.w13_scale_inv, module.w2_scale_inv)
    _every_way(serving, module.w13, module.w2, scales, num_shared=module.num_shared)


@_launch.register
def _(module: IntegerExperts, serving: Serving) -> None:
    if module.w13_scale is None:
        _every_way(serving, module.w13, module.w2, (None, None))
        return
    zeros: dict[str, Any] = {"w13_zero": module.w13_zero, "w2_zero": module.w2_zero}
    scales = (module.w13_scale, module.w2_scale)
    _every_way(serving, module.w13, module.w2, scales, module.quantize_activations, **zeros)


@_launch.register(Fp8Columns)
@_launch.register(Fp8Rows)
def _(module: Fp8Columns | Fp8Rows, serving: Serving) -> None:
    for tokens in TOKENS:
        block_fp8_matmul(serving.zeros(tokens, module.weight.shape[1]), module.weight, module.weight_scale_inv)


@_launch.register
def _(module: IntegerLinear, serving: Serving) -> None:
    scale = module.weight_scale
    if scale is None:
        return
    columns = module.weight.shape[1] * (2 if module.weight.dtype is torch.uint8 else 1)
    for tokens in TOKENS:
        x, rounds = serving.zeros(tokens, columns), module.quantize_activations
        quantized_matmul(x, module.weight, scale, module.weight_zero, quantize_activations=rounds)


def _every_way(
    serving: Serving,
    w13: torch.Tensor,
    w2: torch.Tensor,
    scales: tuple[torch.Tensor | None, torch.Tensor | None],
    quantize_activations: bool | None = None,
    *,
    num_shared: int = 0,
    **zeros: Any,
) -> None:
    """Each way that numbers of tokens go, with few of them, none of whose experts is here."""
    choices, hidden = serving.top_k + num_shared, w2.shape[1]
    size = torch.empty((), dtype=serving.dtype).element_size()
    ways = ways_up_to(serving.max_tokens, choices, size, w13, scales[0], quantize_activations, num_shared)
    if w13.dtype is FP8 and any(way.quantize for way in ways):
        for tokens in TOKENS:
            for width in (hidden, w2.shape[2]):
                quantize_tokens(serving.zeros(tokens, width))
    for way, (first, _) in ways.items():
        rows = way.config is None and way.plan is None
        tokens = first if rows else _fewest_tokens(way, choices, w13.shape[0])
        ids = torch.full((tokens, choices), SKIPPED, dtype=torch.int32, device=serving.device)
        call = (serving.zeros(tokens, hidden), w13, w2, serving.zeros(*ids.shape, dtype=torch.float32), ids, *scales)
        if way.plan is not None:
            from .kernels.moe.triton.by_peer import fused_moe_by_peer  # here, where Triton is known to be

            fused_moe_by_peer(way.plan, *call)
            continue
        if way.tall:
            from .kernels.moe.triton.tall import fused_moe_tall  # here, as above

            fused_moe_tall(*call)
            continue
        if way.config is None:
            fused_moe(*call, **zeros, quantize_activations=way.quantize, num_shared=num_shared)
            continue
        with forced(way.config):
            fused_moe(*call, **zeros, quantize_activations=way.quantize, num_shared=num_shared)


def _fewest_tokens(way: Way, choices: int, num_experts: int) -> int:
    """Tokens of so many choices whose pairs are sorted as this way sorts them."""
    if way.chunks:
        return -(-MANY_PAIRS // choices)
    if way.scan == LONG_SCAN:
        return SHORT_SCAN // choices + 1
    if way.config is None or way.apart:  # a plan asks for nothing of them
        return 1
    rows = way.config.block_m
    return next(tokens for tokens in count(1) if not apart(tokens * choices, num_experts, rows))
