"""Which specialisations of kernels a warm-up launches, and which steps of a server launch, without a GPU.

Run as a process of its own, without TRITON_INTERPRET, with a compute capability and the
kind of layers as arguments. Triton's own code says what
a launch would be specialised on; nothing is compiled or run. Prints one JSON object: the number of specialisations that
the warm-up had, and a line for each further one that a step had.
"""

import dataclasses
import json
import os
import pkgutil
import sys
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import qwen3next_plugin.kernels as kernels
from qwen3next_plugin.config import Qwen3NextSpec, parse_config
from qwen3next_plugin.expert_shard import ExpertShard
from qwen3next_plugin.kernels import dispatch, early
from qwen3next_plugin.kernels.gdn import DraftRecords, PackedRows, config, gdn_commit, peers
from qwen3next_plugin.kernels.gdn.step import DraftRows, PrefillRows, RecurrentRows, gdn_step
from qwen3next_plugin.kernels.gemm import policy
from qwen3next_plugin.kernels.moe import peer_table, tall_rule, ways
from qwen3next_plugin.kernels.moe import peers as moe_peers
from qwen3next_plugin.layers import GatedAttentionParts, GdnParts, Places
from qwen3next_plugin.layers_base import ParallelLayers, ZeroCentredRMSNorm
from qwen3next_plugin.layers_integer import IntegerExperts, IntegerLinear
from qwen3next_plugin.layers_moe import GatedMLP, SparseMoE
from qwen3next_plugin.moe_peers import expert_shape
from qwen3next_plugin.spec import IntegerFormat
from qwen3next_plugin.warmup import Serving, warm_up
from qwen3next_plugin.warmup_rows import SkippedRows
from tests.configs import new_form
from tests.cpu.core.few_layers import lent, small_spec
from tests.cpu.core.parallel import layers
from tests.cpu.core.varied_gdn import varied_table
from tests.kernels.compile_layers import NamesTargetOnly

BF16 = torch.bfloat16
MAX_TOKENS, DRAFTS = 2048, 3
STEPS = (
    *range(1, 19),
    23,
    31,
    32,
    33,
    47,
    48,
    63,
    64,
    65,
    100,
    127,
    128,
    129,
    255,
    256,
    257,
    500,
    1000,
    1024,
    1100,
    2047,
    2048,
)
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "head_dim": 64,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "num_experts": 24,  # some numbers of tokens have as many pairs, some more
    "num_experts_per_tok": 3,
}
specializations: dict[str, None] = {}


