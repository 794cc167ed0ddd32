"""Machine code is read as it is: counts, loops, waits, spills."""

from __future__ import annotations

from pathlib import Path

import pytest

from attn_engine.errors import BackendNotInstalled, UnsupportedOnBackend
from attn_engine.runtime import sass
from attn_engine.runtime.aot_report import AotReport
from attn_engine.runtime.sass import MachineCode, parse, read_cubin
from tests.runtime.test_triton_aot import compiled, showcase

USAGE = """
 Function work:
  REG:168 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:704
 Function other:
  REG:24 STACK:8 SHARED:0 LOCAL:0
"""
# An outer loop (.L_x_0) around an inner one (.L_x_1) with a wait (.L_x_2) in it, whose slow way lies behind the end.
TEXT = """
	.section	.text.work,"ax",@progbits
work:
.text.work:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   MOV R2, RZ ;
.L_x_1:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R3], R4 ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
.L_x_3:
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R8, gdesc[UR4], R8 ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R8, gdesc[UR4], R8 ;
        /*0060*/                   MUFU.EX2 R9, R9 ;
        /*0070*/                   BSSY B0, `(.L_x_4) ;
        /*0080*/               @P1 BRA `(.L_x_5) ;
        /*0090*/                   BSYNC B0 ;
.L_x_5:
        /*00a0*/                   FADD R1, R1, R2 ;
        /*00b0*/                   BSYNC B0 ;
.L_x_4:
        /*00c0*/               @P2 CALL.REL.NOINC `(.L_x_6) ;
        /*00d0*/                   BRA `(.L_x_1) ;
.L_x_6:
        /*00e0*/                   FMUL R1, R1, R2 ;
        /*00f0*/              @!P6 BRA P5, `(.L_x_0) ;
        /*0100*/                   EXIT ;
.L_x_2:
        /*0110*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R3], R4 ;
        /*0120*/              @!P0 BRA `(.L_x_2) ;
        /*0130*/                   BRA `(.L_x_3) ;
.L_x_7:
        /*0140*/                   BRA `(.L_x_7);
        /*0150*/                   NOP;
	.section	.text.other,"ax",@progbits
other:
.text.other:
        /*0000*/                   STL.64 [R1], R2 ;
        /*0010*/                   EXIT ;
"""


def test_kernels_of_a_text() -> None:
    work, other = parse(TEXT, USAGE)
    assert (work.kernel, work.registers, work.stack_bytes, work.static_shared_bytes) == (
        "work",
        168,
        16,
        1024,
    )
    assert work.spill_bytes == 0, "a stack that nothing touches is no spill"
    assert (other.kernel, other.spill_bytes, other.loops) == ("other", 8, ())
    assert (work.count("HGMMA"), work.count("HGMMA.64x64x16.F32.BF16"), work.count("HGM")) == (2, 1, 0)
    assert work.products == 2
    assert work.by_kind()["BRA"] == 7


def test_loops_are_those_of_the_jumps_not_of_the_text() -> None:
    """The way back from a wait, a call as an exit, a predicate among the operands: none makes or hides a loop."""
    work, other = parse(TEXT, USAGE)
    (inner,) = work.loops
    assert work.main_loop == inner
    assert other.main_loop is None
    assert inner.first == 0x20
    assert (inner.count("HGMMA"), inner.count("MUFU.EX2"), inner.count("FADD")) == (2, 1, 1)
    assert inner.count("FMUL") == 0, "that is the outer loop"
    assert inner.count("MOV") == 0


def test_a_trip_is_the_shortest_way_through_a_loop() -> None:
    work, _ = parse(TEXT, USAGE)
    (inner,) = work.loops
    # past the wait's slow way, and from the first BSYNC to where it says that threads meet
    assert inner.trip.count("SYNCS") == 1
    assert (inner.trip.count("HGMMA"), inner.trip.total) == (2, 10)
    assert inner.total == 12 + 3


def test_a_kernel_that_was_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    report = compiled(showcase("forward"), "sm_90")
    code = report.machine_code()
    assert (code.kernel, code.registers, code.spill_bytes) == ("forward", report.registers, 0)
    loop = code.main_loop
    assert loop is not None
    assert 0 < loop.count("HGMMA") <= code.count("HGMMA")
    assert loop.count("MUFU.EX2") > 0
    assert loop.trip.total < loop.total < code.total, "a whole tile needs no mask"
    assert loop.trip.count("HGMMA") == loop.count("HGMMA")
    with pytest.raises(KeyError):
        read_cubin(report.cubin, "backward")


def test_no_machine_code_to_read() -> None:
    with pytest.raises(UnsupportedOnBackend, match="NVIDIA"):
        AotReport("forward", "gfx942", 128, 0, 1024, 65536, (), 1.0).machine_code()


def test_no_disassembler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sass, "find_spec", lambda name: None)
    sass._program.cache_clear()
    with pytest.raises(BackendNotInstalled, match="nvdisasm"):
        sass.disassembler("nvdisasm", "-c", "k.cubin")


def test_the_loop_of_an_empty_kernel() -> None:
    assert MachineCode({}).main_loop is None
