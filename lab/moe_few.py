"""Experts of 4 to 16 tokens: moe_few.py SECONDS FILE. Launches alone, then whole, the best of them combined."""

import json
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import few_rows
import few_tiles

from qwen3next_plugin.kernels import moe
from qwen3next_plugin.kernels.gemm.reference import FP8
from qwen3next_plugin.kernels.moe import reference

END, PATH = time.monotonic() + float(sys.argv[1]), sys.argv[2]
H, E, I, K = 2048, 513, 512, 10
EXPERT = 3 * H * I
COPY = 4.26e12


def say(**line):
    with open(PATH, "a") as file:
        file.write(json.dumps(line) + "\n")


def codes(n, k):
    made = torch.empty(E, n, k, dtype=FP8, device="cuda")
    for b in range(0, E, 32):
        made[b : b + 32].copy_((torch.randn(made[b : b + 32].shape, device="cuda") * 64).clamp_(-448, 448))
    return made


def factors(n, k):
    return (torch.rand(E, n // 128, k // 128, device="cuda") + 0.5) / (64 * k**0.5)


def routed(m):
    each, made = EXPERT * min(E, m * K), []
    for _ in range(max(4, 1 + 4 * 60 * 2**20 // each)):
        x = torch.randn(m, H, device="cuda").bfloat16()
        logits = torch.randn(m, E - 1, device="cuda").bfloat16()
        made.append((x, *moe.route(logits, K, True, x, gate)))
    return made


def milliseconds(action, times):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        action()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / times


def timed(calls):
    """Microseconds a call (median, least), and whether the graph's replays gave the bits of calls one by one."""
    alone = []
    for call in calls:
        alone.append(call())
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [call() for call in calls]
    first = milliseconds(graph.replay, 2)
    times = max(1, round(8.0 / max(first, 1e-3)))
    us = sorted(1e3 * milliseconds(graph.replay, times) / len(calls) for _ in range(5))
    same = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(alone, outs, strict=True))
    return us[2], us[0], same


def poisoned(call):
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is empty with NaN
    try:
        return call().float()
    except RuntimeError as error:  # some type cannot be filled
        say(poison=str(error)[:200])
        torch.use_deterministic_algorithms(False)
        return call().float()
    finally:
        torch.use_deterministic_algorithms(False)


def measure(case, variant, calls, expected=None, **more):
    began = time.monotonic()
    if began > END:
        return None
    try:
        line = {}
        if expected is not None:
            out = poisoned(calls[0])
            line["error"] = round(float((out - expected).norm() / expected.norm()), 5)
        us, least, same = timed(calls)
        say(case=case, variant=variant, us=round(us, 2), least=round(least, 2), same=same, **line, **more,
            took=round(time.monotonic() - began, 2))  # fmt: skip
        return us if line.get("error", 0.0) < 0.06 else None
    except Exception as error:
        say(case=case, variant=variant, error=f"{type(error).__name__}: {error}"[:400])
        torch.cuda.synchronize()
        return None


w13, w2, s13, s2 = codes(2 * I, H), codes(H, I), factors(2 * I, H), factors(H, I)
gate = torch.randn(1, H, device="cuda").bfloat16()
say(torch=torch.__version__, gpu=torch.cuda.get_device_name())

UP_ROWS = {
    "lead": {"lead": True},
    "lead, 4 steps": {"lead": True, "steps": 4},
    "lead, 2 steps": {"lead": True, "steps": 2},
    "two at once, 4 steps of 2 rows": {"lead": True, "two": True, "rows": 2, "steps": 4},
    "two at once, 128 registers": {"lead": True, "two": True, "maxnreg": 128},
    "pairs fastest": {"lead": False, "pairs_fastest": True},
    "lead, by warps, 8 steps": {"lead": True, "by_warps": True, "steps": 8},
    "lead, 8 steps of 2 rows": {"lead": True, "rows": 2, "steps": 8},
    "lead, 8 steps in 3 stages": {"lead": True, "steps": 8, "stages": 3},
    "lead, 4 steps, 8 warps": {"lead": True, "steps": 4, "warps": 8},
    "lead, pairs fastest, 4 steps": {"lead": True, "pairs_fastest": True, "steps": 4},
    "lead, 16 steps of 2 rows in 4 stages": {"lead": True, "rows": 2, "steps": 16, "stages": 4},
    "lead, 8 steps of 4 rows": {"lead": True, "steps": 8},
    "lead, by warps, 4 steps": {"lead": True, "by_warps": True, "steps": 4},
    "lead, 8 warps": {"lead": True, "warps": 8},
    "alone, rows fastest": {"lead": False},
}
DOWN_ROWS = {
    "8 + 4": {},
    "8 + 4, 2 steps": {"steps": 2},
    "8 + 4, 4 steps of 2 rows": {"rows": 2, "steps": 4},
    "16, 8 warps": {"parts": (16, 0), "warps": 8},
    "8 + 4, 8 rows, 8 warps": {"rows": 8, "warps": 8},
    "8 + 4, 2 rows": {"rows": 2},
    "8 + 4, rows fastest": {"tokens_fastest": False},
    "8 + 4, 4 steps": {"steps": 4},
}
UP_TILES = {
    "64 columns, 4 stages": {},
    "32, 3 stages": {"cols": 32, "stages": 3},
    "32, 4 stages": {"cols": 32},
    "32, 4 stages, 2 warps": {"cols": 32, "warps": 2},
    "64, 3 stages": {"stages": 3},
    "64, 4 stages, 8 warps": {"warps": 8},
    "64, 5 stages": {"stages": 5},
    "64, 4 stages, last not first": {"last_first": False},
    "128, 3 stages": {"cols": 128, "stages": 3},
}
DOWN_TILES = {  # fp8: of 64 columns a factor; else it rounds groups of 128 itself
    "fp8, 64 columns, 4 stages": {"fp8": True},
    "fp8, held, 64": {"fp8": True, "held": True},
    "fp8, held, 32": {"fp8": True, "held": True, "cols": 32},
    "fp8, 64, 8 stages": {"fp8": True, "stages": 8},
    "fp8, 128, 6 stages": {"fp8": True, "cols": 128, "stages": 6},
    "fp8, 32, 8 stages": {"fp8": True, "cols": 32, "stages": 8},
    "fp8, held, 32, 2 warps": {"fp8": True, "held": True, "cols": 32, "warps": 2},
    "fp8 of 128, 64, 4 stages (today's)": {"fp8": True, "group": 128},
    "rounds, 64, 4 stages": {},
    "rounds, held, 64": {"held": True},
}


def best(found, count=1):
    order = sorted((us, name) for name, us in found.items() if us is not None)
    return [name for _, name in order[:count]] or [next(iter(found))]


def group_of(options):
    return options.get("group", 64 if options.get("fp8") else 128)


def launch_up(data, x, _weights, ids, **options):
    out = x.new_empty((ids.numel(), I))
    few_rows.gate_up(x, w13, s13, ids, out, **options)
    return out


def launch_down(gated, x, weights, ids, **options):
    out = torch.empty_like(x)
    few_rows.down(gated, w2, s2, ids, weights, out, **options)
    return out


def launch_up_tiles(tiles, x, _weights, ids, **options):
    return few_tiles.gate_up(tiles[2], tiles[3], w13, s13, *tiles[:2], ids.shape[1], **options)[0]


def launch_down_tiles(tiles, gated, x, weights, ids, **options):
    fp8 = options.pop("fp8", False)
    group = group_of({"fp8": fp8, **options})
    return few_tiles.down(*gated[(fp8, group)], w2, s2, *tiles[:2], **{**options, "group": group})


def pieces(m, inputs, which):
    """Launches alone; what the others leave is made before. Returns times by kind and name."""
    found = {kind: {} for kind in ("up rows", "up tiles", "down rows", "down tiles")}
    gated = [launch_up(None, *one, lead=False) for one in inputs]
    tiles = [few_tiles.tiles_apart(ids, E, x, pdl=False) for x, _, ids in inputs]
    wide = [(g, g) for g in gated]
    narrow = {
        group: [
            few_tiles.gate_up(t[2], t[3], w13, s13, *t[:2], K + 1, fp8=True, cols=group, stages=3)
            for t in tiles
        ]
        for group in (64, 128)
    }  # fmt: skip
    between = [
        {(False, 128): wide[n], (True, 64): narrow[64][n], (True, 128): narrow[128][n]} for n in range(len(inputs))
    ]
    jobs = []
    for name, options in UP_ROWS.items():
        jobs.append(("up rows", name, [partial(launch_up, None, *one, **options) for one in inputs]))
    for name, options in UP_TILES.items():
        calls = [partial(launch_up_tiles, t, *one, **options) for t, one in zip(tiles, inputs, strict=True)]
        jobs.append(("up tiles", name, calls))
    for name, options in DOWN_ROWS.items():
        calls = [partial(launch_down, g, *one, **options) for g, one in zip(gated, inputs, strict=True)]
        jobs.append(("down rows", name, calls))
    for name, options in DOWN_TILES.items():
        calls = [
            partial(launch_down_tiles, t, g, *one, **options)
            for t, g, one in zip(tiles, between, inputs, strict=True)
        ]  # fmt: skip
        jobs.append(("down tiles", name, calls))
    expected = gated[0].float()
    for kind, name, calls in jobs:
        if which is not None and name not in which[kind]:
            continue
        # rows of pairs are the same for all: none is skipped here
        found[kind][name] = measure(f"{m} tokens, {kind}", name, calls, expected if kind.startswith("up") else None)
    values = [x.new_empty((ids.numel(), H)).normal_() for x, _, ids in inputs]
    rest = {
        "tiles apart": [partial(lambda x, _, ids: few_tiles.tiles_apart(ids, E, x, pdl=False)[2], *one) for one in inputs],
        "sum": [partial(few_tiles.summed, v, w, ids, E, pdl=False) for v, (_, w, ids) in zip(values, inputs, strict=True)],
    }  # fmt: skip
    if which is None:
        for name, calls in rest.items():
            measure(f"{m} tokens, rest", name, calls)
    return found


def today(x, weights, ids):
    return moe.fused_moe(x, w13, w2, weights, ids, s13, s2, num_shared=1)


def rows_whole(x, weights, ids, up, down):
    return few_rows.whole_rows(x, w13, w2, weights, ids, s13, s2, up, down)


def tiles_whole(x, weights, ids, **options):
    return few_tiles.tiled(x, w13, w2, weights, ids, s13, s2, **options)


def hybrid_whole(x, weights, ids, **options):
    return few_tiles.hybrid(x, w13, w2, weights, ids, s13, s2, **options)


def believed(m, inputs):
    """The combinations of which most is expected, before anything is known."""
    x, weights, ids = inputs[0]
    expected = reference.fused_moe(x.float(), w13, w2, weights, ids, s13, s2, False)

    def whole(variant, function, **options):
        measure(f"{m} tokens", variant, [partial(function, *one, **options) for one in inputs], expected)

    early = {"pdl": True, "pdl_launch": False}
    whole("today", today)
    whole("believed: lead, 4 steps | 8 + 4 | pdl", rows_whole, up={**UP_ROWS["lead, 4 steps"], **early}, down={"pdl": True})
    whole("believed: tiles 64 | fp8, held, 64 | pdl", tiles_whole, pdl=True, up={"fp8": True},
          dn={"group": 64, "held": True})  # fmt: skip
    whole("believed: hybrid 64 | 8 + 4 | pdl", hybrid_whole, pdl=True)
    whole("believed: lead | 8 + 4", rows_whole, up=UP_ROWS["lead"], down={})
    whole("believed: pairs fastest | 8 + 4", rows_whole, up=UP_ROWS["pairs fastest"], down={})


def wholes(m, inputs, choice):
    x, weights, ids = inputs[0]
    expected = reference.fused_moe(x.float(), w13, w2, weights, ids, s13, s2, False)
    touched = sum(len(one[2].unique()) for one in inputs) / len(inputs)
    facts = {"copy_us": round(1e6 * touched * EXPERT / COPY, 1), "experts": round(touched, 1)}

    def whole(variant, function, **options):
        return measure(f"{m} tokens", variant, [partial(function, *one, **options) for one in inputs], expected, **facts)

    whole("today", today)
    up, down = choice["up rows"], choice["down rows"]
    for early, name in ((None, "no pdl"), (False, "pdl of down"), (True, "pdl of both")):
        options = {} if early is None else {"pdl": True, "pdl_launch": early}
        whole(f"rows: {up[0]} | {down[0]} | {name}", rows_whole, up={**UP_ROWS[up[0]], **options},
              down={**DOWN_ROWS[down[0]], "pdl": early is not None})  # fmt: skip
    for name in down[1:]:
        whole(f"rows: {up[0]} | {name} | pdl of down", rows_whole,
              up={**UP_ROWS[up[0]], "pdl": True, "pdl_launch": False}, down={**DOWN_ROWS[name], "pdl": True})  # fmt: skip
    for name in up[1:]:
        whole(f"rows: {name} | {down[0]} | pdl of down", rows_whole,
              up={**UP_ROWS[name], "pdl": True, "pdl_launch": False}, down={**DOWN_ROWS[down[0]], "pdl": True})  # fmt: skip
    if m < 4:
        return
    for up_name in choice["up tiles"]:
        up = UP_TILES[up_name]
        for name in choice["down tiles"]:
            options = dict(DOWN_TILES[name])
            fp8 = options.pop("fp8", False)
            cols = up.get("cols", 64)
            if fp8 and (cols != 64 or "group" in options):
                if cols != 32 or "group" in options:
                    continue
                options["group"] = 32
                if options.get("held"):
                    continue
            elif fp8:
                options["group"] = 64
            for pdl, first in ((False, False), (True, False), (True, True)):
                whole(f"tiles: {up_name} | {name} | pdl {pdl}, first {first}", tiles_whole, pdl=pdl, first_pdl=first,
                      up={**up, "fp8": fp8}, dn=options)  # fmt: skip
        for pdl, first in ((True, False), (True, True), (False, False)):
            whole(f"hybrid: {up_name} | {down[0]} | pdl {pdl}, first {first}", hybrid_whole, pdl=pdl, first_pdl=first,
                  up=up, dn=DOWN_ROWS[down[0]])  # fmt: skip


COUNTS = {"up rows": 2, "up tiles": 2, "down rows": 2, "down tiles": 2}
inputs = {m: routed(m) for m in (8, 16, 4, 12, 5, 2, 1)}
found = {}
for m in (8, 16, 4):
    try:
        believed(m, inputs[m])
    except Exception as error:
        say(case=f"{m} tokens", error=f"{type(error).__name__}: {error}"[:400])
for m in (8, 16, 4):
    which = None
    if m == 4 and 8 in found:  # the better halves
        which = {kind: best(found[8][kind], 5 if kind == "up rows" else 4) for kind in COUNTS}
    try:
        found[m] = pieces(m, inputs[m], which)
        wholes(m, inputs[m], {kind: best(found[m][kind], count) for kind, count in COUNTS.items()})
    except Exception as error:
        say(case=f"{m} tokens", error=f"{type(error).__name__}: {error}"[:400])
for m in (12, 5, 2, 1):
    near = found.get(16 if m == 12 else 8 if m == 5 else 4) or found.get(8)
    try:
        if near is not None and time.monotonic() < END:
            wholes(m, inputs[m], {kind: best(near[kind], 2 if m < 4 else 1) for kind in COUNTS})
    except Exception as error:
        say(case=f"{m} tokens", error=f"{type(error).__name__}: {error}"[:400])
say(done=True, left=round(END - time.monotonic(), 1))
