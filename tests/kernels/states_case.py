"""Rows of drafts that leave a state a token, verified in one operation, and compared with the float64 formula."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen3next_plugin.kernels import conv, gdn, norm
from qwen3next_plugin.kernels.gdn import config
from qwen3next_plugin.kernels.gdn.table import StatesTile

from .gdn_case import assert_error, limit
from .layer_case import EPS, Layer
from .slots import assert_only_these_slots_changed, bits, clone_layout, ints, ranges, strided_slots

Span = tuple[int, int, int]
"""start, end, and how many tokens the step before kept; 0 of those for a row that is skipped."""


class StatesCase:
    """A layer and rows, each with ``length`` slots of its own, over poisoned states.

    nowhere: pairs of a row and a token whose state is not kept. Windows stand where the accepted tokens say, with
    poison around them.
    """

    def __init__(
        self,
        layer: Layer,
        spans: Sequence[Span],
        length: int,
        backend: str,
        *,
        state_dtype: torch.dtype = torch.float32,
        window_dtype: torch.dtype | None = None,
        layout: str = "contiguous",
        tile: StatesTile | None = None,
        nowhere: Sequence[tuple[int, int]] = (),
    ) -> None:
        tokens = layer.tokens
        self.layer, self.spans, self.length, self.backend = layer, spans, length, backend
        self.device, self.tile, self.state_dtype = tokens.device, tile or StatesTile(16, 2), state_dtype
        self.taps = layer.conv_weight.shape[1] - 1
        slots, dtype = 2 + length * len(spans), window_dtype or tokens.mixed_qkv.dtype
        self.windows = layer.windows(slots, self.taps - 1 + length + 1, dtype, layout)
        self.states = tokens.state(slots, state_dtype, layout)
        self.table = torch.randperm(slots)[: length * len(spans)].view(len(spans), length)
        for n, (start, end, accepted) in enumerate(spans):
            if accepted == 0:
                self.table[n] = -1
            elif end > start:
                own, first = self.table[n], accepted - 1
                window = torch.randn(len(layer.conv_weight), self.taps, device=self.device)
                self.windows[own[0], :, first : first + self.taps] = window.to(dtype)
                state = torch.randn(self.states.shape[1:], device=self.device) * 0.3
                self.states[own[first]] = state.to(state_dtype)
        self.initial = [int(self.table[n, max(accepted - 1, 0)]) for n, (*_, accepted) in enumerate(spans)]
        self.outputs = self.table.clone()
        for n, token in nowhere:
            self.outputs[n, token] = -1
        self.running = [
            (n, start, min(end, start + length), accepted)
            for n, (start, end, accepted) in enumerate(spans)
            if end > start and accepted > 0
        ]
        self.idle = torch.ones(tokens.mixed_qkv.shape[0], dtype=torch.bool)
        for _, start, end, _ in self.running:
            self.idle[start:end] = False
        for padding in (tokens.mixed_qkv, layer.z, tokens.a, tokens.b):
            padding[self.idle.nonzero().squeeze(1).tolist()] = float("nan")

    def rows(self) -> dict[str, Tensor]:
        return ranges([(start, end, 0) for start, end, _ in self.spans], self.device)

    def verify(self, windows: Tensor, states: Tensor) -> Tensor:
        """The output, poisoned before."""
        out = self.layer.tokens.out()
        wide = torch.stack([self.outputs, self.outputs - 1], dim=1).int().to(self.device)
        with config.forced(config.only(config.table_of(windows.device), self.tile)):
            gdn.gdn_verify_states(
                *self.layer.arguments(),
                windows,
                states,
                num_k_heads=self.layer.tokens.k_heads,
                norm_eps=EPS,
                **self.rows(),
                max_query_len=self.length,
                conv_slots=strided_slots(self.table[:, 0].tolist(), self.device),
                initial_slots=strided_slots(self.initial, self.device),
                output_slots=wide[:, 0],
                num_accepted_tokens=ints([accepted for *_, accepted in self.spans], self.device),
                out=out,
                backend=self.backend,
            )
        return out

    def one_after_another(self, windows: Tensor, states: Tensor) -> Tensor:
        """The same by three operations; tokens in no row are not looked at."""
        x, z, a, b, weight, A_log, dt_bias, norm_weight = self.layer.arguments()
        convolved, out = torch.empty_like(x), torch.empty_like(z)
        rows = self.rows() | {"max_query_len": self.length, "backend": self.backend}
        accepted = ints([accepted for *_, accepted in self.spans], self.device)
        first = ints(self.table[:, 0].tolist(), self.device)
        conv.causal_conv1d_update(
            x, weight, None, windows, **rows, state_slots=first, num_accepted_tokens=accepted, out=convolved
        )
        slots = {"initial_slots": ints(self.initial, self.device), "output_slots": self.outputs.int().to(self.device)}
        k_heads = self.layer.tokens.k_heads
        gdn.gdn_verify(convolved, a, b, A_log, dt_bias, states, num_k_heads=k_heads, **rows, **slots, out=out)
        norm.rms_norm_gated(out, z, norm_weight, EPS, out=out, backend=self.backend)
        return out

    def check(self) -> None:
        """Outputs and states are the formula's, windows those of the convolution alone, and nothing else moved."""
        before = clone_layout(self.windows), clone_layout(self.states)
        others = clone_layout(self.windows), clone_layout(self.states)
        self.one_after_another(*others)
        out = self.verify(self.windows, self.states)
        assert torch.equal(bits(self.windows.contiguous()), bits(others[0].contiguous())), "windows"
        allowed = 1.5 * limit(out.dtype, self.layer.tokens, self.backend)  # of one token few roundings average out
        kept = limit(self.state_dtype, self.layer.tokens, self.backend)
        written = []
        for n, start, end, accepted in self.running:
            own, first = self.table[n], accepted - 1
            window = before[0][own[0], :, first : first + self.taps]
            o, _, states = self.layer.expected(start, end, window, before[1][own[first]])
            assert_error(out[start:end], o, allowed, f"row {n}")
            for token in range(end - start):
                slot = int(self.outputs[n, token])
                if slot >= 0:
                    assert_error(self.states[slot], states[token], kept, f"state of row {n} after token {token}")
                    other = others[1][slot].cpu().double()
                    assert_error(self.states[slot], other, 2 * (kept + allowed), f"the other state of row {n}")
                    written.append(slot)
        assert not bool(out[self.idle].any()), "a token in no row has an output"
        assert_only_these_slots_changed(before[1], self.states, written)
        assert_only_these_slots_changed(before[0], self.windows, [int(self.table[n, 0]) for n, *_ in self.running])
