# ruff: noqa
"""Experts of many tokens, parts and variants: `moe_many.py SECONDS FILE`; one JSON line a measurement."""

import json
import os
import sys
import time
from dataclasses import replace
from functools import partial

import torch

import qwen3next_plugin.kernels.moe.triton.align  # noqa: F401

from qwen3next_plugin.bench.kernels.timing import GraphTimer, Times
from qwen3next_plugin.kernels import moe
from qwen3next_plugin.kernels.gemm.reference import FP8
from qwen3next_plugin.kernels.gemm.triton import quantize_tokens
from qwen3next_plugin.kernels.moe.config import MoeConfig, Tile, forced
from qwen3next_plugin.kernels.integers import cdiv, next_power_of_2
from qwen3next_plugin.kernels.moe.triton import combine
from qwen3next_plugin.kernels.moe.triton.align import HEIGHT, align
from qwen3next_plugin.kernels.moe.triton.experts import _grouped
from qwen3next_plugin.kernels.moe.triton.tall import TallForm, TallTile, fused_moe_tall, tall_product
from qwen3next_plugin.kernels.moe.triton.tall_sum import shared_sum

align_module = sys.modules["qwen3next_plugin.kernels.moe.triton.align"]
BEGIN = time.monotonic()
END, PATH = BEGIN + float(sys.argv[1]), sys.argv[2]
H, E, I, K, DEV, MS = 2048, 513, 512, 10, "cuda", (8192, 2048, 4096, 512)
TIMER = GraphTimer()
DRY = "LAB_DRY" in os.environ  # without a GPU, under the interpreter: only whether the script runs
if DRY:
    H, E, I, K, DEV, MS = 256, 5, 128, 2, "cpu", (190, 30, 70, 9)

    def TIMER(calls):
        for call in calls:
            call()
        return Times((1.0, 2.0), "dry")


