"""What the compiled kernels execute: a budget of instructions, and no race, spill or serialization.

Counted in the main loop for each wgmma, which takes 2048 weights, 16 of a thread: 14 instructions of those dequantize
codes -7..7, and 18 codes -8..7.
"""

from collections.abc import Callable

import pytest
from kernel_cases import Case, all_cases
from sass import Findings

# With 128 rows or more a warpgroup, and with 64, where less is shared.
BUDGETS = {
    ("w4a8", "lut", -7): (22, 25),
    ("w4a8", "lut", -8): (28, 31),
    # Multiplying partial sums by their group's scale is included.
    ("w4a8", "exact", -7): (27, 27),
    ("w4a8", "exact", -8): (27, 27),
    # A bf16 wgmma takes half as many weights, in half the time.
    ("w4a16", "exact", -8): (20, 20),
}
# Instructions that dequantize a word; of a block, threads have 8.
EXACT_WORD = {-7: 3, -8: 7}


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_kernel(case: Case, findings: Callable[[Case], Findings]) -> None:
    found = findings(case)
    assert not found.hazards, "registers are used that a wgmma in flight needs"
    assert not found.notes
    assert not found.spilled
    blocks = case.config.row_blocks
    if (case.scheme, case.numerics) != ("w4a8", "exact"):
        assert not found.exposed, f"of {found.alu} instructions with a result, {len(found.exposed)} do not overlap"
    else:
        # A step's sums need all its wgmmas. So only those of other warpgroups run while its first block is dequantized,
        # and while its last is added to the sums.
        assert found.operands >= 8 * EXACT_WORD[case.code_min] * blocks
        assert len(found.operands_exposed) * blocks <= found.operands, f"{found.operands_exposed} do not overlap"
        assert sum("FFMA" in text for text in found.exposed) <= case.config.tile_tokens // 2
    budget = BUDGETS[case.scheme, case.numerics, case.code_min][case.config.row_blocks < 2]
    assert found.instructions <= budget, found.mix
