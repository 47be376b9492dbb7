"""Compile the convolution's and the delta rule's kernels for an H200 (sm_90) and an A100 (sm_80) without either.

The interpreter runs kernels as Python and so misses what only the compiler refuses. Run as a script, without
TRITON_INTERPRET: launches are caught, and what would have been launched is compiled with ptxas instead. One line a
kernel and target goes to stdout.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from qwen3next_plugin.kernels import conv, early, gdn
from qwen3next_plugin.kernels.gdn import config, triton_peers
from qwen3next_plugin.kernels.gdn.table import PROJECTED, DecodeTile, VerifyTile
from qwen3next_plugin.kernels.gdn.triton_split import split
from qwen3next_plugin.kernels.gpus import Target

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
ROWS = 4
CAPABILITIES: tuple[int, ...] = (90, 80)
H200 = Target("NVIDIA H200", (9, 0))
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class OnGpu(Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(*shape, dtype=dtype).as_subclass(OnGpu)


def compile_launch(self: JITFunction, *args: Any, grid: Any = None, warmup: bool = False, **keywords: Any) -> None:
    """Stands in for a launch: the signature a launch would have specialised on, compiled."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    values = dict(zip(self.arg_names, args, strict=False)) | keywords
    for place, parameter in enumerate(self.params):
        value = values.pop(parameter.name)
        if parameter.is_constexpr or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[(place,)] = "constexpr", value
            continue
        signature[parameter.name] = (
            TYPES[value.dtype] if isinstance(value, Tensor) else "fp32" if isinstance(value, float) else "i32"
        )
        if isinstance(value, Tensor) or (value % 16 == 0 and not parameter.do_not_specialize):
            attributes[(place,)] = [["tt.divisibility", 16]]
    for capability in CAPABILITIES:
        if capability < 90 and "EARLY" in self.arg_names:  # no launch begins early there
            constants[(self.arg_names.index("EARLY"),)] = False
            values.pop("launch_pdl", None)
        source = ASTSource(self, signature, constants, attributes)
        kernel = triton.compile(source, GPUTarget("cuda", capability, 32), dict(values))
        shared = kernel.metadata.shared
        copies = kernel.asm["ptx"].count("cp.async.cg.shared.global")
        says = f"{self.__name__} sm_{capability} shared={shared} {resources(kernel)} copies={copies}"
        print(f"{says} grid={grid}", flush=True)


