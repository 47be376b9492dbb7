"""vLLM's grouped products, by the entry that its Triton experts share (0.32): routed experts only."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ..moe_work import ROUTED, MoeInputs
from ..work import Prepared, Work
from . import named

_PACKAGE = "vllm.model_executor.layers.fused_moe"
_MOST_CONFIGS = 4


def _block(one: MoeInputs) -> int:
    """Both sides of vLLM's weight blocks: what is left of 128 where a slice of an expert ends inside of one."""
    inner = one.w2.shape[2]
    return min(128, inner & -inner)


def _call(one: MoeInputs, config: dict[str, Any] | None) -> Any:
    """One call of fused_experts, under ``config`` if one is given."""
    x, w13, w2, weights, ids, s13, s2 = one.arguments(ROUTED)
    run, quant = named(f"{_PACKAGE}.fused_moe:fused_experts"), None
    if s13 is not None:
        block = _block(one)
        # Our factors cover 128 columns of the hidden size; a square block of 64 repeats them, as vLLM refines them.
        times = 128 // block
        s13, s2 = s13.repeat_interleave(times, -1), s2.repeat_interleave(times, -2)
        quant = named(f"{_PACKAGE}.config:fp8_w8a8_moe_quant_config")(s13, s2, block_shape=[block, block])
    forced = named(f"{_PACKAGE}:override_config")

    def call() -> Tensor:
        with forced(config):
            out: Tensor = run(x, w13, w2, weights, ids, quant_config=quant)
        return out

    return call


def _prepared(work: Work, config: dict[str, Any] | None, source: str) -> Prepared:
    calls = [_call(one, config) for one in work.inputs]
    facts: dict[str, Any] = {"source": source}
    return Prepared(calls, ROUTED, facts | {"config": config or _found(work)})


def _dtype(one: MoeInputs) -> str | None:
    return None if one.s13 is None else "fp8_w8a8"


def _file_name(one: MoeInputs) -> str:
    block = None if one.s13 is None else [_block(one)] * 2
    name: str = named(f"{_PACKAGE}.fused_moe:get_config_file_name")(
        one.w2.shape[0] - 1, one.w2.shape[2], _dtype(one), block
    )
    return name


def _configs() -> Path:
    return Path(named(f"{_PACKAGE}.fused_moe:__file__")).resolve().parent / "configs"


def _found(work: Work) -> Any:
    """The config that vLLM's own look-up gives."""
    one: MoeInputs = work.inputs[0]
    _, w13, w2, _, ids, s13, _ = one.arguments(ROUTED)
    block = None if s13 is None else [_block(one)] * 2
    look_up = named(f"{_PACKAGE}.fused_moe:try_get_optimal_moe_config")
    return look_up(w13.shape, w2.shape, ids.shape[1], _dtype(one), work.case.tokens, block_shape=block)


def default(work: Work) -> list[Prepared]:
    """With the config that vLLM finds for this GPU, or computes where it ships none."""
    name = _file_name(work.inputs[0])
    shipped = (_configs() / name).is_file()
    return [_prepared(work, None, name if shipped else "vLLM's default: it ships no file for this GPU")]


def other_configs(work: Work) -> list[Prepared]:
    """With configs shipped for the same experts on other GPUs or in another width: the fastest of a few."""
    seen: list[Any] = [_found(work)]
    found = []
    for name, config in _others(work):
        if config not in seen:
            seen.append(config)
            found.append(_prepared(work, config, name))
        if len(found) == _MOST_CONFIGS:
            break
    return found


def _others(work: Work) -> Iterator[tuple[str, dict[str, Any]]]:
    """Files of as many experts in the same type, the same width and Hopper GPUs first, with their nearest config."""
    one: MoeInputs = work.inputs[0]
    mine, quantised = _file_name(one), one.s13 is not None

    def order(path: Path) -> tuple[bool, bool, str]:
        return f"N={one.w2.shape[2]}," not in path.name, not any(g in path.name for g in ("H100", "H200")), path.name

    for path in sorted(_configs().glob(f"E={one.w2.shape[0] - 1},*.json"), key=order):
        if path.name == mine or ("fp8_w8a8" in path.name) != quantised or ("block_shape" in path.name) != quantised:
            continue
        entries = json.loads(path.read_text(encoding="utf-8"))
        by_tokens = {int(key): value for key, value in entries.items() if key.isdigit()}
        yield path.name, by_tokens[min(by_tokens, key=lambda tokens: abs(tokens - work.case.tokens))]
