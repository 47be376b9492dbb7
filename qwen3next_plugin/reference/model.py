"""Qwen3-Next over the fused weights: decoder, language-model head and the multi-token-prediction (MTP) layer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from qwen3next_plugin import weights_packed
from qwen3next_plugin.config import LayerKind, Qwen3NextSpec, load_spec
from qwen3next_plugin.kernels.gemm.reference import dequantize_block
from qwen3next_plugin.kernels.norm.reference import rms_norm
from qwen3next_plugin.rope import build_cos_sin
from qwen3next_plugin.weights import fuse_checkpoint, open_checkpoint

from .cache import ReferenceCache
from .layers import Weights, decoder_layer

SCALE_SUFFIX = "_scale_inv"
GATE_PARAMETERS = ("A_log", "dt_bias")  # never rounded below float32, as in the checkpoint


def prepare_weights(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights the oracle computes with: quantised ones multiplied out, everything in ``dtype``, gate parameters in
    float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    prepared = {}
    for name, weight in weights.items():
        if name.endswith((SCALE_SUFFIX, weights_packed.SCALE_SUFFIX, weights_packed.ZERO_SUFFIX)):
            continue
        scale, factors = weights.get(name + SCALE_SUFFIX), weights.get(name + weights_packed.SCALE_SUFFIX)
        if scale is not None:
            weight = dequantize_block(weight, scale, wide)
        elif factors is not None:
            weight = weights_packed.dequantize(weight, factors, weights.get(name + weights_packed.ZERO_SUFFIX), wide)
        prepared[name] = weight.to(wide if name.endswith(GATE_PARAMETERS) else dtype)
    return prepared


class ReferenceModel:
    """The oracle. It holds a specification and a dict of fused weights; training hands in weights that require
    gradients.

    Args:
        spec: the model's shape.
        weights: fused names and tensors as ``qwen3next_plugin.weights.fuse_checkpoint`` returns them. Tensors that
            already have the right dtype are used as they are, without a copy.
        dtype: of weights and activations: float32, float64 or bfloat16. Norms, softmax, gates and the delta rule
            compute in float32 or wider in any case.
        delta_rule: ``"chunked"``, ``"recurrent"`` or ``"auto"`` (recurrent for single tokens).
    """

    def __init__(
        self,
        spec: Qwen3NextSpec,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float32,
        delta_rule: str = "auto",
    ) -> None:
        self.spec = spec
        self.weights = prepare_weights(weights, dtype)
        self.dtype = dtype
        self.delta_rule = delta_rule
        prefixes = [f"model.layers.{i}." for i in range(spec.num_layers)]
        prefixes += [f"mtp.layers.{i}." for i in range(spec.num_mtp_layers)]
        self._layers: dict[str, Weights] = {prefix: self._below(prefix) for prefix in prefixes}
        self._cos_sin: Tensor | None = None

    @classmethod
    def from_checkpoint(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> Self:
        """Read ``config.json`` and the safetensors files below ``path``; raises what ``load_spec`` and
        ``fuse_checkpoint`` raise."""
        spec = load_spec(path)
        return cls(spec, fuse_checkpoint(open_checkpoint(path), spec), dtype)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.weights["model.embed_tokens.weight"].device

    def tokens(self, ids: Sequence[int]) -> Tensor:
        """One sequence of token ids as ``[1, T]`` beside the weights."""
        return torch.tensor([list(ids)], device=self.device)

    def layer(self, prefix: str) -> Weights:
        """The weights of the layer called ``prefix`` (``model.layers.3.``, ``mtp.layers.0.``), names without it."""
        return self._layers[prefix]

    def _below(self, prefix: str) -> Weights:
        return {name[len(prefix) :]: w for name, w in self.weights.items() if name.startswith(prefix)}

    def rotary(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin ``[length, rotary_dim / 2]`` from position ``start`` on."""
        end = start + length
        if self._cos_sin is None or self._cos_sin.shape[0] < end:
            # Twice what is needed, so that decoding token by token does not rebuild the table at every step.
            self._cos_sin = build_cos_sin(self.spec.rope, self.spec.attention.rotary_dim, 2 * end, self.device)
        cos, sin = self._cos_sin[start:end].chunk(2, dim=-1)
        return cos, sin

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids ``[B, T]`` -> embeddings ``[B, T, H]``."""
        return functional.embedding(tokens, self.weights["model.embed_tokens.weight"])

    def hidden(self, tokens: Tensor, cache: ReferenceCache | None = None) -> Tensor:
        """The decoder: token ids ``[B, T]`` -> hidden states ``[B, T, H]`` behind the final norm, which head and MTP
        layer both read.

        With a ``cache`` the tokens follow those it has seen, and it is brought up to date.
        """
        start = cache.length if cache else 0
        cos, sin = self.rotary(start, tokens.shape[1])
        x = self.embed(tokens)
        for i, kind in enumerate(self.spec.layer_kinds):
            prefix = f"model.layers.{i}."
            state = cache.layer(prefix) if cache else None
            dense = i in self.spec.dense_layers
            x = decoder_layer(x, self._layers[prefix], self.spec, kind, dense, cos, sin, state, self.delta_rule)
        if cache is not None:
            cache.length += tokens.shape[1]
        return rms_norm(x, self.weights["model.norm.weight"], self.spec.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[..., H]`` of decoder or MTP layer -> logits ``[..., vocab]``."""
        head = "model.embed_tokens.weight" if self.spec.tie_word_embeddings else "lm_head.weight"
        return functional.linear(hidden, self.weights[head])

    def __call__(self, tokens: Tensor, cache: ReferenceCache | None = None) -> Tensor:
        """Token ids ``[B, T]`` of equally long sequences -> logits ``[B, T, vocab]``."""
        return self.logits(self.hidden(tokens, cache))

    def ragged(
        self, sequences: Sequence[Sequence[int]], caches: Sequence[ReferenceCache] | None = None
    ) -> list[Tensor]:
        """Sequences of any lengths -> logits ``[T_i, vocab]`` of each; no padding, so nothing can leak between them."""
        each = caches if caches is not None else [None] * len(sequences)
        return [self(self.tokens(s), cache)[0] for s, cache in zip(sequences, each, strict=True)]

    def mtp_input(self, hidden: Tensor, next_tokens: Tensor) -> Tensor:
        """``fc([norm(embedding of the next token), norm(hidden)])``, in this order: ``[B, T, H]``."""
        eps = self.spec.rms_norm_eps
        embedding = rms_norm(self.embed(next_tokens), self.weights["mtp.pre_fc_norm_embedding.weight"], eps)
        hidden = rms_norm(hidden, self.weights["mtp.pre_fc_norm_hidden.weight"], eps)
        return functional.linear(torch.cat([embedding, hidden], dim=-1), self.weights["mtp.fc.weight"])

    def mtp(self, hidden: Tensor, next_tokens: Tensor, cache: ReferenceCache | None = None) -> Tensor:
        """The MTP layer (DeepSeek-V3, arXiv 2412.19437, section 2.2): predicts the token after the next one.

        Row t pairs the hidden state of position t with the token at t + 1; ``logits`` of row t of the result are for
        the token at t + 2. To look further ahead, the result is fed back as ``hidden`` together with the token it
        predicted.

        Args:
            hidden: ``[B, T, H]`` behind the final norm of the decoder, or a former result of this function.
            next_tokens: ``[B, T]``.
            cache: continued from and brought up to date when given; row 0 then stands at position ``cache.mtp_length``.

        Returns:
            ``[B, T, H]`` behind the MTP layer's own norm.
        """
        start = cache.mtp_length if cache else 0
        cos, sin = self.rotary(start, next_tokens.shape[1])
        prefix = "mtp.layers.0."
        state = cache.layer(prefix) if cache else None
        x = self.mtp_input(hidden, next_tokens)
        x = decoder_layer(x, self._layers[prefix], self.spec, LayerKind.FULL, False, cos, sin, state)
        if cache is not None:
            cache.mtp_length += next_tokens.shape[1]
        return rms_norm(x, self.weights["mtp.norm.weight"], self.spec.rms_norm_eps)