def resources(kernel: Any) -> str:
    """Registers a thread and bytes of stack, where spilled ones go, as ptxas wrote them into the binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return "registers={} stack={}".format(*found.groups())


def launch_all(heads: tuple[int, int], key_dim: int, value_dim: int, tokens: int) -> None:
    """Call every operation once, with strided inputs as an engine gives them."""
    k_heads, v_heads = heads
    dim = 2 * k_heads * key_dim + v_heads * value_dim
    rows = {"query_start": tensor(ROWS, dtype=torch.int32), "query_end": tensor(ROWS, dtype=torch.int32)}
    slots = tensor(ROWS, 3, dtype=torch.int32)
    has_state = tensor(ROWS, dtype=torch.bool)
    x, out = tensor(tokens, dim + 64)[:, :dim], tensor(tokens, dim)
    weight, conv_state = tensor(dim, 4), tensor(6, 5, dim).transpose(1, 2)
    prefill = rows | {"state_slots": slots[:, 0], "has_initial_state": has_state}
    conv.causal_conv1d_prefill(x, weight, None, conv_state, **prefill, out=out)
    # SGLang's: positions and slots of snapshots.
    kept = {"snapshot_positions": tensor(ROWS, dtype=torch.int64), "snapshot_slots": tensor(ROWS, dtype=torch.int64)}
    conv.causal_conv1d_prefill(x, weight, None, conv_state, **prefill, **kept, out=out)
    update = rows | {"state_slots": slots[:, 0], "num_accepted_tokens": slots[:, 1].contiguous(), "max_query_len": 3}
    conv.causal_conv1d_update(x, weight, None, conv_state, **update, out=out)
    step = rows | {"state_slots": slots[:, 0], "num_accepted_tokens": None, "max_query_len": 1}
    conv.causal_conv1d_update(x, weight, None, conv_state, **step, out=out, snapshot_slots=kept["snapshot_slots"])

    gates = tensor(tokens, 2 * v_heads)
    per_head = [tensor(v_heads, dtype=torch.float32) for _ in range(2)]
    arguments = (out, gates[:, v_heads:], gates[:, :v_heads], *per_head)
    ssm_state = tensor(6, v_heads, value_dim, key_dim, dtype=torch.float32)
    shared = {"num_k_heads": k_heads, "out": tensor(tokens, v_heads, value_dim)}
    gdn.gdn_prefill(*arguments, ssm_state, **shared, **prefill, max_query_len=tokens)
    gdn.gdn_prefill(*arguments, ssm_state, **shared, **prefill, **kept, max_query_len=tokens)
    launch_around_a_peer(arguments, gdn.Convolution(weight, conv_state), ssm_state, k_heads, prefill, kept, tokens)
    gdn.gdn_decode(*arguments, ssm_state, **shared, **rows, state_slots=slots[:, 0])
    one = rows | {"state_slots": slots[:, 0], "snapshot_slots": kept["snapshot_slots"]}
    gdn.gdn_decode(*arguments, ssm_state, **shared, **one)
    qkvz = tensor(tokens, dim + v_heads * value_dim)
    gated = {"num_k_heads": k_heads, "norm_eps": 1e-6, "out": shared["out"]}
    whole = (qkvz[:, :dim], qkvz[:, dim:].unflatten(1, (v_heads, value_dim)), *arguments[1:3], weight, *per_head)
    # vLLM's layout of the windows and a float32 state; SGLang's and a bfloat16 state, with snapshots.
    norm_weight, own, narrow = tensor(value_dim), tensor(6, dim, 3), tensor(*ssm_state.shape)
    gdn.gdn_decode_fused(*whole, norm_weight, conv_state, ssm_state, **gated, **rows, state_slots=slots[:, 0])
    gdn.gdn_decode_fused(*whole, norm_weight, own, narrow, **gated, **one)
    for stages in (3, 5):
        with config.forced(config.only(config.table_of(ssm_state.device), DecodeTile(1024, 2, stages))):
            gdn.gdn_decode_fused(*whole, norm_weight, conv_state, ssm_state, **gated, **rows, state_slots=slots[:, 0])
            gdn.gdn_decode_fused(*whole, norm_weight, own, narrow, **gated, **one)
    verify = rows | {"max_query_len": 3, "initial_slots": slots[:, 0], "output_slots": slots}
    gdn.gdn_verify(*arguments, ssm_state, **shared, **verify)
    for length in (2, 4, 8):
        wide, places = tensor(6, 2 + length, dim).mT, tensor(ROWS, length, dtype=torch.int32)
        begin = {"conv_slots": places[:, 0], "initial_slots": slots[:, 0].contiguous(), "output_slots": places}
        begin |= rows | {"max_query_len": length, "num_accepted_tokens": slots[:, 1].contiguous()}
        for state in (ssm_state, narrow):
            gdn.gdn_verify_states(*whole, norm_weight, wide, state, **gated, **begin)
    for length in (4, 8):
        sizes = {"num_k_heads": k_heads, "num_v_heads": v_heads, "head_k_dim": key_dim, "head_v_dim": value_dim}
        made = gdn.DraftRecords.allocate(2, ROWS, length, **sizes, input_dtype=torch.bfloat16, device="cpu")
        records = gdn.DraftRecords(*(part.as_subclass(OnGpu) for part in made.tensors()))
        drafts = rows | {"max_query_len": length, "state_slots": slots[:, 0].contiguous()}
        for state in (ssm_state, narrow):
            gdn.gdn_verify_fused(*whole, norm_weight, own, state, records.layer(0), **gated, **drafts)
            with config.forced(config.only(config.table_of(state.device), VerifyTile(128, 4, PROJECTED))):
                gdn.gdn_verify_fused(*whole, norm_weight, own, state, records.layer(0), **gated, **drafts)
            states = (torch.stack([own, own]).as_subclass(OnGpu), torch.stack([state, state]).as_subclass(OnGpu))
            last = {"state_slots": drafts["state_slots"], "last_tokens": kept["snapshot_positions"]}
            gdn.gdn_commit(*states, records, **last)
            tracked = {"snapshot_slots": kept["snapshot_slots"], "snapshot_tokens": kept["snapshot_positions"]}
            gdn.gdn_commit(*states, records, **last, **tracked)


def launch_merging(heads: tuple[int, int], key_dim: int, value_dim: int, tokens: int) -> None:
    """A prefill as an H200's table builds it, with snapshots and without."""
    k_heads, v_heads = heads
    table = config.find(H200).table
    gates = tensor(tokens, 2 * v_heads)
    per_head = [tensor(v_heads, dtype=torch.float32) for _ in range(2)]
    qkv = tensor(tokens, 2 * k_heads * key_dim + v_heads * value_dim)
    rows = {"query_start": tensor(ROWS, dtype=torch.int32), "query_end": tensor(ROWS, dtype=torch.int32)}
    rows |= {
        "state_slots": tensor(ROWS, 3, dtype=torch.int32)[:, 0],
        "has_initial_state": tensor(ROWS, dtype=torch.bool),
    }
    kept = {"snapshot_positions": tensor(ROWS, dtype=torch.int64), "snapshot_slots": tensor(ROWS, dtype=torch.int64)}
    shared = {"num_k_heads": k_heads, "max_query_len": tokens, "out": tensor(tokens, v_heads, value_dim)}
    states = tensor(6, v_heads, value_dim, key_dim, dtype=torch.float32), tensor(6, v_heads, value_dim, key_dim)
    with config.forced(config.only(table, table.prefill[-1].way)):
        for state, snapshots in zip(states, ({}, kept), strict=True):
            per_token = (gates[:, v_heads:], gates[:, :v_heads])
            gdn.gdn_prefill(qkv, *per_token, *per_head, state, **shared, **rows, **snapshots)


