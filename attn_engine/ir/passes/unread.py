"""Statements of a kernel whose results nothing reads, such as scores where every visible key has the same weight."""

from __future__ import annotations

from dataclasses import replace

from attn_engine.ir.expr import Expr, variables
from attn_engine.ir.tile import If, Kernel, Let, Loop, Stmt, expressions, walk


def without_unread(kernel: Kernel) -> Kernel:
    """The kernel without assignments to names that no other statement reads."""
    while unread := _unread(kernel.body):
        kernel = replace(kernel, body=_without(kernel.body, unread))
    return kernel


def _unread(body: tuple[Stmt, ...]) -> frozenset[str]:
    made: set[str] = set()
    read: set[str] = set()
    known: dict[Expr, frozenset[str]] = {}
    for s in walk(body):
        names: set[str] = set()
        for e in expressions(s):
            if e not in known:
                known[e] = frozenset(v.name for v in variables(e))
            names |= known[e]
        if isinstance(s, Let):
            made.add(s.name)
            names.discard(s.name)  # x = x + 1 alone does not make anybody need x
        read |= names
    return frozenset(made - read)


def _without(body: tuple[Stmt, ...], names: frozenset[str]) -> tuple[Stmt, ...]:
    kept: list[Stmt] = []
    for s in body:
        if isinstance(s, Let) and s.name in names:
            continue
        kept.append(replace(s, body=_without(s.body, names)) if isinstance(s, Loop | If) else s)
    return tuple(kept)
