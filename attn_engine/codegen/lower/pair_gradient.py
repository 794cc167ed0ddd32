"""Kernels of their own for captured gradients that the main backward kernel cannot add up without collisions."""

from __future__ import annotations

from dataclasses import replace

from attn_engine.codegen.lower.backward import (
    ORDER_KV,
    Sweep,
    backward_kernel,
    key_loads,
    query_loads,
)
from attn_engine.codegen.lower.capture import (
    CaptureGradient,
    Route,
    added_beside_keys,
    buffer_param,
    capture_gradients,
    parallel_axes,
)
from attn_engine.codegen.lower.forward import ORDER_Q
from attn_engine.codegen.lower.score import reserved_names
from attn_engine.codegen.lower.values import BATCHES, GROUP_OF_HEADS, HEADS, KV_LEN, Q_LEN
from attn_engine.codegen.schedule import Gradients, Schedule
from attn_engine.ir.expr import Const
from attn_engine.ir.program import HEAD, Attention
from attn_engine.ir.tile import Accumulate, Kernel, Let, Loop, Stmt


def lower_pair_gradients(
    program: Attention, schedule: Schedule, learned: tuple[str, ...]
) -> tuple[Kernel, ...]:
    """A kernel for each read by pairs that the main backward kernel leaves over."""
    one_kernel = schedule.gradients is Gradients.ONE_KERNEL
    pairs = (c for c in capture_gradients(program, learned) if c.route is Route.PAIR)
    left = (c for c in pairs if not (one_kernel and added_beside_keys(c)))
    return tuple(lower_pair_gradient(program, schedule, c) for c in left)


def lower_pair_gradient(program: Attention, schedule: Schedule, capture: CaptureGradient) -> Kernel:
    """The gradient of a tensor whose index depends on both positions; loops over every axis that might collide."""
    names, grid = reserved_names(program), parallel_axes(capture.load, schedule.backward_lanes.axis)
    owned = "kv" if "kv" in grid else "q"
    loop = "q" if owned == "kv" else "kv"
    tiles = {"q": schedule.backward_q, "kv": schedule.backward_kv}
    sweep = Sweep(program, schedule, names, loop, tiles, sums_own_axis=True)
    update: list[Stmt] = [Accumulate(capture.buffer, capture.load.indices, capture.value)]
    own_loads = key_loads() if owned == "kv" else query_loads(program, names)
    swept_loads = query_loads(program, names) if owned == "kv" else key_loads()
    inner: tuple[Stmt, ...] = (
        Let("kv_head", HEAD // GROUP_OF_HEADS),
        *own_loads,
        *sweep.before,
        *sweep.loops([capture], swept_loads, update, in_loop=True),
    )
    if owned not in grid:
        length = Q_LEN if owned == "q" else KV_LEN
        end = (length + (tiles[owned] - 1)) // tiles[owned] * tiles[owned]
        inner = (Loop(f"{owned}_start", Const(0), end, owned, inner, f"{owned}_tile"),)
    for axis, count in (("head", HEADS), ("batch", BATCHES)):
        if axis not in grid:
            inner = (Loop(axis, Const(0), count, None, inner),)
    output = (buffer_param(program, capture),)
    order = ORDER_KV if owned == "kv" else ORDER_Q
    kernel = backward_kernel(program, capture.buffer, grid, order, tiles, output, [*inner], tests=sweep.tests)
    return replace(kernel, lanes=schedule.backward_lanes) if owned == schedule.backward_lanes.axis else kernel
