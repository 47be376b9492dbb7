"""A Gated DeltaNet layer between its projections: from their outputs to the input of the last one.

Inputs lie flat, q | k | v | z and b | a, as the plugin lays out its weights; `GdnAbout.interleaved` gives what an
engine's projection gives that keeps the checkpoint's order, whose split is then a part of its work.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.kernels.conv.reference import causal_conv
from qwen3next_plugin.kernels.gdn import DraftRecords, PackedRows, gdn_commit, reference, reference_drafts
from qwen3next_plugin.kernels.gdn.peers import OFFERS
from qwen3next_plugin.kernels.gdn.step import DraftRows, GdnParameters, PrefillRows, RecurrentRows, gdn_step
from qwen3next_plugin.kernels.norm.reference import rms_norm_gated
from qwen3next_plugin.spec import GdnSpec

from .cases import Case
from .work import Engine, Normal, Prepared, Work, copies_of

CHECKED_ROWS = 8
_CHECKED_TOKENS = 256
_STATE_SCALE = 0.1


@dataclass
class GdnInputs:
    """qkvz [T, conv_dim + HV * V] and ba [T, 2 * HV], flat; both states [slots, ...]; out [T, HV, V]."""

    qkvz: Tensor
    ba: Tensor
    conv_state: Tensor
    ssm_state: Tensor
    out: Tensor

    def gates(self) -> tuple[Tensor, Tensor]:
        """a and b."""
        b, a = self.ba.chunk(2, dim=-1)
        return a, b


@dataclass
class GdnAbout:
    """What all copies share. slots [N, M]: of each row the slots it may write, the first being its own; none is slot
    0, which vLLM keeps for padding. starts [N + 1]: where rows begin; last [N]: the last draft accepted.
    """

    sizes: GdnSpec
    parameters: GdnParameters
    rows: int
    tokens: int
    slots: Tensor
    starts: Tensor
    last: Tensor

    def interleaved(self, inputs: GdnInputs) -> tuple[Tensor, Tensor]:
        """qkvz and ba in the checkpoint's order: key head by key head, each with its value heads."""
        g = self.sizes
        q, k, v, z = inputs.qkvz.split([g.key_dim, g.key_dim, g.value_dim, g.value_dim], dim=-1)
        heads = [part.unflatten(-1, (g.num_k_heads, -1)) for part in (q, k, v, z)]
        gates = [part.unflatten(-1, (g.num_k_heads, -1)) for part in reversed(inputs.gates())]
        return torch.cat(heads, dim=-1).flatten(1), torch.cat(gates, dim=-1).flatten(1)

    def prefill_rows(self, packed: bool = False) -> PrefillRows:
        """All rows as prompts that begin; packed: said once more as the host knows them, for an engine's function."""
        begins = torch.zeros(self.rows, dtype=torch.bool, device=self.slots.device)
        told = PackedRows.of([self.tokens] * self.rows, self.slots.device) if packed else None
        own = self.slots[:, 0]
        return PrefillRows(self.starts[:-1], self.starts[1:], own, begins, self.tokens, packed=told)

    def records(self) -> DraftRecords:
        """Room for what one layer's verification of these rows leaves."""
        sizes = self.sizes
        return DraftRecords.allocate(
            1,
            self.rows,
            self.tokens,
            num_k_heads=sizes.num_k_heads,
            num_v_heads=sizes.num_v_heads,
            head_k_dim=sizes.head_k_dim,
            head_v_dim=sizes.head_v_dim,
            input_dtype=torch.bfloat16,
            device=self.slots.device,
        )


def gdn_parameters(sizes: GdnSpec, eps: float, normal: Normal) -> GdnParameters:
    """A layer's constants: decays of every speed, as trained layers have them."""
    heads = sizes.num_v_heads
    return GdnParameters(
        conv_weight=normal(sizes.conv_dim, sizes.conv_kernel_size, scale=0.3),
        A_log=normal(heads, dtype=torch.float32),
        dt_bias=normal(heads, dtype=torch.float32) - 2.0,
        norm_weight=1.0 + normal(sizes.head_v_dim, scale=0.1),
        norm_eps=eps,
        num_k_heads=sizes.num_k_heads,
    )


