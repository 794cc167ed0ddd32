"""What is computed: traced functions, the row rule, and the attention program they make together.

    fn       = ScalarFn(name, result, names, sources, captures, scalars)
    rule     = OnlineRule(name, states, step, epilogue, recompute, gradient)      -- the normaliser
    program  = Attention(name, score, mask, rule, element, dim_qk, dim_v, scale)

Every value here is frozen and hashable, so a program is its own cache key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from attn_engine.ir.expr import Expr, Load, Var
from attn_engine.ir.ops import DType, Storage

# The inputs of traced functions. `score` is q.k times the scale; the indices are positions in the sequence.
SCORE = Var("score", DType.FLOAT, ("q", "kv"))
BATCH = Var("batch", DType.INT)
HEAD = Var("head", DType.INT)
Q_IDX = Var("q_idx", DType.INT, ("q",))
KV_IDX = Var("kv_idx", DType.INT, ("kv",))

# Query heads per kv head: a number of programs whose rows hold several heads (passes/pack_heads.py); at least 1.
GROUP = Var("group", DType.INT)

# The inputs of an online function's methods, besides its own row states and saved row values.
LOGIT = Var("logit", DType.FLOAT, ("q", "kv"))  # the score after score_mod
OUT = Var("out", DType.FLOAT, ("q", "dv"))  # the un-normalised output accumulator
PROBS = Var("probs", DType.FLOAT, ("q", "kv"))  # the recomputed weights
D_PROBS = Var("d_probs", DType.FLOAT, ("q", "kv"))  # their gradient, <dO, v>
DELTA = Var("delta", DType.FLOAT, ("q",))  # row sum of dO * O


@dataclass(frozen=True, slots=True)
class Captured:
    """A tensor that a user's function indexes: its name in the kernel, its storage and its number of dimensions."""

    name: str
    storage: Storage
    rank: int


