"""Weights of a whole checkpoint out of nothing, on the device that wants them: what both engines are measured with.

An engine's own dummy weights flatter it: tensors of one shape share their numbers, and as FP8 most are zero. Here every
tensor of the published checkpoint's names has numbers of its own, drawn from a seed and its name, so that stock and
plugin, vLLM and SGLang, and every rank of a tensor-parallel group load one and the same model through their own
loaders. No file is read or written; one tensor (or `EXPERTS_AT_ONCE` experts' worth) exists at a time.

The distributions:

- matrices: normal, sigma 0.02 (`initializer_range` of the published config), in FP8 with the scale that makes each
  128x128 block's largest magnitude 448; those that write to the residual stream divided by the square root of how many
  do (Radford et al. 2019, section 2.3), embeddings with sigma 1. Without the two, 48 random layers are chaotic: a
  rounding of 0.4 % a layer grew to 80 % (`tests/cpu/bench` holds 3 % to less than a tenth), and logits would say
  nothing about whether an engine computes this model;
- norms: zero-centred ones normal around 0, the gated norm around 1, sigma 0.02;
- convolution, A_log, dt_bias: as their layers are initialised before training: uniform within 1/sqrt(width); A uniform
  in [0.5, 16]; time step log-uniform in [0.001, 0.1] (Mamba-2, arXiv 2405.21060; Gated DeltaNet, arXiv 2412.06464), so
  that states remember from one token to hundreds;
- routers: rows normal with sigma 0.02 times a factor of their own, log-normal with sigma `ROUTER_SPREAD`. Logits of
  longer rows vary more and win a place among the top 10 more often. An assumption, not a measurement: Qwen3-Next was
  trained with a load-balancing loss over global batches, which leaves experts used unevenly within one batch, but none
  idle; 0.08 gives loads with a coefficient of variation of about 0.4 (`tests/cpu/bench` holds it to that). What a run
  really touched is in its result file, row by row.

Numbers depend on the device's generator: the same on every GPU of one kind and PyTorch version, others on a CPU.
"""

import math
import re
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .demo.random import tensor_shapes
from .errors import WeightError
from .kernels.gemm.reference import quantize_block
from .spec import Qwen3NextSpec
from .weights_map import SCALE_SUFFIX, Scope, in_scope

SIGMA = 0.02
EMBEDDING_SIGMA = 1.0
ROUTER_SPREAD = 0.08
EXPERTS_AT_ONCE = 64

_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(\w+)\.weight")


def synthetic_tensors(
    spec: Qwen3NextSpec, device: torch.device | str, *, seed: int = 0, scope: Scope = "all"
) -> Iterator[tuple[str, Tensor]]:
    """Checkpoint tensors by their published names, on ``device``; each may be overwritten once the next is asked for.

    Matrices come in ``spec.dtype``, or as float8_e4m3fn codes followed by ``..._scale_inv`` (float32, positive) where
    ``spec.quant`` covers them; A_log and dt_bias in float32. ``scope`` "model" leaves the MTP layer out, "mtp" gives it
    with the embedding and head that a drafter shares. Experts are drawn together and handed out as views, one by one,
    gate, up and down in turn. Raises WeightError for a model in packed integers.
    """
    if spec.quant is not None and spec.quant.rules:
        raise WeightError(f"synthetic weights are bf16 or FP8, not {spec.quant.method}: take another config.json.")
    device = torch.device(device)
    shapes = [(name, shape) for name, shape in tensor_shapes(spec) if in_scope(name, scope)]
    for name, shape in shapes:
        match = _EXPERT.fullmatch(name)
        if match is None:
            drawn = _draw(name, shape, _generator(f"{seed} {name}", device)).mul_(_share(name, spec))
            yield from _pair(name, drawn, spec)
        elif match[2] == "0" and match[3] == "gate_proj":
            yield from _experts(match[1], spec, seed, device)


def _experts(prefix: str, spec: Qwen3NextSpec, seed: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    up = (spec.moe.intermediate_size, spec.hidden_size)
    for first in range(0, spec.moe.num_experts, EXPERTS_AT_ONCE):
        count = min(EXPERTS_AT_ONCE, spec.moe.num_experts - first)
        for part, shape in (("gate_proj", up), ("up_proj", up), ("down_proj", up[::-1])):
            generator = _generator(f"{seed} {prefix}.{first}.{part}.weight", device)
            sigma = SIGMA * _share(f"{prefix}.{part}.weight", spec)
            values = _empty(count, *shape, device=device).normal_(0.0, sigma, generator=generator)
            stacked = dict(_pair(f"{prefix}.{first}.{part}.weight", values, spec))
            del values
            for i in range(count):
                for name, tensor in stacked.items():
                    yield name.replace(f".experts.{first}.", f".experts.{first + i}."), tensor[i]


def _pair(name: str, values: Tensor, spec: Qwen3NextSpec) -> Iterator[tuple[str, Tensor]]:
    """The tensor as its checkpoint holds it: as it is, or as FP8 codes and their scales."""
    if name.endswith(("A_log", "dt_bias")):
        yield name, values
    elif spec.quant is not None and _is_linear(name) and not spec.quant.is_ignored(name.removesuffix(".weight")):
        codes, scale = quantize_block(values)
        yield name, codes
        yield name + SCALE_SUFFIX, scale
    else:
        yield name, values.to(spec.dtype)


def _share(name: str, spec: Qwen3NextSpec) -> float:
    """What a tensor as drawn is multiplied by: less where it writes to the residual stream, as 2 a layer do."""
    if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
        return float((2 * spec.num_layers) ** -0.5)
    return EMBEDDING_SIGMA / SIGMA if name.endswith("embed_tokens.weight") else 1.0


def _is_linear(name: str) -> bool:
    return name.endswith(("_proj.weight", "in_proj_qkvz.weight"))


def _generator(text: str, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(zlib.crc32(text.encode()))


def _empty(*shape: int, device: torch.device) -> Tensor:
    """float32, whatever torch's default is: engines load with the model's dtype as theirs, the oracle does not."""
    return torch.empty(shape, dtype=torch.float32, device=device)


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    tensor = _empty(*shape, device=generator.device)
    if name.endswith("A_log"):
        return tensor.uniform_(0.5, 16.0, generator=generator).log_()
    if name.endswith("dt_bias"):
        step = tensor.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp_()
        return step + torch.log(-torch.expm1(-step))  # softplus gives the step back
    if name.endswith("conv1d.weight"):
        bound = shape[-1] ** -0.5
        return tensor.uniform_(-bound, bound, generator=generator)
    tensor.normal_(0.0, SIGMA, generator=generator)
    if name.endswith("linear_attn.norm.weight"):
        return tensor.add_(1.0)
    if name.endswith("mlp.gate.weight"):
        popularity = _empty(shape[0], 1, device=generator.device).normal_(0.0, ROUTER_SPREAD, generator=generator)
        return tensor.mul_(popularity.exp_())
    return tensor
