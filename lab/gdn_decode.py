"""Decode steps of Gated DeltaNet, 16 key and 32 value heads of 128: gdn_decode.py SECONDS FILE."""

import json
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gdn_tiled import decode_tiled
from gdn_two import APART, LAST, Two, decode_two

from qwen3next_plugin.kernels.gdn.triton_decode import gdn_decode_fused

K_HEADS, V_HEADS, DIM, WIDTH = 16, 32, 128, 4
CHANNELS = (2 * K_HEADS + V_HEADS) * DIM
COPY = 4.26e12
VLLM, SGLANG = "vLLM's", "SGLang's"  # how windows lie: channels or taps side by side

TWO = {  # by value: what is measured at every shape first
    "whole, 8 warps, late gates": Two(warps=8, chunks=4, spread=32, late=True, registers=128),
    "whole, 8 warps, pdl": Two(warps=8, chunks=4, spread=32, registers=128, pdl=True),
    "16 rows, 1 warp, last norms, pdl": Two(rows=16, warps=1, chunks=4, spread=4, norm=LAST, registers=128, pdl=True),
    "32 rows, 1 warp, last norms, pdl": Two(rows=32, warps=1, chunks=4, spread=4, norm=LAST, pdl=True),
    "64 rows, 4 warps, last norms, pdl": Two(rows=64, warps=4, chunks=4, spread=16, norm=LAST, registers=128, pdl=True),
    "32 rows, 1 warp, 32 lanes, last norms, pdl": Two(rows=32, warps=1, norm=LAST, pdl=True),
    "32 rows, 1 warp, 32 lanes, norm apart": Two(rows=32, warps=1, norm=APART),
    "whole, 4 warps, pdl": Two(warps=4, chunks=4, spread=16, pdl=True),
    "16 rows, 1 warp, last norms, early, pdl": Two(
        rows=16, warps=1, chunks=4, spread=4, norm=LAST, early=True, registers=128, pdl=True
    ),
    "whole, 8 warps, late gates, pdl": Two(warps=8, chunks=4, spread=32, late=True, registers=128, pdl=True),
    "16 rows, 1 warp, last norms, 168 registers, pdl": Two(
        rows=16, warps=1, chunks=4, spread=4, norm=LAST, registers=168, pdl=True
    ),
    "32 rows, 2 warps, last norms, pdl": Two(rows=32, warps=2, chunks=4, spread=8, norm=LAST, registers=128, pdl=True),
    "16 rows, 1 warp, last norms": Two(rows=16, warps=1, chunks=4, spread=4, norm=LAST, registers=128),
    "whole, 8 warps, keys by shared memory, pdl": Two(warps=8, chunks=4, registers=128, pdl=True),
    "halves, 8 warps, pdl": Two(warps=8, chunks=4, spread=32, halves=True, registers=128, pdl=True),
    "whole, 8 warps, late gates, pdl, heads by 4": Two(
        warps=8, chunks=4, spread=32, late=True, registers=128, pdl=True, heads=4
    ),
}
VARIANTS = {"today": gdn_decode_fused}
VARIANTS |= {name: partial(decode_two, two) for name, two in TWO.items()}
VARIANTS |= {
    "one launch, 8 rows, 3 stages, 2 warps": partial(decode_tiled, 8, 3, 2),
    "one launch, 16 rows, 4 stages, 4 warps": partial(decode_tiled, 16, 4, 4),
    "one launch, 8 rows, 5 stages, 2 warps": partial(decode_tiled, 8, 5, 2),
}
FIRST = [
    "today",
    "whole, 8 warps, late gates, pdl",
    "16 rows, 1 warp, last norms, pdl",
    "32 rows, 1 warp, last norms, pdl",
    "whole, 8 warps, late gates",
    "64 rows, 4 warps, last norms, pdl",
    "whole, 4 warps, pdl",
    "one launch, 8 rows, 3 stages, 2 warps",
]
REST = [name for name in VARIANTS if name not in FIRST]


def say(path, **line):
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()


def milliseconds(action, times):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        action()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / times


