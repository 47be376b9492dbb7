"""What no engine can beat on this machine: bytes that must move, or products that must be made, at measured ceilings.

Decoding moves bytes: dense weights and head once a step, each touched expert's weights once, every request's recurrent
state read and written, its KV cache read. Prefill makes products: 2 FLOP a weight and token that a token meets, plus
causal attention; the Gated DeltaNet's own products are left out (they are below a percent), so the floor is one.
"""

from typing import Any

from qwen3next_plugin.spec import LayerKind, Qwen3NextSpec

from .rows import Row

BYTES_OF = {"float8_e4m3fn": 1, "fp8": 1, "bfloat16": 2, "float16": 2, "float32": 4}


def bytes_of(dtype: str | None, default: int) -> int:
    """Bytes of a dtype's name, with or without ``torch.`` before it; ``default`` for one that is not known."""
    return BYTES_OF.get((dtype or "").removeprefix("torch."), default)


def expected_experts(spec: Qwen3NextSpec, tokens: int) -> float:
    """Distinct experts of a layer that ``tokens`` tokens touch if every expert is as likely as any other."""
    experts = spec.moe.num_experts
    return experts * (1.0 - (1.0 - spec.moe.top_k / experts) ** tokens)


def _mixer_parameters(spec: Qwen3NextSpec, kind: LayerKind) -> tuple[int, int]:
    """Parameters of a layer's mixer in projections that FP8 covers, and in all others."""
    h = spec.hidden_size
    if kind == LayerKind.FULL:
        a = spec.attention
        width = a.num_heads * a.head_dim
        return h * (2 * width + 2 * a.num_kv_heads * a.head_dim) + width * h, 0
    g = spec.gdn
    covered = h * (2 * g.key_dim + 2 * g.value_dim) + g.value_dim * h
    return covered, h * 2 * g.num_v_heads + g.conv_dim * g.conv_kernel_size


def _weight_bytes(spec: Qwen3NextSpec, experts: float) -> float:
    small = 2
    covered = 1 if spec.quant is not None else small
    h, moe = spec.hidden_size, spec.moe
    total = float(spec.vocab_size * h * small)
    for i, kind in enumerate(spec.layer_kinds):
        linear, other = _mixer_parameters(spec, kind)
        total += linear * covered + other * small
        if i in spec.dense_layers:
            total += 3 * h * spec.intermediate_size * covered
            continue
        total += 3 * h * covered * (experts * moe.intermediate_size + moe.shared_intermediate_size)
        total += (moe.num_experts + 1) * h * small
    return total


def decode_bytes(spec: Qwen3NextSpec, batch: int, context: int, experts: float, facts: dict[str, Any]) -> float:
    """Bytes that one step of ``batch`` requests with ``context`` tokens each must move."""
    state, conv = bytes_of(facts.get("ssm_state_dtype"), 4), bytes_of(facts.get("conv_state_dtype"), 2)
    g, a = spec.gdn, spec.attention
    linear = sum(kind == LayerKind.LINEAR for kind in spec.layer_kinds)
    full = len(spec.layer_kinds) - linear
    a_state = g.num_v_heads * g.head_v_dim * g.head_k_dim * state + g.conv_dim * (g.conv_kernel_size - 1) * conv
    a_cache = 2 * a.num_kv_heads * a.head_dim * context * bytes_of(facts.get("kv_dtype"), 2)
    return _weight_bytes(spec, experts) + batch * (2 * linear * a_state + full * a_cache)


def prefill_flop(spec: Qwen3NextSpec, tokens: int) -> tuple[float, float]:
    """FLOP of a prompt: in weights, and in causal attention."""
    h, moe, a = spec.hidden_size, spec.moe, spec.attention
    weights = 0.0
    for i, kind in enumerate(spec.layer_kinds):
        weights += sum(_mixer_parameters(spec, kind))
        width = (
            spec.intermediate_size
            if i in spec.dense_layers
            else (moe.top_k * moe.intermediate_size + moe.shared_intermediate_size)
        )
        weights += 3 * h * width + (0 if i in spec.dense_layers else (moe.num_experts + 1) * h)
    full = sum(kind == LayerKind.FULL for kind in spec.layer_kinds)
    attention = full * 2 * 2 * a.num_heads * a.head_dim * tokens * tokens / 2
    return 2 * weights * tokens, attention


def floor_of(
    row: Row, spec: Qwen3NextSpec, ceilings: dict[str, Any], facts: dict[str, Any], experts: float | None, steps: int
) -> float | None:
    """The row's floor in its unit, None where there is none (starts, traffic) or a ceiling is missing."""
    if row.kind == "decode":
        batch = int(row.size)
        touched = expected_experts(spec, batch) if experts is None else experts
        moved = decode_bytes(spec, batch, row.prompt_tokens + steps // 2, touched, facts)
        return moved / (ceilings["copy_gb_s"] * 1e9) * 1e3
    if row.kind == "prefill":
        weights, attention = prefill_flop(spec, int(row.size))
        fast = (ceilings["fp8_tflop_s"] if spec.quant is not None else None) or ceilings["bf16_tflop_s"]
        return weights / (fast * 1e12) + attention / (ceilings["bf16_tflop_s"] * 1e12)
    return None
