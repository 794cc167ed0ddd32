"""Forward for few query tiles: each sees its keys in several splits, one per program, and a second kernel merges them.

The first kernel is the forward pass over a share of the keys in sight; it leaves the un-normalised output and the row
states of every split in memory. The second folds them in the order of the splits, with the normaliser's own merge, and
normalises. How many splits there are is a run-time argument.
"""

from __future__ import annotations

from attn_engine.codegen.lower.emit import Emitter, base_two
from attn_engine.codegen.lower.forward import (
    ORDER_Q,
    empty_row_state,
    epilogue,
    forward_kernel,
    pass_over_keys,
    saved_outputs,
    tuple_of_tiles,
)
from attn_engine.codegen.lower.score import reserved_names
from attn_engine.codegen.lower.values import (
    DV_IDX,
    FLOAT,
    Q_ROW,
    ROW_SHAPE,
    SPLIT,
    SPLITS,
    captured_params,
    compute_storage,
    tile,
    wide,
)
from attn_engine.codegen.schedule import Schedule
from attn_engine.ir.expr import Const, Expr, Load, Var, postorder
from attn_engine.ir.passes.merge_rule import MergeRule, part_var
from attn_engine.ir.program import OUT, Attention
from attn_engine.ir.tile import Kernel, Let, Loop, Module, Param, Section, Stmt, StoreTile

PARTIAL_OUT = "partial_out"
_PART = (SPLIT, *Q_ROW)


def partial_state(name: str) -> str:
    """The tensor that keeps a row state of every split."""
    return f"partial_{name}"


def lower_decode(program: Attention, schedule: Schedule, merge: MergeRule) -> Module:
    """The kernels of a forward pass whose keys are split."""
    return Module("decode", (lower_split(program, schedule), lower_merge(program, schedule, merge)))


def lower_split(program: Attention, schedule: Schedule) -> Kernel:
    """The un-normalised output and the row states of one q tile over one share of the keys that it sees."""
    names = reserved_names(program)
    keys = pass_over_keys(program, schedule, names, one_split=True)
    end: list[Stmt] = [
        Section("store this split"),
        StoreTile(PARTIAL_OUT, (*_PART, DV_IDX), OUT),
        *(StoreTile(partial_state(s.name), _PART, s.var) for s in program.rule.states),
    ]
    return forward_kernel(program, schedule, "decode", _partials(program, output=True), keys, end)


def lower_merge(program: Attention, schedule: Schedule, merge: MergeRule) -> Kernel:
    """O and the saved row values of one q tile from its splits."""
    names = reserved_names(program)
    rule = program.rule
    roots = (rule.output, *(e for _, e in rule.saved), *merge.states, merge.left_scale, merge.right_scale)
    read = {
        n.tensor if isinstance(n, Load) else n.name for n in postorder(*roots) if isinstance(n, Load | Var)
    }
    body = [
        *empty_row_state(program.rule),
        Section("splits, in order"),
        Loop(SPLIT.name, Const(0), SPLITS, None, tuple(_merge_one(program, merge))),
        *epilogue(program, names),
    ]
    return Kernel(
        name="merge",
        params=(
            *_partials(program, output=False),
            *(p for p in captured_params(program) if p.name in read),
            wide(program, "O", output=True),
            *saved_outputs(program),
        ),
        scalars=(SPLITS, *(s for s in program.scalars if s.name in read)),
        grid=("q", "head", "batch"),
        order=ORDER_Q,
        tile=tuple_of_tiles(
            program, {"q": schedule.delta_rows or schedule.backward_q}
        ),  # a schedule for few rows may shrink block_q
        body=tuple(body),
        header=(f"{program.name}: merge of the splits",),
    )


def _merge_one(program: Attention, merge: MergeRule) -> list[Stmt]:
    """Add the next split to what the row has so far."""
    rule = program.rule
    emitter = Emitter(reserved_names(program), adjust=base_two)
    part_out = tile(f"part_{OUT.name}", *OUT.axes)
    emitter.lets += [Let(part_out.name, Load(PARTIAL_OUT, FLOAT, (*_PART, DV_IDX)))]
    for state in rule.states:
        emitter.lets.append(Let(part_var(state).name, Load(partial_state(state.name), FLOAT, _PART)))
    new = {
        state.name: emitter.define(f"new_{state.name}", value, merge.names)
        for state, value in zip(rule.states, merge.states, strict=True)
    }

    def scaled(out: Expr, scale: Expr) -> Expr:
        return out * (emitter.define(merge.names[scale], scale, merge.names) if scale.axes else scale)

    emitter.let(OUT.name, scaled(OUT, merge.left_scale) + scaled(part_out, merge.right_scale))
    return [*emitter.lets, *(Let(name, value) for name, value in new.items())]


def _partials(program: Attention, *, output: bool) -> tuple[Param, ...]:
    shape = ("splits", *ROW_SHAPE)
    storage = compute_storage(program)
    states = [Param(partial_state(s.name), storage, shape, output) for s in program.rule.states]
    return (Param(PARTIAL_OUT, storage, (*shape, "dim_v"), output), *states)
