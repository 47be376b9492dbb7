"""The kernels compile for a GPU, which the interpreter cannot tell."""

from itertools import product
from pathlib import Path

import pytest

from tests.helpers import output_of, tritons

KERNELS = (
    "_prefill_kernel",
    "_update_kernel",
    "_chunk_kernel",
    "_walk_kernel",
    "_windows_kernel",
    "_split_kernel",
    "_collect_kernel",
    "_put_back_kernel",
    "_recurrent_kernel",
    "_gdn_decode_kernel",
    "gdn_decode_staged_kernel",
    "gdn_verify_steps_kernel",
    "gdn_verify_projected_kernel",
    "gdn_verify_states_kernel",
    "_commit_kernel",
)
STACK = {
    "gdn_verify_steps_kernel": 64,
    "gdn_verify_projected_kernel": 400,
    "gdn_verify_states_kernel": 64,  # of 8 tokens, in 128 registers: what is read once a head, not once a token
    "_commit_kernel": 64,
}
"""Bytes a thread may spill; 8 tokens at once with float32 states do by far the most, and win 2.6 times nevertheless."""
OVER_TILES = ("gates_kernel", "chunk_kernel", "walk_kernel")  # by the tables of sm_90 alone
STACK |= dict.fromkeys(OVER_TILES, 256)
DECODING = ("_gdn_decode_kernel", "gdn_decode_staged_kernel")
SHARED_MEMORY = {"sm_90": 227 * 1024, "sm_80": 163 * 1024}  # bytes a block may have on an H200, on an A100


def test_whatever_a_tuning_tries_compiles_for_an_h200(tmp_path: Path) -> None:
    """With the Triton of the GPUs, where it is there; small spills are for the tuner to judge."""
    module, triton = "tests.kernels.compile_gdn_candidates", tritons()[-1]
    lines = output_of(module, "default", triton=triton, TRITON_CACHE_DIR=str(tmp_path))
    compiled = [line.split() for line in lines if not line.startswith("took")]
    verifying = {"gdn_verify_steps_kernel", "gdn_verify_projected_kernel"}
    names = {"_chunk_kernel", "_walk_kernel", *OVER_TILES, *DECODING, *verifying}
    assert {name for name, *_ in compiled} == names
    for name, target, shared, _, stack, *_ in compiled:
        assert target == "sm_90" and int(shared.removeprefix("shared=")) <= SHARED_MEMORY[target], (name, shared)
        assert int(stack.removeprefix("stack=")) <= 256, (name, stack)


@pytest.mark.parametrize("triton", tritons(), ids=lambda folder: "of the GPUs" if folder else "installed")
def test_every_kernel_compiles_for_an_h200_and_an_a100(triton: str, tmp_path: Path) -> None:
    lines = output_of("tests.kernels.compile_for_gpu", triton=triton, TRITON_CACHE_DIR=str(tmp_path))
    compiled = [line.split()[:6] for line in lines]
    expected = {*product(KERNELS, SHARED_MEMORY), *product(OVER_TILES, ["sm_90"])}
    assert {(name, target) for name, target, *_ in compiled} == expected
    for name, target, shared, registers, stack, copies in compiled:
        if name in STACK:
            assert int(stack.removeprefix("stack=")) <= STACK[name], f"{name} for {target} spills: {registers}, {stack}"
        if name == "gdn_decode_staged_kernel":  # two at least of a tile, one before the loop and one in it
            assert int(copies.removeprefix("copies=")) >= 2, f"no tile is on its way for {target} while another is used"
            assert stack == "stack=0", f"{name} for {target} spills: {registers}, {stack}"
        if name == "gdn_verify_states_kernel":
            assert int(registers.removeprefix("registers=")) <= 128, "four programs do not share a multiprocessor"
        assert int(shared.removeprefix("shared=")) <= SHARED_MEMORY[target], f"{name} for {target}: {shared}"
