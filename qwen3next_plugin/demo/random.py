"""Checkpoints with random weights in the published file layout, for tests of any shape.

The numbers are drawn so that errors show: norm weights off their neutral value, routers that spread, decays from
slow to fast as in Mamba-2's initialisation (arXiv 2405.21060), so that the state remembers far more than a few tokens.
"""

import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qwen3next_plugin.config import GdnSpec, LayerKind, Qwen3NextSpec, parse_config
from qwen3next_plugin.errors import SettingsError
from qwen3next_plugin.kernels.gemm.reference import quantize_block

from .packing import packed_tensors
from .shapes import config_of
from .tokenizer import write_tokenizer

SHARD_BYTES = 2 << 30
MAX_PARAMETERS = 4_000_000_000


def write_random_checkpoint(
    directory: str | Path,
    shape: str = "tiny",
    seed: int = 0,
    dtype: str = "bfloat16",
    *,
    fp8: bool = False,
    quantization: str | None = None,
    weights: bool | None = None,
    **overrides: Any,
) -> Path:
    """Write config.json, tokenizer and random safetensors in the published layout and names.

    The same seed, shape and dtype give the same bytes; every tensor has a generator of its own, so a layer's numbers
    do not depend on how many others there are.

    Args:
        directory: made if it is not there.
        shape: a key of ``shapes.SHAPES``.
        seed: of the weights.
        dtype: ``bfloat16``, ``float16`` or ``float32``; ``A_log`` and ``dt_bias`` are float32 in any case.
        fp8: short for the quantisation of the published FP8 checkpoint: 128x128 blocks, ``weight_scale_inv`` beside.
        quantization: how linear layers are quantised, one of ``shapes.QUANTISATIONS``.
        weights: False writes config and tokenizer only; None does so for shapes over ``MAX_PARAMETERS``.
        overrides: fields of config.json to set on top of the shape.

    Returns:
        the directory.

    Raises:
        SettingsError: unknown shape, dtype or quantisation; ConfigError: overrides that make no model.
    """
    directory = Path(directory)
    config = config_of(shape, dtype, fp8, quantization, **overrides)
    spec = parse_config(config)
    if weights is None:
        weights = count_parameters(spec) <= MAX_PARAMETERS
    elif weights and count_parameters(spec) > MAX_PARAMETERS:
        raise SettingsError(
            f"shape: {shape!r} has {count_parameters(spec):,} parameters: random weights are written up to"
            f" {MAX_PARAMETERS:,}, ask for the config alone."
        )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(directory, (), spec.max_position_embeddings, spec.vocab_size)
    if weights:
        save_shards(directory, random_tensors(spec, seed))
    return directory