def gdn_work(case: Case, spec: Qwen3NextSpec, engine: Engine, device: torch.device) -> Work:
    """A decode, verification or prefill case, with what the model runs for it inside ``engine``."""
    sizes, normal = spec.gdn, Normal(device)
    tokens, drafts, prefill = case.rows * case.tokens, case.op == "gdn-verify", case.op == "gdn-prefill"
    state_dtype = torch.bfloat16 if case.variant else torch.float32
    places = case.tokens if drafts else 1
    shape = (sizes.num_v_heads, sizes.head_v_dim, sizes.head_k_dim)
    state = sizes.value_dim * sizes.head_k_dim * state_dtype.itemsize
    window = sizes.conv_dim * (sizes.conv_kernel_size - 1) * 2
    passed = tokens * (sizes.conv_dim + 2 * sizes.value_dim + 2 * sizes.num_v_heads) * 2
    written = case.rows * (state + window)
    moved = passed + (written if prefill else 2 * written)
    slots = 1 + case.rows * places
    columns = sizes.conv_kernel_size - 1 + places - 1
    about = GdnAbout(
        sizes,
        gdn_parameters(sizes, spec.rms_norm_eps, normal),
        case.rows,
        case.tokens,
        1 + normal.order(case.rows * places).view(case.rows, places).int(),
        torch.arange(case.rows + 1, device=device, dtype=torch.int32) * case.tokens,
        normal.order(case.rows).remainder(case.tokens).int(),
    )

    def inputs() -> GdnInputs:
        held = (slots, columns, sizes.conv_dim) if engine == "vllm" else (slots, sizes.conv_dim, columns)
        windows = normal(*held)
        return GdnInputs(
            normal(tokens, sizes.conv_dim + sizes.value_dim),
            normal(tokens, 2 * sizes.num_v_heads),
            windows.mT if engine == "vllm" else windows,
            normal(slots, *shape, scale=0.0 if prefill else _STATE_SCALE, dtype=state_dtype),  # SGLang reads zeros
            torch.empty(tokens, sizes.num_v_heads, sizes.head_v_dim, dtype=torch.bfloat16, device=device),
        )

    copies = [inputs() for _ in range(copies_of(moved, passed + slots * (state + window), device))]
    first = copies[0]
    looked_at = sorted({0, case.rows - 1}) if prefill else range(min(case.rows, CHECKED_ROWS))
    checked = about.slots[list(looked_at)].flatten().long()
    saved = [(held, held[checked].clone()) for held in (first.conv_state, first.ssm_state)]

    def restore() -> None:
        for held, values in saved:
            held[checked] = values

    if prefill:
        end = min(case.tokens, _CHECKED_TOKENS)
        spans = [(row * case.tokens, row * case.tokens + end) for row in looked_at]
        own = {"own": Prepared([partial(run_prefill, about, about.prefill_rows(), one) for one in copies])}
        if OFFERS.tried:  # then a step whose rows the host knows may run an engine's function
            packed = about.prefill_rows(packed=True)
            own["plugin"] = Prepared([partial(run_prefill, about, packed, one) for one in copies])
        expected = partial(_expected_prefill, about, first, spans)
    else:
        spans = [(0, len(looked_at) * case.tokens)]
        expected = partial(_expected_recurrent, about, first, saved)
        own = _recurrent_calls(about, copies, drafts, engine)
    return Work(
        case=case,
        text="from the projections' output to the input of the next: convolution, delta rule, gated norm"
        + (", and the commit of what was accepted" if drafts else ""),
        bytes=moved,
        flops=tokens * 6 * sizes.value_dim * sizes.head_k_dim,
        products="bf16",
        inputs=copies,
        own=own,
        expected={"": expected},
        subset=lambda out: torch.cat([out.reshape(first.out.shape)[start:end] for start, end in spans]),
        restore=restore,
        about=about,
        facts={"state_dtype": str(state_dtype).removeprefix("torch.")},
    )


def run_prefill(about: GdnAbout, rows: PrefillRows, one: GdnInputs) -> Tensor:
    """One call on a copy of the inputs; its output."""
    a, b = one.gates()
    states = (one.conv_state, one.ssm_state, one.out)
    gdn_step(one.qkvz, a, b, about.parameters, *states, prefill=rows)
    return one.out


