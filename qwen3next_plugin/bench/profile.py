"""GPU time by part of the model, and launches a layer, out of a PyTorch profiler trace.

Kernels are told apart by their names: this package's by the folder their source is in, others' by patterns. What no
pattern knows is "other", with its name in the list of the longest, so that nothing is hidden.
"""

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PARTS = ("moe", "gdn", "attention", "dense", "norm and quantisation", "sampling", "other")

_FOLDERS = {
    "moe": "moe",
    "gdn": "gdn",
    "conv": "gdn",
    "rope": "attention",
    "norm": "norm and quantisation",
    "gemm": "dense",
}

# The first that matches; from particular to general.
_PATTERNS = tuple(
    (part, re.compile(pattern, re.IGNORECASE))
    for part, pattern in (
        (
            "moe",
            r"moe|expert|grouped_?gemm|group_?gemm|m_grouped|topk_?(gating|softmax)|route|act_and_mul|silu_and_mul"
            # DeepGEMM has one kernel for both: behind its sizes N and K stands the number of groups.
            r"|_impl<\S*Major\)\d, \d+u, \d+u, \d+u, (?!1u)\d+u",
        ),
        (
            "gdn",
            r"gdn|gated_?delta|delta_?rule|causal_conv|conv1d|fused_recurrent|chunk_(gated|fwd|local|scaled|delta)",
        ),
        ("gdn", r"solve_tril|recompute_w_u|l2norm|kkt|fused_sigmoid_gating|fla_|merge_16x16|sigmoid_gating_delta"),
        ("sampling", r"argmax|sampl|top_?[kp]_?(mask|renorm|sampl|top)|multinomial|penalt|gumbel|logits|softmax"),
        ("attention", r"attn|attention|fmha|flash|paged|prefillwith|decodewith|reshape_and_cache|rope|rotary|qk_norm"),
        ("norm and quantisation", r"quant|rms_?norm|layer_?norm|fused_add|rsqrt_mean|per_token_group|_norm_|cvt_fp8"),
        ("dense", r"gemm|gemv|nvjet|cutlass|cublas|splitk|matmul|xmma|wgmma|dot_kernel|reduce_1block"),
    )
)


NAME_CHARACTERS = 160
"""Of a kernel's name in files: templates' names go on for pages."""


@dataclass(frozen=True)
class Launch:
    """One kernel, copy or fill on the GPU: name, start and length in microseconds."""

    name: str
    start: float
    length: float


def read_trace(path: Path) -> list[Launch]:
    """GPU work in a Chrome trace (``.json`` or ``.json.gz``) as `torch.profiler` exports it, by start."""
    raw = path.read_bytes()
    events = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    found = [
        Launch(str(event["name"]), float(event["ts"]), float(event.get("dur", 0.0)))
        for event in events
        if event.get("ph") == "X" and event.get("cat") in kinds
    ]
    return sorted(found, key=lambda launch: launch.start)


@cache
def _own_kernels() -> dict[str, str]:
    """This package's Triton kernels by name, and the part each belongs to."""
    import qwen3next_plugin.kernels as kernels

    found = {}
    for folder in (Path(path) for path in kernels.__path__):
        for source in folder.glob("*/**/*.py"):
            part = _FOLDERS.get(source.relative_to(folder).parts[0])
            for name in re.findall(r"@triton\.jit(?:\([^)]*\))?\s+def (\w+)", source.read_text(encoding="utf-8")):
                if part is not None:
                    found[name] = "norm and quantisation" if "quantize" in name else part
    return found


def part_of(name: str) -> str:
    """The part of the model that a kernel of this name belongs to."""
    own = _own_kernels().get(name)
    if own is not None:
        return own
    return next((part for part, pattern in _PATTERNS if pattern.search(name)), "other")


def summarize(launches: list[Launch], steps: int, layers: int) -> dict[str, Any]:
    """GPU milliseconds and launches a step by part, idle time, and the longest kernels.

    Idle is what is left of the time between the first launch's start and the last one's end, so parts that overlap can
    add up to more than the busy time.
    """
    parts: dict[str, list[float]] = {part: [0.0, 0.0] for part in PARTS}
    names: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for launch in launches:
        for entry in (parts[part_of(launch.name)], names[launch.name]):
            entry[0] += launch.length / 1e3 / steps
            entry[1] += 1 / steps
    span = max((launch.start + launch.length for launch in launches), default=0.0)
    span = (span - min((launch.start for launch in launches), default=0.0)) / 1e3 / steps
    busy = _union(launches) / 1e3 / steps
    return {
        "steps": steps,
        "ms": _short(span),
        "idle_ms": _short(span - busy),
        "launches": _short(len(launches) / steps),
        "launches_a_layer": _short(len(launches) / steps / layers),
        "parts": {
            part: {"ms": _short(ms), "share": _short(ms / span if span else 0.0), "launches": _short(count)}
            for part, (ms, count) in parts.items()
        },
        "longest": [
            {"name": name[:NAME_CHARACTERS], "part": part_of(name), "ms": _short(ms), "launches": _short(count)}
            for name, (ms, count) in sorted(names.items(), key=lambda item: -item[1][0])[:25]
        ],
    }


def _union(launches: Iterable[Launch]) -> float:
    """Microseconds in which at least one launch ran; launches come by start."""
    total, end = 0.0, float("-inf")
    for launch in launches:
        stop = launch.start + launch.length
        total += max(0.0, stop - max(launch.start, end))
        end = max(end, stop)
    return total


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def profile_table(profiles: dict[str, dict[str, Any]]) -> str:
    """Profiles by side as a Markdown table: a line a part, GPU ms and share a side."""
    sides = list(profiles)
    lines = [f"| part | {' | '.join(sides)} |", "|---" + "|---:" * len(sides) + "|"]
    for part in PARTS:
        cells = [profiles[side]["parts"][part] for side in sides]
        lines.append(f"| {part} | " + " | ".join(f"{c['ms']:.3g} ms, {c['share']:.0%}" for c in cells) + " |")
    for label, key in (("idle", "idle_ms"), ("whole step", "ms")):
        lines.append(f"| {label} | " + " | ".join(f"{profiles[side][key]:.3g} ms" for side in sides) + " |")
    cells = [f"{profiles[side]['launches_a_layer']:.3g}" for side in sides]
    return "\n".join([*lines, f"| launches a layer | {' | '.join(cells)} |"])
