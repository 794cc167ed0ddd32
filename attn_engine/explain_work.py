"""The part of an explanation that counts: how kernels fill a GPU, what a call computes and moves, what bounds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from attn_engine.codegen.footprint import footprint
from attn_engine.codegen.gpu_schedule import kernels_of
from attn_engine.codegen.resources import resources
from attn_engine.codegen.targets import Device, Target, devices_of
from attn_engine.codegen.work import Sizes, Work, backward_work, forward_work
from attn_engine.errors import UnknownOption
from attn_engine.ir.ops import Number
from attn_engine.runtime.compiled import CompiledAttention

Known = Sequence[tuple[int | None, int | None, int | None]]
ASSUMED = Sizes(1, 16, 16, 4096, 4096)


def sizes_of_call(known: Known, given: Mapping[str, int]) -> tuple[Sizes, tuple[str, ...]]:
    """What work is counted for: given sizes, else those that the meta_tensors fix, else usual ones; and the names of
    the last kind. known: (batch, heads, length) of q, k and v."""
    names = [f.name for f in fields(Sizes)]
    for name, value in given.items():
        if name not in names or type(value) is not int or value < 1:
            raise UnknownOption(
                option=name,
                value=value,
                where="engine.explain",
                known=", ".join(f"{n} (at least 1)" for n in names),
            )
    (batches, heads, q_len), (_, kv_heads, kv_len), _ = known
    fixed = {"batches": batches, "heads": heads, "kv_heads": kv_heads, "q_len": q_len, "kv_len": kv_len}
    found = {n: given.get(n) or fixed[n] for n in names}
    found["kv_heads"] = found["kv_heads"] or found["heads"]
    found["heads"] = found["heads"] or found["kv_heads"]
    found["q_len"] = found["q_len"] or found["kv_len"]
    found["kv_len"] = found["kv_len"] or found["q_len"]
    sizes = Sizes(**{n: x or getattr(ASSUMED, n) for n, x in found.items()})
    return sizes, tuple(n for n, x in found.items() if x is None)


def occupancy_text(compiled: CompiledAttention, target: Target) -> str:
    """Predicted shared memory, registers and blocks of the main kernels."""
    lines: list[str] = []
    for kernel in kernels_of(compiled.program):
        launch = compiled.schedule.launch(kernel.name)
        need = resources(footprint(kernel).sized(launch.q, launch.kv), launch, target)
        lines.append(f"{kernel.name} in {launch}: {need}")
    return "\n".join([f"predicted for {target.name}", *lines])


def work_of(compiled: CompiledAttention, sizes: Sizes, numbers: Mapping[str, Number]) -> dict[str, Work]:
    """By direction."""
    counted = (compiled.program, compiled.schedule, sizes, numbers)
    return {"forward": forward_work(*counted), "backward": backward_work(*counted)}


def work_text(work: Mapping[str, Work], sizes: Sizes, assumed: tuple[str, ...]) -> str:
    said = f"; {', '.join(assumed)} assumed: explain({assumed[0]}=...) counts for others" if assumed else ""
    lines = [f"for {sizes}{said}"]
    for name, w in work.items():
        most = "" if w.exact else "at most "
        share = "all pairs" if w.visited == 1 else f"the {100 * w.visited:.1f} % of pairs in visited tiles"
        lines.append(
            f"{name}: {most}{_amount(w.flops, 'FLOP')} in {share}, {_amount(w.read, 'B')} read, "
            f"{_amount(w.written, 'B')} written: {w.intensity:.0f} FLOP per byte"
        )
    return "\n".join(lines)


def bound_text(compiled: CompiledAttention, work: Mapping[str, Work], target: Target) -> str:
    """The least time that a device of the target needs, from its vendor's figures; nothing is measured."""
    lines = ["the least that vendors' figures allow, not a measurement"]
    for device in devices_of(target.name):
        times = ", ".join(f"{name} {_bound(compiled, w, device)}" for name, w in work.items())
        lines.append(f"{device.name}: {times}")
    return "\n".join(lines)


def _bound(compiled: CompiledAttention, w: Work, device: Device) -> str:
    compute = w.flops / (device.tflops(compiled.program.element) * 1e12)
    memory = (w.read + w.written) / (device.gigabytes * 1e9)
    by = "by products" if compute >= memory else "by memory"
    return f"{_amount(max(compute, memory), 's')} ({by})"


_PREFIXES = (
    (1e12, "T"),
    (1e9, "G"),
    (1e6, "M"),
    (1e3, "k"),
    (1.0, ""),
    (1e-3, "m"),
    (1e-6, "u"),
    (1e-9, "n"),
)


def _amount(x: float, unit: str) -> str:
    scale, prefix = next(((s, p) for s, p in _PREFIXES if x >= s), (1.0, ""))
    return f"{x / scale:.3g} {prefix}{unit}"
