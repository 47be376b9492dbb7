"""On a CPU: under the interpreter the variants against the tests' float64 formula; else registers of all (compile)."""
import os, sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent))
import torch
from gdn_two import APART, LAST, Two, decode_two

def interpret():
    from qwen3next_plugin.kernels.gdn import triton_decode
    from tests.kernels import test_gdn_decode_fused as t
    from tests.kernels.layer_case import make_layer
    cases = [Two(heads=2), Two(chunks=4, heads=2, halves=True), Two(rows=4, warps=1, chunks=2, spread=2, norm=LAST, heads=1)]
    if os.environ.get("TILED"):
        from gdn_tiled import decode_tiled
        cases = [None]
    for two in cases:
        run = (lambda *x, two=two: decode_two(two, *x)) if two else (lambda *x: decode_tiled(4, 3, 1, *x))
        triton_decode.gdn_decode_fused = run
        for heads, dims in (((2, 4), (16, 16)), ((1, 3), (12, 20)), ((4, 8), (8, 8))):
            if two is None and dims[0] != 16 and dims[0] != 8: continue
            t.check(make_layer(6, "cpu", heads, dims), t.ROWS, "triton")
            print("ok", two, heads, dims, flush=True)
        t.check(make_layer(6, "cpu", (2, 4), (16, 16), dtype=torch.float16), t.ROWS, "triton", state_dtype=torch.float16, layout=t.STATE_LAYOUTS[-1],
                snapshots=[7, -1, 8, 9, 10], spare_columns=2)
        print("ok snapshots", flush=True)

def compiled():
    from triton.runtime.jit import JITFunction
    from tests.kernels import compile_for_gpu
    from tests.kernels.compile_for_gpu import compile_launch, tensor
    from triton.compiler import CompiledKernel
    compile_for_gpu.CAPABILITIES = (90,)
    only = sys.argv[1:] 
    seen = set()
    JITFunction.run = lambda self, *a, **k: compile_launch(self, *a, **k)
    from gdn_decode import VARIANTS
    d, hv = 8192, 32
    for dtype in (torch.float32, torch.bfloat16):
        for name, call in VARIANTS.items():
            if only and name not in only: continue
            qkvz, ba = tensor(64, d + 4096), tensor(64, 64)
            i = [tensor(64, dtype=torch.int32) for _ in range(3)]
            per = [tensor(hv, dtype=torch.float32) for _ in range(2)]
            print(dtype, name, flush=True)
            call(qkvz[:, :d], qkvz[:, d:].unflatten(1, (hv, 128)), (ba[:, hv:], ba[:, :hv], *per), tensor(d, 4), tensor(128), 1e-6,
                 tensor(6, 3, d).transpose(1, 2), tensor(6, hv, 128, 128, dtype=dtype), 16, *i, tensor(64, hv, 128), None)

interpret() if os.environ.get("TRITON_INTERPRET") == "1" else compiled()
