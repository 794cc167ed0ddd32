"""The C++ text and the schedule behind it: what shares a loop, what is stored, which names are legal."""

from __future__ import annotations

import re

import pytest

from attn_engine.codegen.backends.cpu import CpuTarget, argument_slots, render_cpu
from attn_engine.codegen.backends.cpu_names import INCLUDE, header_names, with_legal_names
from attn_engine.codegen.lower.nests import Item, Nest, Schedule, Sweep, schedule_nests
from attn_engine.codegen.lower.steps import Product
from attn_engine.codegen.pipeline import lower, with_header
from attn_engine.codegen.schedule import cpu_schedule
from attn_engine.ir.expr import Load, Var, call
from attn_engine.ir.ops import DType, Op, Storage
from attn_engine.ir.program import HEAD, KV_IDX, Q_IDX, SCORE, Attention, Captured, ScalarFn
from attn_engine.ir.tile import Kernel
from attn_engine.runtime.cpu_compile import compile_cpu, find_compiler
from tests.runtime.rules import RULES, function, program

SOFTCAP = function(call(Op.TANH, SCORE / 20.0) * 20.0)
CAUSAL = function(KV_IDX <= Q_IDX)


def kernel(p: Attention, name: str, learned: tuple[str, ...] = (), lanes: int = 64) -> Kernel:
    return lower(p, cpu_schedule(lanes), "forward" if name == "forward" else "backward", learned).kernel(name)


def steps_of(schedule: Schedule) -> list[tuple[Nest, ...]]:
    """The nests of every innermost loop."""

    def walk(items: tuple[Item, ...]) -> list[tuple[Nest, ...]]:
        found: list[tuple[Nest, ...]] = []
        for item in items:
            if isinstance(item, Sweep):
                nests = tuple(x for x in item.body if isinstance(x, Nest))
                found += [nests] if len(nests) == len(item.body) else walk(item.body)
        return found

    return walk(schedule.body)


def row_loops(nests: tuple[Nest, ...]) -> list[Nest]:
    return [n for n in nests if n.shape.rows is not None]


@pytest.mark.parametrize("score", [None, SOFTCAP], ids=["plain", "softcap"])
def test_forward_has_a_loop_per_product_and_one_for_the_powers(score: ScalarFn | None):
    steps = steps_of(schedule_nests(kernel(program(score, CAUSAL), "forward")))
    assert steps
    for nests in steps:
        loops = row_loops(nests)
        assert [n.shape.rows for n in loops] == ["kv", "kv", "dv"]
        assert [isinstance(n.steps[0], Product) for n in loops] == [True, False, True]
        assert [len(n.stored) for n in loops] == [1, 1, 1], (
            "nothing but scores, weights and the output is stored"
        )
        assert set(loops[1].places) == {"probs"}, "weights overwrite the scores"


@pytest.mark.parametrize("score", [None, SOFTCAP], ids=["plain", "softcap"])
def test_backward_has_a_loop_per_product(score: ScalarFn | None):
    for nests in steps_of(schedule_nests(kernel(program(score, CAUSAL), "backward"))):
        of_rows, *loops = row_loops(nests)
        assert of_rows.stored <= {"safe_lse", "delta"}, "numbers of each query row, read once"
        assert len(loops) == 5
        assert all(isinstance(n.steps[0], Product) for n in loops)
        stored = set().union(*(n.stored for n in loops))
        assert stored == {"d_probs", "probs", "d_score", "d_key", "d_value"}, "all else stays in registers"


def test_equal_bodies_are_printed_once():
    window = function((KV_IDX <= Q_IDX) & (Q_IDX - KV_IDX <= 100))
    text = render_cpu(kernel(program(None, window), "forward"), CpuTarget())
    assert text.count("const auto partial_step = ") == 1
    assert text.count("  partial_step(kv_start);") == 2
    assert text.count("const auto full_step = ") == 1


