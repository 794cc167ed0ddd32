"""Backward: the row sums of dO * O, then dK, dV and dQ, without atomics: every run gives the same bits.

One loop structure in two cuts (`Schedule.gradients`). ONE_KERNEL owns kv tiles and adds each tile's part of dQ to a
buffer (one per split of the kv axis, so that no two instances share one). TWO_KERNELS computes dQ in a second kernel
that owns q tiles. All of them share `recompute`: weights and score gradients of one (q, kv) pair of tiles.
"""

from __future__ import annotations

from dataclasses import replace

from attn_engine.codegen.lower.capture import (
    CaptureGradient,
    Route,
    add_part,
    added_beside_keys,
    buffer_param,
    capture_gradients,
    shared_axes,
)
from attn_engine.codegen.lower.emit import Emitter, Names, base_two, rounded
from attn_engine.codegen.lower.forward import ORDER_Q, later_rows_see_more, tuple_of_tiles
from attn_engine.codegen.lower.listed import list_params
from attn_engine.codegen.lower.ranges import masking
from attn_engine.codegen.lower.row_values import RowReads, main_rows, row_bindings, uses_delta
from attn_engine.codegen.lower.score import (
    Masked,
    Visibility,
    hoisted,
    reserved_names,
    scale_lets,
    score_lets,
    visibility,
)
from attn_engine.codegen.lower.shares import (
    D_KEY,
    D_VALUE,
    KeyShares,
    QueryShares,
    d_key_value,
    d_key_value_stores,
    shares_queries,
)
from attn_engine.codegen.lower.tile_classes import TileTests, tile_tests
from attn_engine.codegen.lower.values import (
    D_OUT,
    FLOAT,
    GROUP_OF_HEADS,
    KEY,
    KV_HEAD,
    Q_ROW,
    QUERY,
    SCALE,
    VALUE,
    captured_params,
    indices,
    load_tile,
    rows,
    scalar,
    tile,
    wide,
)
from attn_engine.codegen.lower.visited import phases_of
from attn_engine.codegen.schedule import Gradients, Schedule
from attn_engine.ir.expr import Call, Dot, Expr, Full, Reduce, Var, postorder, where
from attn_engine.ir.passes.autodiff import gradients
from attn_engine.ir.passes.mask_range import plan_mask
from attn_engine.ir.passes.row_gradients import backward_roots
from attn_engine.ir.program import (
    BATCH,
    D_PROBS,
    DELTA,
    HEAD,
    KV_IDX,
    PROBS,
    SCORE,
    Attention,
)
from attn_engine.ir.tile import Accumulate, Kernel, Let, Loop, Module, Param, Section, Stmt, StoreTile

ORDER_KV = (
    "kv",
    "q",
    "dv",
    "d",
)  # tiles are [kv, q]: both accumulating products read their left operand as it lies
D_LOGIT, D_SCORE = tile("d_logit", "q", "kv"), tile("d_score", "q", "kv")
D_QUERY = tile("d_query", "q", "d")


def lower_backward(program: Attention, schedule: Schedule, learned: tuple[str, ...] = ()) -> Module:
    """The kernels of the backward pass, in order; `learned` names the captured tensors that need a gradient.

    Those of captured gradients that need a kernel of their own are `lower_pair_gradients`.
    """
    captures = capture_gradients(program, learned)
    kernels = [lower_delta(program, schedule)] if uses_delta(program) else []
    if schedule.gradients is Gradients.ONE_KERNEL:
        kernels.append(lower_d_key_value(program, schedule, captures, name="backward", with_query=True))
    else:
        kernels.append(lower_d_query(program, schedule, captures))
        kernels.append(lower_d_key_value(program, schedule, captures, name="dkdv", with_query=False))
    return Module("backward", tuple(kernels))


def lower_delta(program: Attention, schedule: Schedule) -> Kernel:
    """delta = <dO, O> per row: the one reduction that a normaliser's gradient needs."""
    out, product = tile("out", "q", "dv"), tile("product", "q", "dv")
    tiles = {"q": schedule.delta_rows or schedule.block_q}
    return Kernel(
        name="delta",
        params=(wide(program, "O"), wide(program, "dO"), rows(program, "Delta", output=True)),
        scalars=(),
        grid=("q", "head", "batch"),
        order=ORDER_Q,
        tile=tuple_of_tiles(program, tiles),
        body=(
            Let("out", load_tile("O")),
            Let("d_out", load_tile("dO")),
            Let("product", out * D_OUT),
            StoreTile("Delta", Q_ROW, Reduce("sum", product, "dv")),
        ),
        header=(f"{program.name}: backward, row sums of dO * O",),
    )


