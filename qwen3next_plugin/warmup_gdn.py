"""What a Gated DeltaNet layer launches, for a warm-up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .kernels.gdn import Convolution, PackedRows, config
from .kernels.gdn.peers import launch_around_peers
from .kernels.gdn.step import PrefillRows, gdn_step
from .layers import GdnParts
from .warmup_rows import tokens_a_row

if TYPE_CHECKING:
    from .warmup import Serving


def launch_gdn(module: GdnParts, serving: Serving, numbers: Sequence[int]) -> None:
    """Every kind of its steps with these ``numbers`` of tokens, in all variants and tiles that the table may choose."""
    states = serving.states(module)
    if states is None:
        return
    table = config.table_of(states[1].device)
    for rows in serving.steps(module):
        for one in config.every_table(table, states[1].element_size(), tokens_a_row(rows)):
            for tokens in numbers:
                qkvz = serving.zeros(tokens, module.conv_dim + module.num_v_heads * module.head_v_dim)
                gates = module.gates(serving.zeros(tokens, 2 * module.num_v_heads))
                out = serving.zeros(tokens, module.num_v_heads, module.head_v_dim)
                with config.forced(one):
                    gdn_step(qkvz, *gates, module.core_parameters(), *states, out, **rows)
        if "prefill" in rows:
            _around_peers(module, states, rows["prefill"], serving)


def _around_peers(
    module: GdnParts, states: tuple[torch.Tensor, torch.Tensor], rows: PrefillRows, serving: Serving
) -> None:
    """What lies around an engine's own prefill function, if one was tried."""
    lengths = [1] * rows.state_slots.shape[0]
    qkv = serving.zeros(len(lengths), module.conv_dim)
    a, b = module.gates(serving.zeros(len(lengths), 2 * module.num_v_heads))
    snapshot = None
    if rows.snapshot_positions is not None and rows.snapshot_slots is not None:
        snapshot = (rows.snapshot_positions, rows.snapshot_slots)
    launch_around_peers(
        PackedRows.of(lengths, serving.device),
        qkv,
        (a, b, module.A_log, module.dt_bias),
        states[1],
        module.num_k_heads,
        rows.query_start,
        rows.query_end,
        rows.max_query_len,
        rows.state_slots,
        rows.has_initial_state,
        serving.zeros(len(lengths), module.num_v_heads, module.head_v_dim),
        snapshot,
        Convolution(module.core_parameters().conv_weight, states[0]),
    )
