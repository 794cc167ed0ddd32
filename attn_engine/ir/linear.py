"""Linear attentions: what is computed, before any chunk is thought of.

    S~_t = Diag(e^{decay_t}) S_{t-1}
    S_t  = S~_t + write_t (value_t - S~_t^T erase_t)^T        (no erase: no correction)
    o_t  = S_t^T query_t                              (exclusive: S_{t-1}^T query_t + (bonus_t . query_t) value_t)

query, write, erase, bonus (d), value (dv) and decay (nothing, or d) are expressions of one token: what the user's mods
make of its rows of q, k, v, decay and beta. Frozen and hashable, so a program is its own cache key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from attn_engine.ir.expr import Expr, Var
from attn_engine.ir.ops import DType, Storage
from attn_engine.ir.program import Captured

# The inputs of a token's functions. Its row of q and k spans "d", its row of v "dv".
QUERY = Var("query", DType.FLOAT, ("q", "d"))
KEY = Var("key", DType.FLOAT, ("q", "d"))
VALUE = Var("value", DType.FLOAT, ("q", "dv"))
BETA = Var("beta", DType.FLOAT, ("q",))
T_IDX = Var("t", DType.INT, ("q",))  # the token's position in the tensors
D_IDX = Var("d_idx", DType.INT, ("d",))
DV_IDX = Var("dv_idx", DType.INT, ("dv",))

# The inputs of what is done to an output row: the sum of the weights that made it, and the row.
WEIGHT_SUM = Var("weight_sum", DType.FLOAT, ("q",))
OUT_ROW = Var("out_row", DType.FLOAT, ("q", "dv"))


class Rank(Enum):
    """What a decay depends on besides the head."""

    NONE = "none"
    HEAD = "head"
    TOKEN = "token"
    VECTOR = "vector"

    @property
    def axes(self) -> tuple[str, ...]:
        return {"none": (), "head": (), "token": ("q",), "vector": ("q", "d")}[self.value]


def decay_var(rank: Rank) -> Var:
    """A call's decay, as a decay_mod receives it."""
    return Var("decay", DType.FLOAT, rank.axes)


@dataclass(frozen=True, slots=True)
class LinearProgram:
    """One linear attention, fully described.

    decay_given, decay_storage, beta_storage: how a call's decay and beta lie; the decay that is used, after decay_mod,
    may have another rank. divisor: what an output row is divided by, of WEIGHT_SUM; None: nothing.
    reverse: tokens are taken from the last to the first. Batch, heads, lengths and strides are run-time arguments.
    """

    name: str = field(compare=False)
    query: Expr
    write: Expr
    value: Expr
    decay: Expr | None
    erase: Expr | None
    bonus: Expr | None
    divisor: Expr | None
    exclusive: bool
    reverse: bool
    element: Storage
    dim_qk: int
    dim_v: int
    decay_given: Rank
    decay_storage: Storage
    beta_storage: Storage | None
    captures: tuple[Captured, ...] = ()
    scalars: tuple[Var, ...] = ()
    names: Mapping[Expr, str] = field(default_factory=dict[Expr, str], compare=False, repr=False)
    sources: Mapping[Expr, str] = field(default_factory=dict[Expr, str], compare=False, repr=False)

    @property
    def rank(self) -> Rank:
        """What the decay depends on."""
        if self.decay is None:
            return Rank.NONE
        return Rank.VECTOR if "d" in self.decay.axes else Rank.TOKEN if "q" in self.decay.axes else Rank.HEAD

    @property
    def corrected(self) -> bool:
        return self.erase is not None

    @property
    def state_columns(self) -> int:
        """Columns of the state: those of v, and one for the sum of the weights where that is divided by."""
        return self.dim_v + (self.divisor is not None)

    @property
    def functions(self) -> tuple[Expr, ...]:
        """Everything that is computed for a token."""
        found = (self.query, self.write, self.value, self.decay, self.erase, self.bonus, self.divisor)
        return tuple(f for f in found if f is not None)
