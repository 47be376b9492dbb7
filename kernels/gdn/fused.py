"""A decode step from the projection's output to the input of the next one: convolution, delta rule, gated norm."""

from torch import Tensor

from ..checks import check_optional
from ..dispatch import TRITON, choose, declare
from . import reference
from .choices import decode_choices
from .validation import check_decode_rows, check_fused, check_tokens

declare("gdn_decode_fused", cuda=decode_choices)


def gdn_decode_fused(
    mixed_qkv: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    *,
    num_k_heads: int,
    norm_eps: float,
    query_start: Tensor,
    query_end: Tensor,
    state_slots: Tensor,
    out: Tensor,
    snapshot_slots: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One new token a row through a whole layer but its projections; both states advance in place.

    The same as :func:`~qwen3next_plugin.kernels.conv.causal_conv1d_update`, :func:`.gdn_decode` and
    :func:`~qwen3next_plugin.kernels.norm.rms_norm_gated` one after another (Gated Delta Networks, arXiv 2412.06464,
    figure 1), without rounding in between. Unlike theirs, the output is written whole: a token that no row decodes,
    such as padding, gets zeros, whatever its inputs are.

    Args:
        mixed_qkv: ``[T, 2 * HK * K + HV * V]``, the convolution's input, q | k | v flat; float32, float16 or bfloat16,
            any strides. z ``[T, HV, V]``: the output gate; both may be column slices of one projection.
        a, b: ``[T, HV]``, any strides; ``A_log``, ``dt_bias``: ``[HV]``.
        conv_weight: ``[conv_dim, W]``, oldest tap first; ``norm_weight`` ``[V]``, plain, and ``norm_eps``.
        conv_state: ``[S, conv_dim, L]`` with ``L >= W - 1``, any strides; the window stands in columns
            ``[0, W - 1)``, oldest first, and others are left alone.
        ssm_state: ``[S, HV, V, K]``, any strides, float32, float16 or bfloat16.
        query_start, query_end: ``[N]`` integers; of a row that is longer than one token only the first is taken, and
            an empty one is skipped. No two rows share a token.
        state_slots: ``[N]`` integers, any stride; a row with a negative one is skipped: nothing of its states is read
            or written. No two rows share a slot.
        out: ``[T, HV, V]``, any strides.
        snapshot_slots: ``[N]`` integers or None: both new states go to that slot too, where it is not negative. No row
            may read or write a slot given here.
        backend: None (Triton on CUDA, else the reference), ``"reference"`` or ``"triton"``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    check_tokens(mixed_qkv, a, b, A_log, dt_bias, ssm_state, num_k_heads, out)
    check_fused(mixed_qkv, z, conv_weight, norm_weight, conv_state, out)
    rows = check_decode_rows(mixed_qkv, query_start, query_end, state_slots)
    check_optional(rows, mixed_qkv, snapshot_slots=snapshot_slots)
    chosen = choose(mixed_qkv, backend)
    if rows == 0 or mixed_qkv.shape[0] == 0:
        out.zero_()
        return
    if chosen == TRITON:
        from . import triton_decode

        run = triton_decode.gdn_decode_fused
    else:
        run = reference.gdn_decode_fused
    run(
        mixed_qkv,
        z,
        (a, b, A_log, dt_bias),
        conv_weight,
        norm_weight,
        norm_eps,
        conv_state,
        ssm_state,
        num_k_heads,
        query_start,
        query_end,
        state_slots,
        out,
        snapshot_slots,
    )
