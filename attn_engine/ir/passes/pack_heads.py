"""Grouped heads as query rows: the query heads that share a kv head become the rows of one tile.

The packed program sees Hkv heads of Sq * group rows each, row = q * group + g. Its functions still speak of the user's
head and position:

    head := head * group + row % group       q_idx := row // group

With one query there is nothing to divide: head := head * group + row, q_idx := 0, and masks stay linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from functools import lru_cache

from attn_engine.ir.expr import Const, Expr, postorder, substitute
from attn_engine.ir.program import GROUP, HEAD, Q_IDX, Attention, OnlineRule, ScalarFn


class Packing(Enum):
    """How query heads lie in the rows of a tile."""

    NONE = "one query head per tile"
    ONE_QUERY = "the heads of a group, one query each"
    QUERIES = "the heads of a group, for every query"


@lru_cache(maxsize=256)
def packable(rule: OnlineRule) -> bool:
    """Whether heads can be packed: the normaliser itself must not ask for the head or the position, nor pool."""
    if rule.pooled:
        return False
    roots = (rule.weights, *rule.new_states, rule.out_scale, rule.output, *(e for _, e in rule.saved))
    for p in rule.earlier:
        roots += (*p.new_states, *(e for _, e in p.values))
    return not {HEAD, Q_IDX} & set(postorder(*roots))


def pack_heads(program: Attention, packing: Packing, group: int | None = None) -> Attention:
    """The same attention on packed rows; where its functions need `group`, it takes that number, or it is known.

    >>> from attn_engine.ir.program import KV_IDX
    >>> _packed(ScalarFn("causal", KV_IDX <= Q_IDX), Packing.QUERIES).result is (KV_IDX <= Q_IDX // GROUP)
    True
    """
    if packing is Packing.NONE:
        return program
    assert packable(program.rule), "the normaliser asks for the head or the position"
    size = GROUP if group is None else Const(group)
    score, mask = (f and _packed(f, packing, size) for f in (program.score, program.mask))
    # Lists serve packed rows where every query is in one block.
    listed = program.listed and replace(program.listed, q=0)
    return replace(program, score=score, mask=mask, listed=listed)


def _packed(fn: ScalarFn, packing: Packing, group: Expr = GROUP) -> ScalarFn:
    position, head = _meanings(packing, group)
    moved = in_terms_of(fn, {Q_IDX: position, HEAD: head})
    names = {**moved.names, position: "position", Q_IDX % group: "head_in_group"}
    needs_group = GROUP in postorder(moved.result)
    return replace(
        moved,
        scalars=(*fn.scalars, GROUP) if needs_group else fn.scalars,
        names={node: name for node, name in names.items() if node.operands},
    )


def in_terms_of(fn: ScalarFn, replacements: Mapping[Expr, Expr]) -> ScalarFn:
    """The same function of other inputs, with the user's names and lines."""

    def moved(notes: Mapping[Expr, str]) -> dict[Expr, str]:
        return {substitute(node, inputs): text for node, text in notes.items()}

    inputs = dict(replacements)
    result, names = substitute(fn.result, inputs), moved(fn.names)
    names = {node: name for node, name in names.items() if node.operands}
    return replace(fn, result=result, names=names, sources=moved(fn.sources))


def _meanings(packing: Packing, group: Expr) -> tuple[Expr, Expr]:
    """The user's q_idx and head in terms of the row and the kv head."""
    if packing is Packing.ONE_QUERY:
        return Const(0), HEAD * group + Q_IDX
    return Q_IDX // group, HEAD * group + Q_IDX % group
