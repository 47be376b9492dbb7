"""What the model should say: the oracle over synthetic weights, one layer in memory at a time.

Run as a program in an engine's environment while no engine holds the GPU:
``python -m qwen3next_plugin.bench.oracle MODEL FILE`` writes the float32 log-probabilities of the token after each of
`PROMPTS` to a ``.npy`` file [prompts, vocabulary]. At 80B shapes a layer takes 7 GB.
"""

import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qwen3next_plugin.config import load_spec
from qwen3next_plugin.expert_shard import ExpertShard
from qwen3next_plugin.kernels.norm.reference import rms_norm
from qwen3next_plugin.reference.layers import decoder_layer
from qwen3next_plugin.reference.model import prepare_weights
from qwen3next_plugin.rope import build_cos_sin
from qwen3next_plugin.spec import Qwen3NextSpec
from qwen3next_plugin.synthetic import synthetic_tensors
from qwen3next_plugin.weights import fused_stream

from .logits import logit_prompts


def oracle_log_probabilities(spec: Qwen3NextSpec, prompts: list[list[int]], device: torch.device) -> Tensor:
    """Log-probabilities [prompts, vocabulary] (float32) of the token after each of equally long prompts."""
    ids = torch.tensor(prompts, device=device)
    cos, sin = build_cos_sin(spec.rope, spec.attention.rotary_dim, ids.shape[1], device).chunk(2, dim=-1)
    x = final = embedding = torch.empty(0, device=device)
    for part, weights in _parts(spec, device):
        if part == "model.embed_tokens":
            embedding = weights["weight"]
            x = functional.embedding(ids, embedding)
        elif part == "model.norm":
            final = rms_norm(x[:, -1], weights["weight"], spec.rms_norm_eps)
        elif part == "lm_head":
            embedding = weights["weight"]
        else:
            i = int(part.split(".")[2])
            x = decoder_layer(x, weights, spec, spec.layer_kinds[i], i in spec.dense_layers, cos, sin)
    return functional.linear(final, embedding).log_softmax(dim=-1)


def _parts(spec: Qwen3NextSpec, device: torch.device) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Embedding, layers, norm and head with their weights in float32, names without the part's own."""

    def part_of(pair: tuple[str, Tensor]) -> str:
        words = pair[0].split(".")
        return ".".join(words[: 3 if "layers" in words else -1])

    for part, pairs in groupby(synthetic_tensors(spec, device, scope="model"), key=part_of):
        fused = prepare_weights(_fused(pairs, spec), torch.float32)
        yield part, {name.removeprefix(part + "."): tensor for name, tensor in fused.items()}


def _fused(tensors: Iterable[tuple[str, Tensor]], spec: Qwen3NextSpec) -> dict[str, Tensor]:
    fused: dict[str, Tensor] = {}
    experts = ExpertShard(spec, 0, 1)
    for name, tensor, placement in fused_stream(tensors, spec, scope="model", complete=False):
        if placement.expert is not None:
            if name not in fused:
                rows = tensor.shape[0] * (1 if placement.shard is None else 2)
                fused[name] = tensor.new_empty(spec.moe.num_experts, rows, *tensor.shape[1:])
            experts.place(fused[name], tensor, placement)
        else:  # q, k, v and gate, up come in the order they stand in
            fused[name] = torch.cat([fused[name], tensor]) if name in fused else tensor
    return fused


def main(model: str, file: str) -> None:
    """Writes the oracle's log-probabilities for the bench's prompts."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = load_spec(model)
    with torch.inference_mode():
        found = oracle_log_probabilities(spec, logit_prompts(spec.vocab_size), device)
    part = Path(file).with_suffix(".part.npy")
    np.save(part, found.float().cpu().numpy())
    part.replace(file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