TODAY = {
    MS[3]: MoeConfig(16, Tile(128, 128, 4, 3), Tile(128, 128, 4, 3)),
    MS[1]: MoeConfig(64, Tile(64, 128, 4, 4), Tile(64, 128, 4, 3)),
    MS[2]: MoeConfig(64, Tile(64, 128, 4, 4), Tile(128, 128, 4, 3)),
    MS[0]: MoeConfig(64, Tile(64, 128, 4, 4), Tile(128, 128, 4, 4)),
}
# name: most tiles a group, tile, whether it rounds (groups of half its block_n), rows of a tile
GATE_UP = {
    "joined": (3, TallTile(128, 8, 4, ahead=3), True, 64),
    "split": (3, TallTile(256, 8, 4, split=True, ahead=3), True, 64),
    "joined walks": (3, TallTile(128, 8, 4, walks=132, ahead=3), True, 64),
    "one tile": (1, TallTile(128, 4, 4, ahead=3), True, 64),
    "split described": (3, TallTile(256, 8, 4, split=True, ahead=3, described=True), True, 64),
    "joined behind": (3, TallTile(128, 8, 4, ahead=2), True, 64),
    "split walks": (3, TallTile(256, 8, 4, split=True, walks=132, ahead=3), True, 64),
    "joined plain": (3, TallTile(128, 8, 4, ahead=3), False, 64),
    "joined top": (3, TallTile(128, 8, 4, ahead=1), True, 64),
    "pairs": (2, TallTile(128, 8, 4, ahead=3), True, 64),
    "split 3 stages": (3, TallTile(256, 8, 3, split=True, ahead=3), True, 64),
    "low": (2, TallTile(128, 4, 3, low=64, ahead=3), True, 64),
    "one tile walks": (1, TallTile(128, 4, 4, walks=264, ahead=3), True, 64),
    "one tile split": (1, TallTile(256, 8, 4, split=True, ahead=3), True, 64),
    "16 rows": (1, TallTile(256, 4, 3, split=True, ahead=3), True, 16),
    "16 rows walks": (1, TallTile(256, 4, 3, split=True, walks=264, ahead=3), True, 16),
    "16 rows joined": (1, TallTile(128, 4, 4, ahead=3), True, 16),
}
DOWN = {
    "128": (3, TallTile(128, 8, 3, ahead=3), 64),
    "64": (3, TallTile(64, 4, 3, ahead=3), 64),
    "128 walks": (3, TallTile(128, 8, 3, walks=132, ahead=3), 64),
    "128 described": (3, TallTile(128, 8, 3, ahead=3, described=True), 64),
    "one tile": (1, TallTile(128, 4, 4, ahead=3), 64),
    "128 4 stages": (3, TallTile(128, 8, 4, ahead=3), 64),
    "64 walks": (3, TallTile(64, 4, 3, walks=264, ahead=3), 64),
    "128 behind": (3, TallTile(128, 8, 3, ahead=2), 64),
    "pairs": (2, TallTile(128, 8, 3, ahead=3), 64),
    "low": (2, TallTile(128, 4, 3, low=64, ahead=3), 64),
    "one tile 64": (1, TallTile(64, 4, 4, ahead=3), 64),
    "one tile walks": (1, TallTile(128, 4, 4, walks=264, ahead=3), 64),
    "16 rows": (1, TallTile(128, 4, 3, ahead=3), 16),
    "16 rows walks": (1, TallTile(128, 4, 3, walks=396, ahead=3), 16),
}
DOWN_64 = {  # factors every 64 columns: steps of 64
    "128": (3, TallTile(128, 8, 6, ahead=3), 64),
    "64": (3, TallTile(64, 4, 6, ahead=3), 64),
    "128 walks": (3, TallTile(128, 8, 6, walks=132, ahead=3), 64),
    "one tile": (1, TallTile(128, 4, 6, ahead=3), 64),
    "16 rows": (1, TallTile(128, 4, 4, ahead=3), 16),
}
MANY = {
    "gate": ["joined", "split", "joined walks", "one tile", "split described", "joined behind", "split walks",
             "joined plain", "joined top", "pairs", "split 3 stages", "low"],
    "down": ["128", "64", "128 walks", "128 described", "one tile", "128 4 stages", "64 walks", "128 behind", "pairs",
             "low"],
    "fine": ["128", "64", "128 walks", "one tile"],
}  # fmt: skip
FEW = {
    MS[1]: {"gate": ["one tile", "one tile split", "one tile walks"], "down": ["one tile", "one tile 64", "one tile walks"],
            "fine": ["one tile"]},
    MS[2]: {"gate": ["pairs"], "down": ["pairs", "low"], "fine": []},
    MS[3]: {"gate": ["16 rows", "16 rows walks", "16 rows joined"], "down": ["16 rows", "16 rows walks"],
            "fine": ["16 rows"]},
}  # fmt: skip


def say(**line):
    with open(PATH, "a") as f:
        f.write(json.dumps({"room": "moe-many"} | line) + "\n")


def attempt(what, action, left=0.0):
    """The line's result, or None; nothing where the time is over but for `left` seconds."""
    if time.monotonic() > END - left:
        return None
    begin = time.monotonic()
    try:
        with torch.no_grad():
            found = action()
    except Exception as e:
        found = {"error": f"{type(e).__name__}: {' '.join(str(e).split())}"[:400]}
    say(**what, **found, took_s=round(time.monotonic() - begin, 2))
    torch.cuda.empty_cache()
    return found