def launch_around_a_peer(
    arguments: tuple[Tensor, ...],
    convolution: gdn.Convolution,
    ssm_state: Tensor,
    k_heads: int,
    prefill: dict[str, Tensor],
    kept: dict[str, Tensor],
    tokens: int,
) -> None:
    """What runs before and after an engine's prefill function."""
    mixed_qkv, *gates = arguments
    head_dim = ssm_state.shape[3]
    slots, has_state = prefill["state_slots"], prefill["has_initial_state"]
    ends = (prefill["query_start"], prefill["query_end"])
    offsets = tensor(ROWS + 1, dtype=torch.int64)
    packed = gdn.PackedRows(0, (tokens // ROWS,) * ROWS, offsets)
    for log_decay in (True, False):
        for inputs in (None, convolution):
            options = (tuple(gates), k_heads, head_dim, packed, *ends, slots, has_state, log_decay)
            split(mixed_qkv, inputs, *options)
    for state in (ssm_state, tensor(*ssm_state.shape)):
        collected = triton_peers.collect(state, slots, prefill["has_initial_state"])
        triton_peers.put_back(collected, None, packed, state, *ends, slots, None)
        snapshot = (kept["snapshot_positions"], kept["snapshot_slots"])
        triton_peers.put_back(collected, collected, packed, state, *ends, slots, snapshot)


if __name__ == "__main__":
    JITFunction.run = compile_launch
    vars(early)["capability_of"] = lambda device: (9, 0)
    launch_all((16, 32), 128, 128, 1000)
    CAPABILITIES = (90,)  # the tables of other GPUs never name it
    launch_merging((16, 32), 128, 128, 1000)
