"""Lists of tokens: each query brings a list of keys of its own, which its heads share.

The kernels see a batch of queries. Row r of one is its head r of a kv head, key j is the token that entry j of its list
names. The user's functions still speak of the batch, the head and the positions:

    batch := query_places[batch, 0]     head := (query_places[batch, 2] + head) * heads_of_list + row
    q_idx := query_places[batch, 1]     kv_idx := token_lists[batch, key]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from attn_engine.ir.expr import Const, Expr, Load, Var, loads, postorder, substitute
from attn_engine.ir.ops import DType, Storage
from attn_engine.ir.program import BATCH, HEAD, KV_IDX, Q_IDX, Attention, Captured, ScalarFn, Sequences

QUERY_PLACES = Captured("query_places", Storage.INT32, 2)  # (queries, 3): batch, position, first kv head
TOKEN_LISTS = Captured("token_lists", Storage.INT32, 2)  # (queries, longest list): positions of keys
HEADS_OF_LIST = Var(
    "heads_of_list", DType.INT
)  # query heads per kv head: a number of the program, where it is read

_PLACE = {n: Load(QUERY_PLACES.name, DType.INT, (BATCH, Const(n))) for n in range(3)}
_MEANINGS: dict[Expr, Expr] = {
    BATCH: _PLACE[0],
    Q_IDX: _PLACE[1],
    HEAD: (_PLACE[2] + HEAD) * HEADS_OF_LIST + Q_IDX,
    KV_IDX: Load(TOKEN_LISTS.name, DType.INT, (BATCH, KV_IDX)),
}


def over_token_lists(program: Attention, *, ragged: bool) -> Attention:
    """The same attention for queries that bring lists; ragged: of lengths of their own, the spans of `sequences`.

    >>> fn = _in_lists(ScalarFn("causal", KV_IDX <= Q_IDX))
    >>> [c.name for c in fn.captures]
    ['query_places', 'token_lists']
    """
    score, mask = (f and _in_lists(f) for f in (program.score, program.mask))
    sequences = Sequences(packed=False) if ragged else None
    return replace(program, score=score, mask=mask, sequences=sequences)


def _in_lists(fn: ScalarFn) -> ScalarFn:
    result = substitute(fn.result, _MEANINGS)

    def moved(notes: Mapping[Expr, str]) -> dict[Expr, str]:
        return {substitute(node, _MEANINGS): text for node, text in notes.items()}

    names = {**moved(fn.names), _MEANINGS[Q_IDX]: "position", _MEANINGS[KV_IDX]: "token"}
    read = {x.tensor for x in loads(result)}
    tables = tuple(c for c in (QUERY_PLACES, TOKEN_LISTS) if c.name in read)
    return replace(
        fn,
        result=result,
        captures=(*fn.captures, *tables),
        scalars=(*fn.scalars, HEADS_OF_LIST) if HEADS_OF_LIST in postorder(result) else fn.scalars,
        names=names,
        sources=moved(fn.sources),
    )
