"""Routing and the shared expert's gate against float64, ties and broken logits included."""

import pytest
import torch

from qwen3next_plugin.kernels import moe

from .common import BACKENDS, DTYPES, assert_close, assert_compiles, assert_repeatable, tolerance

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def expected_weights(logits: torch.Tensor, ids: torch.Tensor, renormalize: bool) -> torch.Tensor:
    weights = torch.softmax(logits.double(), dim=-1).gather(-1, ids.long())
    return weights / weights.sum(dim=-1, keepdim=True) if renormalize else weights


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 512, 10), (6, 8, 2), (5, 7, 7), (3, 1, 1), (2, 1000, 3)])
def test_route(
    tokens: int, experts: int, top_k: int, renormalize: bool, dtype: torch.dtype, backend: str, device: str
) -> None:
    logits = (torch.randn(tokens, experts + 3, device=device) * 2).to(dtype)[:, 2:-1]
    weights, ids = moe.route(logits, top_k, renormalize, backend=backend)
    assert ids.dtype is torch.int32 and weights.dtype is torch.float32
    largest = logits.double().topk(top_k, dim=-1).values
    assert torch.equal(logits.double().gather(-1, ids.long()), largest)  # holds whichever of equal logits was taken
    assert all(len(set(row)) == top_k for row in ids.tolist())
    assert_close(weights, expected_weights(logits, ids, renormalize), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "experts", "top_k", "hidden"), [(1, 512, 10, 300), (5, 8, 7, 64), (0, 8, 2, 16)])