def timed(calls):
    t = TIMER(calls)
    us = sorted(1e6 * s for s in t.seconds)
    return {"us": round(us[len(us) // 2], 2), "least": round(us[0], 2), "how": t.how}


def err(a, b):
    return float(f"{float((a.float() - b.float()).norm() / b.float().norm()):.3g}")


def codes(n, k):
    made = torch.empty(E, n, k, dtype=FP8, device=DEV)
    for b in range(0, E, 32):
        made[b : b + 32].copy_((torch.randn(made[b : b + 32].shape, device=DEV) * 64).clamp_(-448, 448))
    return made


def factors(n, k):
    return (torch.rand(E, n // 128, k // 128, device=DEV) + 0.5) / (64 * k**0.5)


torch.manual_seed(0)
W13, W2, S13, S2 = codes(2 * I, H), codes(H, I), factors(2 * I, H), factors(H, I)
GATE = torch.randn(1, H, device=DEV).bfloat16()


class Step:
    """One number of tokens: inputs, sorted pairs, and what each part is given; `copies` inputs for whole steps."""

    def __init__(self, m, copies=2):
        self.m, self.pairs = m, m * (K + 1)
        self.inputs = []
        for _ in range(copies):
            x = torch.randn(m, H, device=DEV).bfloat16()
            self.inputs.append((x, *moe.route(torch.randn(m, E - 1, device=DEV).bfloat16(), K, True, x, GATE)))
        self.x, self.weights, self.ids = self.inputs[0]
        self.codes, self.scale = quantize_tokens(self.x)
        self.tall = {(h, n): align(self.ids, E, h, n)[0] for h, n in ((64, 1), (64, 2), (64, 3), (16, 1))}
        self.tiles = align(self.ids, E, TODAY[m].block_m)[0]
        self.plain = torch.empty(self.pairs, I, dtype=torch.bfloat16, device=DEV)
        self.today_gate_up(self.plain)
        self.inner = quantize_tokens(self.plain)
        halves = self.plain.float().view(-1, 64)
        scale = (halves.abs().amax(1, keepdim=True) / 448).clamp(min=1e-30)
        self.inner_64 = (halves / scale).to(FP8).view(-1, I), scale.view(-1, I // 64).contiguous()
        self.values = torch.empty(self.pairs, H, dtype=torch.bfloat16, device=DEV)
        self.today_down(self.values)

    def today_gate_up(self, out):
        _grouped(
            self.codes, W13, S13, None, self.tiles, TODAY[self.m].gate_up, out,
            pairs_per_row=K + 1, swiglu=True, quantize=True, a_scale=self.scale)  # fmt: skip

    def today_down(self, out):
        _grouped(self.inner[0], W2, S2, None, self.tiles, TODAY[self.m].down, out, pairs_per_row=1, swiglu=False,
                 quantize=True, a_scale=self.inner[1])  # fmt: skip

    def gate_up(self, name):
        most, tile, rounds, height = GATE_UP[name]
        out = torch.full((self.pairs, I), float("nan"), device=DEV).to(FP8 if rounds else torch.bfloat16)
        group = tile.block_n // 2
        scale = torch.full((self.pairs, I // group), float("nan"), device=DEV) if rounds else None
        call = partial(tall_product, self.codes, self.scale, W13, S13, self.tall[height, most], out, scale,
                       pairs_per_row=K + 1, swiglu=True, tile=tile)  # fmt: skip
        call()
        got = out.float()
        if scale is not None:
            got = (got.view(-1, group) * scale.view(-1, 1)).view(-1, I)
        return {"error_to_today": err(got, self.plain), **timed([call] * 2)}

    def down(self, name, fine):
        most, tile, height = (DOWN_64 if fine else DOWN)[name]
        out = torch.full((self.pairs, H), float("nan"), device=DEV, dtype=torch.bfloat16)
        inner = self.inner_64 if fine else self.inner
        call = partial(
            tall_product, *inner, W2, S2, self.tall[height, most], out, pairs_per_row=1, swiglu=False, tile=tile
        )
        call()
        return {"error_to_today": err(out, self.values), **timed([call] * 2)}

    def combined(self, unrolled, block, warps):
        out = torch.full((self.m, H), float("nan"), device=DEV, dtype=torch.bfloat16)
        kept = combine.UNROLLED, combine.BLOCK, combine.WARPS
        combine.UNROLLED, combine.BLOCK, combine.WARPS = unrolled, block, warps
        try:
            call = partial(combine.weighted_sum, self.values, None, self.weights, self.ids, E, out)
            call()
            # in chunks: gathering all in float32 would take gigabytes
            wide = torch.cat([(self.values[b * (K + 1) : (b + 512) * (K + 1)].view(-1, K + 1, H).float()
                               * self.weights[b : b + 512, :, None]).sum(1) for b in range(0, self.m, 512)])  # fmt: skip
            return {"error": err(out, wide), **timed([call] * 4)}
        finally:
            combine.UNROLLED, combine.BLOCK, combine.WARPS = kept

    def shared(self, fine, *sizes):
        """The sum with the shared expert's product in it, and what the down product of the others takes."""
        inner = self.inner_64 if fine else self.inner
        out = torch.full((self.m, H), float("nan"), device=DEV, dtype=torch.bfloat16)
        call = partial(shared_sum, *inner, W2, S2, self.values, self.weights, self.ids, out, *sizes)
        call()
        expected = torch.empty_like(out)
        combine.weighted_sum(self.values, None, self.weights, self.ids, E, expected)
        return {"error_to_today": err(out, expected), **timed([call] * 4)}

    def sorting(self):
        """The sort's kernels alone, and its first one with other chunks."""
        rows = TODAY[self.m].block_m
        ids, (tiles, counts) = self.ids.reshape(-1), align(self.ids, E, rows)
        starts = torch.empty(E, dtype=torch.int64, device=DEV)
        ranks = torch.empty(self.pairs, dtype=torch.int32, device=DEV)
        totals = torch.empty_like(counts)
        for chunk in (128, 256, 512):
            chunks = cdiv(self.pairs, chunk)
            before, zeros = (torch.zeros((chunks, E), dtype=torch.int32, device=DEV) for _ in range(2))
            calls = {
                "count": lambda: align_module._chunk_count_kernel[(chunks,)](
                    ids, before, ranks, self.pairs, E, CHUNK=chunk, BLOCK_E=next_power_of_2(E), num_warps=8),
                "running": lambda: align_module._running_count_kernel[(cdiv(E, 8),)](
                    zeros, totals, chunks, E, CHUNKS=128, EXPERTS=8, num_warps=4),
                "place": lambda: align_module._place_kernel[(E,)](
                    ids, counts, tiles.pairs, tiles.experts, starts, counts, self.pairs, E, tiles.max_tiles, 0,
                    BLOCK_M=rows, BLOCK_E=next_power_of_2(E), SCAN=1024, PLACE=False, MOST=0, num_warps=4),
                "chunk place": lambda: align_module._chunk_place_kernel[(chunks,)](
                    ids, ranks, zeros, starts, tiles.pairs, self.pairs, E, CHUNK=chunk, num_warps=4),
            }  # fmt: skip
            for name, call in calls.items():
                if chunk == 128 or name in ("count", "running"):
                    attempt({"m": self.m, "part": "sort", "variant": [name, chunk]}, partial(timed, [call] * 8))

    def whole_today(self):
        with forced(TODAY[self.m]):
            calls = [partial(moe.fused_moe, x, W13, W2, w, ids, S13, S2, quantize_activations=True, num_shared=1)
                     for x, w, ids in self.inputs]  # fmt: skip
            return timed(calls)

    def whole(self, form):
        with forced(TODAY[self.m]):
            expected = moe.fused_moe(
                self.x, W13, W2, self.weights, self.ids, S13, S2, quantize_activations=True, num_shared=1
            )
        calls = [partial(fused_moe_tall, form, x, W13, W2, w, ids, S13, S2) for x, w, ids in self.inputs]
        got, again = calls[0](), calls[0]()
        return {"error_to_today": err(got, expected), "same_bits": bool(torch.equal(got, again)), **timed(calls)}

    def parts(self):
        """Today's, part by part."""
        rows = TODAY[self.m].block_m
        xs = [torch.randn(self.m, H, device=DEV).bfloat16() for _ in range(8)]
        each = {
            "sort": [partial(align, ids, E, rows) for _, _, ids in self.inputs],
            "sort in groups": [partial(align, ids, E, HEIGHT, 3) for _, _, ids in self.inputs],
            "round x": [partial(quantize_tokens, x) for x in xs],
            "gate-up": [partial(self.today_gate_up, self.plain)] * 2,
            "round inner": [partial(quantize_tokens, self.plain)] * 4,
            "down": [partial(self.today_down, self.values)] * 2,
        }
        for name, calls in each.items():
            attempt({"m": self.m, "part": name, "variant": "today"}, partial(timed, calls))


def copied():
    a = torch.empty(2**29, dtype=torch.uint8, device=DEV)
    b = torch.empty_like(a)
    found = timed([partial(b.copy_, a)])
    return {**found, "tb_s": round(2 * a.numel() / found["us"] / 1e6, 3)}


def best(found):
    return min((t, n) for n, t in found.items() if t)[1] if any(found.values()) else None


def us(found):
    return None if found is None or not found.get("error_to_today", 1) < 0.06 else found.get("us")


def explore(m, gate_ups, downs, downs_64, sums, shared, wholes):
    """Parts, variants, and whole steps of the quickest of them; `wholes`: how many forms."""
    step, left = Step(m), (0.35 * float(sys.argv[1]) if m == MS[0] else 0)  # for the other numbers of tokens
    attempt({"m": m, "part": "whole", "variant": "today"}, step.whole_today)
    step.parts()
    gate = {
        n: us(attempt({"m": m, "part": "gate-up", "variant": n}, partial(step.gate_up, n), left + 12)) for n in gate_ups
    }
    down = {
        n: us(attempt({"m": m, "part": "down", "variant": n}, partial(step.down, n, False), left + 8)) for n in downs
    }
    fine = {
        n: us(attempt({"m": m, "part": "down 64", "variant": n}, partial(step.down, n, True), left + 6))
        for n in downs_64
    }
    for args in sums:
        attempt({"m": m, "part": "sum", "variant": list(args)}, partial(step.combined, *args), left + 5)
    forms = []
    for n, t in gate.items():
        most, tile, rounds, height = GATE_UP[n]
        group_64 = rounds and tile.block_n == 128
        seconds, table = (fine, DOWN_64) if group_64 else (down, DOWN)
        # one form has one kind of groups
        fitting = {d: s for d, s in seconds.items() if s and table[d][0] == most and table[d][2] == height}
        if t and fitting:
            d = best(fitting)
            extra = 0 if rounds else 50 * m / 8192
            forms.append((t + fitting[d] + extra, n, d, TallForm(most, tile, table[d][1], rounds, height)))
    for args in shared:
        attempt({"m": m, "part": "sum", "variant": ["shared in it", *args]}, partial(step.shared, *args), left + 5)
    for t, n, d, form in sorted(forms, key=lambda f: f[0])[:wholes]:
        attempt(
            {"m": m, "part": "whole", "variant": [n, d, form.most], "products_us": round(t, 1)},
            partial(step.whole, form),
        )
    for t, n, d, form in sorted(forms, key=lambda f: f[0])[:1]:
        form = replace(form, shared_in_sum=True)
        attempt({"m": m, "part": "whole", "variant": [n, d, form.most, "shared in sum"]}, partial(step.whole, form))
    if m in (MS[0], MS[3]):
        step.sorting()
    return gate, down, fine


def explored(*args):
    return {"ran": bool(explore(*args))}


def ranked(found, n):
    return [name for name, t in sorted(((k, v) for k, v in found.items() if v), key=lambda p: p[1])[:n]]


say(torch=torch.__version__, gpu="dry" if DRY else torch.cuda.get_device_name())
if not DRY:
    attempt({"part": "copy"}, copied)
SUMS = [(False, 1024, 4), (True, 1024, 4), (True, 2048, 8), (True, 2048, 4), (True, 512, 2)]
SHARED = [(False, 64, 128, 4, 3), (False, 64, 64, 4, 3), (False, 128, 128, 8, 3), (True, 64, 128, 4, 4)]
gate, down, fine = explore(MS[0], MANY["gate"], MANY["down"], MANY["fine"], SUMS, SHARED, 4)
for m in MS[1:]:
    if time.monotonic() > END - 5:
        break
    more = FEW[m]
    lists = [
        list(dict.fromkeys([*more[part], *ranked(found, 0 if m == MS[3] else 2)]))
        for part, found in (("gate", gate), ("down", down), ("fine", fine))
    ]
    attempt({"m": m, "part": "all"}, partial(explored, m, *lists, SUMS[:2], SHARED[:1], 2))
say(done=True, seconds=round(time.monotonic() - BEGIN, 1))
