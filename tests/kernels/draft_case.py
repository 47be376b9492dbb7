"""Rows of drafts over layers that share their slots: verified, committed, and compared with the float64 formula."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from qwen3next_plugin.kernels import gdn
from qwen3next_plugin.kernels.gdn import config
from qwen3next_plugin.kernels.gdn.table import FORMS, PROJECTED, STEPS, VerifyTile
from tests.helpers import relative_error

from .gdn_case import assert_error, limit
from .layer_case import EPS, Layer
from .slots import Row, assert_only_these_slots_changed, bits, clone_layout, fill_slots, ints, ranges, strided_slots

LENGTH, SLOTS = 3, 12
WAYS = ("reference", *FORMS)


class Case:
    """Layers that share rows and slots, as a model's do, with records that nothing was written to.

    way: one of WAYS, or a backend, where a table chooses the tile; tile_rows: rows of a state at a time otherwise.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        rows: Sequence[Row],
        way: str | None,
        *,
        length: int = LENGTH,
        slots: int = SLOTS,
        room: int | None = None,
        state_dtype: torch.dtype = torch.float32,
        window_dtype: torch.dtype | None = None,
        layout: str = "contiguous",
        tile_rows: int = 16,
    ) -> None:
        tokens = layers[0].tokens
        self.layers, self.rows, self.length = layers, rows, length
        self.backend, self.tile = way, None
        if way in FORMS:
            self.backend, self.tile = "triton", VerifyTile(tile_rows, 4 if way == PROJECTED else tile_rows // 8, way)
        self.device, self.state_dtype = tokens.device, state_dtype
        dtype = window_dtype or tokens.mixed_qkv.dtype
        taps = layers[0].conv_weight.shape[1] - 1
        wide = [
            (layer.windows(slots, taps, dtype, layout), layer.tokens.state(slots, state_dtype, layout))
            for layer in layers
        ]
        # One view over all layers, whatever the layout of each: as if each were a page of one buffer.
        self.windows, self.states = (stack_views([pair[place] for pair in wide]) for place in (0, 1))
        self.running = [
            (n, start, min(end, start + length), slot)
            for n, (start, end, slot) in enumerate(rows)
            if slot >= 0 and end > start and n < (len(rows) if room is None else room)
        ]
        for states, scale in ((self.windows, 1.0), (self.states, 0.3)):
            for place in range(len(layers)):
                fill_slots(states[place], [slot for *_, slot in self.running], scale)
        self.records = gdn.DraftRecords.allocate(
            len(layers),
            len(rows) if room is None else room,
            length,
            num_k_heads=tokens.k_heads,
            num_v_heads=tokens.v_heads,
            head_k_dim=tokens.key_dim,
            head_v_dim=tokens.value_dim,
            input_dtype=dtype,
            device=self.device,
        )
        for tensor in self.records.tensors():
            tensor.fill_(float("nan"))
        self.before = clone_layout(self.windows), clone_layout(self.states)
        idle = torch.ones(tokens.mixed_qkv.shape[0], dtype=torch.bool)
        for _, start, end, _ in self.running:
            idle[start:end] = False
        self.idle = idle.nonzero().squeeze(1).tolist()
        for layer in layers:
            for padding in (layer.tokens.mixed_qkv, layer.z, layer.tokens.a, layer.tokens.b):
                padding[self.idle] = float("nan")

    def verify(self) -> list[Tensor]:
        """The outputs of all layers, poisoned before."""
        outs = []
        table = config.table_of(self.windows.device)
        with nullcontext() if self.tile is None else config.forced(config.only(table, self.tile)):
            for n, layer in enumerate(self.layers):
                out = layer.tokens.out()
                gdn.gdn_verify_fused(
                    *layer.arguments(),
                    self.windows[n],
                    self.states[n],
                    self.records.layer(n),
                    num_k_heads=layer.tokens.k_heads,
                    norm_eps=EPS,
                    **ranges(self.rows, self.device),
                    max_query_len=self.length,
                    state_slots=strided_slots([slot for _, _, slot in self.rows], self.device),
                    out=out,
                    backend=self.backend,
                )
                outs.append(out)
        return outs

    def commit(self, last: Sequence[int], snapshots: Sequence[tuple[int, int]] | None = None) -> None:
        """last: a row's last accepted token; snapshots: (slot, token) a row."""
        options: dict[str, Tensor] = {}
        if snapshots is not None:
            options["snapshot_slots"] = ints([slot for slot, _ in snapshots], self.device, torch.int64)
            options["snapshot_tokens"] = ints([token for _, token in snapshots], self.device)
        gdn.gdn_commit(
            self.windows,
            self.states,
            self.records,
            state_slots=strided_slots([slot for _, _, slot in self.rows], self.device),
            last_tokens=ints(last, self.device, torch.int64),
            backend=self.backend,
            **options,
        )

    def expected(self) -> dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]]:
        """`Layer.expected` of every running row by layer and row."""
        windows, states = self.before
        return {
            (n, row): layer.expected(start, end, windows[n][slot], states[n][slot])
            for n, layer in enumerate(self.layers)
            for row, start, end, slot in self.running
        }

    def common_errors(
        self, outs: Sequence[Tensor], expected: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]]
    ) -> dict[tuple[int, int], float]:
        """Errors of the other float32 version (plain torch, or token by token) by layer and row, where an output is off
        by more than rounding explains: in one small batch of a thousand what is summed cancels for everybody.
        """
        places = {row: slice(start, end) for row, start, end, _ in self.running}
        far = [
            (n, row)
            for (n, row), (o, *_) in expected.items()
            if relative_error(outs[n][places[row]], o) > limit(outs[n].dtype, self.layers[n].tokens, self.backend)
        ]
        if not far:
            return {}
        mine = (self.backend, self.tile)
        self.backend, self.tile = "reference", None
        if mine[0] == "reference":
            self.backend, self.tile = "triton", VerifyTile(16, 2, STEPS)
        other = self.verify()
        self.backend, self.tile = mine
        self.verify()  # for the records are those of the last one
        return {(n, row): relative_error(other[n][places[row]], expected[n, row][0]) for n, row in far}

    def check(self, last: Sequence[int], snapshots: Sequence[tuple[int, int]] | None = None) -> None:
        """Verify and commit; every output, window and state is the formula's, and nothing else moved."""
        outs = self.verify()
        for states, old in zip((self.windows, self.states), self.before, strict=True):
            assert torch.equal(bits(states.contiguous()), bits(old.contiguous())), "verification moved a state"
        formula = self.expected()
        common = self.common_errors(outs, formula)
        self.commit(last, snapshots)
        for n, layer in enumerate(self.layers):
            windows, states, written = self.windows[n], self.states[n], []
            for row, start, end, slot in self.running:
                o, moved, expected = formula[n, row]
                allowed = max(limit(outs[n].dtype, layer.tokens, self.backend), 10 * common.get((n, row), 0.0))
                assert_error(outs[n][start:end], o, allowed, f"row {row}")
                holds = [(slot, last[row])] if last[row] >= 0 else []
                if snapshots is not None and snapshots[row][0] >= 0 and 0 <= snapshots[row][1] <= last[row]:
                    holds.append(snapshots[row])
                for place, token in holds:
                    where = f"row {row} after token {token} in slot {place}"
                    assert torch.equal(windows[place].cpu().double(), moved[token]), f"window of {where}"
                    error = limit(self.state_dtype, layer.tokens, self.backend)
                    assert_error(states[place], expected[token], error, f"state of {where}")
                    written.append(place)
            assert not bool(outs[n][self.idle].any()), "a token in no row has an output"
            for before, after in zip(self.before, (self.windows, self.states), strict=True):
                assert_only_these_slots_changed(before.transpose(0, 1), after.transpose(0, 1), written)


def stack_views(parts: Sequence[Tensor]) -> Tensor:
    """[len(parts), ...] with each part's own strides and memory around it, over one storage."""
    storage = torch.cat([torch.empty(0, dtype=p.dtype, device=p.device).set_(p.untyped_storage()) for p in parts])
    step = storage.numel() // len(parts)
    first = parts[0]
    return storage.as_strided((len(parts), *first.shape), (step, *first.stride()), first.storage_offset())