def test_the_shared_expert_is_one_choice_more(
    tokens: int, experts: int, top_k: int, hidden: int, dtype: torch.dtype, backend: str, device: str
) -> None:
    logits = torch.randn(tokens, experts, device=device).to(dtype)
    x, _, _, gate = shared_arguments(tokens, hidden, device, dtype)
    weights, ids = moe.route(logits, top_k, True, x, gate, backend=backend)
    routed, routed_ids = moe.route(logits, top_k, True, backend=backend)
    assert torch.equal(ids[:, :-1], routed_ids) and torch.equal(weights[:, :-1], routed)
    assert list(ids.shape) == [tokens, top_k + 1] and (ids[:, -1] == experts).all()
    assert_close(weights[:, -1:], torch.sigmoid(x.double() @ gate.double().T), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lower_index(dtype: torch.dtype, backend: str, device: str) -> None:
    rows = [[0.0, 2.0, 1.0, 2.0, 1.0, 1.0], [1.0] * 6, [-1.0, -2.0, -0.0, -1.0, 0.0, -1.0]]
    _, ids = moe.route(torch.tensor(rows, device=device).to(dtype), 4, True, backend=backend)
    assert ids.tolist() == [[1, 3, 2, 4], [0, 1, 2, 3], [2, 4, 0, 3]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_too_far_apart_for_their_softmax_are_still_ranked(backend: str, device: str) -> None:
    """All but the first weight underflow to 0; the choice follows the logits, not the equal zeros."""
    logits = torch.tensor([[-300.0, 0.0, -200.0, -250.0]], device=device)
    weights, ids = moe.route(logits, 3, True, backend=backend)
    assert ids.tolist() == [[1, 2, 3]]
    assert weights.tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_broken_logits_never_give_an_id_out_of_range(dtype: torch.dtype, backend: str, device: str) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [[nan] * 5, [-inf] * 5, [nan, 1.0, -inf, 3.0, nan], [inf, inf, 0.0, nan, -inf]]
    logits = torch.tensor(rows, device=device).to(dtype)
    weights, ids = moe.route(logits, 3, True, backend=backend)
    assert ids.tolist() == [[0, 1, 2], [0, 1, 2], [3, 1, 0], [0, 1, 2]]
    assert bool(weights.isnan().all())  # a broken row shows


def test_backends_agree_and_repeat(device: str) -> None:
    logits = torch.randn(9, 64, device=device).to(torch.bfloat16)
    for backend in BACKENDS:
        assert_repeatable(moe.route, logits, 6, True, backend=backend)
    by_reference, by_triton = (moe.route(logits, 6, True, backend=backend) for backend in BACKENDS)
    assert torch.equal(by_reference[1], by_triton[1])
    assert_close(by_triton[0], by_reference[0].double(), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend: str, device: str) -> None:
    weights, ids = moe.route(torch.empty(0, 8, device=device), 2, True, backend=backend)
    assert list(weights.shape) == list(ids.shape) == [0, 2]


def test_route_custom_op(device: str) -> None:
    logits = torch.randn(5, 8, device=device).to(torch.bfloat16)
    torch.library.opcheck(torch.ops.qwen3next.route.default, (logits, 3, True))
    assert_compiles(lambda t: moe.route(t, 3, True), logits)
    x, _, _, gate = shared_arguments(5, 16, device, torch.bfloat16)
    torch.library.opcheck(torch.ops.qwen3next.route.default, (logits, 3, True, x, gate))
    assert_compiles(lambda *a: moe.route(a[0], 3, True, *a[1:]), logits, x, gate)


@pytest.mark.parametrize(
    ("shape", "top_k", "message"),
    [
        ((2, 8), 9, "top_k is 9; it must be between 1 and the 8 experts"),
        ((2, 8), 0, "top_k is 0"),
        ((2, 1025), 2, r"router_logits is \[2, 1025\].*1024"),
        ((8,), 2, r"router_logits is \[8\]; it must be \[M, E\]"),
    ],
)
def test_wrong_routing_arguments(shape: tuple[int, ...], top_k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moe.route(torch.zeros(shape), top_k, True)


def test_a_shared_expert_needs_its_input_and_gate() -> None:
    logits, x = torch.zeros(2, 8), torch.zeros(2, 16)
    with pytest.raises(ValueError, match="both x and shared_gate"):
        moe.route(logits, 2, True, x)
    with pytest.raises(ValueError, match=r"shared_gate are \[2, 16\] and \[16\]"):
        moe.route(logits, 2, True, x, x[0])


def shared_arguments(tokens: int, hidden: int, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    wide = torch.randn(3, tokens, hidden + 5, device=device).to(dtype)
    gate_weight = (torch.randn(1, hidden, device=device) / hidden**0.5).to(dtype)
    return (*wide[:, :, 2:-3].unbind(0), gate_weight)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 16), (5, 40), (3, 300), (0, 8)])
def test_add_shared_expert(tokens: int, hidden: int, dtype: torch.dtype, backend: str, device: str) -> None:
    args = shared_arguments(tokens, hidden, device, dtype)
    actual = moe.add_shared_expert(*args, backend=backend)
    expected = moe.reference.add_shared_expert(*(a.double() for a in args))
    assert_close(actual, expected, tolerance(dtype, 1, backend, device))
    assert_repeatable(moe.add_shared_expert, *args, backend=backend)


def test_add_shared_expert_custom_op(device: str) -> None:
    args = shared_arguments(4, 16, device, torch.bfloat16)
    torch.library.opcheck(torch.ops.qwen3next.add_shared_expert.default, args)
    assert_compiles(lambda *a: moe.add_shared_expert(*a), *args)


def test_wrong_shared_arguments() -> None:
    routed, shared, x, gate_weight = shared_arguments(4, 16, "cpu", torch.float32)
    with pytest.raises(ValueError, match=r"\[4, 16\], \[3, 16\] and \[4, 16\]"):
        moe.add_shared_expert(routed, shared[1:], x, gate_weight)
    with pytest.raises(ValueError, match=r"gate_weight is \[16, 1\]; it must be \[1, 16\]"):
        moe.add_shared_expert(routed, shared, x, gate_weight.T)
    with pytest.raises(ValueError, match="dtypes differ"):
        moe.add_shared_expert(routed, shared.half(), x, gate_weight)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_sizes(dtype: torch.dtype) -> None:
    for tokens in (1, 7, 64, 1024):
        logits = (torch.randn(tokens, 512, device="cuda") * 2).to(dtype)
        weights, ids = moe.route(logits, 10, True)
        assert torch.equal(ids, moe.route(logits, 10, True, backend="reference")[1])
        assert_close(weights, expected_weights(logits, ids, True), 1e-6)
        args = shared_arguments(tokens, 2048, "cuda", dtype)
        expected = moe.reference.add_shared_expert(*(a.double() for a in args))
        assert_close(moe.add_shared_expert(*args), expected, tolerance(dtype))
