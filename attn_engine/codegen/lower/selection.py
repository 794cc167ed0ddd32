"""Selection: the importances of a few tokens' keys, a tile of keys at a time, and the best candidates of each token.

The tokens of a program share each tile of keys. For every token the query heads of a group are the rows of a tile, so
that importances are its column sums:

    for kv tiles in sight:
        for tokens:
            for tiles of heads:  importance += sum over rows of score_mod(query . key)
            offer importance to the token's state

A grid of few programs splits the keys; a second kernel then takes the best of all shares. Which are best does not
depend on how keys and tokens are cut, so neither does the result on the number of threads (docs/adr/0030).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from attn_engine.codegen.lower.emit import Emitter, Names, base_two
from attn_engine.codegen.lower.paged import over_pages
from attn_engine.codegen.lower.ranges import ceil_to, floor_to, split_bounds
from attn_engine.codegen.lower.score import reserved_names, score_lets, visibility
from attn_engine.codegen.lower.sequences import TABLES, spans_param
from attn_engine.codegen.lower.values import (
    D_IDX,
    ELEMENT,
    FLOAT,
    INT,
    KV_HEAD,
    KV_LEN,
    Q_LEN,
    SCALE,
    SPLIT,
    SPLITS,
    load_tile,
    scalar,
    wide,
)
from attn_engine.ir.expr import Const, Expr, Full, Load, Reduce, Var, call, substitute, variables, where
from attn_engine.ir.ops import Op, Storage
from attn_engine.ir.passes.mask_range import Interval, plan_mask
from attn_engine.ir.passes.pack_heads import in_terms_of
from attn_engine.ir.passes.simplify import simplify
from attn_engine.ir.passes.unread import without_unread
from attn_engine.ir.program import BATCH, HEAD, KV_IDX, Q_IDX, Attention
from attn_engine.ir.selection import Selection
from attn_engine.ir.tile import (
    Choice,
    Choose,
    If,
    Kernel,
    Lanes,
    Let,
    Loop,
    Module,
    Narrow,
    Param,
    Section,
    Stmt,
    walk,
)
from attn_engine.ir.verify import verify_kernel

TOKEN, TOKENS, TILE = scalar("token"), scalar("tokens"), scalar("tile")
FIRST_TOKEN, TOKEN_END, LAST_TOKEN = scalar("first_token"), scalar("token_end"), scalar("last_token")
TILE_COUNT, FIRST_TILE, TILE_TOKENS = scalar("tile_count"), scalar("first_tile"), scalar("tile_tokens")
TOPK = scalar("topk")
IMPORTANCE, SEEN = Var("importance", FLOAT, ("kv",)), Var("seen_by_a_head", FLOAT, ("kv",))
STATES, INDICES = "candidates", "indices"


@dataclass(frozen=True, slots=True)
class SelectionSchedule:
    """heads, keys: rows and columns of a tile of scores. one_tile: the heads of every group fit into one."""

    heads: int
    keys: int
    one_tile: bool = False


def lower_selection(program: Selection, schedule: SelectionSchedule, *, split: bool) -> Module:
    """The kernel "select", and where the keys are split the kernel "settle" after it."""
    lowered = _Selection(program, schedule, split)
    kernels = (lowered.select(), lowered.settle()) if split else (lowered.select(),)
    for kernel in kernels:
        verify_kernel(kernel)
    return Module("selection", kernels)


class _Selection:
    def __init__(self, program: Selection, schedule: SelectionSchedule, split: bool) -> None:
        self.program, self.schedule, self.split = program, schedule, split
        self.pairs = _by_token(program.pairs)
        self.blocks = (1, 0) if program.pool is None else (program.pool.step, program.pool.reach)
        self.of_tile = TOKEN - FIRST_TOKEN
        self.state = (SPLIT if split else Const(0), BATCH, KV_HEAD, TILE * TILE_TOKENS + self.of_tile)

    # -- kernels

    def select(self) -> Kernel:
        forced = self.forced()
        end: list[Stmt] = [] if self.split else [Section("the best of each token"), *self.settled(Const(1))]
        own = self.tokens_of_program()
        inside = [*self.bounds(), *self.started(), *forced, *self.over_keys(), *end]
        # A sequence may have no token in this tile.
        body = (*own, If(FIRST_TOKEN < TOKEN_END, tuple(inside), "select_tile"))
        program, sequences = self.program, self.program.sequences
        inputs = (_queries(program), wide(program.pairs, "K"), *_captured(program))
        numbers = (SCALE, *program.scalars, TOPK, *self.counts())
        kernel = self.kernel("select", (*inputs, *self.outputs(body)), numbers, body)
        kernel = without_unread(kernel)
        return over_pages(kernel, sequences.page) if sequences is not None and sequences.page else kernel

    def settle(self) -> Kernel:
        own = self.tokens_of_program(keys=False)
        body = (*own, Section("the best of each token in all shares of the keys"), *self.settled(SPLITS))
        params = (_queries(self.program), *self.outputs(body))  # Q says what is computed in
        kernel = self.kernel("settle", params, (TOPK, *self.counts()), body)
        return without_unread(replace(kernel, grid=kernel.grid[1:]))

    def kernel(
        self, name: str, params: tuple[Param, ...], scalars: tuple[Var, ...], body: tuple[Stmt, ...]
    ) -> Kernel:
        program, s = self.program.pairs, self.schedule
        return Kernel(
            name=name,
            params=params,
            scalars=scalars,
            grid=(*(["split"] if self.split else []), "tile", "kv_head", "batch"),
            order=("q", "kv", "d", "dv"),
            tile=(("q", s.heads), ("kv", s.keys), ("d", program.dim_qk)),
            body=body,
            header=(
                f"{self.program.name}: {name}",
                "rows of a tile are the query heads that share a kv head",
            ),
            lanes=Lanes.KEYS,
        )

    def counts(self) -> tuple[Var, ...]:
        of_tokens = () if self.program.sequences is not None else (TOKENS,)
        return (*of_tokens, TILE_COUNT, FIRST_TILE, TILE_TOKENS, *([SPLITS] if self.split else []))

    def outputs(self, body: tuple[Stmt, ...]) -> tuple[Param, ...]:
        """The tables of sequences, the states and the result, as far as they are used."""
        found: list[Param] = []
        if self.program.sequences is not None:
            found += [Param(n, Storage.INT32, TABLES[n]) for n in (spans_param("q"), spans_param("kv"))]
        states = ("shares", "batches", "kv_heads", "tile_tokens", "words")
        found.append(Param(STATES, Storage.INT32, states, output=True))
        if _settles(body):
            shape = ("batches", "kv_heads", "tokens", "topk")
            found.append(Param(INDICES, Storage.INT32, shape, output=True))
        return tuple(found)

    # -- where the program is

    def tokens_of_program(self, *, keys: bool = True) -> list[Stmt]:
        """The tokens of this tile; in a call with sequences also where the sequence lies, and its keys."""
        lets: list[Stmt] = []
        if self.program.sequences is not None:
            lets.append(Section("sequence of this program"))
            spans_of = (("q", "q_first", "tokens"), ("kv", "kv_first", "kv_len"))
            for axis, first, length in spans_of if keys else spans_of[:1]:
                spans = spans_param(axis)
                lets.append(Let(first, Load(spans, INT, (BATCH, Const(0)))))
                lets.append(Let(length, Load(spans, INT, (BATCH, Const(1)))))
            if keys and not self.program.sequences.page:
                lets.append(Narrow("K", "kv", scalar("kv_first"), KV_LEN))
        return [
            *lets,
            Section("tokens of this program"),
            Let(FIRST_TOKEN.name, (FIRST_TILE + TILE) * TILE_TOKENS),
            Let(TOKEN_END.name, call(Op.MIN, FIRST_TOKEN + TILE_TOKENS, TOKENS)),
        ]

    def bounds(self) -> list[Stmt]:
        """The kv tiles that a token of this program sees."""
        hull = _hull(self.program.pairs)
        ends: dict[Expr, Expr] = {scalar("q_start"): FIRST_TOKEN, scalar("q_last"): LAST_TOKEN}
        lo, hi = (None if e is None else substitute(e, ends) for e in (hull.lo, hull.hi))
        n, begin, end = self.schedule.keys, scalar("kv_begin"), scalar("kv_end")
        first = Const(0) if lo is None else call(Op.MAX, floor_to(lo, n), 0)
        stop = KV_LEN if hi is None else call(Op.MIN, hi, KV_LEN)
        lets: list[Stmt] = [
            Section("kv tiles that these tokens can see"),
            Let(LAST_TOKEN.name, TOKEN_END - 1),
            Let(begin.name, simplify(first)),
            Let(end.name, simplify(call(Op.MAX, ceil_to(stop, n), begin))),
        ]
        if self.split:
            lets += split_bounds(n, begin, end, (end - begin) // n)
        return lets

    # -- steps

    def over_tokens(self, body: list[Stmt], title: str = "") -> Loop:
        return Loop(TOKEN.name, FIRST_TOKEN, TOKEN_END, None, tuple(body), title)

    def choose(self, choice: Choice, value: Expr) -> Choose:
        return Choose(choice, STATES, self.state, value, blocks=self.blocks)

    def started(self) -> list[Stmt]:
        begin = scalar("split_begin" if self.split else "kv_begin")
        return [self.over_tokens([self.choose(Choice.BEGIN, begin)])]

    def forced(self) -> list[Stmt]:
        """Candidates that are taken in any case, once for all shares of the keys."""
        fn = self.program.forced
        if fn is None:
            return []
        fn = in_terms_of(fn, {Q_IDX: TOKEN, HEAD: KV_HEAD})
        emitter = Emitter(self.names(), {}, base_two)
        count = self.candidates()
        taken = emitter.value(fn.result, fn.names, fn.sources) & (count > KV_IDX)
        own = [*emitter.lets, self.choose(Choice.FORCE, taken)]
        tiles = Loop("kv_start", Const(0), ceil_to(count, self.schedule.keys), "kv", tuple(own), "force_tile")
        body: list[Stmt] = [self.over_tokens([tiles])]
        if self.split:
            body = [If(SPLIT.equals(0), tuple(body))]
        return [Section("candidates that are taken in any case"), *body]

    def candidates(self) -> Expr:
        pool = self.program.pool
        if pool is None:
            return KV_LEN
        return (KV_LEN * pool.stride + (pool.length - 1 + pool.block - 1)) // pool.block

    def over_keys(self) -> list[Stmt]:
        begin, end = (scalar(f"{'split' if self.split else 'kv'}_{x}") for x in ("begin", "end"))
        body = (Let("key", load_tile("K")), self.over_tokens(self.offered()))
        return [Section("importances, tile by tile"), Loop("kv_start", begin, end, "kv", body, "key_tile")]

    def offered(self) -> list[Stmt]:
        """The importances of one tile of keys for one token, offered to its state."""
        names = self.names()
        by_head = _asks_for_the_head(self.program.pairs)
        seen = visibility(self.pairs, names, {}, ("kv",))
        rows, first = self.schedule.heads, Const(0)
        end = first + rows if self.schedule.one_tile else ceil_to(Q_LEN, rows)
        heads = Loop("q_start", first, end, "q", (*self.heads(names, by_head),))
        start: list[Stmt] = [Let(IMPORTANCE.name, Full(0.0, ("kv",)))]
        if by_head:
            there: Expr = SEEN > 0.0
            return [
                *start,
                Let(SEEN.name, Full(0.0, ("kv",))),
                heads,
                self.choose(Choice.OFFER, where(there, IMPORTANCE, -math.inf)),
            ]
        value = where(seen.var, IMPORTANCE, -math.inf)
        return [*start, heads, *seen.lets, self.choose(Choice.OFFER, value)]

    def heads(self, names: Names, by_head: bool) -> list[Stmt]:
        """What the heads of a tile add."""
        emitter = Emitter(names, {}, base_two)
        token = TOKEN if self.program.sequences is None else scalar("q_first") + TOKEN
        emitter.lets.append(Let("query", Load("Q", ELEMENT, (BATCH, token, KV_HEAD, Q_IDX, D_IDX))))
        logit = score_lets(self.pairs, emitter)
        there: Expr = Q_IDX < Q_LEN
        if by_head:
            seen = visibility(self.pairs, names, {}, ("kv",))
            emitter.lets += seen.lets
            there = there & seen.var
            found = Reduce("max", where(there, 1.0, Full(0.0, ("q", "kv"))), "q")
            emitter.lets.append(Let(SEEN.name, call(Op.MAX, SEEN, found)))
        part = Reduce("sum", where(there, logit, Full(0.0, ("q", "kv"))), "q")
        return [*emitter.lets, Let(IMPORTANCE.name, IMPORTANCE + part)]

    def settled(self, shares: Expr) -> list[Stmt]:
        token = TOKEN if self.program.sequences is None else scalar("q_first") + TOKEN
        place = (BATCH, KV_HEAD, token)
        step = Choose(Choice.SETTLE, STATES, self.state[1:], shares, INDICES, place, self.blocks)
        return [self.over_tokens([step])]

    def names(self) -> Names:
        taken = {c.name for c in self.program.captures} | {s.name for s in self.program.scalars}
        names = reserved_names(self.pairs)
        for name in taken:
            names.fresh(name)
        return names


def _queries(program: Selection) -> Param:
    """Q as (batch, token, kv head, head of the group, dimension)."""
    return Param("Q", program.pairs.element, ("batches", "tokens", "kv_heads", "q_len", "dim_qk"))


def _captured(program: Selection) -> tuple[Param, ...]:
    return tuple(
        Param(c.name, c.storage, tuple(f"{c.name}_size_{i}" for i in range(c.rank))) for c in program.captures
    )


def _by_token(pairs: Attention) -> Attention:
    """The functions of a tile whose rows are the heads of a group, at one token."""
    inputs: dict[Expr, Expr] = {Q_IDX: TOKEN, HEAD: KV_HEAD * Q_LEN + Q_IDX}
    score, mask = (f and in_terms_of(f, inputs) for f in (pairs.score, pairs.mask))
    return replace(pairs, score=score, mask=mask, sequences=None)


def _asks_for_the_head(pairs: Attention) -> bool:
    return pairs.mask is not None and HEAD in variables(pairs.mask.result)


def _hull(pairs: Attention) -> Interval:
    """Outside of it no token of a tile sees a key, whatever its head."""
    hull = plan_mask(pairs.mask.result if pairs.mask else None, "kv").hull
    ends = [e for e in (hull.lo, hull.hi) if e is not None]
    return Interval() if any(HEAD in variables(e) for e in ends) else hull


def _settles(body: tuple[Stmt, ...]) -> bool:
    return any(isinstance(s, Choose) and s.choice is Choice.SETTLE for s in walk(body))
