"""QK-norm with partial rotary embedding, and the output gate, against float64."""

from typing import Any

import pytest
import torch

from qwen3next_plugin.kernels import rope

from .common import BACKENDS, DTYPES, assert_close, assert_compiles, assert_repeatable, to64, tolerance

pytestmark = pytest.mark.usefixtures("poisoned_memory")
# heads, kv heads, head_dim, rotary_dim: partial, the whole head, not a power of two, the smallest, one kv head
SHAPES = [(4, 2, 16, 4), (2, 2, 16, 16), (3, 1, 20, 6), (1, 1, 8, 2), (2, 1, 24, 24)]


def arguments(
    tokens: int, heads: int, kv_heads: int, dim: int, rotary: int, device: str, dtype: torch.dtype = torch.float32
) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """Tensors and sizes; qkv is a column slice, cos_sin a table of real angles, positions unordered and repeated."""
    width = 2 * (heads + kv_heads) * dim
    qkv = torch.randn(tokens, width + 9, device=device).to(dtype)[:, 4 : 4 + width]
    weights = [(torch.randn(dim, device=device) * 0.3).to(dtype) for _ in range(2)]
    angles = torch.rand(50, rotary // 2, device=device) * 6.3
    positions = torch.randint(0, 50, (tokens,), device=device)
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim, "eps": 1e-6}
    return (qkv, *weights, torch.cat([angles.cos(), angles.sin()], dim=-1), positions), sizes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 5])
def test_qk_norm_rope(
    tokens: int, shape: tuple[int, int, int, int], dtype: torch.dtype, backend: str, device: str
) -> None:
    tensors, sizes = arguments(tokens, *shape, device, dtype)
    actual = rope.qk_norm_rope(*tensors, **sizes, backend=backend)
    assert_close(actual, rope.reference.qk_norm_rope(*to64(tensors), **sizes), tolerance(dtype, 1, backend, device))


def test_rotation_against_complex_numbers(device: str) -> None:
    """The formula itself: entries (i, i + R/2) are one complex number, turned by its angle; the rest stays."""
    x = torch.randn(3, 2, 10, dtype=torch.float64, device=device)
    angle = torch.rand(3, 1, 3, dtype=torch.float64, device=device)
    turned = torch.complex(x[..., :3], x[..., 3:6]) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat([turned.real, turned.imag, x[..., 6:]], dim=-1)
    torch.testing.assert_close(rope.reference.apply_partial_rotary(x, angle.cos(), angle.sin()), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gate_and_values_pass_through_unchanged(backend: str, device: str) -> None:
    tensors, sizes = arguments(4, 3, 2, 8, 4, device, torch.float16)
    _, _, v, gate = rope.qk_norm_rope(*tensors, **sizes, backend=backend)
    per_head = tensors[0][:, : 2 * 3 * 8].reshape(4, 3, 2, 8)
    assert torch.equal(gate.view(4, 3, 8), per_head[:, :, 1])
    assert torch.equal(v, tensors[0][:, -2 * 8 :])
    assert v.is_contiguous() and v.untyped_storage().data_ptr() != tensors[0].untyped_storage().data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend: str, device: str) -> None:
    tensors, sizes = arguments(0, 2, 1, 8, 4, device)
    shapes = [list(t.shape) for t in rope.qk_norm_rope(*tensors, **sizes, backend=backend)]
    assert shapes == [[0, 16], [0, 8], [0, 8], [0, 16]]


