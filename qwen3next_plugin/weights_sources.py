"""What the tensors of an unquantised checkpoint must look like, layer by layer, and where they go.

Names are those of the published checkpoint and of transformers 5, which stacks experts.
"""

from typing import Literal, NamedTuple

from .spec import LayerKind, Qwen3NextSpec
from .weights_packed import PackedPart


class Placement(NamedTuple):
    """The place of one checkpoint tensor in the fused weights.

    ``shard`` is None for a whole tensor, else which part of it: "q", "k", "v" of ``qkv_proj``, "gate" or "up" of
    ``gate_up_proj`` and ``experts.w13``. ``expert`` is None for tensors without experts and for stacked experts.
    """

    name: str
    shard: str | None = None
    expert: int | None = None


class Source(NamedTuple):
    """What a checkpoint tensor must look like and where it goes.

    ``shape`` is the checkpoint tensor's, ``fused_shape`` that of the whole fused tensor, and ``offset`` the first row
    (of dim -2) this part takes in it. ``relayout`` names the change of layout on the way, if any; ``packed`` says of
    integer codes, their scales and zero points how they are stored.
    """

    placement: Placement
    shape: tuple[int, ...]
    fused_shape: tuple[int, ...]
    offset: int = 0
    relayout: Literal["qkvz", "ba", "conv", "float32"] | None = None
    packed: PackedPart | None = None

    @property
    def whole(self) -> bool:
        """Whether this tensor alone makes up the fused one."""
        return self.placement.shard is None and self.placement.expert is None


def top_sources(spec: Qwen3NextSpec) -> dict[str, Source]:
    h, table = spec.hidden_size, (spec.vocab_size, spec.hidden_size)
    sources = [
        _whole("model.embed_tokens.weight", *table),
        _whole("model.norm.weight", h),
        _whole("mtp.fc.weight", h, 2 * h),
        _whole("mtp.norm.weight", h),
        _whole("mtp.pre_fc_norm_embedding.weight", h),
        _whole("mtp.pre_fc_norm_hidden.weight", h),
    ]
    if not spec.tie_word_embeddings:
        sources.insert(2, _whole("lm_head.weight", *table))
    return {source.placement.name: source for source in sources}


def layer_sources(spec: Qwen3NextSpec, kind: LayerKind, dense: bool) -> dict[str, Source]:
    """The tensors of one layer by name below its prefix; ``*`` stands for the expert."""
    h = spec.hidden_size
    sources = {name: _whole(name, h) for name in ("input_layernorm.weight", "post_attention_layernorm.weight")}
    sources |= _gdn_sources(spec) if kind is LayerKind.LINEAR else _attention_sources(spec)
    if dense:
        sources |= _mlp_sources("mlp.", h, spec.intermediate_size)
    else:
        sources |= _moe_sources(spec)
    return sources


def _whole(name: str, *shape: int) -> Source:
    return Source(Placement(name), shape, shape)


def _gdn_sources(spec: Qwen3NextSpec) -> dict[str, Source]:
    gdn, h = spec.gdn, spec.hidden_size
    heads, conv = (gdn.num_v_heads,), (gdn.conv_dim, gdn.conv_kernel_size)
    qkvz, ba = (2 * gdn.key_dim + 2 * gdn.value_dim, h), (2 * gdn.num_v_heads, h)
    sources = [
        Source(Placement("in_proj_qkvz.weight"), qkvz, qkvz, relayout="qkvz"),
        Source(Placement("in_proj_ba.weight"), ba, ba, relayout="ba"),
        Source(Placement("conv1d.weight"), (conv[0], 1, conv[1]), conv, relayout="conv"),
        Source(Placement("A_log"), heads, heads, relayout="float32"),
        Source(Placement("dt_bias"), heads, heads, relayout="float32"),
        _whole("norm.weight", gdn.head_v_dim),
        _whole("out_proj.weight", h, gdn.value_dim),
    ]
    return {f"linear_attn.{s.placement.name}": _below("linear_attn.", s) for s in sources}


def _below(prefix: str, source: Source) -> Source:
    return source._replace(placement=source.placement._replace(name=prefix + source.placement.name))


def _attention_sources(spec: Qwen3NextSpec) -> dict[str, Source]:
    attention, h = spec.attention, spec.hidden_size
    # q_proj holds the output gate as well: per head, first q, then the gate.
    query = 2 * attention.num_heads * attention.head_dim
    key = attention.num_kv_heads * attention.head_dim
    fused = (query + 2 * key, h)
    name = "self_attn.qkv_proj.weight"
    return {
        "self_attn.q_proj.weight": Source(Placement(name, "q"), (query, h), fused),
        "self_attn.k_proj.weight": Source(Placement(name, "k"), (key, h), fused, query),
        "self_attn.v_proj.weight": Source(Placement(name, "v"), (key, h), fused, query + key),
        "self_attn.o_proj.weight": _whole("self_attn.o_proj.weight", h, query // 2),
        "self_attn.q_norm.weight": _whole("self_attn.q_norm.weight", attention.head_dim),
        "self_attn.k_norm.weight": _whole("self_attn.k_norm.weight", attention.head_dim),
    }


def _mlp_sources(prefix: str, h: int, width: int) -> dict[str, Source]:
    fused, name = (2 * width, h), f"{prefix}gate_up_proj.weight"
    return {
        f"{prefix}gate_proj.weight": Source(Placement(name, "gate"), (width, h), fused),
        f"{prefix}up_proj.weight": Source(Placement(name, "up"), (width, h), fused, width),
        f"{prefix}down_proj.weight": _whole(f"{prefix}down_proj.weight", h, width),
    }


def _moe_sources(spec: Qwen3NextSpec) -> dict[str, Source]:
    moe, h = spec.moe, spec.hidden_size
    width = moe.intermediate_size
    w13, w2 = (moe.num_experts, 2 * width, h), (moe.num_experts, h, width)
    up, down = Placement("mlp.experts.w13", "up"), Placement("mlp.experts.w2")
    return {
        "mlp.gate.weight": _whole("mlp.gate.weight", moe.num_experts, h),
        "mlp.shared_expert_gate.weight": _whole("mlp.shared_expert_gate.weight", 1, h),
        **_mlp_sources("mlp.shared_expert.", h, moe.shared_intermediate_size),
        # As published, one tensor an expert.
        "mlp.experts.*.gate_proj.weight": Source(Placement("mlp.experts.w13", "gate"), (width, h), w13),
        "mlp.experts.*.up_proj.weight": Source(up, (width, h), w13, width),
        "mlp.experts.*.down_proj.weight": Source(down, (h, width), w2),
        # As transformers 5 holds them, all experts in one tensor.
        "mlp.experts.gate_up_proj": Source(Placement("mlp.experts.w13"), w13, w13),
        "mlp.experts.down_proj": Source(down, w2, w2),
    }
