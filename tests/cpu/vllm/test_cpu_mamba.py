"""The CPU versions of vLLM's align-mode state copies, judged by the states themselves.

The world of these tests is independent of the kernels: `State after t tokens` is a random tensor a (request, layer, t),
and a convolution window is a stretch of a random input sequence. A step writes such states where an engine step writes
them; after any number of steps, blocks must hold the states that the scheduler believes them to hold.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

from vllm.model_executor.layers.mamba import mamba_utils as layout_utils
from vllm.model_executor.layers.mamba.mamba_utils import get_conv_copy_spec, get_temporal_copy_spec
from vllm.triton_utils.dispatcher import KernelOverride
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, MambaSpec
from vllm.v1.utils import CpuGpuBuffer
from vllm.v1.worker import mamba_utils

from qwen3next_plugin.errors import DriftError
from qwen3next_plugin.vllm_integration import cpu_mamba

WIDTH, CHANNELS, STATE = 4, 6, (2, 3, 5)
GDN = MambaAttentionBackendEnum.GDN_ATTN


@dataclass
class Layer:
    """Just what vLLM reads of a layer: the (convolution, recurrent) state tensors."""

    kv_cache: tuple[torch.Tensor, torch.Tensor]


@dataclass
class World:
    """Two groups of layers with block tables of their own, states as strided views of pages poisoned with NaN."""

    num_spec: int
    block_size: int
    num_requests: int
    num_columns: int
    window_last: bool = False  # a block's window is [channels, rows]
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.bfloat16, torch.float32)
    layers: dict[str, Layer] = field(default_factory=dict)
    tables: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.window = WIDTH - 1 + self.num_spec
        shape = (CHANNELS, self.window) if self.window_last else (self.window, CHANNELS)
        num_blocks = self.num_requests * self.num_columns * 2 + 1
        order = torch.randperm(num_blocks - 1, dtype=torch.int32) + 1  # block 0 is nobody's
        groups = []
        for group in range(2):
            names = [f"group{group}.layer{i}" for i in range(2)]
            for name in names:
                self.layers[name] = Layer((self._pages(num_blocks, shape, 0), self._pages(num_blocks, STATE, 1)))
            # Tables are wider than a batch needs and rows are strided, as vLLM's persistent ones are.
            table = torch.zeros(self.num_requests, self.num_columns + 3, dtype=torch.int32)
            count = self.num_requests * self.num_columns
            table[:, : self.num_columns] = order[group * count : (group + 1) * count].view(self.num_requests, -1)
            self.tables.append(table)
            spec = MambaSpec(
                block_size=self.block_size,
                shapes=(shape, STATE),
                dtypes=self.dtypes,
                mamba_type=GDN,
                mamba_cache_mode="align",
                num_speculative_blocks=self.num_spec,
            )
            groups.append(KVCacheGroupSpec(layer_names=names, kv_cache_spec=spec))
        config = KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)
        copy_funcs = {GDN: (get_conv_copy_spec, get_temporal_copy_spec)}
        cpu = torch.device("cpu")

        def make_buffer(*size: int, dtype: torch.dtype) -> CpuGpuBuffer:
            return CpuGpuBuffer(*size, dtype=dtype, device=cpu, pin_memory=False)

        create = mamba_utils.MambaSpecDecodeGPUContext.create
        self.context = create(self.num_requests, config, copy_funcs, cpu, make_buffer)
        self.context.initialize_from_forward_context(config, self.layers, copy_funcs, self.tables)

    def _pages(self, num_blocks: int, shape: tuple[int, ...], kind: int) -> torch.Tensor:
        """States that are narrower than their page, as attention and state share one page size."""
        size = torch.Size(shape).numel()
        pages = torch.full((num_blocks, size + 7), float("nan"), dtype=self.dtypes[kind])
        return pages[:, 2 : 2 + size].view(num_blocks, *shape)

    def views(self, name: str, column: int, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(convolution window as [rows, channels], recurrent state) of a request's column."""
        block = int(self.tables[int(name[5])][request, column])
        conv, state = self.layers[name].kv_cache
        return (conv[block].T if self.window_last else conv[block]), state[block]

    def snapshot(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {name: (layer.kv_cache[0].clone(), layer.kv_cache[1].clone()) for name, layer in self.layers.items()}


class Sequence:
    """What one request's layers would hold after any number of tokens."""

    def __init__(self, world: World, length: int) -> None:
        self.inputs = {name: torch.randn(length + WIDTH, CHANNELS).to(world.dtypes[0]) for name in world.layers}
        self.states = {name: torch.randn(length + 1, *STATE).to(world.dtypes[1]) for name in world.layers}

    def history(self, name: str, tokens: int) -> torch.Tensor:
        """The last WIDTH - 1 convolution inputs after `tokens` tokens (the first rows stand before the sequence)."""
        return self.inputs[name][tokens + 1 : tokens + WIDTH]


def run_step(world: World, request: int, sequence: Sequence, computed: int, drafts: int) -> None:
    """What layers do in a verify step: windows to the running column, the state after token j to the j-th from it."""
    column = (computed + drafts) // world.block_size  # ceil((computed + 1 + drafts) / block_size) - 1
    for name in world.layers:
        window = world.views(name, column, request)[0]
        window.fill_(float("nan"))
        window[: WIDTH - 1 + drafts] = sequence.inputs[name][computed + 2 : computed + WIDTH + 1 + drafts]
        for token in range(1 + drafts):
            world.views(name, column + token, request)[1].copy_(sequence.states[name][computed + 1 + token])


def assert_holds(world: World, request: int, sequence: Sequence, column: int, tokens: int, accepted: int = 1) -> None:
    """The state after `tokens` tokens lies where a step running in `column` with that accepted count reads it."""
    for name in world.layers:
        window = world.views(name, column, request)[0]
        assert torch.equal(window[accepted - 1 : accepted + WIDTH - 2], sequence.history(name, tokens)), name
        assert torch.equal(world.views(name, column + accepted - 1, request)[1], sequence.states[name][tokens]), name


@pytest.fixture(autouse=True)
def replaced_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs through vLLM's own launch of the kernels, replaced for its duration."""
    for kernel in (cpu_mamba.precopy_mamba_align_fused_kernel, cpu_mamba.postprocess_mamba_fused_kernel):
        original = getattr(mamba_utils, kernel.__name__)
        if not isinstance(original, KernelOverride):
            monkeypatch.setattr(mamba_utils, kernel.__name__, KernelOverride(original, kernel))


@settings(max_examples=60)
@given(
    num_spec=st.integers(1, 4),
    block_size=st.integers(5, 9),
    num_requests=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_every_full_block_and_every_step_finds_its_state(
    num_spec: int, block_size: int, num_requests: int, seed: int
) -> None:
    """Requests decode at random draft counts and acceptances; both copies run as vLLM's V1 runner runs them."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    steps = 12
    length = block_size + steps * (num_spec + 1) + 1
    world = World(num_spec, block_size, num_requests, -(-length // block_size) + num_spec + 1)
    context = world.context
    sequences = [Sequence(world, length) for _ in range(num_requests)]
    computed = [rng.randrange(1, block_size + 1) for _ in range(num_requests)]
    column = [(c - 1) // block_size for c in computed]  # as after a prefill, or a prefix hit that ends there
    accepted = [1] * num_requests
    for request in range(num_requests):
        run_step(world, request, sequences[request], computed[request] - 1, 0)

    def ints(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    for _ in range(steps):
        drafts = [rng.randrange(num_spec + 1) for _ in range(num_requests)]
        running = [(c + d) // block_size for c, d in zip(computed, drafts, strict=True)]
        moved = [new != old for new, old in zip(running, column, strict=True)]
        sources = ints([old if m else -1 for old, m in zip(column, moved, strict=True)])
        biases = ints([k - 1 if m else 0 for k, m in zip(accepted, moved, strict=True)])
        context.run_fused_precopy(num_requests, ints(running), sources, biases, None)
        accepted = [1 if m else k for k, m in zip(accepted, moved, strict=True)]
        column = running
        for request in range(num_requests):
            assert_holds(world, request, sequences[request], column[request], computed[request], accepted[request])
            run_step(world, request, sequences[request], computed[request], drafts[request])

        kept = [1 + rng.randrange(d + 1) for d in drafts]
        context.run_fused_postprocess(
            num_requests, ints(kept), ints(running), ints([1 + d for d in drafts]), ints(computed), ints(drafts)
        )
        accepted = context.num_accepted_tokens_out[:num_requests].tolist()
        for request in range(num_requests):
            computed[request] += kept[request]
            assert accepted[request] in (1, kept[request])
            assert_holds(world, request, sequences[request], column[request], computed[request], accepted[request])
    for request in range(num_requests):
        for full in range(computed[request] // block_size):
            assert_holds(world, request, sequences[request], full, (full + 1) * block_size)
    for layer in world.layers.values():  # block 0 belongs to no request
        assert all(bool(state[0].isnan().all()) for state in layer.kv_cache)


@pytest.mark.parametrize("window_last", [False, True], ids=["SD", "DS"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float16)], ids=str)
@pytest.mark.parametrize("bias", [0, 1, 2])
@pytest.mark.parametrize("target", [0, 2], ids=["same column", "another column"])
def test_a_copy_changes_what_it_must_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
    window_last: bool,
    dtypes: tuple[torch.dtype, torch.dtype],
    bias: int,
    target: int,
) -> None:
    """All states of all layers after one postprocess, against slices; the second request has nothing to keep."""
    monkeypatch.setattr(layout_utils, "is_conv_state_dim_first", lambda: window_last)
    monkeypatch.setattr(mamba_utils, "is_conv_state_dim_first", lambda: window_last)
    world = World(2, 8, 2, 6, window_last, dtypes)
    for layer in world.layers.values():
        for state in layer.kv_cache:
            state.copy_(torch.randn(state.shape))
    expected = world.snapshot()
    source = 0 if target == 0 else 3
    for name, (conv, recurrent) in expected.items():
        table = world.tables[int(name[5])][0]
        windows = conv.transpose(1, 2) if window_last else conv
        windows[table[target], : world.window - bias] = windows[table[source], bias:].clone()
        recurrent[table[target]] = recurrent[table[source + bias]].clone()

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    # Request 0: `bias` tokens of the accepted stand before the boundary at (target + 1) * 8; request 1 keeps none.
    computed = (target + 1) * 8 - 1 - bias
    world.context.run_fused_postprocess(
        2, ints(bias + 1, 1), ints(source, 0), ints(3, 3), ints(computed, 3), ints(2, 2)
    )
    for name, layer in world.layers.items():
        for found, wanted in zip(layer.kv_cache, expected[name], strict=True):
            assert torch.equal(found, wanted), name
    assert world.context.num_accepted_tokens_out.tolist() == [1 if source == target else bias + 1, 1]


def test_rows_are_found_through_the_index_mapping() -> None:
    """The V2 runner's form: decisions by request slot, an empty row in the batch, tokens counted after the step."""
    world = World(2, 8, 3, 6)
    for layer in world.layers.values():
        for state in layer.kv_cache:
            state.copy_(torch.randn(state.shape))
    expected = world.snapshot()
    for name, (conv, recurrent) in expected.items():
        table = world.tables[int(name[5])][2]
        conv[table[1], : world.window - 1] = conv[table[2], 1:].clone()
        recurrent[table[1]] = recurrent[table[3]].clone()
    accepted = torch.tensor([9, 9, 2], dtype=torch.int32)
    columns = torch.tensor([9, 9, 2], dtype=torch.int32)
    computed = torch.tensor([999, 999, 16], dtype=torch.int32)
    mapping = torch.tensor([-1, 2], dtype=torch.int32)
    world.context.run_fused_postprocess_align(2, accepted, columns, computed, mapping)
    for name, layer in world.layers.items():
        for found, wanted in zip(layer.kv_cache, expected[name], strict=True):
            assert torch.equal(found, wanted), name
    assert accepted.tolist() == [9, 9, 2]

    for name, (conv, recurrent) in (expected := world.snapshot()).items():
        table = world.tables[int(name[5])][2]
        conv[table[4], : world.window - 1] = conv[table[2], 1:].clone()
        recurrent[table[4]] = recurrent[table[3]].clone()
    sources, biases = torch.tensor([0, -1, 2], dtype=torch.int32), torch.tensor([0, 0, 1], dtype=torch.int32)
    world.context.run_fused_precopy(2, torch.tensor([0, 5, 4], dtype=torch.int32), sources, biases, mapping)
    for name, layer in world.layers.items():
        for found, wanted in zip(layer.kv_cache, expected[name], strict=True):
            assert torch.equal(found, wanted), name


class TestRegistration:
    """What register_cpu_kernels does to vLLM; the module's attributes are put back afterwards."""

    @pytest.fixture(autouse=True)
    def stock(self, monkeypatch: pytest.MonkeyPatch, replaced_kernels: None) -> None:
        monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", False)
        for name in ("precopy_mamba_align_fused_kernel", "postprocess_mamba_fused_kernel"):
            kernel = getattr(mamba_utils, name)

            def plain() -> None: ...

            plain.arg_names = kernel.arg_names  # type: ignore[attr-defined]
            plain.__name__ = name
            monkeypatch.setattr(mamba_utils, name, plain)

    def test_replaces_both_once(self) -> None:
        with pytest.raises(TypeError, match="not subscriptable"):
            mamba_utils.precopy_mamba_align_fused_kernel[(1,)]
        assert len(cpu_mamba.register_cpu_kernels()) == 2
        assert isinstance(mamba_utils.precopy_mamba_align_fused_kernel, KernelOverride)
        assert cpu_mamba.register_cpu_kernels() == ()

    def test_a_usable_triton_is_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", True)
        assert cpu_mamba.register_cpu_kernels() == ()
        assert not isinstance(mamba_utils.precopy_mamba_align_fused_kernel, KernelOverride)

    def test_a_kernel_that_is_gone_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(mamba_utils, "postprocess_mamba_fused_kernel")
        with pytest.raises(DriftError, match=r"mamba_utils\.postprocess_mamba_fused_kernel any more"):
            cpu_mamba.register_cpu_kernels()

    def test_other_arguments_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def precopy_mamba_align_fused_kernel(mamba_state_idx_ptr: object, new_argument: object) -> None: ...

        monkeypatch.setattr(mamba_utils, "precopy_mamba_align_fused_kernel", precopy_mamba_align_fused_kernel)
        with pytest.raises(DriftError, match="precopy_mamba_align_fused_kernel takes other arguments.*new_argument"):
            cpu_mamba.register_cpu_kernels()
        assert not isinstance(mamba_utils.postprocess_mamba_fused_kernel, KernelOverride)
