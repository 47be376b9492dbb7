"""Findings about a checkpoint: what the engines read differently in config.json, and what `qwen3next check` says."""

import json
from collections.abc import Iterator
from typing import Any

from qwen3next_plugin.serve.machine import available_memory_gib

from .finding import Finding, error, ok, refusal, warning
from .surroundings import Surroundings

_CHECK = "from qwen3next_plugin.cli import main; main()"
WITH_MTP = "with MTP layer"  # part of what `check` says
_FP8_CAPABILITY = (8, 9)  # multiplies FP8; below, weights are widened to bf16
_WIDENED_CAPABILITY = (8, 0)


def read_config(s: Surroundings) -> dict[str, Any]:
    """config.json's content; empty if there is none or it is not JSON, which `check` reports."""
    if s.checkpoint is None:
        return {}
    file = s.checkpoint / "config.json" if s.checkpoint.suffix != ".json" else s.checkpoint
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def complete(s: Surroundings) -> Iterator[Finding]:
    """`qwen3next check` in a process of its own (it imports torch), and what it means for MTP."""
    if s.checkpoint is None:
        return
    folder = s.checkpoint.parent if s.checkpoint.suffix == ".json" else s.checkpoint
    outcome = s.run([s.python, "-P", "-c", _CHECK, "check", folder], timeout=300)
    if outcome.returncode != 0:
        said = outcome.stderr.strip().splitlines()
        yield refusal("checkpoint", said[-1] if said else f"`qwen3next check` ended with {outcome.returncode}")
        return
    yield ok("checkpoint", outcome.stdout.strip())
    yield from mtp(read_config(s).get("num_nextn_predict_layers"), WITH_MTP in outcome.stdout)


def mtp(announced: int | None, present: bool) -> Iterator[Finding]:
    """MTP layers that config.json announces (``num_nextn_predict_layers``) against those in the files."""
    if present and not announced:
        yield warning(
            "mtp",
            "num_nextn_predict_layers is missing in config.json while there are mtp.* tensors: "
            "MTP needs its depth in the flags",
            'vLLM: --speculative-config \'{"method": "mtp", "num_speculative_tokens": 2}\'; '
            "SGLang: --speculative-algorithm NEXTN --speculative-num-steps 2 --speculative-eagle-topk 1 "
            "--speculative-num-draft-tokens 3",
        )
    if announced and not present:
        yield warning(
            "mtp",
            f"num_nextn_predict_layers is {announced} in config.json, and there is no mtp.* tensor",
            "serve without MTP flags, or fetch the files that hold the MTP layer",
        )


def full_attention_interval(s: Surroundings) -> Iterator[Finding]:
    """Stock SGLang reads layers from ``full_attention_interval`` only; transformers 5 writes ``layer_types``."""
    config = read_config(s)
    if not config.get("layer_types") or config.get("full_attention_interval"):
        return
    interval = _interval(config["layer_types"])
    found = "config.json has layer_types and no full_attention_interval, without which stock SGLang cannot read it"
    if interval is None:
        remedy = "keep the plugin active: these layers do not repeat, and SGLang has no field to say so"
    else:
        remedy = f'add "full_attention_interval": {interval}, to config.json'
    yield _for_sglang(s, found, remedy)


def _interval(kinds: list[str]) -> int | None:
    """Every how many layers there is one of full attention; None if they do not repeat."""
    if "full_attention" not in kinds:
        return None
    interval = kinds.index("full_attention") + 1
    repeats = all((kind == "full_attention") == ((i + 1) % interval == 0) for i, kind in enumerate(kinds))
    return interval if repeats else None


def rope_theta(s: Surroundings) -> Iterator[Finding]:
    """Stock SGLang takes the rotary base from the top level only, and 10000 where it is not there."""
    config = read_config(s)
    inner = config.get("rope_parameters")
    theta = inner.get("rope_theta") if isinstance(inner, dict) else None
    if theta is not None and config.get("rope_theta") is None:
        found = f"config.json has rope_theta {theta} in rope_parameters only, and stock SGLang silently takes 10000"
        yield _for_sglang(s, found, f'add "rope_theta": {json.dumps(theta)}, to config.json\'s top level')


def _for_sglang(s: Surroundings, found: str, remedy: str) -> Finding:
    """An error where SGLang would be served without the plugin, which mends it; else something to know."""
    stock = "sglang" in s.packages and s.environ.get("QWEN3NEXT_PLUGIN") == "0"
    return (error if stock else warning)("config.json", found, remedy)


def fits(s: Surroundings) -> Iterator[Finding]:
    """The weights against the memory of the machine, and FP8 against what its GPUs can do."""
    if s.checkpoint is None:
        return
    weights = sum(file.stat().st_size for file in s.checkpoint.glob("*.safetensors")) / 2**30
    gpus = sum(gpu.memory_mib for gpu in s.gpus) / 1024
    memory, whose = (gpus, "the GPUs have") if gpus else (available_memory_gib(), "free memory is")
    if memory and weights > memory:
        found = f"the weights take {weights:.0f} GiB, {whose} {memory:.0f} GiB"
        yield warning("memory", found, "use an FP8 checkpoint, or more GPUs (--tensor-parallel-size)")
    quantised = (read_config(s).get("quantization_config") or {}).get("quant_method")
    for gpu in s.gpus[:1]:
        if quantised == "fp8" and gpu.capability and gpu.capability < _FP8_CAPABILITY:
            have = ".".join(map(str, gpu.capability))
            if gpu.capability < _WIDENED_CAPABILITY:
                found = f"FP8 weights need compute capability 8.0, {gpu.name} has {have}"
                yield error("fp8", found, "use another GPU")
                continue
            yield warning(
                "fp8",
                f"{gpu.name} (compute capability {have}) has no FP8 units: FP8 weights are widened to bf16 when "
                "read, experts by this plugin, other layers by the engine's Marlin kernels; no such GPU was tried",
                "use the bf16 checkpoint where it fits, which takes no widening",
            )