def _recurrent_calls(about: GdnAbout, copies: list[GdnInputs], drafts: bool, engine: Engine) -> dict[str, Prepared]:
    if not drafts:
        return {"own": Prepared([partial(run_decode, about, one) for one in copies])}
    record = about.records()
    found = {"own": Prepared([partial(_records_way, about, one, record) for one in copies])}
    if engine == "vllm":  # which takes drafts back by the choice of the slot that the next step begins with
        accepted = torch.ones(about.rows, dtype=torch.int32, device=about.slots.device)
        found["plugin"] = Prepared([partial(_engine_way, about, one, accepted) for one in copies])
    return found


def _engine_way(about: GdnAbout, one: GdnInputs, accepted: Tensor | None) -> Tensor:
    a, b = one.gates()
    own = about.slots[:, 0]
    rows = RecurrentRows(about.starts[:-1], about.starts[1:], own, own, about.slots, accepted, about.tokens)
    gdn_step(one.qkvz, a, b, about.parameters, one.conv_state, one.ssm_state, one.out, recurrent=rows)
    return one.out


def run_decode(about: GdnAbout, one: GdnInputs) -> Tensor:
    """Likewise for rows of one token."""
    return _engine_way(about, one, None)


def run_verify(about: GdnAbout, record: DraftRecords, one: GdnInputs) -> Tensor:
    """Likewise for rows of drafts, which leave ``record`` and no state."""
    a, b = one.gates()
    rows = DraftRows(about.starts[:-1], about.starts[1:], about.slots[:, 0], about.tokens)
    windows = one.conv_state[:, :, : about.sizes.conv_kernel_size - 1]
    states = (windows, one.ssm_state, one.out)
    gdn_step(one.qkvz, a, b, about.parameters, *states, drafts=(rows, record.layer(0)))
    return one.out


def _records_way(about: GdnAbout, one: GdnInputs, record: DraftRecords) -> Tensor:
    run_verify(about, record, one)
    own, windows = about.slots[:, 0], one.conv_state[:, :, : about.sizes.conv_kernel_size - 1]
    gdn_commit(windows[None], one.ssm_state[None], record, state_slots=own, last_tokens=about.last)
    return one.out


def _wide(one: GdnInputs, about: GdnAbout, start: int, end: int) -> tuple[Tensor, ...]:
    """mixed_qkv, z, a and b of some tokens in float64."""
    qkvz = one.qkvz[start:end].double()
    a, b = (gate[start:end].double() for gate in one.gates())
    z = qkvz[:, about.sizes.conv_dim :].unflatten(-1, one.out.shape[1:])
    return qkvz[:, : about.sizes.conv_dim], z, a, b


def _expected_recurrent(about: GdnAbout, one: GdnInputs, saved: list[tuple[Tensor, Tensor]]) -> Tensor:
    rows, p = min(about.rows, CHECKED_ROWS), about.parameters
    mixed, z, a, b = _wide(one, about, 0, rows * about.tokens)
    windows, states = (values.unflatten(0, (rows, -1))[:, 0].double() for _, values in saved)
    sizes = about.sizes
    record = DraftRecords(
        *(
            torch.zeros(rows, about.tokens, *shape, dtype=torch.float64, device=mixed.device)
            for shape in (
                (sizes.conv_dim,),
                (sizes.num_k_heads, sizes.head_k_dim),
                (sizes.num_v_heads, sizes.head_v_dim),
                (sizes.num_v_heads,),
            )
        )
    )
    out = torch.empty_like(z)
    reference_drafts.gdn_verify_fused(
        mixed,
        z,
        (a, b, p.A_log, p.dt_bias),
        p.conv_weight,
        p.norm_weight,
        p.norm_eps,
        windows,
        states,
        record,
        p.num_k_heads,
        about.starts[:rows],
        about.starts[1 : rows + 1],
        about.tokens,
        torch.arange(rows, device=mixed.device),
        out,
    )
    return out


def _expected_prefill(about: GdnAbout, one: GdnInputs, spans: list[tuple[int, int]]) -> Tensor:
    p, outs = about.parameters, []
    for start, end in spans:
        mixed, z, a, b = _wide(one, about, start, end)
        convolved, _ = causal_conv(mixed[None], p.conv_weight)
        gates = (a[None], b[None], p.A_log, p.dt_bias)
        tokens = reference.split_tokens(convolved, gates, p.num_k_heads, one.ssm_state)
        core, _ = reference.delta_rule_chunked(*tokens)
        outs.append(rms_norm_gated(core[0], z, p.norm_weight, p.norm_eps))
    return torch.cat(outs)
