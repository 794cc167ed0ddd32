"""The text of generated Triton: valid, formatted, complete, and meaning what Python means."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from attn_engine.codegen.backends.triton import TritonOptions, argument_names, render_triton
from attn_engine.codegen.backends.triton_functions import HELPERS
from attn_engine.codegen.backends.triton_layout import WIDTH, wrapped
from attn_engine.codegen.pipeline import lower
from attn_engine.ir.expr import Const, Expr, Full, Load, Var, call, where
from attn_engine.ir.ops import INFO, DType, Op, Signature, Storage
from attn_engine.ir.program import BATCH, HEAD, KV_IDX, Q_IDX, SCORE, Captured
from attn_engine.ir.tile import Accumulate, If, Kernel, Let, Loop, Param, Stmt, StoreTile
from tests.gpu_tiles import gpu_schedule
from tests.runtime.rules import function, program

BIAS, SLOPES = Captured("bias", Storage.FLOAT16, 3), Captured("slopes", Storage.FLOAT32, 1)
SCORE_MOD = function(
    30.0 * call(Op.TANH, SCORE / 30.0)
    - Load("slopes", DType.FLOAT, (HEAD,)) * (Q_IDX - KV_IDX)
    + Load("bias", DType.FLOAT, (HEAD, Q_IDX, KV_IDX)),
    SLOPES, BIAS,
)  # fmt: skip
MASK = function((KV_IDX <= Q_IDX) & (Q_IDX - KV_IDX <= 100))
SHOWCASE = program(SCORE_MOD, MASK, element=Storage.FLOAT16, dim_qk=24, dim_v=64)
ROWS, COLUMNS = Var("rows", DType.FLOAT, ("q",)), Var("columns", DType.FLOAT, ("kv",))


def showcase() -> list[Kernel]:
    schedule = gpu_schedule(24, 64, 2)
    modules = [lower(SHOWCASE, schedule, d, ("slopes", "bias")) for d in ("forward", "backward")]
    return [k for m in modules for k in m.kernels]


def small(
    *body: Stmt, scalars: tuple[Var, ...] = (), grid: tuple[str, ...] = ("q", "head", "batch")
) -> Kernel:
    params = (
        Param("X", Storage.FLOAT32, ("batches", "heads", "q_len"), True),
        Param("table", Storage.FLOAT32, ("table_size_0", "table_size_1"), True),
    )
    tile = (("q", 64), ("kv", 32), ("d", 24), ("dv", 64))
    return Kernel("small", params, scalars, grid, ("q", "kv", "d", "dv"), tile, body)


def stored(value: Expr) -> str:
    """The text of a value as it is stored, one row of X."""
    text = render_triton(small(StoreTile("X", (BATCH, HEAD, Q_IDX), value)))
    calls = [
        n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "tl.store"
    ]
    return ast.unparse(calls[0].args[1])


@pytest.mark.parametrize("kernel", showcase(), ids=lambda k: k.name)
def test_showcase_is_formatted(kernel: Kernel, tmp_path: Path) -> None:
    ruff = shutil.which("ruff") or shutil.which("ruff", path=str(Path(sys.executable).parent))
    if ruff is None:
        pytest.skip("needs ruff")
    file = tmp_path / "kernel.py"
    file.write_text(render_triton(kernel))
    for command in (["format", "--diff"], ["check", "--select", "E,F", "--ignore", "E741"]):
        line = [ruff, command[0], "--isolated", "--line-length", str(WIDTH), *command[1:], str(file)]
        found = subprocess.run(line, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("kernel", showcase(), ids=lambda k: k.name)
def test_arguments_are_those_of_the_text(kernel: Kernel) -> None:
    (definition,) = [
        n
        for n in ast.parse(render_triton(kernel)).body
        if isinstance(n, ast.FunctionDef) and n.name == kernel.name
    ]
    assert tuple(a.arg for a in definition.args.args) == argument_names(kernel)
    read = {n.id for n in ast.walk(definition) if isinstance(n, ast.Name)}
    assert set(argument_names(kernel)) <= read


def test_header_says_how_to_launch() -> None:
    text = render_triton(showcase()[0], TritonOptions(num_warps=8, num_stages=3))
    assert text.startswith("# test: forward\n# launch with num_warps=8, num_stages=3\nimport triton\n")
    assert "BLOCK_D = tl.constexpr(32)" in text
    assert "DIM_QK = tl.constexpr(24)" in text  # 24 is no power of two
    assert "DIM_V" not in text


def test_every_operation_has_a_spelling() -> None:
    pair, flags = (ROWS, ROWS + 1.0), (ROWS < 1.0, ROWS < 2.0)
    operands = {DType.FLOAT: pair, DType.INT: (Q_IDX, Q_IDX - 7), DType.BOOL: flags}
    for op in Op:
        arity, signature = INFO[op].arity, INFO[op].signature
        ints = signature in (Signature.INTEGER, Signature.BIT)
        kind = DType.INT if ints else DType.BOOL if signature is Signature.LOGICAL else DType.FLOAT
        args = (flags[0], *pair) if signature is Signature.SELECT else operands[kind][:arity]
        ast.parse(stored(call(Op.TO_FLOAT, call(op, *args))))


def test_integer_quotients_floor() -> None:
    assert stored(call(Op.TO_FLOAT, (Q_IDX - 5) // 3)) == "floor_divide(q_idx - 5, 3).to(tl.float32)"
    assert stored(call(Op.TO_FLOAT, (Q_IDX - 5) % 3)) == "floor_modulo(q_idx - 5, 3).to(tl.float32)"
    assert stored(call(Op.TO_FLOAT, (Q_IDX + 5) // 3)) == "((q_idx + 5) // 3).to(tl.float32)"


def test_bounds_of_integers_are_not_overestimated() -> None:
    low = Var("low", DType.INT)
    lets = (Let("low", Const(3)), Let("low", low - 1))
    store = StoreTile("X", (BATCH, HEAD, Q_IDX), call(Op.TO_FLOAT, low // 2) + ROWS)
    text = render_triton(small(Loop("head", Const(0), Const(2), None, (*lets, store))))
    assert "floor_divide(low, 2)" in text
    assert "def floor_divide" in text


def test_comparisons_do_not_chain() -> None:
    value = where((ROWS < 1.0).equals(ROWS < 2.0), 1.0, ROWS)
    assert stored(value) == "tl.where((rows < 1.0) == (rows < 2.0), 1.0, rows)"


def test_users_names_do_not_hide_the_files_own() -> None:
    names = ("tl", "X", "BLOCK_Q", "tanh", "q_tile", "table_stride_0")
    lets = [Let(n, call(Op.TANH, Full(0.5, ("q",)))) for n in names]
    stores = [StoreTile("X", (BATCH, HEAD, Q_IDX), Var(n, DType.FLOAT, ("q",))) for n in names]
    text = render_triton(small(*lets, *stores))
    assigned = {
        n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    assert {
        "tl_value",
        "X_value",
        "BLOCK_Q_value",
        "tanh_value",
        "q_tile_value",
        "table_stride_0_value",
    } <= assigned
    assert not assigned & {"tl", "X", "tanh", "table_stride_0"}


def test_gathers_stay_inside_the_tensor() -> None:
    text = render_triton(small(
        Let("near", Load("table", DType.FLOAT, (Q_IDX - 1, KV_IDX))),
        StoreTile("X", (BATCH, HEAD, Q_IDX), call(Op.MAX, ROWS, 0.0)),
        Let("kept", Var("near", DType.FLOAT, ("q", "kv")) + 1.0),
    ))  # fmt: skip
    assert "tl.minimum(tl.maximum(q_idx[:, None] - 1, 0), table_size_0 - 1)" in text
    assert "mask=kv_idx[None, :] < table_size_1" in text


def test_scattered_additions_are_masked_and_ordered() -> None:
    add = Accumulate("table", (Q_IDX - 1, HEAD), ROWS)
    text = render_triton(small(Let("rows", Full(1.0, ("q",))), If(Var("q_start", DType.INT) < 64, (add,))))
    assert "(q_idx - 1 >= 0) & (q_idx - 1 < table_size_0) & (head < table_size_1)" in text
    assert text.index("tl.store(") < text.index("tl.debug_barrier()")


def test_further_grid_axes_share_the_third_dimension() -> None:
    store = StoreTile("X", (BATCH, HEAD, Q_IDX), call(Op.TO_FLOAT, Var("split", DType.INT)) + ROWS)
    text = render_triton(small(store, grid=("q", "split", "head", "batch")))
    assert "head = (tl.program_id(2) % heads).to(tl.int64)" in text
    assert "batch = (tl.program_id(2) // heads).to(tl.int64)" in text


def test_empty_grid_is_one_instance() -> None:
    inner = (StoreTile("X", (BATCH, HEAD, Q_IDX), Full(1.0, ("q",))),)
    rows = Loop("q_start", Const(0), Var("q_len", DType.INT), "q", inner)
    heads = Loop("head", Const(0), Var("heads", DType.INT), None, (rows,))
    text = render_triton(small(Loop("batch", Const(0), Var("batches", DType.INT), None, (heads,)), grid=()))
    assert "program_id" not in text
    assert "tl.cast(head, tl.int64) * X_head_stride" in text  # a loop counts in 32 bits, addresses need 64


def test_helpers_stand_before_the_kernel_only_where_used() -> None:
    text = render_triton(small(StoreTile("X", (BATCH, HEAD, Q_IDX), call(Op.TANH, ROWS))))
    assert text.index("def tanh(x)") < text.index("def small(")
    assert not any(f"def {name}" in text for name in HELPERS if name != "tanh")


@pytest.mark.parametrize("line", [
    "x = tl.load(pointer + (rows[:, None] * row_stride + columns[None, :] * stride), mask=rows[:, None] < n, other=0)",
    "value = tl.load(pointer + first_offset_of_tile * row_stride, mask=first_offset_of_tile < n).to(tl.float32)",
    "visible = (first_name <= second_name) & (second_name < third_name) & (third_name < fourth) & (fourth <= fifth)",
    "if (kv_start_of_tile < kv_full_begin_of_tile) | (kv_full_end_of_tile <= kv_start_of_tile) | another_condition:",
    "total = total * rescale_of_tile[:, None] + tl.dot(probabilities.to(Values.dtype.element_ty), values_of_tile)",
])  # fmt: skip
def test_long_lines_break_and_keep_their_meaning(line: str) -> None:
    lines = wrapped(line, 2)
    assert max(map(len, lines)) <= WIDTH - 8
    body = "    pass" if line.startswith("if") else ""
    assert ast.dump(ast.parse("\n".join([*lines, body]))) == ast.dump(ast.parse(f"{line}\n{body}"))
