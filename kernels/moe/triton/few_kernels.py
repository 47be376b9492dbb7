"""The two products of few tokens by whole rows: a program's rows of gate and up, and of down. `few` launches them.

Sizes and a row's stride are compile-time values: a layer has one of each, and they save registers. What depends on the
number of tokens is none, but for EARLY: the second launch may begin while programs of the first one still run
(programmatic dependent launch); it asks for its weights and waits then.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

from ...gemm.triton import widened


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def gate_up_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    ids_ptr,
    out_ptr,
    num_experts,
    x_stride,
    ids_stride,
    weight_stride_e,
    scale_stride_e,
    scale_stride_n,
    up_scale_offset,
    INNER: tl.constexpr,
    K: tl.constexpr,
    WEIGHT_STRIDE_N: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOAD: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN: tl.constexpr,
    EARLY: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out[pair, i] = silu(gate row i . x) * (up row i . x); a pair without an expert here is left as it was."""
    if EARLY:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()  # the down product may begin; it waits for the end of this launch by itself
    # Pairs vary fastest, all tokens' last choices first and the others token by token: where all of them choose a
    # shared expert as their last one, its rows are read while the cache has them.
    others: tl.constexpr = CHOICES - 1 if CHOICES > 1 else 1
    tokens = tl.num_programs(0) // CHOICES
    place = tl.program_id(0)
    rest = place - tokens
    pair = tl.where(rest < 0, place * CHOICES + CHOICES - 1, rest // others * CHOICES + rest % others)
    token = (pair // CHOICES).to(tl.int64)
    expert = tl.load(ids_ptr + token * ids_stride + pair % CHOICES).to(tl.int64)
    if (expert >= 0) & (expert < num_experts):
        first = tl.program_id(1) * BLOCK_N
        cols = first + tl.arange(0, BLOCK_N)
        begins = tl.arange(0, BLOCK_K // LOAD) * LOAD
        ks = begins[:, None] + tl.arange(0, LOAD)[None, :]
        gate_ptrs = weight_ptr + expert * weight_stride_e + cols[:, None, None] * WEIGHT_STRIDE_N + ks[None]
        up_ptrs = gate_ptrs + INNER * WEIGHT_STRIDE_N
        if EVEN:
            gate_rows = tl.load(gate_ptrs, eviction_policy="evict_first")
            up_rows = tl.load(up_ptrs, eviction_policy="evict_first")
        else:
            mask = (cols < INNER)[:, None, None] & (ks < K)[None]
            gate_rows = tl.load(gate_ptrs, mask=mask, other=0.0, eviction_policy="evict_first")
            up_rows = tl.load(up_ptrs, mask=mask, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + token * x_stride + ks, mask=ks < K, other=0.0).to(tl.float32)
        if SCALED:
            factors = scale_ptr + expert * scale_stride_e + (first // SCALE_N) * scale_stride_n + begins // SCALE_K
            gate_factor = tl.load(factors, mask=begins < K, other=0.0)[None]
            up_factor = tl.load(factors + up_scale_offset, mask=begins < K, other=0.0)[None]
        gate = tl.sum(widened(gate_rows) * x[None], axis=2)
        up = tl.sum(widened(up_rows) * x[None], axis=2)
        if SCALED:
            gate *= gate_factor
            up *= up_factor
        if INTERPRETED:  # by which the sums below take minutes
            gated, up = tl.sum(gate, axis=1), tl.sum(up, axis=1)
        else:
            gated, up = tl.reduce((gate, up), 1, _add_both)  # together: warps meet once, and 56 registers, not 60
        gated = gated * tl.sigmoid(gated) * up
        tl.store(out_ptr + pair.to(tl.int64) * INNER + cols, gated.to(out_ptr.dtype.element_ty), mask=cols < INNER)


@triton.jit
def _choices(
    ids_ptr, topk_weights_ptr, num_experts,
    FIRST: tl.constexpr, COUNT: tl.constexpr, CHOICES: tl.constexpr, BLOCK_I: tl.constexpr, LOAD: tl.constexpr,
):  # fmt: skip
    """A token's choices from FIRST on, one a group of columns that lie together in a thread: which, where the columns
    begin, its expert, whether that is here (the other pairs were never written), and its weight."""
    groups = tl.arange(0, COUNT * BLOCK_I // LOAD)
    choice = FIRST + groups // (BLOCK_I // LOAD)
    begins = groups % (BLOCK_I // LOAD) * LOAD
    expert = tl.load(ids_ptr + choice, mask=choice < CHOICES, other=-1).to(tl.int64)
    held = (expert >= 0) & (expert < num_experts)
    factor = tl.load(topk_weights_ptr + choice, mask=held, other=0.0).to(tl.float32)
    return choice, begins, tl.maximum(expert, 0), held, factor  # not where(held, ...): Triton 3.7.1 then fails


@triton.jit
def _down_rows(
    weight_ptr, rows, expert, begins, held, weight_stride_e,
    H: tl.constexpr, INNER: tl.constexpr, WEIGHT_STRIDE_N: tl.constexpr, LOAD: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """These rows of the choices' experts."""
    columns = begins[:, None] + tl.arange(0, LOAD)[None, :]
    if EVEN:
        mask = tl.broadcast_to(held[None, :, None], [rows.shape[0], begins.shape[0], LOAD])
    else:
        mask = (held[:, None] & (columns < INNER))[None] & (rows < H)[:, None, None]
    places = (expert * weight_stride_e)[:, None] + columns
    pointers = weight_ptr + places[None] + (rows * WEIGHT_STRIDE_N)[:, None, None]
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _gated(gated_ptr, choice, begins, held, INNER: tl.constexpr, LOAD: tl.constexpr):
    """What the first launch left for these choices of a token."""
    columns = begins[:, None] + tl.arange(0, LOAD)[None, :]
    inside = held[:, None] & (columns < INNER)
    return tl.load(gated_ptr + choice[:, None] * INNER + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _weighted(
    rows, gated, factor, scale_ptr, expert, begins, held, scale_stride_e,
    INNER: tl.constexpr, SCALE_K: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """The rows' products with `gated`, group by group of columns, times the choices' weights and groups' factors."""
    if SCALED:
        factors = scale_ptr + expert * scale_stride_e + begins // SCALE_K
        factor *= tl.load(factors, mask=held & (begins < INNER), other=0.0)
    return tl.sum(widened(rows) * gated[None], axis=2) * factor[None]


@triton.jit
def down_kernel(
    gated_ptr,
    weight_ptr,
    scale_ptr,
    ids_ptr,
    topk_weights_ptr,
    out_ptr,
    num_experts,
    ids_stride,
    topk_stride,
    weight_stride_e,
    scale_stride_e,
    scale_stride_n,
    H: tl.constexpr,
    INNER: tl.constexpr,
    WEIGHT_STRIDE_N: tl.constexpr,
    CHOICES: tl.constexpr,
    PART: tl.constexpr,
    REST: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    LOAD: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out[token, h] = sum over a token's choices of its weight times (row h of the expert . gated[pair]).

    Choices come in two parts, of PART and REST (0: none): 8 and 4 hold 11 choices, where 16 would waste five.
    """
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * (STEPS * BLOCK_N)
    rows = first + tl.arange(0, BLOCK_N)
    ids_ptr += token * ids_stride
    topk_weights_ptr += token * topk_stride
    gated_ptr += token * CHOICES * INNER
    choice, begins, expert, held, factor = _choices(
        ids_ptr, topk_weights_ptr, num_experts, 0, PART, CHOICES, BLOCK_I, LOAD
    )
    codes = _down_rows(
        weight_ptr, rows, expert, begins, held, weight_stride_e, H, INNER, WEIGHT_STRIDE_N, LOAD, EVEN
    )  # fmt: skip
    if REST:
        choice2, begins2, expert2, held2, factor2 = _choices(
            ids_ptr, topk_weights_ptr, num_experts, PART, REST, CHOICES, BLOCK_I, LOAD
        )
        codes2 = _down_rows(
            weight_ptr, rows, expert2, begins2, held2, weight_stride_e, H, INNER, WEIGHT_STRIDE_N, LOAD, EVEN
        )
    if EARLY:
        # Ids, routing weights and the experts' weights above were complete, and what used the memory of `out` before
        # was done with it, when the first launch let this one begin: it had waited for all before it. What
        # follows waits for that launch, which wrote `gated`; and every program does, so that none of what comes after
        # this launch can begin before that one has ended.
        cuda.gdc_wait()
    gated = _gated(gated_ptr, choice, begins, held, INNER, LOAD)
    if REST:
        gated2 = _gated(gated_ptr, choice2, begins2, held2, INNER, LOAD)
    for step in tl.static_range(STEPS):
        here = rows + step * BLOCK_N
        scales = scale_ptr + (first + step * BLOCK_N) // SCALE_N * scale_stride_n
        sums = _weighted(codes, gated, factor, scales, expert, begins, held, scale_stride_e, INNER, SCALE_K, SCALED)
        if REST:
            sums2 = _weighted(
                codes2, gated2, factor2, scales, expert2, begins2, held2, scale_stride_e, INNER, SCALE_K, SCALED
            )
        if step + 1 < STEPS:  # asked for before the warps meet in the sums below
            codes = _down_rows(
                weight_ptr, here + BLOCK_N, expert, begins, held, weight_stride_e,
                H, INNER, WEIGHT_STRIDE_N, LOAD, EVEN,
            )  # fmt: skip
            if REST:
                codes2 = _down_rows(
                    weight_ptr, here + BLOCK_N, expert2, begins2, held2, weight_stride_e,
                    H, INNER, WEIGHT_STRIDE_N, LOAD, EVEN,
                )  # fmt: skip
        result = tl.sum(sums, axis=1)
        if REST:
            result += tl.sum(sums2, axis=1)
        tl.store(out_ptr + token * H + here, result.to(out_ptr.dtype.element_ty), mask=here < H)