@dataclass(frozen=True, slots=True)
class ScalarFn:
    """A user's elementwise function after tracing.

    `names` gives the user's local variable for a node, `sources` the user's line ("file.py:12: text") for a named node.
    Neither takes part in equality: two functions that compute the same are the same.
    """

    name: str = field(compare=False)
    result: Expr
    captures: tuple[Captured, ...] = ()
    scalars: tuple[Var, ...] = ()  # numbers the function closes over, passed at run time
    names: Mapping[Expr, str] = field(default_factory=dict[Expr, str], compare=False, repr=False)
    sources: Mapping[Expr, str] = field(default_factory=dict[Expr, str], compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class RowState:
    """One value per query row that the online update carries from tile to tile."""

    name: str
    initial: float

    @property
    def var(self) -> Var:
        return Var(self.name, DType.FLOAT, ("q",))


@dataclass(frozen=True, slots=True)
class RowPass:
    """A pass over the keys that makes row values for the passes after it.

    new_states (q): one per state, in terms of LOGIT, the states' variables before the tile, and the values of earlier
    passes. values: name -> (q) row values in terms of the states after the last tile; later passes read
    `saved_var(name)`.
    """

    states: tuple[RowState, ...]
    new_states: tuple[Expr, ...]
    values: tuple[tuple[str, Expr], ...]


@dataclass(frozen=True, slots=True)
class RuleParameter:
    """The gradient of one read of a captured tensor by the rule's own functions (a learned sink, a temperature).

    load: the read, without an axis or along q. per_pair (q, kv): what is summed over the keys that a row sees; per_row
    (q): what is added once per row. Both in terms of the backward inputs of `OnlineRule`; None where there is nothing.
    """

    load: Load
    per_pair: Expr | None
    per_row: Expr | None


@dataclass(frozen=True, slots=True)
class Pooled:
    """The largest ("max") or the sum ("sum") of a row's final weights over every block of so many keys."""

    kind: str
    block: int

    @property
    def name(self) -> str:
        return f"pooled_{self.kind}"


@dataclass(frozen=True, slots=True)
class OnlineRule:
    """A normaliser: how a row of scores becomes weights, one tile of keys at a time, and back.

    Online update, in terms of LOGIT and the states' variables (their values before the tile):
        weights (q, kv), new_states (q) one per state, out_scale (q): out = out * out_scale + weights @ V.
    Epilogue, in terms of OUT and the states' variables (after the last tile):
        output (q, dv), saved: name -> (q) row values kept for the backward pass and returned to the user.
    Backward, in terms of LOGIT and the saved names' variables:
        recompute (q, kv): the weights again; gradient (q, kv): d(loss)/d(LOGIT) from PROBS, D_PROBS, DELTA too, and
        from d_saved_var(name) where d(loss)/d(saved row value) is not zero.
    pooled: further outputs of the forward pass, numbers per row and block of keys.
    A rule of one pass has neither `earlier` nor `adjoints`. `earlier`: passes over the keys before the online update,
    which may read their values by saved_var(name) (as may the epilogue). `adjoints`: passes over the keys before the
    gradient, in terms of the same inputs as it; the gradient reads their values by saved_var(name).
    The source of each is a user's OnlineFunc; see spec in docs/online_functions.md.
    """

    name: str = field(compare=False)
    states: tuple[RowState, ...]
    weights: Expr
    new_states: tuple[Expr, ...]
    out_scale: Expr
    output: Expr
    saved: tuple[tuple[str, Expr], ...]
    recompute: Expr
    gradient: Expr
    names: Mapping[Expr, str] = field(default_factory=dict[Expr, str], compare=False, repr=False)
    sources: Mapping[Expr, str] = field(default_factory=dict[Expr, str], compare=False, repr=False)
    earlier: tuple[RowPass, ...] = ()
    adjoints: tuple[RowPass, ...] = ()
    parameters: tuple[RuleParameter, ...] = ()
    captures: tuple[Captured, ...] = ()
    scalars: tuple[Var, ...] = ()
    pooled: tuple[Pooled, ...] = ()
    reasons: tuple[str, ...] = field(default=(), compare=False)  # why one pass is not enough
    powers_of_two: bool = False  # LOGIT is in powers of two, logit / ln 2 (passes/powers_of_two.py)

    @property
    def row_outputs(self) -> tuple[str, ...]:
        """What a call can hand out beside the output: saved row values, then pooled weights."""
        return (*(name for name, _ in self.saved), *(p.name for p in self.pooled))

    @property
    def saved_vars(self) -> tuple[Var, ...]:
        return tuple(saved_var(name) for name, _ in self.saved)


def saved_var(name: str) -> Var:
    """The variable under which the backward methods, and later passes, read a row value."""
    return Var(name, DType.FLOAT, ("q",))


def d_saved_var(name: str) -> Var:
    """d(loss)/d(saved row value), for row values that a user has used in a loss."""
    return Var(f"d_{name}", DType.FLOAT, ("q",))


@dataclass(frozen=True, slots=True)
class ListedBlocks:
    """Pairs of blocks come from lists, which are data of a call (docs/adr/0018): what is compiled in.

    q, kv: positions of a block; q is 0 where one block holds every query. heads: "heads", or "kv_heads" where the query
    heads of a group share their lists. A pair of blocks in the list of full ones is visible whatever the mask says; in
    that of partial ones the mask says; any other is hidden. ragged: a block in the list of full ones may stick out
    beyond the end of an axis.

    tested: the lists know nothing of the mask, which is asked in all of them, and of the ends of the axes. A block in
    the list of partial ones is cut into `parts` of queries and of keys, and a bit for each pair of parts says whether
    it is visible; where that is (0, 0) there are no partial blocks. part_rows: rows of a part of queries. group: query
    heads whose rows lie side by side, as `passes/pack_heads.py` says.
    """

    q: int
    kv: int
    heads: str = "kv_heads"
    ragged: bool = False
    tested: bool = False
    parts: tuple[int, int] = (0, 0)
    part_rows: int = 0
    group: int = 1

    @property
    def words(self) -> int:
        """How many words of 32 bits each partial block has."""
        return -(-self.parts[0] * self.parts[1] // 32)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The lists that there are."""
        return ("full",) if self.tested and self.parts == (0, 0) else ("partial", "full")

    def block(self, axis: str) -> int:
        return self.q if axis == "q" else self.kv


@dataclass(frozen=True, slots=True)
class Sequences:
    """A call brings sequences of lengths of their own, in tables (docs/adr/0024): what is known of how they lie.

    packed: one after the other along one axis of rows, without a batch; else each in its place of the batch, from a
    row of its own on. Kernels are the same for both. Positions count from a sequence's first row, and BATCH is its
    number.
    page: K and V lie in pages of so many rows, anywhere in a cache, and a table says which (docs/adr/0027); `packed` is
    then about q alone. 0: they lie as q does.
    listed: the rows of packed sequences lie anywhere, and two more tables name each of them: tensors with D or Dv
    columns keep that order, row values are in the order of the sequences.
    """

    packed: bool
    page: int = 0
    listed: bool = False


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention, fully described: the compiler's input.

    element: storage of q, k, v and o. dim_qk, dim_v: head dimensions, compile-time constants.
    listed: the sizes of the blocks whose lists a call brings; None: the mask alone says what is visible.
    sequences: how sequences lie whose tables a call brings; None: every row of the batch is one, of the same length.
    cache: how k and v lie where a call brings scales for them (docs/adr/0029); None: as q does.
    values_in_keys: V is the first columns of K, in the same memory, and forward kernels load its tiles once.
    Everything else (batch, heads, lengths, strides, scale, captured numbers) is a run-time argument.
    """

    name: str = field(compare=False)
    score: ScalarFn | None
    mask: ScalarFn | None
    rule: OnlineRule
    element: Storage
    dim_qk: int
    dim_v: int
    listed: ListedBlocks | None = None
    sequences: Sequences | None = None
    cache: Storage | None = None
    values_in_keys: bool = False

    @property
    def functions(self) -> tuple[ScalarFn, ...]:
        return tuple(f for f in (self.score, self.mask) if f is not None)

    @property
    def captures(self) -> tuple[Captured, ...]:
        """Captured tensors of all functions and of the rule, each once, in order of first use."""
        return tuple(dict.fromkeys(c for f in (*self.functions, self.rule) for c in f.captures))

    @property
    def scalars(self) -> tuple[Var, ...]:
        return tuple(dict.fromkeys(s for f in (*self.functions, self.rule) for s in f.scalars))

    @property
    def differentiable_captures(self) -> tuple[Captured, ...]:
        """Floating tensors that score_mod or the rule reads: a mask has no gradient."""
        read = (*(self.score.captures if self.score else ()), *self.rule.captures)
        return tuple(dict.fromkeys(c for c in read if c.storage.floating))