def paged(
    pages: int, page_size: int, kv_heads: int, dim: int, device: str, dtype: torch.dtype, *, heads_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache's keys and values, views of one tensor as vLLM has them, in either order of its inner dimensions."""
    outer = (pages, kv_heads, page_size) if heads_first else (pages, page_size, kv_heads)
    whole = torch.randn(*outer, 2 * dim, device=device).to(dtype)
    keys, values = (whole.transpose(1, 2) if heads_first else whole).split(dim, dim=-1)
    return keys, values


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("heads_first", [False, True])
def test_keys_and_values_are_written(
    shape: tuple[int, int, int, int], heads_first: bool, dtype: torch.dtype, backend: str, device: str
) -> None:
    """Into their slots and nowhere else, as they are returned; padding, negative or beyond the slots, into none."""
    heads, kv_heads, dim, _ = shape
    tensors, sizes = arguments(6, *shape, device, dtype)
    cache = paged(4, 5, kv_heads, dim, device, dtype, heads_first=heads_first)
    before = [part.clone() for part in cache]
    slots = torch.tensor([-1, 7, 19, 0, -1], device=device)  # and a sixth token without any
    gate = torch.full((6, heads * dim), float("nan"), device=device, dtype=dtype)
    actual = rope.qk_norm_rope_write(*tensors, gate, *cache, slots, **sizes, backend=backend)
    alone = rope.qk_norm_rope(*tensors, **sizes, backend=backend)
    assert all(torch.equal(one, other) for one, other in zip((*actual, gate), alone, strict=True))
    for new, part, old in zip(actual[1:], cache, before, strict=True):
        for token, (page, place) in {1: (1, 2), 2: (3, 4), 3: (0, 0)}.items():
            old[page, place] = new[token].view(kv_heads, dim)
        assert torch.equal(part, old)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_page_of_slots(backend: str, device: str) -> None:
    """SGLang's pool has no pages: keys and values [slots, heads, D], each a tensor of its own."""
    tensors, sizes = arguments(3, 2, 2, 8, 4, device)
    cache = [torch.zeros(9, 2, 8, device=device) for _ in range(2)]
    slots = torch.tensor([4, 8, 2], device=device)
    gate = torch.empty(3, 16, device=device)
    _, k, v = rope.qk_norm_rope_write(*tensors, gate, *(part[None] for part in cache), slots, **sizes, backend=backend)
    for new, part in zip((k, v), cache, strict=True):
        assert torch.equal(part[slots], new.view(3, 2, 8))
        assert part.count_nonzero() == new.count_nonzero()


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_below_the_first_are_padding(backend: str, device: str) -> None:
    tensors, sizes = arguments(3, 2, 2, 8, 4, device)
    keys, values = (torch.zeros(1, 4, 2, 8, device=device) for _ in range(2))
    slots, gate = torch.tensor([0, 1, 0], device=device), torch.empty(3, 16, device=device)
    rope.qk_norm_rope_write(*tensors, gate, keys, values, slots, **sizes, first_slot=1, backend=backend)
    for part in (keys, values):
        assert part[0, 1].all() and not bool(part[0, 0].any()) and not bool(part[0, 2:].any())
    with pytest.raises(ValueError, match="first_slot is -1"):
        rope.qk_norm_rope_write(*tensors, gate, keys, values, slots, **sizes, first_slot=-1, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_are_written(backend: str, device: str) -> None:
    tensors, sizes = arguments(0, 2, 1, 8, 4, device)
    cache = paged(1, 4, 1, 8, device, torch.float32, heads_first=False)
    before = cache[0].clone()
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    rope.qk_norm_rope_write(*tensors, torch.empty(0, 16, device=device), *cache, nothing, **sizes, backend=backend)
    assert torch.equal(cache[0], before)


def test_write_as_a_custom_op(device: str) -> None:
    tensors, sizes = arguments(4, 1, 1, 8, 4, device, torch.bfloat16)
    gate = torch.empty(4, 8, device=device, dtype=torch.bfloat16)
    keys, values = (torch.zeros(2, 3, 1, 8, device=device, dtype=torch.bfloat16) for _ in range(2))
    slots = torch.tensor([5, 0, -1], device=device)
    call = (*tensors, gate, keys, values, slots)
    torch.library.opcheck(torch.ops.qwen3next.qk_norm_rope_write.default, call, sizes)
    assert_compiles(lambda *t: rope.qk_norm_rope_write(*t, **sizes), *call)


_BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("place", "replacement", "message"),
    [
        (5, torch.zeros(4, 8), r"gate is \[4, 8\].*\[4, 16\]"),
        (5, torch.zeros(4, 32)[:, ::2], r"gate is \[4, 16\], strides \[32, 2\]; it must be contiguous"),
        (5, torch.zeros(4, 16, dtype=_BF16), r"gate is torch.bfloat16.*qkv's dtype, torch.float32"),
        (6, torch.zeros(3, 5, 8), r"key_cache is \[3, 5, 8\].*\[pages, page_size, 1, 8\]"),
        (6, torch.zeros(3, 5, 1, 16)[..., ::2], "side by side"),
        (7, torch.zeros(3, 5, 1, 16)[..., :8], r"value_cache is \[3, 5, 1, 8\], strides \[80, 16, 16, 1\]"),
        (8, torch.zeros(5, dtype=torch.int64), r"slots is \[5\].*at most 4"),
        (8, torch.zeros(4, dtype=torch.int32), r"slots is \[4\] torch.int32; it must be contiguous int64"),
    ],
)
def test_wrong_caches(place: int, replacement: torch.Tensor, message: str) -> None:
    tensors, sizes = arguments(4, 2, 1, 8, 4, "cpu")
    keys, values = torch.zeros(3, 5, 1, 8), torch.zeros(3, 5, 1, 8)
    call = [*tensors, torch.zeros(4, 16), keys, values, torch.arange(4)]
    call[place] = replacement
    with pytest.raises(ValueError, match=message):
        rope.qk_norm_rope_write(*call, **sizes)


def test_custom_op(device: str) -> None:
    tensors, sizes = arguments(4, 1, 1, 8, 4, device, torch.bfloat16)
    torch.library.opcheck(torch.ops.qwen3next.qk_norm_rope.default, tensors, sizes)
    assert_compiles(lambda *t: rope.qk_norm_rope(*t, **sizes), *tensors)
    for backend in BACKENDS:
        assert_repeatable(rope.qk_norm_rope, *tensors, **sizes, backend=backend)


@pytest.mark.parametrize(
    ("place", "replacement", "message"),
    [
        (0, torch.ones(4, 47), r"qkv is \[4, 47\].*\[T, 48\]"),
        (1, torch.ones(4), r"q_weight is \[4\]; it must be \[8\]"),
        (2, torch.ones(2, 8), r"k_weight is \[2, 8\]"),
        (3, torch.ones(50, 10), r"cos_sin is \[50, 10\].*head_dim 8"),
        (3, torch.ones(50, 3), r"cos_sin is \[50, 3\].*even"),
        (4, torch.zeros(4, dtype=torch.int32), r"positions is \[4\] torch.int32; it must be \[4\] int64"),
        (4, torch.zeros(3, dtype=torch.int64), r"positions is \[3\]"),
    ],
)
def test_wrong_arguments(place: int, replacement: torch.Tensor, message: str) -> None:
    tensors, sizes = arguments(4, 2, 1, 8, 4, "cpu")
    wrong = [*tensors[:place], replacement, *tensors[place + 1 :]]
    with pytest.raises(ValueError, match=message):
        rope.qk_norm_rope(*wrong, **sizes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 24), (1, 1), (3, 2, 40), (2, 1500), (0, 8), (7,)])
