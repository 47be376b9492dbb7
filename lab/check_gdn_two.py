"""On a CPU. With TRITON_INTERPRET=1: variants against the tests' float64 formula; without: registers of all variants
or of those named as arguments, compiled for sm_90.
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gdn_decode import CHANNELS, DIM, K_HEADS, V_HEADS, VARIANTS
from gdn_tiled import decode_tiled
from gdn_two import LAST, Two, decode_two


def interpret():
    from qwen3next_plugin.kernels.gdn import triton_decode
    from tests.kernels import test_gdn_decode_fused as t
    from tests.kernels.layer_case import make_layer

    small = [
        Two(heads=2),
        Two(chunks=4, heads=2, halves=True),
        Two(rows=4, warps=1, chunks=2, spread=2, norm=LAST, heads=1),
        Two(rows=4, warps=1, chunks=4, spread=2, norm=LAST, early=True, heads=1),
        Two(warps=8, chunks=4, spread=8, heads=4, late=True),
    ]
    cases = [(str(two), partial(decode_two, two), ((12, 20), (8, 8))) for two in small]
    cases.append(("one launch", partial(decode_tiled, 4, 3, 1), ((8, 8),)))
    for name, run, sizes in cases:
        triton_decode.gdn_decode_fused = run
        for dims in sizes:
            t.check(make_layer(6, "cpu", (2, 4), dims), t.ROWS, "triton")
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            layer = make_layer(6, "cpu", (2, 4), (16, 16), dtype=torch.float16)
            kept = {"snapshots": [7, -1, 8, 9, 10], "spare_columns": 2}
            t.check(layer, t.ROWS, "triton", state_dtype=dtype, layout=t.STATE_LAYOUTS[-1], **kept)
        print("ok", name, flush=True)


def compiled():
    from triton.runtime.jit import JITFunction

    from tests.kernels import compile_for_gpu
    from tests.kernels.compile_for_gpu import compile_launch, tensor

    compile_for_gpu.CAPABILITIES = (90,)
    JITFunction.run = lambda self, *a, **k: compile_launch(self, *a, **k)
    for dtype in (torch.float32, torch.bfloat16):
        for name, call in VARIANTS.items():
            if sys.argv[1:] and name not in sys.argv[1:]:
                continue
            qkvz, ba = tensor(64, CHANNELS + V_HEADS * DIM), tensor(64, 2 * V_HEADS)
            rows = [tensor(64, dtype=torch.int32) for _ in range(3)]
            per_head = [tensor(V_HEADS, dtype=torch.float32) for _ in range(2)]
            z, gates = qkvz[:, CHANNELS:].unflatten(1, (V_HEADS, DIM)), (ba[:, V_HEADS:], ba[:, :V_HEADS], *per_head)
            windows, state = tensor(6, 3, CHANNELS).transpose(1, 2), tensor(6, V_HEADS, DIM, DIM, dtype=dtype)
            print(dtype, name, flush=True)
            weights = (tensor(CHANNELS, 4), tensor(DIM), 1e-6)
            call(qkvz[:, :CHANNELS], z, gates, *weights, windows, state, K_HEADS, *rows, tensor(64, V_HEADS, DIM), None)


if os.environ.get("TRITON_INTERPRET") == "1":
    interpret()
else:
    compiled()
