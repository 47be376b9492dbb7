"""Compile the norm, rope, MoE and FP8 kernels for a GPU on a machine that has none.

Run as a process of its own, without TRITON_INTERPRET, with the compute capability as argument: 90 or 80, where FP8
weights are read as bytes and activations are never rounded. Triton is given a driver that only names its target, and
every launch stops after compilation; the launches are those of the real model's sizes. Prints one JSON object: kernel
name, with ", early" where it may begin before the launch in front of it ends -> the most shared memory (bytes) one of
its variants uses.
"""

import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from qwen3next_plugin.kernels import early
from qwen3next_plugin.kernels.gemm import policy, triton_few
from qwen3next_plugin.kernels.gemm import triton as gemm
from qwen3next_plugin.kernels.moe import peers, ways
from qwen3next_plugin.kernels.moe import triton as moe
from qwen3next_plugin.kernels.moe.triton.align import align
from qwen3next_plugin.kernels.moe.triton.apart import tiles_apart
from qwen3next_plugin.kernels.moe.triton.by_peer import fused_moe_by_peer
from qwen3next_plugin.kernels.moe.triton.ordered import tiles_in_order
from qwen3next_plugin.kernels.moe.triton.tall import fused_moe_tall
from qwen3next_plugin.kernels.norm import triton as norm
from qwen3next_plugin.kernels.rope import triton as rope

CAPABILITY = int(sys.argv[1])
ROUNDED = (False, True) if CAPABILITY >= 89 else (False,)
SHARED: dict[str, int] = {}
HIDDEN, INNER, EXPERTS, TOP_K = 2048, 512, 8, 2  # fewer experts than the model: their number is no compile-time value


class NamesTargetOnly:
    """The little of a Triton driver that compilation asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_only(run: Any) -> Any:
    """`JITFunction.run` without the launch, noting what was compiled."""

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        name = self.fn.__name__ + (", early" if kernel.metadata.launch_pdl else "")
        SHARED[name] = max(SHARED.get(name, 0), kernel.metadata.shared)
        return kernel

    return compiled


def launch_all(dtype: torch.dtype) -> None:
    """Every kernel but the experts', and but those whose launches begin early with few rows alone."""
    x, weight = torch.zeros(8, HIDDEN, dtype=dtype), torch.zeros(HIDDEN, dtype=dtype)
    rope.sigmoid_gate(x, x)
    moe.add_shared_expert(x, x, x, weight[None])
    for rounded in ROUNDED:
        tiles_apart(torch.zeros(8, 11, dtype=torch.int32), 513, 16, x, rounded)
        tiles_in_order(torch.zeros(8, 40, dtype=torch.int32), 513, 16, x, rounded)
    align(torch.zeros(4096, 2, dtype=torch.int32), 513, 64)
    codes, scale = torch.zeros(1024, HIDDEN, dtype=torch.float8_e4m3fn), torch.zeros(8, 16)
    for rows in (8, 128):
        for rounded in ROUNDED:
            gemm.block_fp8_matmul(torch.zeros(rows, HIDDEN, dtype=dtype), codes, scale, rounded)


def launch_small(dtype: torch.dtype, rows: int) -> None:
    """Norms, rotation and routing."""
    x, weight = torch.zeros(rows, HIDDEN, dtype=dtype), torch.zeros(HIDDEN, dtype=dtype)
    norm.rms_norm(x, weight, 1e-6)
    norm.add_rms_norm(x, x, weight, 1e-6)
    heads = torch.zeros(rows, 32 * 128 + 16, dtype=dtype)[:, 16:].view(rows, 32, 128)
    norm.rms_norm_gated(heads, heads, weight[:128], 1e-6, heads.contiguous())
    qkv, positions = torch.zeros(rows, 16 * 512 + 1024, dtype=dtype), torch.arange(rows)
    sizes = {"num_heads": 16, "num_kv_heads": 2, "head_dim": 256}
    rope.qk_norm_rope(qkv, weight[:256], weight[:256], torch.zeros(99, 64), positions, **sizes, eps=1e-6)
    keys, values = torch.zeros(2, 528, 2, 512, dtype=dtype).split(256, dim=-1)
    gate = torch.zeros(rows, 16 * 256, dtype=dtype)
    written = {"gate": gate, "cache": (keys, values, positions)}
    rope.qk_norm_rope(qkv, *[weight[:256]] * 2, torch.zeros(99, 64), positions, **sizes, eps=1e-6, **written)
    moe.route(torch.zeros(rows, 512, dtype=dtype), 10, True, x, weight[None])