def lower_d_query(program: Attention, schedule: Schedule, captures: tuple[CaptureGradient, ...]) -> Kernel:
    """dQ of one q tile, and the captured gradients that are sums over a query row."""
    names, sums = reserved_names(program), [c for c in captures if c.route is Route.ROW]
    tiles = {"q": schedule.d_query_launch.q, "kv": schedule.d_query_launch.kv}
    sweep = Sweep(program, schedule, names, "kv", tiles)
    update: list[Stmt] = [Let("d_query", D_QUERY + Dot(rounded(D_SCORE, "K"), KEY))]
    update += [Let(c.total.name, c.total + Reduce("sum", c.value, "kv")) for c in sums]
    body: list[Stmt] = [
        Section("query tile of this program"),
        Let("kv_head", HEAD // GROUP_OF_HEADS),
        *scale_lets(program),
        *query_loads(program),
        *sweep.before,
        Let("d_query", Full(0.0, ("q", "d"))),
        *(Let(c.total.name, Full(0.0, ("q",))) for c in sums),
        *sweep.loops(sums, [*key_loads()], update),
        Section("store"),
        StoreTile("dQ", indices("dQ"), D_QUERY * SCALE),
        *(StoreTile(c.buffer, Q_ROW, c.total) for c in sums),
    ]
    outputs = (wide(program, "dQ", output=True), *(buffer_param(program, c) for c in sums))
    grid = ("q", "head", "batch")
    return backward_kernel(
        program, "dq", grid, ORDER_Q, tiles, outputs, body, tests=sweep.tests, sections=schedule.sections
    )


def lower_d_key_value(
    program: Attention,
    schedule: Schedule,
    captures: tuple[CaptureGradient, ...],
    *,
    name: str,
    with_query: bool,
) -> Kernel:
    """dK and dV of one kv tile, or of a split of the kv axis together with its part of dQ."""
    names = reserved_names(program)
    tiles = {"q": schedule.backward_q, "kv": schedule.backward_kv}
    columns = [c for c in captures if c.route is Route.COLUMN]
    parts = [c for c in captures if added_beside_keys(c)] if with_query else []
    shares = None
    if with_query:
        cut = QueryShares if shares_queries(program, schedule, captures) else KeyShares
        shares = cut(program, tiles, shared_axes(parts))
    within = shares.queries if shares else None
    sweep = Sweep(program, schedule, names, "q", tiles, sums_own_axis=with_query, within=within)
    body = [Section("kv tile of this program"), *kv_tile(program, sweep, columns, parts, shares)]
    if shares is None:
        outputs = (*d_key_value(program), *(buffer_param(program, c) for c in columns))
        grid = ("kv", "kv_head", "batch")
        return backward_kernel(
            program, name, grid, ORDER_KV, tiles, outputs, body, tests=sweep.tests, sections=schedule.sections
        )
    buffers = {c.buffer: buffer_param(program, c, parts=True) for c in parts}.values()
    of_keys, of_queries = shares.outputs()[:2], shares.outputs()[2:]
    outputs = (*of_keys, *(buffer_param(program, c) for c in columns), *of_queries, *buffers)
    own, tests = shares.over(body), sweep.tests
    kernel = backward_kernel(program, name, shares.grid, ORDER_KV, tiles, outputs, own, shares.numbers, tests)
    return replace(kernel, lanes=schedule.backward_lanes)


def kv_tile(
    program: Attention,
    sweep: Sweep,
    columns: list[CaptureGradient],
    parts: list[CaptureGradient],
    shares: KeyShares | QueryShares | None,
) -> list[Stmt]:
    """Everything that one kv tile owns: loads, the sweep over heads and q tiles, stores.

    parts: captured gradients added up in memory. shares: of a kernel that makes dQ too.
    """
    update: list[Stmt] = [
        Let("d_value", D_VALUE + Dot(rounded(PROBS, "V"), D_OUT)),
        Let("d_key", D_KEY + Dot(rounded(D_SCORE, "K"), QUERY)),
    ]
    update += [Let(c.total.name, c.total + Reduce("sum", c.value, "q")) for c in columns]
    if shares is not None:
        update.append(Accumulate(*shares.query_part(), Dot(rounded(D_SCORE, "K"), KEY)))
        update += [add_part(c, sweep.lanes_axis) for c in parts]
    per_head = (
        *sweep.before,
        *(Let(c.total.name, Full(0.0, ("kv",))) for c in columns),
        *sweep.loops([*columns, *parts], query_loads(program), update, in_loop=True),
        *(StoreTile(c.buffer, (BATCH, HEAD, KV_IDX), c.total) for c in columns),
    )
    first, group = scalar("first_head"), scalar("group")
    return [
        *scale_lets(program),
        *key_loads(),
        Let("d_key", Full(0.0, ("kv", "d"))),
        Let("d_value", Full(0.0, ("kv", "dv"))),
        Section("query heads that read this kv head"),
        Let("group", GROUP_OF_HEADS),
        Let("first_head", KV_HEAD * group),
        Loop("head", first, first + group, None, per_head),
        Section("store"),
        *(d_key_value_stores() if shares is None else shares.stores()),
    ]


class Sweep:
    """The loops over one axis for a tile of the other, with weights and score gradients recomputed in each step."""

    def __init__(
        self,
        program: Attention,
        schedule: Schedule,
        names: Names,
        loop: str,
        tiles: dict[str, int],
        *,
        sums_own_axis: bool = False,
        within: tuple[Expr, Expr] | None = None,
    ) -> None:
        """sums_own_axis: something is summed over the rows of the program's own tile, so its ragged end is masked.
        within: the positions that the loop keeps to, multiples of its tile; None: all."""
        self.program, self.names, self.loop = program, names, loop
        self.lanes_axis = schedule.backward_lanes.axis
        self.masked_axes = ("q", "kv") if sums_own_axis else (loop,)
        self.tests = tile_tests(program, names, loop, tiles, own_rows_count=sums_own_axis)
        self.phases = phases_of(
            program, loop, tiles, schedule.edges, self.tests, own_rows_count=sums_own_axis, within=within
        )
        self.before, self.known = hoisted(program, names, loop, backward_roots(program.rule))
        if program.rule.powers_of_two and loop == "kv":
            self._compute_rows_once()

    def _compute_rows_once(self) -> None:
        """Before the loop: what the weights subtract from every pair of a row."""
        rule, emitter = (
            self.program.rule,
            Emitter(self.names, {**self.known, **row_bindings(self.program.rule)}),
        )
        for node in postorder(rule.recompute):
            if isinstance(node, Call) and node.axes == ("q",) and node in rule.names:
                self.known[node] = emitter.define(rule.names[node], node)
        self.before += emitter.lets

    def loops(
        self, wanted: list[CaptureGradient], loads: list[Stmt], update: list[Stmt], *, in_loop: bool = False
    ) -> list[Stmt]:
        """Bounds and loops; each step loads, recomputes and updates. `wanted`: captured gradients to make per pair."""
        body: list[Stmt] = [] if in_loop else [Section(f"{self.loop} tiles this tile meets")]
        body += self.phases.bounds
        for run in self.phases.runs:
            loop = run.loop(self.loop, lambda masked: [*loads, *self.recompute(masked, wanted), *update])
            body += [Section(run.title), loop]
        return body

    def recompute(self, masked: Masked, wanted: list[CaptureGradient]) -> list[Stmt]:
        """Weights from the saved row values; the gradient through the normaliser, then through score_mod."""
        program, rule = self.program, self.program.rule
        emitter = Emitter(self.names.copy(), self.known, base_two)
        score_lets(program, emitter)
        for value, loaded in row_bindings(rule).items():
            emitter.bind(value, loaded)
        probs = emitter.value(rule.recompute, rule.names, rule.sources)
        seen = None
        if masked is not False:
            seen = visibility(program, emitter.names, self.known, self.masked_axes, masked)
        hide_weights(emitter, probs, seen, masked)
        emitter.let(D_PROBS.name, Dot(D_OUT, VALUE))
        emitter.bind(PROBS, PROBS)
        emitter.bind(DELTA, tile("delta", "q"))
        results = self.score_gradients(emitter, wanted)
        hide_gradients(emitter, results, seen, masked)
        return emitter.lets

    def score_gradients(self, emitter: Emitter, wanted: list[CaptureGradient]) -> list[tuple[str, Expr]]:
        """(name, value) of d_score and of each wanted read, before the mask."""
        program, rule = self.program, self.program.rule
        d_logit = emitter.value(rule.gradient, rule.names, rule.sources)
        in_rule = {c: c.per_pair for c in wanted if c.per_pair is not None}
        own = [(c.value.name, emitter.value(e, rule.names, rule.sources)) for c, e in in_rule.items()]
        if program.score is None:
            return [(D_SCORE.name, d_logit), *own]
        emitter.let(D_LOGIT.name, d_logit)
        in_score = [c for c in wanted if c not in in_rule]
        targets = [SCORE, *(c.load for c in in_score)]
        through = gradients(program.score.result, D_LOGIT, targets)
        names = [D_SCORE.name, *(c.value.name for c in in_score)]
        fn = program.score
        found = [(n, emitter.value(g, fn.names, fn.sources)) for n, g in zip(names, through, strict=True)]
        return [*found, *own]


def hide_weights(emitter: Emitter, probs: Expr, seen: Visibility | None, masked: Masked) -> None:
    """Mask the weight, not the score: a row that sees nothing has no finite row value to subtract.

    Under a branch the weights are hidden together with the gradients, in one `if` after both.
    """
    if seen is not None and not isinstance(masked, Expr):
        emitter.lets += seen.lets
        probs = where(seen.var, probs, 0.0)
    emitter.let(PROBS.name, probs)


def hide_gradients(
    emitter: Emitter, results: list[tuple[str, Expr]], seen: Visibility | None, masked: Masked
) -> None:
    """Zero at invisible pairs, whatever the user's derivative is there."""
    for name, value in results:
        spread = value if set(value.axes) == {"q", "kv"} else value + Full(0.0, ("q", "kv"))
        emitter.let(name, where(seen.var, spread, 0.0) if seen and not isinstance(masked, Expr) else spread)
    if seen and isinstance(masked, Expr):
        pairs = [PROBS, *(Var(name, FLOAT, ("q", "kv")) for name, _ in results)]
        hidden = [Let(x.name, where(seen.var, x, 0.0)) for x in pairs]
        emitter.lets += masking(masked, [*seen.lets, *hidden])


def key_loads() -> list[Stmt]:
    return [Let("key", load_tile("K")), Let("value", load_tile("V"))]


def query_loads(program: Attention, read: RowReads | None = None) -> list[Stmt]:
    """Q, dO and the row values of a q tile, those in `read` or all that the gradients read."""
    read = read or main_rows(program)
    return [Let("query", load_tile("Q")), Let("d_out", load_tile("dO")), *read.loads()]


def backward_kernel(
    program: Attention,
    name: str,
    grid: tuple[str, ...],
    order: tuple[str, ...],
    tiles: dict[str, int],
    outputs: tuple[Param, ...],
    body: list[Stmt],
    more_scalars: tuple[Var, ...] = (),
    tests: TileTests | None = None,
    read: RowReads | None = None,
    *,
    sections: bool = False,
) -> Kernel:
    plan = plan_mask(program.mask.result if program.mask else None, "kv")
    inputs = (
        *(wide(program, t) for t in ("Q", "K", "V", "dO")),
        *(read or main_rows(program)).params(program),
        *captured_params(program),
    )
    inputs = (*inputs, *(tests.params if tests else ()), *list_params(program, tuple(body)))
    return Kernel(
        name=name,
        params=(*inputs, *outputs),
        scalars=(SCALE, *program.scalars, *more_scalars),
        grid=grid,
        order=order,
        tile=tuple_of_tiles(program, tiles),
        body=tuple(body),
        header=(f"{program.name}: backward" + (f", {name}" if name != "backward" else ""),),
        heavy_last=grid[:1] == ("q",) and later_rows_see_more(plan),
        sections=sections and grid[:1] in (("q",), ("kv",)) and later_rows_see_more(plan),
        tables=tests.tables if tests else (),
    )
