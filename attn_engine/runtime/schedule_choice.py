"""What each backend says of schedules: which may run, which are worth measuring, and what a tuned one is for."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from attn_engine.codegen.footprint import footprint
from attn_engine.codegen.gpu_schedule import default_schedule, kernels_of, launches_worth_trying
from attn_engine.codegen.resources import resources
from attn_engine.codegen.schedule import Edges, Gradients, Launch, Schedule, within_blocks
from attn_engine.codegen.targets import Target
from attn_engine.errors import IllegalSchedule, NothingToTune, OutOfSharedMemory, WrongArgument
from attn_engine.ir.program import Attention
from attn_engine.runtime.backend import Backend
from attn_engine.runtime.gpu_target import current_device_name, current_target
from attn_engine.runtime.schedule_store import Place
from attn_engine.version import VERSION

GPUS = ("triton", "triton-interpreter")
MOST_ROWS = {"cpu": 512, "torch": 4096}
CPU_KV = (32, 64, 128, 256)
CPU_Q = (32, 64, 128)
SMALLEST_TILE = 16


def check_schedule(program: Attention, backend: Backend, schedule: object, target: Target) -> Schedule:
    """A schedule that a user gave, once it can run; raises WrongArgument, IllegalSchedule, OutOfSharedMemory."""
    if not isinstance(schedule, Schedule):
        instead = "Make one, or change some fields of a default one: replace(engine.schedule, block_kv=32)."
        raise WrongArgument(argument="schedule", got=schedule, expected="a Schedule", instead=instead)
    most = MOST_ROWS.get(backend.name, 256)
    for name, n in _tile_sizes(schedule):
        if type(n) is not int or not SMALLEST_TILE <= n <= most or n & (n - 1):
            expected = f"a power of two from {SMALLEST_TILE} to {most}"
            raise IllegalSchedule(field=name, got=n, expected=expected, instead=_ADVICE)
    if backend.name == "cpu":
        _check_cpu(program, backend, schedule)
    elif backend.name in GPUS:
        _check_gpu(program, backend, schedule, target)
    return schedule


_ADVICE = "Change a default one: replace(engine.schedule, block_kv=32)."


def _tile_sizes(s: Schedule) -> Iterator[tuple[str, object]]:
    for name in ("block_q", "block_kv", "backward_q", "backward_kv"):
        yield name, getattr(s, name)
    if s.d_query is not None:
        yield "d_query.q", s.d_query.q
        yield "d_query.kv", s.d_query.kv
    if s.delta_rows:
        yield "delta_rows", s.delta_rows


def _check_cpu(program: Attention, backend: Backend, schedule: Schedule) -> None:
    """Loops and lanes are the target's; tiles are free."""
    default = backend.schedule(program)
    for name in ("edges", "gradients", "lanes", "backward_lanes"):
        if (got := getattr(schedule, name)) is not (wanted := getattr(default, name)):
            raise IllegalSchedule(
                field=name, got=got, expected=f"{wanted}, which the CPU backend needs", instead=_ADVICE
            )


def _check_gpu(program: Attention, backend: Backend, schedule: Schedule, target: Target) -> None:
    for name, wanted in (("edges", Edges.BRANCH), ("gradients", Gradients.TWO_KERNELS)):
        if (got := getattr(schedule, name)) is not wanted:
            raise IllegalSchedule(
                field=name, got=got, expected=f"{wanted}, which GPU backends need", instead=_ADVICE
            )
    launches = {k.name: (k, schedule.launch(k.name)) for k in kernels_of(program)}
    for name, (kernel, launch) in launches.items():
        for field, n, most in (("warps", launch.num_warps, 16), ("stages", launch.num_stages, 8)):
            if type(n) is not int or not 1 <= n <= most or (field == "warps" and n & (n - 1)):
                expected = (
                    f"1, 2, 4, 8 or 16 warps of {name}" if field == "warps" else f"1 to 8 stages of {name}"
                )
                raise IllegalSchedule(field=field, got=n, expected=expected, instead=_ADVICE)
        need = resources(footprint(kernel).sized(launch.q, launch.kv), launch, target)
        if need.shared_bytes > target.shared_limit and backend.name == "triton":
            instead = "Take smaller tiles or fewer stages; engine.schedule is the default, which fits."
            raise OutOfSharedMemory(
                kernel=name, needed=need.shared_bytes, tiles=launch, target=target.name,
                limit=target.shared_limit, instead=instead,
            )  # fmt: skip


def schedule_on(program: Attention, backend: Backend, target: Target) -> Schedule:
    """The default on a GPU that need not be here; that of the machine for backends that are not for GPUs."""
    if backend.name not in GPUS:
        return within_blocks(backend.schedule(program), program.listed)
    return within_blocks(default_schedule(program, target), program.listed)


def place_of(backend: Backend) -> Place:
    """What a tuned schedule of this backend is for; raises NothingToTune where nothing would be measured."""
    if backend.name == "cpu":
        from attn_engine.runtime.cpu_compile import find_compiler

        compiler = find_compiler()
        version = compiler.version.splitlines()[0] if compiler else ""
        target = f"{platform.machine()}, {_processor_name()}, {torch.get_num_threads()} threads"
        return Place(backend.name, target, f"attn_engine {VERSION}, {version}")
    if backend.name == "triton" and torch.cuda.is_available():
        import triton

        device = f"{current_target().name}, {current_device_name()}"
        return Place(backend.name, device, f"attn_engine {VERSION}, triton {triton.__version__}")
    reason = (
        "there is no CUDA device here" if backend.name == "triton" else "it is there to check, not to be fast"
    )
    instead = 'Leave tune=False, or tune on the machine that runs the kernels (backend "cpu" or "triton").'
    raise NothingToTune(backend=backend.name, reason=reason, instead=instead)


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "CPU part")))
    return next(named, platform.processor())


def candidates(program: Attention, backend: Backend, default: Schedule, part: str) -> list[Schedule]:
    """Schedules worth measuring against the default; they differ from it in one direction."""
    if backend.name == "cpu":
        return list(_cpu_candidates(default, part))
    return list(_gpu_candidates(program, default, part, current_target()))


def _cpu_candidates(default: Schedule, part: str) -> Iterator[Schedule]:
    """Lanes are the machine's; what is tried is how many keys and queries a tile has besides."""
    if part == "forward":
        for kv in sorted(CPU_KV, key=lambda n: abs(n - default.block_kv)):
            yield replace(default, block_kv=kv)
        return
    for q in CPU_Q:
        yield replace(default, backward_q=q)
    for kv in CPU_Q:
        yield replace(default, backward_kv=kv)


def _gpu_candidates(program: Attention, default: Schedule, part: str, target: Target) -> Iterator[Schedule]:
    forward, d_query, d_key_value = (launches_worth_trying(k, target) for k in kernels_of(program))
    if part == "forward":
        for launch in forward:
            yield with_forward(default, launch)
        return
    for launch in d_key_value:
        yield with_d_key_value(default, launch)
    for launch in d_query:
        yield replace(default, d_query=launch)


def with_forward(s: Schedule, launch: Launch) -> Schedule:
    return replace(
        s, block_q=launch.q, block_kv=launch.kv, num_warps=launch.num_warps, num_stages=launch.num_stages
    )


def with_d_key_value(s: Schedule, launch: Launch) -> Schedule:
    return replace(
        s,
        backward_q=launch.q,
        backward_kv=launch.kv,
        backward_warps=launch.num_warps,
        backward_stages=launch.num_stages,
    )