def launch_few(rows: int) -> None:
    """The projections of a layer with few rows, FP8 and bf16: two at once, one, and the router's, all of norms; one
    behind a gate.
    """
    x, wide = (torch.zeros(rows, columns, dtype=torch.bfloat16) for columns in (HIDDEN, 4096))

    def plain(outputs: int) -> tuple[torch.Tensor, None]:
        return torch.zeros(outputs, HIDDEN, dtype=torch.bfloat16), None

    codes, scale = torch.zeros(12288, HIDDEN, dtype=torch.float8_e4m3fn), torch.zeros(96, 16)
    triton_few.few_matmul(x, codes, scale, second=plain(64))
    weight = torch.zeros(HIDDEN, dtype=torch.bfloat16)
    for residual in (x, None):
        norm = triton_few.Norm(weight, 1e-6, residual, keeps=False)
        triton_few.few_matmul_of_norm(x, norm, codes, scale, second=plain(64))
        triton_few.few_matmul_of_norm(x, norm, codes[:9216], scale[:72])
        triton_few.few_matmul_of_norm(x, norm, *plain(9216))
    triton_few.few_matmul_of_norm(x, triton_few.Norm(weight, 1e-6, x, keeps=True), *plain(512))
    for gate in (None, wide):
        triton_few.few_matmul(wide, codes.view(-1, 4096)[:HIDDEN], torch.zeros(16, 32), gate)
        triton_few.few_matmul(wide, torch.zeros(HIDDEN, 4096, dtype=torch.bfloat16), None, gate)


def launch_experts(dtype: torch.dtype, tokens: int) -> None:
    """The experts in `dtype`, with FP8 weights, and with FP8 activations too; on one rank and on the last of eight."""
    x = torch.zeros(tokens, HIDDEN, dtype=dtype)
    choices = TOP_K if tokens > ways.MAX_TOKENS else 11  # of few tokens a compile-time value that costs registers
    router, ids = torch.zeros(tokens, choices), torch.zeros(tokens, choices, dtype=torch.int32)
    for inner in (INNER, INNER // 8):
        w13, w2 = torch.zeros(EXPERTS, 2 * inner, HIDDEN, dtype=dtype), torch.zeros(EXPERTS, HIDDEN, inner, dtype=dtype)
        moe.fused_moe(x, w13, w2, router, ids, None, None, False)
        codes, blocks = (w13.to(torch.float8_e4m3fn), w2.to(torch.float8_e4m3fn)), -(-inner // 128)
        scales = torch.zeros(EXPERTS, 2 * blocks, 16), torch.zeros(EXPERTS, 16, blocks)
        for rounded in ROUNDED:
            moe.fused_moe(x, *codes, router, ids, *scales, rounded)


def launch_by_peer(dtype: torch.dtype, tokens: int) -> None:
    """What is around an engine's grouped product, on one rank and on the last of four."""
    peers.OFFERS.offer(peers.Peer("peer", lambda call: None))
    ids = torch.zeros(tokens, 11, dtype=torch.int32)
    for inner, alignment in ((INNER, 128), (INNER // 4, 64)):
        w13, w2 = (torch.zeros(EXPERTS, *sizes).to(gemm.FP8) for sizes in ((2 * inner, HIDDEN), (HIDDEN, inner)))
        scales = torch.zeros(EXPERTS, 2 * inner // 128, 16), torch.zeros(EXPERTS, 16, inner // 128)
        plan = peers.Plan("peer", alignment, peers.rows_for(tokens, 11, EXPERTS, alignment))
        x, router = torch.zeros(tokens, HIDDEN, dtype=dtype), torch.zeros(tokens, 11)
        fused_moe_by_peer(plan, x, w13, w2, router, ids, *scales)


def launch_tall(dtype: torch.dtype, tokens: int) -> None:
    """Experts of many tokens, on one rank and on the last of four."""
    ids = torch.zeros(tokens, 11, dtype=torch.int32)
    x, router = torch.zeros(tokens, HIDDEN, dtype=dtype), torch.zeros(tokens, 11)
    for inner in (INNER, INNER // 4):
        w13, w2 = (torch.zeros(EXPERTS, *sizes).to(gemm.FP8) for sizes in ((2 * inner, HIDDEN), (HIDDEN, inner)))
        scales = torch.zeros(EXPERTS, 2 * inner // 128, 16), torch.zeros(EXPERTS, 16, inner // 128)
        fused_moe_tall(x, w13, w2, router, ids, *scales)


def main() -> None:
    """Compile, then print the JSON object."""
    driver.set_active(NamesTargetOnly())
    JITFunction.run = compile_only(JITFunction.run)
    policy.decodes_weights = lambda device: CAPABILITY < 89
    vars(early)["capability_of"] = lambda device: divmod(CAPABILITY, 10)
    launch_all(torch.bfloat16)
    for rows in (2, 8):
        launch_small(torch.bfloat16, rows)
    for rows in (1, 4, 16):
        launch_few(rows)
    # whole rows in two launches of which the second begins early or not; the table's first and last tile sizes
    for tokens in (1, ways.MAX_TOKENS, ways.MAX_TOKENS + 1, 1000):
        launch_experts(torch.bfloat16, tokens)
    if CAPABILITY >= 89:
        launch_by_peer(torch.bfloat16, 1000)
        launch_tall(torch.bfloat16, 2048)
    print(json.dumps(SHARED))


if __name__ == "__main__":
    main()