class Lab:
    """States of one type in a pool that every case takes its slots from."""

    def __init__(self, dtype, slots):
        self.dtype, self.slots = dtype, slots
        device = "cuda"
        self.state = torch.empty(slots, V_HEADS, DIM, DIM, dtype=dtype, device=device)
        for one in self.state.split(64):
            one.copy_(torch.randn(one.shape, device=device) * 0.1)
        windows = torch.randn(slots, WIDTH - 1, CHANNELS, device=device).bfloat16().mT
        self.windows = {VLLM: windows, SGLANG: windows.contiguous()}
        self.weight = (torch.randn(CHANNELS, WIDTH, device=device) * 0.3).bfloat16()
        self.norm = (1 + 0.1 * torch.randn(DIM, device=device)).bfloat16()
        self.A_log, self.dt_bias = torch.randn(V_HEADS, device=device), torch.randn(V_HEADS, device=device) - 2

    def inputs(self, rows):
        qkvz = torch.randn(rows, CHANNELS + V_HEADS * DIM, device="cuda").bfloat16()
        ba = torch.randn(rows, 2 * V_HEADS, device="cuda").bfloat16()
        starts = torch.arange(rows + 1, device="cuda", dtype=torch.int32)
        return qkvz, ba, starts[:-1], starts[1:]

    def call(self, variant, inputs, slots, state, windows, out):
        qkvz, ba, start, end = inputs
        z = qkvz[:, CHANNELS:].unflatten(1, (V_HEADS, DIM))
        gates = (ba[:, V_HEADS:], ba[:, :V_HEADS], self.A_log, self.dt_bias)
        VARIANTS[variant](
            qkvz[:, :CHANNELS], z, gates, self.weight, self.norm, 1e-6, windows, state, K_HEADS,
            start, end, slots, out, None,
        )  # fmt: skip

    def small(self, variant, graphed=False):
        """Outputs, states and windows of 42 tokens, some of rows that are skipped or of none, after two steps."""
        state, windows = (part.clone(memory_format=torch.preserve_format) for part in self.few_states)
        out = torch.full((42, V_HEADS, DIM), float("nan"), dtype=torch.bfloat16, device="cuda")

        def steps():
            for _ in range(2):
                self.call(variant, self.few, self.few_slots, state, windows, out)

        # Scratch is filled with NaN: who reads it too early is found out.
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            if graphed:
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    steps()
                graph.replay()
            else:
                steps()
            torch.cuda.synchronize()
        finally:
            torch.use_deterministic_algorithms(False)
        return out, state, windows

    def check(self, variant):
        """Differences from today's kernel after two steps; whether six tries, three in graphs, give the same bits."""
        if not hasattr(self, "few"):
            qkvz, ba, start, end = self.inputs(42)
            end = end.clone()
            end[7] = start[7]  # an empty row; and tokens 40 and 41 have none
            self.few = (qkvz, ba, start[:40], end[:40])
            # Kept aside, as timing moves those of the pool.
            parts = (self.state[:48], self.windows[VLLM][:48])
            self.few_states = [part.clone(memory_format=torch.preserve_format) for part in parts]
            self.few_slots = torch.randperm(48, device="cuda")[:40].int()
            self.few_slots[[3, 20]] = -1
            self.expected = self.small("today")
        found = self.small(variant)
        off = [
            float((x.float() - y.float()).norm() / y.float().norm())
            for x, y in zip(found[:2], self.expected[:2], strict=True)
        ]
        same = True
        for attempt in range(6):
            again = self.small(variant, graphed=attempt > 2)
            pairs = zip(found[:2], again[:2], strict=True)
            same &= all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs)
        idle = not bool(found[0][[3, 7, 20, 40, 41]].any())
        return off, same, idle, bool(torch.equal(found[2], self.expected[2]))

    def time(self, variant, rows, layout, min_bytes=300e6):
        """Median and least microseconds a call, in a graph over slots and inputs that no call has had just before."""
        moved = 2 * rows * self.state[0].numel() * self.state.itemsize
        calls = max(1, min(self.slots // rows, int(min_bytes // (moved / 2)) + 1))
        order = torch.randperm(self.slots, device="cuda").int()
        made = [
            (self.inputs(rows), order[n * rows : (n + 1) * rows],
             torch.empty(rows, V_HEADS, DIM, dtype=torch.bfloat16, device="cuda"))
            for n in range(calls)
        ]  # fmt: skip

        def run():
            for inputs, slots, out in made:
                self.call(variant, inputs, slots, self.state, self.windows[layout], out)

        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        first = milliseconds(graph.replay, 2)
        times = max(1, round(5.0 / max(first, 1e-3)))
        us = sorted(1e3 * milliseconds(graph.replay, times) / calls for _ in range(5))
        return us[2], us[0], calls, moved / COPY * 1e6


def main(seconds, path):
    end = time.monotonic() + seconds
    try:
        import triton

        say(path, torch=torch.__version__, triton=triton.__version__, gpu=torch.cuda.get_device_name())
        labs = {"float32": Lab(torch.float32, 1024), "bfloat16": Lab(torch.bfloat16, 1024)}
        right = {}
        rounds = [(64, FIRST, VLLM), (256, FIRST, VLLM), (1024, FIRST[:4], VLLM), (64, REST, VLLM), (128, FIRST, VLLM)]
        rounds += [(256, FIRST[:5], SGLANG), (16, FIRST[:7], VLLM), (8, FIRST[:7], VLLM), (256, REST, VLLM)]
        rounds += [(64, FIRST[:5], SGLANG), (1024, FIRST[4:], VLLM), (1024, REST, VLLM)]
        for rows, variants, layout in rounds:
            for dtype, lab in labs.items():
                for variant in variants:
                    began = time.monotonic()
                    if began > end:
                        say(path, over="time is up")
                        return
                    case = {"rows": rows, "state": dtype, "variant": variant, "windows": layout}
                    try:
                        if (dtype, variant) not in right:
                            off, same, idle, windows = lab.check(variant)
                            right[dtype, variant] = max(off) < 0.01 and same and idle and windows
                            found = {"out_off": off[0], "state_off": off[1], "same_bits": same, "idle_zero": idle}
                            took = round(time.monotonic() - began, 2)
                            say(path, check=variant, state=dtype, **found, windows_equal=windows, took=took)
                        if not right[dtype, variant]:
                            continue
                        us, least, calls, copy = lab.time(variant, rows, layout)
                        say(path, **case, us=round(us, 2), least=round(least, 2), of_copy=round(copy / us, 3),
                            calls=calls, took=round(time.monotonic() - began, 2))  # fmt: skip
                    except Exception as error:
                        right.setdefault((dtype, variant), False)
                        say(path, **case, error=f"{type(error).__name__}: {error}"[:400])
                        torch.cuda.synchronize()
    except Exception as error:
        say(path, error=f"{type(error).__name__}: {error}"[:400])
        raise


if __name__ == "__main__":
    torch.manual_seed(1)
    with torch.no_grad():
        main(float(sys.argv[1]), sys.argv[2])
