"""INT4, INT8 and row-scaled FP8 products compile for GPUs, fit their shared memory, and keep to their registers."""

import json

import pytest

from tests.helpers import output_of

SMALLEST_SHARED_MEMORY = 99 * 1024  # bytes a program may use on compute capability 8.6 and 8.9
FORMATS = {"int4", "int4 zeros", "int8", "int8 activations", "fp8 rows"}
A_FEW = 128  # bytes a thread may spill in tiles of many rows, where they are hidden behind the products


@pytest.mark.parametrize("capability", [90, 80])
def test_every_format_compiles_and_fits(capability: int) -> None:
    found = json.loads(output_of("tests.kernels.compile_integer", str(capability))[-1])
    assert {row[1] for row in found if row[0] == "_grouped_kernel"} == FORMATS
    assert {row[1] for row in found if row[0] == "_quantized_matmul_kernel"} == FORMATS - {"fp8 rows"}
    for row in found:
        _, _, group, block_m, _, block_k, shared, registers, spilled = row
        assert shared <= SMALLEST_SHARED_MEMORY and registers <= 255, row
        whole_groups = group == 0 or group % block_k == 0
        assert spilled <= (0 if block_m == 16 and whole_groups else A_FEW), row
