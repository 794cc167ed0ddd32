"""Names in generated C++: what is taken, and how a kernel's own names keep clear of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

from attn_engine.ir.expr import Expr, Load, Var, loads, transform, variables
from attn_engine.ir.tile import (
    Accumulate,
    Choose,
    If,
    Kernel,
    Let,
    Loop,
    Narrow,
    Section,
    Stmt,
    StoreTile,
    expressions,
    walk,
)

INCLUDE = Path(__file__).parent / "include"
Change = Callable[[Expr], Expr]

KEYWORDS = frozenset(
    """alignas alignof and and_eq asm auto bitand bitor bool break case catch char char8_t char16_t char32_t class compl
    concept const consteval constexpr constinit const_cast continue co_await co_return co_yield decltype default delete
    do double dynamic_cast else enum explicit export extern false float for friend goto if inline int long mutable
    namespace new noexcept not not_eq nullptr operator or or_eq private protected public register reinterpret_cast
    requires return short signed sizeof static static_assert static_cast struct switch template this thread_local throw
    true try typedef typeid typename union unsigned using virtual void volatile wchar_t while xor xor_eq linux unix
    main std errno assert stdin stdout stderr INFINITY NAN EOF NULL""".split()
)
LOCALS = frozenset(
    """arguments scratch row block column sums r lane q_rows kv_rows task tasks tile_task Arguments Scratch D DV
    BLOCK_Q BLOCK_KV partial_step full_step step next_task floor_div floor_mod int64_t int32_t int16_t int8_t uint8_t
    aligned_alloc free""".split()
)
# Names that the printed file spells by itself. No name of a user or of a header may be one of them (both are tested).
FIXED = frozenset(
    """split batch head kv_head tile turn q_start kv_start q_idx kv_idx d_idx dv_idx
    batches heads kv_heads q_len kv_len""".split()
)
# What the printed file calls the arrays, rows and pairs of a value, and the rows of a tensor.
AROUND_VALUES = (
    "{}_tile", "{}_packed", "{}_packed_pairs", "{}_spare", "{}_numbers", "{}_rows", "{}_pairs", "even_{}",
)  # fmt: skip
AROUND_TENSORS = ("{}_matrix",)


@cache
def header_names() -> frozenset[str]:
    """Functions, types, constants and macros of the headers."""
    text = "\n".join(path.read_text() for path in sorted(INCLUDE.glob("*.h")))
    code = re.sub(r"//.*", "", text)
    found = set(re.findall(r"(?:INLINE|OUTLINE|constexpr)\s[^;{(=]*?\b(\w+)\s*[({=]", code))
    found |= set(re.findall(r"(?:\b(?:struct|using|namespace)|#define)\s+(\w+)", code))
    found |= set(re.findall(r"\b(?:BY_LIBRARY|OF_NUMBER)\((\w+)\)", code))
    found |= set(re.findall(r"\b([A-Z][A-Z_]+)\s*=", code))
    return frozenset(found)


def with_legal_names(kernel: Kernel) -> Kernel:
    """The kernel with an underscore after every name that C++, the headers or the printed file have taken."""
    names = used_names(kernel)
    taken = (KEYWORDS | LOCALS | header_names() | names_around(kernel)) - FIXED
    new: dict[str, str] = {}
    for name in sorted(names & taken):
        legal = name + "_"
        while legal in names or legal in taken:
            legal += "_"
        new[name] = legal
    if not new:
        return kernel

    def change(e: Expr) -> Expr | None:
        match e:
            case Var(name, kind, spans) if name in new:
                return Var(new[name], kind, spans)
            case Load(tensor, kind, indices) if tensor in new:
                return Load(new[tensor], kind, indices)
            case _:
                return None

    return replace(
        kernel,
        params=tuple(replace(p, name=new.get(p.name, p.name)) for p in kernel.params),
        scalars=tuple(replace(v, name=new.get(v.name, v.name)) for v in kernel.scalars),
        body=_renamed(kernel.body, new, lambda e: transform(e, change)),
    )


def names_around(kernel: Kernel) -> set[str]:
    """Names that the printed file makes from those of the kernel's values and tensors."""
    values = {s.name for s in walk(kernel.body) if isinstance(s, Let)}
    around = {form.format(name) for name in values for form in AROUND_VALUES}
    return around | {form.format(p.name) for p in kernel.params for form in AROUND_TENSORS}


def used_names(kernel: Kernel) -> set[str]:
    names = {p.name for p in kernel.params} | {v.name for v in kernel.scalars}
    for s in walk(kernel.body):
        for e in expressions(s):
            names |= {v.name for v in variables(e)} | {x.tensor for x in loads(e)}
        if isinstance(s, Let):
            names.add(s.name)
    return names


def _renamed(body: tuple[Stmt, ...], new: dict[str, str], change: Change) -> tuple[Stmt, ...]:
    done: list[Stmt] = []
    for s in body:
        match s:
            case Let(name, value, source):
                done.append(Let(new.get(name, name), change(value), source))
            case Loop(_, lo, hi, _, inner):
                done.append(replace(s, lo=change(lo), hi=change(hi), body=_renamed(inner, new, change)))
            case If(condition, inner):
                done.append(replace(s, condition=change(condition), body=_renamed(inner, new, change)))
            case StoreTile(tensor, indices, value):
                done.append(
                    StoreTile(new.get(tensor, tensor), tuple(change(i) for i in indices), change(value))
                )
            case Accumulate(tensor, indices, value):
                done.append(
                    Accumulate(new.get(tensor, tensor), tuple(change(i) for i in indices), change(value))
                )
            case Narrow(tensor, _, first, length, page):
                page = page if page is None else change(page)
                done.append(
                    replace(
                        s,
                        tensor=new.get(tensor, tensor),
                        first=change(first),
                        length=change(length),
                        page=page,
                    )
                )
            case Choose(states=states, row=row, value=value, result=result, place=place):
                row, place = tuple(change(i) for i in row), tuple(change(i) for i in place)
                states, result = new.get(states, states), new.get(result, result)
                done.append(
                    replace(s, states=states, row=row, value=change(value), result=result, place=place)
                )
            case Section():
                done.append(s)
    return tuple(done)