def note(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """Stands in for a launch."""
    binder = self.device_caches[0][-1]
    _, specialization, rest = binder(*args, **options)
    specializations[f"{self.fn.__name__} {specialization} {rest}"] = None


def spec(**changes: Any) -> Qwen3NextSpec:
    return parse_config(new_form(**SIZES | changes))


def states(model: Qwen3NextSpec, slots: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    gdn = model.gdn
    windows = torch.zeros(slots, gdn.conv_kernel_size - 1 + DRAFTS, gdn.conv_dim, dtype=BF16).transpose(1, 2)
    return windows, torch.zeros(slots, gdn.num_v_heads, gdn.head_v_dim, gdn.head_k_dim)


class Gdn:
    """Both engines' steps of a Gated DeltaNet layer."""

    def __init__(self) -> None:
        self.spec = spec()
        self.layer = GdnParts(self.spec, layers(0, 1), "model.layers.0.linear_attn")
        self.states = states(self.spec)
        gdn = self.spec.gdn
        heads = {name: getattr(gdn, name) for name in ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")}
        self.records = DraftRecords.allocate(3, 5, 1 + DRAFTS, **heads, input_dtype=BF16, device="cpu")
        for log_decay in (False, True):
            name = f"log decay: {log_decay}"
            peers.OFFERS.offer(peers.Peer(name, lambda call: (call.state, call.state), log_decay))
            peers.OFFERS.tried.update((name, (peers.HeadShape(**heads, dtype=BF16), kept)) for kept in (False, True))

    def models(self) -> list[nn.Module]:
        return [self.layer]

    def serving(self) -> dict[str, Any]:
        rows = SkippedRows(torch.device("cpu"))
        verify = {"recurrent": rows.verify(1 + DRAFTS)}
        steps: list[dict[str, Any]] = [{"prefill": rows.prefill(kept)} for kept in (False, True)]
        steps += [{"recurrent": rows.decode(kept)} for kept in (False, True)]
        steps += [{"prefill": rows.prefill(), "recurrent": rows.decode()}, verify]
        steps += [{"drafts": (rows.drafts(1 + DRAFTS), self.records.layer(0))}]
        return {
            "states": lambda layer: self.states if layer is self.layer else None,
            "steps": lambda layer: steps,
            "further": [partial(self.commit, rows.slots(), rows.slots(), kept) for kept in (None, rows.slots())],
        }

    def commit(self, slots: torch.Tensor, tokens: torch.Tensor, kept: torch.Tensor | None) -> None:
        windows, matrices = (torch.stack([state] * 3) for state in self.states)
        further: dict[str, Any] = {"last_tokens": tokens, "snapshot_slots": kept, "snapshot_tokens": kept}
        gdn_commit(windows, matrices, self.records, state_slots=slots, **further)

    def serve(self, tokens: int) -> None:
        # Rows lie anywhere in a step's arrays: behind its decodes, or in a table of block numbers.
        for first in range(4):
            rows = min(tokens, 3)
            starts = torch.arange(first + rows + 1, dtype=torch.int32)
            begin, end = starts[:-1][first:], starts[1:][first:]
            slots = torch.zeros(first + rows, 1 + DRAFTS, dtype=torch.int32)[first:]
            one, accepted = slots[:, 0], torch.ones(first + rows, dtype=torch.int32)[first:]
            has_state = torch.zeros(first + rows, dtype=torch.bool)[first:]
            kept = torch.zeros(first + rows, dtype=torch.int64)[first:]
            prefill = PrefillRows(begin, end, one, has_state, tokens)
            decode = RecurrentRows(begin, end, one, one, slots, None, 1)
            self.step(tokens, prefill=prefill, recurrent=decode)
            keeping = dataclasses.replace(prefill, snapshot_positions=kept, snapshot_slots=kept)
            self.step(tokens, prefill=keeping)
            packed = PackedRows.of([1] * rows, "cpu", first)
            for name in list(peers.OFFERS.found):
                peers.OFFERS.prefer(name)
                self.step(tokens + first, prefill=dataclasses.replace(prefill, packed=packed))
                self.step(tokens + first, prefill=dataclasses.replace(keeping, packed=packed))
            self.step(tokens, recurrent=decode)
            self.step(tokens, recurrent=dataclasses.replace(decode, snapshot_slots=kept))
            verify = dataclasses.replace(decode, num_accepted_tokens=accepted, max_query_len=1 + DRAFTS)
            self.step(tokens, recurrent=verify)
            self.step(tokens, prefill=prefill, recurrent=verify)
            for layer in range(3):
                self.step(tokens, drafts=(DraftRows(begin, end, one, 1 + DRAFTS), self.records.layer(layer)))
            self.commit(one, accepted, None)
            self.commit(one, accepted, accepted)

    def step(self, tokens: int, **rows: Any) -> None:
        layer = self.layer
        qkvz = torch.zeros(tokens, layer.conv_dim + layer.num_v_heads * layer.head_v_dim, dtype=BF16)
        gates = layer.gates(torch.zeros(tokens, 2 * layer.num_v_heads, dtype=BF16))
        out = torch.zeros(tokens, layer.num_v_heads, layer.head_v_dim, dtype=BF16)
        gdn_step(qkvz, *gates, layer.core_parameters(), *self.states, out, **rows)


class Attention:
    """Norms, and the parts of full attention."""

    def __init__(self) -> None:
        self.spec = spec()
        self.norm = ZeroCentredRMSNorm(self.spec.hidden_size, 1e-6)
        angles = torch.zeros(64, self.spec.attention.rotary_dim, dtype=torch.float32)
        lent = dataclasses.replace(layers(0, 1), qkv=_Unchanged, row=_Unchanged)
        self.layer = GatedAttentionParts(self.spec, lent, angles, "model.layers.3.self_attn")

    def models(self) -> list[nn.Module]:
        return [self.norm, self.layer]

    def serving(self) -> dict[str, Any]:
        return {}

    def serve(self, tokens: int) -> None:
        x = torch.zeros(tokens, self.spec.hidden_size, dtype=BF16)
        self.norm(x)
        self.norm.add(x, x)
        attention = self.spec.attention
        width = 2 * (attention.num_heads + attention.num_kv_heads) * attention.head_dim
        for first in range(3):
            positions = torch.zeros(tokens + first, dtype=torch.int64)[first:]
            qkv = torch.zeros(tokens, width, dtype=BF16)
            q, _, _, gate = self.layer.split(positions, qkv)
            self.layer.finish(q, gate)
            for keys, values in self.caches():
                for first_slot in range(2):
                    slots = positions[: max(1, tokens - first)]
                    self.layer.split(positions, qkv, Places(keys, values, slots, first_slot))

    def caches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """As vLLM has them, in both orders, with pages of any size, and as SGLang has them."""
        heads, width = self.spec.attention.num_kv_heads, self.spec.attention.head_dim
        for page_size in (16, 784, 33):
            for sizes in ((page_size, heads), (heads, page_size)):
                cache = torch.zeros(3, *sizes, 2 * width, dtype=BF16)
                keys, values = (cache if sizes[1] == heads else cache.transpose(1, 2)).split(width, dim=-1)
                yield keys, values
        yield torch.zeros(1, 77, heads, width, dtype=BF16), torch.zeros(1, 77, heads, width, dtype=BF16)


class Dense:
    """Products of few rows, with weights of the engine's layers."""

    def __init__(self) -> None:
        self.spec = small_spec()
        self.gdn = GdnParts(self.spec, lent(), "model.layers.0.linear_attn")
        self.attention = GatedAttentionParts(self.spec, lent(), torch.zeros(8, 4), "model.layers.3.self_attn")
        self.mlp = SparseMoE(self.spec, lent(), "model.layers.0.mlp")
        self.norm = ZeroCentredRMSNorm(self.spec.hidden_size, 1e-6)

    def models(self) -> list[nn.Module]:
        return [self.gdn, self.attention, self.mlp.gate]

    def serving(self) -> dict[str, Any]:
        return {}

    def serve(self, tokens: int) -> None:
        x, gdn = torch.zeros(tokens, self.spec.hidden_size), self.spec.gdn
        for residual in (x, None):
            self.gdn.project(x, residual, self.norm)
            qkv, _ = self.attention.project(x, residual, self.norm)
        self.gdn.finish(torch.zeros(tokens, gdn.num_v_heads, gdn.head_v_dim))
        q, _, _, gate = self.attention.split(torch.zeros(tokens, dtype=torch.int64), qkv)
        self.attention.finish(q, gate)
        self.mlp.router.of_norm(x, x, self.norm, self.mlp.gate)


class Mixture:
    """The experts with the shared one; kind is bf16, fp8 (which joins the shared one), or an integer format's name."""

    FORMATS = {
        "int4": IntegerFormat("pack-quantized", 4, 32, symmetric=False),
        "int8": IntegerFormat("pack-quantized", 8, 32),
        "int8 activations": IntegerFormat("int-quantized", 8, None, quantize_activations=True),
    }

    def __init__(self, kind: str) -> None:
        changes = {"shared_expert_intermediate_size": 256} if kind == "fp8 apart" else {}
        self.spec = spec(**changes)
        lent: ParallelLayers = layers(0, 1, 128 if kind.startswith("fp8") else None)
        lent = dataclasses.replace(lent, merged_column=_linear, row=_linear)
        if kind == "fp8 slices":
            lent = dataclasses.replace(lent, size=4, rank=1, all_reduce=lambda x: x)
        self.layer: Any = SparseMoE(self.spec, lent, "model.layers.0.mlp")
        if kind == "fp8 by peer":
            shape = expert_shape(self.spec, lent)
            assert shape is not None
            moe_peers.OFFERS.offer(moe_peers.Peer("peer", lambda call: None))
            moe_peers.OFFERS.tried.add(("peer", shape))
            peer_table.RULES = (peer_table.Rule((0, 0), "peer", 20, 64, ""),)
        if kind == "fp8 tall":
            tall_rule.CAPABILITY, tall_rule.MIN_TOKENS = (0, 0), 300
        stored = self.FORMATS.get(kind)
        if stored is not None:
            self.layer.joined = False
            self.layer.experts = IntegerExperts(ExpertShard(self.spec, 0, 1), stored)
            self.layer.shared_expert = nn.Sequential(
                IntegerLinear(self.spec, stored, lent, self.spec.hidden_size, {None: (0, self.spec.hidden_size)}),
                _First(),
            )
        if kind == "fp8 slices":
            self.layer.dense = GatedMLP(self.spec.hidden_size, 256, lent, "model.layers.0.mlp")

    def models(self) -> list[nn.Module]:
        return [self.layer]

    def serving(self) -> dict[str, Any]:
        return {}

    def serve(self, tokens: int) -> None:
        x = torch.zeros(tokens, self.spec.hidden_size, dtype=BF16)
        self.layer.mixture(x, self.layer.gate(x)[0])
        if hasattr(self.layer, "dense"):
            self.layer.dense(x)


class _First(nn.Module):
    def forward(self, outputs: tuple[torch.Tensor, None]) -> torch.Tensor:
        return outputs[0]


class _Unchanged(nn.Module):
    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x, None


class _Zeros(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x.new_zeros(x.shape[0], self.width), None


def _linear(inputs: int, outputs: int | list[int], **options: Any) -> nn.Module:
    return _Zeros(outputs if isinstance(outputs, int) else sum(outputs))


def main(kind: str) -> None:
    """Warm up, serve, print."""
    for module in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        import_module(module.name)
    torch.set_default_dtype(BF16)
    others = {"gdn": Gdn, "gdn varied": Gdn, "attention": Attention, "dense": Dense}
    case: Any = others[kind]() if kind in others else Mixture(kind)
    driver.set_active(NamesTargetOnly())
    dispatch.prefer(dispatch.TRITON)
    os.environ["TRITON_INTERPRET"] = "1"  # only to be allowed kernels on this device: they were made for a compiler
    device = torch.device("cpu")
    table = varied_table() if kind == "gdn varied" else config.table_of(device)
    with (
        config.forced(table),
        patch.object(JITFunction, "run", note),
        patch.object(policy, "has_fp8_units", lambda device: True),
        patch.object(ways, "has_fp8_units", lambda device: True),
        patch.object(ways, "can_begin_early", lambda device: True),
        patch.object(early, "can_begin_early", lambda device: True),
    ):
        warm_up(case.models(), Serving(BF16, device, MAX_TOKENS, 3, **case.serving()))
        warm = set(specializations)
        for tokens in STEPS:
            case.serve(tokens)
    print(json.dumps({"warm": len(warm), "cold": [found for found in specializations if found not in warm]}))


if __name__ == "__main__":
    main(sys.argv[2])