@pytest.mark.parametrize("name", ["forward", "delta", "backward"])
def test_source_is_clean(name: str):
    text = render_cpu(with_header(kernel(program(SOFTCAP, CAUSAL), name), "cpu", "test"), CpuTarget())
    assert text.startswith("// attn_engine test | ")
    assert text.endswith("\n")
    assert not re.search(r"[ \t]$", text, re.MULTILINE)
    assert text.count("{") == text.count("}")
    assert "None" not in text
    assert re.findall(r'#include "(\w+\.h)"', text) == ["kernel.h"]


def test_slots_name_every_argument():
    biased = function(SCORE + Load("bias", DType.FLOAT, (HEAD,)), Captured("bias", Storage.FLOAT32, 1))
    k = kernel(program(biased), "forward")
    slots = argument_slots(k)
    text = render_cpu(k, CpuTarget())
    assert f"sizeof(Arguments) == 8 * {len(slots)}" in text
    at = slots.index("bias")
    assert slots[at : at + 3] == ["bias", "bias.size.0", "bias.stride.0"]
    assert slots[-1] == "scale"


def test_numbers_survive_the_text():
    for element, suffix in ((Storage.FLOAT32, "f"), (Storage.FLOAT64, "")):
        lanes = CpuTarget().lanes(element)
        text = render_cpu(
            kernel(program(function(SCORE + 0.1), element=element), "forward", lanes=lanes), CpuTarget()
        )
        assert f"+ 0.1{suffix};" in text or f"+ 0.1{suffix} " in text


def test_a_remark_never_swallows_code():
    squared = SCORE * SCORE
    source = 'file.py:3: x = a + \\ \\ \n#error "no"'
    text = render_cpu(
        kernel(
            program(ScalarFn("f", squared + 1.0, names={squared: "x"}, sources={squared: source})), "forward"
        ),
        CpuTarget(),
    )
    lines = text.splitlines()
    assert any("file.py:3" in line for line in lines)
    assert not any(line.endswith("\\") or line.startswith("#error") for line in lines)


AWKWARD = ("max", "double", "exp2", "row", "LANES", "load", "sums", "linux", "D")


def awkward_program() -> Attention:
    """A user whose local variables, tensor and number are called like the generated code's own names."""
    nodes = [SCORE]
    for i in range(len(AWKWARD)):
        nodes.append(
            nodes[-1] * (1.0 + i) + Load("register", DType.FLOAT, (HEAD,)) * Var("scratch", DType.FLOAT)
        )
    names = dict(zip(nodes[1:], AWKWARD))
    names[nodes[-1]] = "unused"
    result = call(Op.EXP2, call(Op.MAX, nodes[-1], nodes[-2]))
    mod = ScalarFn(
        "mod", result, (Captured("register", Storage.FLOAT32, 1),), (Var("scratch", DType.FLOAT),), names
    )
    return program(mod, CAUSAL, RULES["sigmoid"]())


def test_names_keep_clear_of_the_language_and_the_headers():
    legal = with_legal_names(kernel(awkward_program(), "forward"))
    text = render_cpu(kernel(awkward_program(), "forward"), CpuTarget())
    assert [p.name for p in legal.params if "register" in p.name] == ["register_"]
    assert not re.search(r"const auto (max|double|exp2|row|LANES|load|sums|linux|D) =", text)


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_awkward_names_compile():
    compiler = find_compiler()
    assert compiler is not None
    k = kernel(awkward_program(), "forward", lanes=compiler.target.lanes(Storage.FLOAT32))
    compile_cpu(k, render_cpu(k, compiler.target), compiler)


def test_every_function_of_the_headers_is_taken():
    code = re.sub(r"//.*", "", "\n".join(path.read_text() for path in INCLUDE.glob("*.h")))
    called = set(re.findall(r"^(?:INLINE|OUTLINE) [\w<>:, *&]+? (\w+)\(", code, re.MULTILINE))
    assert len(called) > 30
    assert called <= header_names()
    assert {
        "Floats",
        "Rows",
        "Matrix",
        "LANES",
        "ROWS",
        "UNROLL",
        "exp2",
        "tanh",
        "where",
        "Real",
    } <= header_names()
