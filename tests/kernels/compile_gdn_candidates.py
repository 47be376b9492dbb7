"""Compile whatever `qwen3next tune gdn` may try on an H200, at the published sizes, without one.

Run as a script, without TRITON_INTERPRET, with an effort as argument. One line a kernel goes to stdout, as by
`compile_for_gpu`, with the candidate and the seconds it took in front.
"""

import sys
import time
from dataclasses import replace

import torch
from triton.runtime.jit import JITFunction

from qwen3next_plugin.kernels import gdn
from qwen3next_plugin.kernels.gdn import config
from qwen3next_plugin.kernels.gdn.table import OWN, DecodeTile, PrefillWay
from qwen3next_plugin.tune.gdn.space import EFFORTS, Candidate

from . import compile_for_gpu
from .compile_for_gpu import ROWS, OnGpu, compile_launch, tensor

K_HEADS, V_HEADS, DIM, TOKENS = 16, 32, 128, 64
CHANNELS = (2 * K_HEADS + V_HEADS) * DIM


def launch(candidate: Candidate, state_dtype: torch.dtype, drafts: int) -> None:
    """The candidate's operation, on skipped rows."""
    rows = {"query_start": tensor(ROWS, dtype=torch.int32), "query_end": tensor(ROWS, dtype=torch.int32)}
    slots = tensor(ROWS, dtype=torch.int32)
    qkvz, gates = tensor(TOKENS, CHANNELS + V_HEADS * DIM), tensor(TOKENS, 2 * V_HEADS)
    per_head = [tensor(V_HEADS, dtype=torch.float32) for _ in range(2)]
    state, out = tensor(6, V_HEADS, DIM, DIM, dtype=state_dtype), tensor(TOKENS, V_HEADS, DIM)
    ab = (gates[:, V_HEADS:], gates[:, :V_HEADS])
    if isinstance(candidate, PrefillWay):
        has_state = {"has_initial_state": tensor(ROWS, dtype=torch.bool), "max_query_len": TOKENS}
        tokens = (tensor(TOKENS, CHANNELS), *ab, *per_head, state)
        gdn.gdn_prefill(*tokens, num_k_heads=K_HEADS, **rows, state_slots=slots, out=out, **has_state)
        return
    z = qkvz[:, CHANNELS:].unflatten(1, (V_HEADS, DIM))
    whole = (qkvz[:, :CHANNELS], z, *ab, tensor(CHANNELS, 4), *per_head, tensor(DIM), tensor(6, CHANNELS, 3), state)
    shared = {"num_k_heads": K_HEADS, "norm_eps": 1e-6, "out": out, "state_slots": slots}
    if isinstance(candidate, DecodeTile):
        gdn.gdn_decode_fused(*whole, **shared, **rows)
        return
    sizes = {"num_k_heads": K_HEADS, "num_v_heads": V_HEADS, "head_k_dim": DIM, "head_v_dim": DIM}
    made = gdn.DraftRecords.allocate(1, ROWS, drafts, **sizes, input_dtype=torch.bfloat16, device="cpu")
    record = gdn.DraftRecords(*(part.as_subclass(OnGpu) for part in made.tensors())).layer(0)
    gdn.gdn_verify_fused(*whole, record, **shared, **rows, max_query_len=drafts)


def main(effort_name: str) -> None:
    """Every candidate once."""
    effort, table = EFFORTS[effort_name], config.table_of(torch.device("cpu"))
    stages = [replace(own, walk_stages=count) for own in effort.chunks for count in effort.stages]
    cases: list[tuple[Candidate, torch.dtype, int]] = [
        (PrefillWay(OWN, own), torch.float32, 1) for own in dict.fromkeys((*effort.chunks, *stages))
    ]
    for dtype in (torch.float32, torch.bfloat16):
        cases += [(tile, dtype, 1) for tile in effort.decode]
        cases += [(tile, dtype, drafts) for tile in effort.verify for drafts in effort.drafts]
    for candidate, dtype, drafts in cases:
        begin = time.monotonic()
        with config.forced(config.only(table, candidate)):
            launch(candidate, dtype, drafts)
        print(f"took {time.monotonic() - begin:.1f} {candidate} {dtype} {drafts}", flush=True)


if __name__ == "__main__":
    JITFunction.run = compile_launch
    compile_for_gpu.CAPABILITIES = (90,)
    main(sys.argv[1])
