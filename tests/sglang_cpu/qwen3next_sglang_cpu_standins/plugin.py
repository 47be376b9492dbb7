"""Entry point ``sglang.srt.plugins``: hooks for what SGLang has in Triton or for a GPU only."""

import logging

from . import DISTRIBUTION, attention, surroundings
from .guard import why_not
from .ops import gates, states

logger = logging.getLogger(f"sglang.{__package__}")

NOTICE = f"TEST AID: {DISTRIBUTION} stands in for sgl_kernel and torchvision; this server is for tests only"

AROUND = {
    "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.forward_extend": attention.forward_extend,
    "sglang.srt.arg_groups.mamba_hook.validate_mamba_extra_buffer": surroundings.validate_mamba_extra_buffer,
}

_DRAFTS = "sglang.srt.speculative.draft_utils.DraftBackendFactory"
_STATES = "sglang.kernels.ops.mamba.mamba_state_scatter_triton"
_ELEMENTWISE = "sglang.kernels.ops.elementwise.elementwise"

REPLACE = {
    f"{_DRAFTS}.create_decode_backend": attention.create_decode_backend,
    f"{_DRAFTS}.create_draft_extend_backend": attention.create_draft_extend_backend,
    f"{_STATES}.track_mamba_states_if_needed": states.track_mamba_states_if_needed,
    f"{_STATES}.track_mamba_states_all_layers": states.track_mamba_states_all_layers,
    f"{_STATES}.fused_mamba_state_scatter_with_mask": states.scatter_with_mask,
    f"{_STATES}.fused_conv_window_scatter_with_mask": states.scatter_with_mask,
    f"{_STATES}._conv_multi_eligible": states.no_multi_scatter,
    f"{_STATES}.fused_commit_track_indices": states.fused_commit_track_indices,
    "sglang.kernels.ops.attention.fla.fused_norm_gate.FusedRMSNormGated.forward": gates.fused_rms_norm_gated,
    f"{_ELEMENTWISE}.fused_sigmoid_mul": gates.fused_sigmoid_mul,
    f"{_ELEMENTWISE}.fused_gate_sigmoid_mul_add": gates.fused_gate_sigmoid_mul_add,
}


def register() -> None:
    """Register every hook, in each of SGLang's processes. Ends the process where the stand-ins must not be.

    SGLang logs and swallows what an entry point raises; SystemExit is no Exception, and is not; Python
    prints its sentence.
    """
    if refusal := why_not():
        raise SystemExit(refusal)
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    surroundings.do_without_pinned_memory()
    for target, replacement in REPLACE.items():
        HookRegistry.register(target, replacement, HookType.REPLACE)
    for target, wrapper in AROUND.items():
        HookRegistry.register(target, wrapper, HookType.AROUND)
    logger.warning(NOTICE)
