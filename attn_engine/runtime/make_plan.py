"""Plans of the passes of one kind of call, made from the tensors of such a call.

Planned are passes whose kernels can be prepared and need nothing else from torch: no tables of tiles, no copies of
packed heads, no passes before the gradient, no gradients of captured tensors. The rest takes the way of `compiled.py`,
which does the same for any call; both choose packing, splits and kernels by the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Protocol

from torch import Tensor

from attn_engine.codegen.schedule import Gradients
from attn_engine.ir.ops import Number
from attn_engine.ir.passes.pack_heads import Packing
from attn_engine.ir.program import GROUP, Attention
from attn_engine.runtime.backward_shares import key_shares, query_shares
from attn_engine.runtime.compiled import CompiledAttention, Direction, sizes_of, sizes_of_call
from attn_engine.runtime.few_rows import choose_packing, choose_splits
from attn_engine.runtime.gradient_parts import gradient_parts
from attn_engine.runtime.launch_plan import (
    MOST_BACKWARD_PLANS,
    BackwardPlan,
    CallKind,
    ForwardPlan,
    Layout,
    Offsets,
    Prepared,
)
from attn_engine.runtime.sequences import OverSequences, SequenceTables, grouped, sequences_of_call
from attn_engine.runtime.strides import empty_ordered_like

Logical = Callable[[Tensor], Tensor]
LINE = 64  # bytes between tensors of one buffer that different threads write


class Planned(Protocol):
    """What a call means besides its tensors (`operator.Call`)."""

    @property
    def compiled(self) -> CompiledAttention: ...

    def logical(self, x: Tensor) -> Tensor: ...


def planned_forward(
    call: Planned, kind: CallKind, q: Tensor, k: Tensor, v: Tensor, captured: Mapping[str, Tensor]
) -> ForwardPlan | None:
    """The plan of this kind of call, made when the second one comes: where the keys grow from call to call, none would
    be used again."""
    if kind.calls < 2:
        kind.calls += 1
        if kind.calls >= 2:
            kind.forward = forward_plan(call.compiled, call.logical, q, k, v, captured)
    return kind.forward


def planned_backward(
    call: Planned, kind: CallKind, d_out: Tensor, stored: Sequence[Tensor], captured: Mapping[str, Tensor]
) -> BackwardPlan | None:
    """The plan of backward passes whose tensors lie like these: d_out, and what hooks made of the stored tensors, may
    lie otherwise than in the forward pass."""
    key = tuple([(x.shape, x.stride()) for x in (d_out, *stored, *captured.values())])
    if key not in kind.backward:
        if len(kind.backward) >= MOST_BACKWARD_PLANS:
            kind.backward.clear()
        kind.backward[key] = backward_plan(call.compiled, call.logical, d_out, stored, captured)
    return kind.backward.get(key)


def forward_plan(
    compiled: CompiledAttention,
    logical: Logical,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Mapping[str, Tensor],
) -> ForwardPlan | None:
    """The plan of calls like this one; None where it needs more than kernels. `logical` views a tensor by head."""
    output = empty_ordered_like(q, v.shape[-1])
    out_layout, out = Layout.of(output), Layout.of(logical(output))
    q, k, v = logical(q), logical(k), logical(v)
    compiled = compiled.of_values(k, v, captured)
    tables = sequences_of_call(compiled.program, captured)
    if tables is not None and not plannable(compiled.program, tables, q):
        return None
    query_rows = q.shape[2] if tables is None else tables.longest["q"]
    packing = choose_packing(compiled.program, compiled.schedule, q, k, query_rows)
    if packing is Packing.QUERIES or compiled.program.rule.pooled:
        return None
    rows, fixed, queries = q.shape[:3], dict[str, Number](), Layout.of(q)
    if packing is Packing.ONE_QUERY:
        group = fixed[GROUP.name] = q.shape[1] // k.shape[1]
        queries, out = by_group(queries, k.shape[1]), by_group(out, k.shape[1])
        q = q.as_strided(queries.shape, queries.stride)
        if tables is not None:
            captured, tables = grouped(captured, tables, group)
            query_rows *= group
    compiled = compiled.of_rows(packing, q.shape[2] if tables is None else query_rows)
    sizes = sizes_of_call(q, k, tables)
    splits = choose_splits(compiled.program, compiled.schedule, q, k, captured, sizes["kv_len"])
    partials, offsets, elements = dict[str, Layout](), (), 0
    if splits > 1:
        sizes["splits"] = fixed["splits"] = splits
        partials = {n: Layout.contiguous(x) for n, x in compiled.partial_shapes(q, splits).items()}
        offsets, elements = in_one_buffer(partials, compiled.compute.itemsize)
    names = compiled.saved_names
    layouts = {"Q": queries, "K": Layout.of(k), "V": Layout.of(v), "O": out, **partials}
    layouts |= dict.fromkeys(names, Layout.contiguous(q.shape[:3]))
    layouts |= {name: Layout.of(x) for name, x in captured.items()}
    kernels = prepared(compiled.kernels("forward" if splits == 1 else "decode"), layouts, sizes, captured)
    if kernels is None:
        return None
    step = prod(rows) * compiled.compute.itemsize
    return ForwardPlan(
        kernels=kernels,
        element=q.dtype,
        compute=compiled.compute,
        out=out_layout,
        rows=(len(names), *rows),
        saved=tuple((name, i * step) for i, name in enumerate(names)),
        partials=offsets,
        partial_elements=elements,
        fixed=fixed,
    )


def backward_plan(
    compiled: CompiledAttention,
    logical: Logical,
    d_out: Tensor,
    stored: Sequence[Tensor],
    captured: Mapping[str, Tensor],
) -> BackwardPlan | None:
    """The plan of backward passes like this one; `stored` is q, k, v, o and the saved row values in one tensor."""
    q, k, v, out, rows = stored
    made = [empty_ordered_like(x) for x in (q, k, v)]
    dq, dk, dv = map(logical, made)
    queries, sizes = logical(q), sizes_of(logical(q), logical(k))
    compiled = compiled.of_shares((dq, dk, dv), sizes)
    direction = compiled.kernels("backward")
    if compiled.schedule.gradients is not Gradients.ONE_KERNEL or direction.adjoints:
        return None
    schedule, compute, names = compiled.schedule, compiled.compute, compiled.saved_names
    if direction.shares_queries:
        splits = query_shares(sizes, schedule.backward_q)
    else:
        splits = key_shares(sizes, schedule.backward_kv)
    sizes["splits"] = splits
    places = dq.to("meta"), dk.to("meta"), dv.to("meta")  # only how the parts lie is asked here
    parts = gradient_parts(direction.shares_queries, places, splits, compute)
    tensors = {"Q": queries, "K": logical(k), "V": logical(v), "O": logical(out), "dO": logical(d_out)}
    tensors |= {"dK": dk, "dV": dv, **parts.tensors()}
    tensors |= {**dict(zip(names, rows, strict=True)), **captured}
    delta = tuple(queries.shape[:3])
    layouts = {"Delta": Layout.contiguous(delta), **{name: Layout.of(x) for name, x in tensors.items()}}
    kernels = prepared(direction, layouts, sizes, captured)
    if kernels is None:
        return None
    step = rows.stride(0) * compute.itemsize
    return BackwardPlan(
        kernels=kernels,
        element=q.dtype,
        compute=compute,
        gradients=tuple(map(Layout.of, made)),
        delta=delta,
        saved=tuple((name, i * step) for i, name in enumerate(names)),
        splits=splits,
        shares_queries=direction.shares_queries,
        fixed={"splits": splits},
        logical=logical,
    )


def plannable(program: Attention, tables: SequenceTables, q: Tensor) -> bool:
    """Whether a call over sequences needs kernels alone: a batch of them, and a sequence for every row of q."""
    packed = program.sequences is not None and program.sequences.packed
    return not packed and tables.count > 0 and tables.rows["q"] == q.shape[0] * q.shape[2]


def prepared(
    direction: Direction,
    layouts: Mapping[str, Layout],
    sizes: Mapping[str, int],
    captured: Mapping[str, Tensor],
) -> tuple[Prepared, ...] | None:
    """The kernels of a direction, each prepared; None where one cannot be or reads tables that a call has to make."""
    found: list[Prepared] = []
    for kernel, tables in zip(direction.kernels, direction.tables, strict=True):
        if tables:
            return None
        if isinstance(kernel, OverSequences):
            made = kernel.prepare(layouts, sizes, captured)
        else:
            prepare = getattr(kernel, "prepare", None)
            made = None if prepare is None else prepare(layouts, sizes)
        if made is None:
            return None
        found.append(made)
    return tuple(found)


def by_group(x: Layout, kv_heads: int) -> Layout:
    """(B, H, 1, D) as (B, Hkv, group, D)."""
    batches, heads, _, dim = x.shape
    batch, head, _, column = x.stride
    group = heads // kv_heads
    return Layout((batches, kv_heads, group, dim), (batch, head * group, head, column))


def in_one_buffer(layouts: Mapping[str, Layout], itemsize: int) -> tuple[Offsets, int]:
    """Where each tensor begins in a buffer that holds them one after the other, in bytes, and its elements in all."""
    offsets: list[tuple[str, int]] = []
    end = 0
    for name, layout in layouts.items():
        offsets.append((name, end))
        end += -(-prod(layout.shape) * itemsize // LINE) * LINE
    return tuple(offsets), end // itemsize