def test_sigmoid_gate(shape: tuple[int, ...], dtype: torch.dtype, backend: str, device: str) -> None:
    x = torch.randn(*shape, device=device).to(dtype)
    gate = torch.randn(*shape[:-1], shape[-1] + 5, device=device).to(dtype)[..., :-5]
    actual = rope.sigmoid_gate(x, gate, backend=backend)
    assert_close(actual, rope.reference.sigmoid_gate(x.double(), gate.double()), tolerance(dtype, 1, backend, device))


def test_sigmoid_gate_custom_op(device: str) -> None:
    x, gate = torch.randn(4, 16, device=device)[:, 3:], torch.randn(4, 13, device=device)
    torch.library.opcheck(torch.ops.qwen3next.sigmoid_gate.default, (x, gate))
    assert_compiles(lambda a, b: rope.sigmoid_gate(a, b), x, gate)
    with pytest.raises(ValueError, match=r"\[4, 13\].*\[4, 12\]"):
        rope.sigmoid_gate(x, gate[:, 1:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_sizes(dtype: torch.dtype) -> None:
    for tokens in (1, 7, 64, 1024):
        tensors, sizes = arguments(tokens, 16, 2, 256, 64, "cuda", dtype)
        expected = rope.reference.qk_norm_rope(*to64(tensors), **sizes)
        assert_close(rope.qk_norm_rope(*tensors, **sizes), expected, tolerance(dtype))
        keys, values = paged(9, 528, 2, 256, "cuda", dtype, heads_first=False)
        slots = torch.randperm(9 * 528, device="cuda")[:tokens]
        gate = torch.full((tokens, 16 * 256), float("nan"), device="cuda", dtype=dtype)
        q, k, v = rope.qk_norm_rope_write(*tensors, gate, keys, values, slots, **sizes)
        assert_close((q, k, v, gate), expected, tolerance(dtype))
        pages, places = slots // 528, slots % 528
        assert torch.equal(keys[pages, places].flatten(1), k) and torch.equal(values[pages, places].flatten(1), v)
