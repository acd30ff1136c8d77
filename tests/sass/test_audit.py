"""The audit finds what it is there to find."""

from collections.abc import Callable

import pytest
from sass import Findings, find


@pytest.mark.parametrize("fault", ["none", "race", "no overlap", "registers"])
def test_faults_that_compile_are_found(fault: str, findings: Callable[[str], Findings]) -> None:
    found = findings(fault)
    assert bool(found.hazards) == (fault == "race")
    assert bool(found.notes) == bool(found.spilled) == (fault == "registers")
    if fault != "registers":
        # Of a step's 4 wgmmas: 4 loads, 16 exclusive ors, and little else.
        assert found.mix["LOP3"] == 4
        assert found.mix["LDSM"] == 1
        assert found.instructions < 9
        assert bool(found.exposed) == (fault == "no overlap")
    else:
        assert found.notes[0].startswith("(C7512)")
        assert found.highest_register > 200


# One step of a loop. The wait is elsewhere, as in compiled kernels: at the end, from where it branches back.
LOOP = """
    .section .text.kernel,"ax",@progbits
    /*0000*/ S2R R1, SR_TID.X ;
.L_x_1:
    /*0010*/ SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R1 ;
    /*0020*/ @!P0 BRA `(.L_x_3) ;
.L_x_2:
    /*0030*/ LDS.128 {loaded}, [R2] ;
    /*0040*/ PRMT R8, {loaded}.reuse, R3, R4 ;
    /*0050*/ QGMMA.64x8x32.F32.E4M3.E4M3 R24, {a}, gdesc[UR8], R24 ;
    /*0060*/ QGMMA.64x8x32.F32.E4M3.E4M3 R24, R16, gdesc[UR8], R24, gsb0 ;
    /*0070*/ WARPGROUP.DEPBAR.LE gsb0, {allowed} ;
    /*0080*/ ISETP.NE.AND P1, PT, R9, RZ, PT ;
    /*0090*/ @P1 BRA `(.L_x_1) ;
    /*00a0*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
    /*00b0*/ STG.E.64 [R2], {result} ;
    /*00c0*/ EXIT ;
.L_x_3:
    /*00d0*/ SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R1 ;
    /*00e0*/ @!P0 BRA `(.L_x_3) ;
    /*00f0*/ BRA `(.L_x_2) ;
"""


@pytest.mark.parametrize(
    ("parts", "address", "exposed"),
    [
        ({}, None, 0),
        ({"loaded": "R12"}, "0030", 0),
        ({"loaded": "R9"}, "0030", 0),  # R9 to R12, of which the A operand is R12 to R15
        ({"a": "R8"}, "0040", 0),
        ({"loaded": "R24", "allowed": "0x0"}, None, 2),
        ({"loaded": "R27"}, "0030", 0),
        ({"result": "R26"}, None, 0),
    ],
)
def test_uses_of_registers_in_flight(parts: dict[str, str], address: str | None, exposed: int) -> None:
    defaults = {"loaded": "R4", "a": "R12", "allowed": "0x1", "result": "R24"}
    found = find(LOOP.format(**defaults | parts))
    assert [hazard[:4] for hazard in found.hazards[:1]] == ([address] if address else [])
    assert (found.instructions, found.alu, len(found.exposed)) == (9 / 2, 2, exposed)
    assert found.mix["BRA"] == 1, "the loop to wait in is none of the main loop's"
    assert found.highest_register == (30 if parts.get("loaded") == "R27" else 27)


@pytest.mark.parametrize(
    ("parts", "operands", "exposed"),
    [
        ({}, 0, 0),  # PRMT's result is no operand of a wgmma
        ({"a": "R8"}, 1, 0),
        ({"a": "R8", "allowed": "0x0"}, 1, 1),
        ({"a": "R5", "loaded": "R4"}, 1, 0),  # R5 to R8: also of what was loaded, as it was
        ({"a": "R4", "loaded": "R4"}, 0, 0),
    ],
)
def test_what_makes_operands(parts: dict[str, str], operands: int, exposed: int) -> None:
    """Loads are not counted."""
    defaults = {"loaded": "R4", "a": "R12", "allowed": "0x1", "result": "R24"}
    found = find(LOOP.format(**defaults | parts))
    assert (found.operands, len(found.operands_exposed)) == (operands, exposed)


def test_operands_are_followed_back() -> None:
    """Through registers that are overwritten in between, and conditional instructions; the dead one is not counted."""
    text = LOOP.format(loaded="R4", a="R12", allowed="0x1", result="R24")
    chain = [
        "LOP3.LUT R12, R4, R3, RZ, 0xc0, !PT",  # overwritten
        "SHF.L.U32 R20, R4, 0x4, RZ",
        "LOP3.LUT R12, R20, R3, RZ, 0xc0, !PT",
        "@P2 LOP3.LUT R13, R5, R3, RZ, 0xc0, !PT",
        "MOV R13, R6",
        "MOV R20, R3",
    ]
    chain = "".join(f"    /*{0x1000 + 16 * i:04x}*/ {instruction} ;\n" for i, instruction in enumerate(chain))
    found = find(text.replace("    /*0050*/", f"{chain}    /*0050*/"))
    assert found.operands == 3


def test_results_read_too_early() -> None:
    text = LOOP.format(loaded="R4", a="R12", allowed="0x1", result="R24")
    found = find(text.replace("/*00a0*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;", ""))
    assert found.hazards == ["00b0: STG.E.64 [R2], R24 uses R24, R25"]


def test_logs() -> None:
    log = """
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...
    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
"""
    found = find(log + LOOP.format(loaded="R4", a="R12", allowed="0x1", result="R24"))
    assert (found.spilled, len(found.notes)) == (40, 1)


def test_no_kernel() -> None:
    with pytest.raises(ValueError, match="found 0"):
        find("")
