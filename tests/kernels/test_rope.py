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