def tensor_shapes(spec: Qwen3NextSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a published checkpoint of this shape: its name and its shape, experts one by one."""
    hidden = spec.hidden_size
    yield "model.embed_tokens.weight", (spec.vocab_size, hidden)
    for i, kind in enumerate(spec.layer_kinds):
        yield from _layer_shapes(f"model.layers.{i}.", spec, kind, i in spec.dense_layers)
    yield "model.norm.weight", (hidden,)
    if not spec.tie_word_embeddings:
        yield "lm_head.weight", (spec.vocab_size, hidden)
    if spec.num_mtp_layers:
        yield "mtp.fc.weight", (hidden, 2 * hidden)
        for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            yield f"mtp.{name}.weight", (hidden,)
        yield from _layer_shapes("mtp.layers.0.", spec, LayerKind.FULL, False)


def _layer_shapes(
    prefix: str, spec: Qwen3NextSpec, kind: LayerKind, dense: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, moe = spec.hidden_size, spec.moe
    yield f"{prefix}input_layernorm.weight", (hidden,)
    yield f"{prefix}post_attention_layernorm.weight", (hidden,)
    if kind == LayerKind.LINEAR:
        yield from _gdn_shapes(f"{prefix}linear_attn.", hidden, spec.gdn)
    else:
        attention, at = spec.attention, f"{prefix}self_attn."
        width, kv_width = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
        yield f"{at}q_proj.weight", (2 * width, hidden)
        yield f"{at}k_proj.weight", (kv_width, hidden)
        yield f"{at}v_proj.weight", (kv_width, hidden)
        yield f"{at}o_proj.weight", (hidden, width)
        yield f"{at}q_norm.weight", (attention.head_dim,)
        yield f"{at}k_norm.weight", (attention.head_dim,)
    if dense:
        yield from _mlp_shapes(f"{prefix}mlp.", hidden, spec.intermediate_size)
        return
    yield f"{prefix}mlp.gate.weight", (moe.num_experts, hidden)
    for expert in range(moe.num_experts):
        yield from _mlp_shapes(f"{prefix}mlp.experts.{expert}.", hidden, moe.intermediate_size)
    yield from _mlp_shapes(f"{prefix}mlp.shared_expert.", hidden, moe.shared_intermediate_size)
    yield f"{prefix}mlp.shared_expert_gate.weight", (1, hidden)


def _gdn_shapes(at: str, hidden: int, gdn: GdnSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{at}in_proj_qkvz.weight", (2 * gdn.key_dim + 2 * gdn.value_dim, hidden)
    yield f"{at}in_proj_ba.weight", (2 * gdn.num_v_heads, hidden)
    yield f"{at}conv1d.weight", (gdn.conv_dim, 1, gdn.conv_kernel_size)
    yield f"{at}A_log", (gdn.num_v_heads,)
    yield f"{at}dt_bias", (gdn.num_v_heads,)
    yield f"{at}norm.weight", (gdn.head_v_dim,)
    yield f"{at}out_proj.weight", (hidden, gdn.value_dim)


def _mlp_shapes(at: str, hidden: int, intermediate: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{at}gate_proj.weight", (intermediate, hidden)
    yield f"{at}up_proj.weight", (intermediate, hidden)
    yield f"{at}down_proj.weight", (hidden, intermediate)


def count_parameters(spec: Qwen3NextSpec) -> int:
    """Parameters of the whole model, embeddings and MTP layer included."""
    return sum(math.prod(shape) for _, shape in tensor_shapes(spec))


def random_tensors(spec: Qwen3NextSpec, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Checkpoint tensors one after another, in ``spec.dtype``, or as codes and scales where ``spec.quant`` asks for
    it."""
    for name, shape in tensor_shapes(spec):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        value = _draw(name, shape, generator)
        module = name.removesuffix(".weight")
        stored = spec.quant.integer_format(module) if spec.quant is not None and _is_linear(module) else None
        if name.endswith(("A_log", "dt_bias")):
            yield name, value
        elif stored is not None and not _left_alone(module, spec):
            yield from packed_tensors(module, value.to(spec.dtype), stored)
        elif spec.quant and not spec.quant.rules and _is_in_fp8(module, spec):
            codes, scale = quantize_block(value)
            yield name, codes
            yield f"{name}_scale_inv", scale
        else:
            yield name, value.to(spec.dtype)


def _is_in_fp8(module: str, spec: Qwen3NextSpec) -> bool:
    linear = module.endswith(("_proj", "in_proj_qkvz"))
    return linear and spec.quant is not None and not spec.quant.is_ignored(module)


def _is_linear(module: str) -> bool:
    return module.endswith(("_proj", "in_proj_qkvz", "in_proj_ba", "mlp.gate", "shared_expert_gate", "lm_head", "fc"))


def _left_alone(module: str, spec: Qwen3NextSpec) -> bool:
    """GPTQ's tools never see the MTP layer: it stays as it is, and their config does not mention it."""
    return spec.quant is not None and spec.quant.method == "gptq" and module.startswith("mtp.")


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    def normal(std: float, mean: float = 0.0) -> Tensor:
        return torch.empty(shape).normal_(mean, std, generator=generator)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=generator)

    if name.endswith("A_log"):
        return uniform(0.5, 16.0).log()
    if name.endswith("dt_bias"):
        # softplus(dt_bias) is the time step: log-uniform in [0.001, 0.1].
        step = uniform(math.log(1e-3), math.log(1e-1)).exp()
        return step + torch.log(-torch.expm1(-step))
    if name.endswith("linear_attn.norm.weight"):
        return normal(0.1, mean=1.0)
    if len(shape) == 1:
        return normal(0.1)  # zero-centred norms
    if name.endswith("conv1d.weight"):
        return uniform(-0.5, 0.5)
    if name == "model.embed_tokens.weight":
        return normal(1.0)
    gain = 2.0 if name.endswith(("lm_head.weight", "mlp.gate.weight")) else 1.0
    return normal(gain * shape[-1] ** -0.5)


def save_shards(directory: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write safetensors below ``directory``: one file, or numbered shards with an index when there is more than
    ``shard_bytes``."""
    shards: list[dict[str, str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal pending, size
        path = directory / f"model-{len(shards) + 1:05d}.safetensors"
        save_file(pending, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes files that only their owner can read
        shards.append(dict.fromkeys(pending, path.name))
        pending, size = {}, 0

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > shard_bytes:
            flush()
        pending[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (directory / "model-00001.safetensors").rename(directory / "model.safetensors")
        return
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"model-{number:05d}.safetensors").rename(directory / final)
        index |= dict.fromkeys(names, final)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
