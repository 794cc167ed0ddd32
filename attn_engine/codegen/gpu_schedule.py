"""Schedules for GPUs: every kernel's tiles, warps and stages, chosen by the resource model for one target.

Of all launches that are legal, those that the model says do not fit are left out, and the one that it expects to be
fastest is taken. The expectation is arithmetic from vendors' figures, not a measurement: `tune=True` measures.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product

from attn_engine.codegen.compiled_launches import (
    COMPILED,
    IN_PAGES,
    OF_BYTES,
    OF_SEQUENCES,
    TESTING_TILES,
    VALUES_IN_KEYS,
)
from attn_engine.codegen.footprint import Footprint, footprint
from attn_engine.codegen.pipeline import lower
from attn_engine.codegen.resources import Resources, grouped, resources
from attn_engine.codegen.schedule import (
    MULTIPROCESSORS,
    TENSOR_MEMORY,
    Edges,
    Gradients,
    Launch,
    Schedule,
)
from attn_engine.codegen.targets import Target, devices_of
from attn_engine.codegen.tuned_defaults import TUNED
from attn_engine.ir.ops import Storage
from attn_engine.ir.passes.mask_range import plan_mask
from attn_engine.ir.passes.mask_tiles import classify_tiles
from attn_engine.ir.program import Attention
from attn_engine.ir.tile import Kernel

TILES = (16, 32, 64, 128)
WARPS = (4, 8)
STAGES = (1, 2, 3)
WORTH_TRYING = 16  # launches of a kernel
SMALLEST = Launch(16, 16, 4, 1)  # where nothing fits without spilling
# Of the cost model: seconds. A step waits for its loads and barriers unless another block runs meanwhile.
STEP_LATENCY = 1e-6
TYPICAL_LENGTH = 4096
ELEMENTWISE = 4  # instructions per element of a tile of pairs, for a normaliser and a score_mod
ALONE = 0.4  # of the peak: products of single warps on targets whose warps multiply in groups
L2 = 2.0  # times the bandwidth of device memory
DELTA_ELEMENTS = 8192  # of a tile of dO and O, whose products are summed by row


def default_schedule(program: Attention, target: Target, device: str = "") -> Schedule:
    """Of the program's forward pass, dQ and dK/dV; where listed blocks are, within_blocks comes after it.

    device: a product by the name that CUDA gives it, whose measured launches come first.
    """
    short = program.element in (Storage.BFLOAT16, Storage.FLOAT16)
    compiled = {**COMPILED, **TESTING_TILES} if tests_tiles(program) else COMPILED
    if program.sequences is not None:
        compiled = {**compiled, **OF_SEQUENCES}
    if program.sequences is not None and program.sequences.page:
        compiled = {**compiled, **IN_PAGES}
    if program.cache is not None:
        compiled = {**compiled, **OF_BYTES}
    if program.values_in_keys:
        compiled = {**compiled, **VALUES_IN_KEYS}
    bounded, about = is_bounded(program), (program.element, program.dim_qk, program.dim_v)
    forward, d_query, d_key_value = (
        TUNED.get((device, k.name, *about, bounded))
        or (compiled.get((target.name, k.name, *about[1:])) if short else None)
        or best_launch(k, target, bounded)
        for k in kernels_of(program)
    )
    delta_rows = max(16, min(128, DELTA_ELEMENTS // max(16, 1 << (program.dim_v - 1).bit_length())))
    return Schedule(
        forward.q,
        forward.kv,
        d_key_value.q,
        d_key_value.kv,
        Edges.BRANCH,
        Gradients.TWO_KERNELS,
        forward.num_warps,
        forward.num_stages,
        d_key_value.num_warps,
        d_key_value.num_stages,
        folded=short,
        descriptors=short and target.name in TENSOR_MEMORY,
        sections=True,
        d_query=d_query,
        delta_rows=delta_rows,
        short_tiles=True,
        split_tasks=MULTIPROCESSORS,
    )


def kernels_of(program: Attention) -> tuple[Kernel, Kernel, Kernel]:
    """Forward, dQ, dK/dV with all captured gradients, in tiles that mean nothing."""
    any_tiles = Schedule(64, 64, 64, 64, Edges.BRANCH, Gradients.TWO_KERNELS)
    learned = tuple(c.name for c in program.differentiable_captures)
    backward = lower(program, any_tiles, "backward", learned)
    return (
        lower(program, any_tiles, "forward").kernel("forward"),
        backward.kernel("dq"),
        backward.kernel("dkdv"),
    )


def is_bounded(program: Attention) -> bool:
    """Whether tiles are skipped: then large ones also visit pairs that nobody sees."""
    return (
        program.listed is not None or plan_mask(program.mask.result if program.mask else None, "kv").bounded
    )


def tests_tiles(program: Attention) -> bool:
    """Whether loops ask of every tile what it holds."""
    listed, mask = program.listed, program.mask
    by_lists = listed is not None and not listed.tested
    return not by_lists and mask is not None and classify_tiles(mask.result, "kv") is not None


@lru_cache(maxsize=512)
def best_launch(kernel: Kernel, target: Target, bounded: bool) -> Launch:
    """The launch that the model expects to be fastest; the least hungry one where nothing fits."""
    ranked = ranked_launches(kernel, target, bounded)
    return ranked[0] if ranked else least_hungry(kernel, target)


def ranked_launches(kernel: Kernel, target: Target, bounded: bool) -> list[Launch]:
    """Launches that fit, the expected fastest first."""
    facts = footprint(kernel)
    costs = {
        launch: cost(sized, need, launch, target, bounded)
        for launch, sized, need in _all(facts, target)
        if need.fits
    }
    return sorted(costs, key=lambda launch: costs[launch])


def launches_worth_trying(kernel: Kernel, target: Target) -> list[Launch]:
    """The most promising ones, for a search that measures."""
    return ranked_launches(kernel, target, bounded=False)[:WORTH_TRYING]


def least_hungry(kernel: Kernel, target: Target) -> Launch:
    """The launch of smallest need that starts at all, for kernels that cannot keep their values in registers."""
    starting = [
        (need.registers, need.shared_bytes, i, launch)
        for i, (launch, _, need) in enumerate(_all(footprint(kernel), target))
        if need.launches
    ]
    return min(starting)[3] if starting else SMALLEST


def legal_launches() -> Iterator[Launch]:
    """Every combination that is tried, for any kernel."""
    for q, kv, warps, stages in product(TILES, TILES, WARPS, STAGES):
        yield Launch(q, kv, warps, stages)


def _all(facts: Footprint, target: Target) -> Iterator[tuple[Launch, Footprint, Resources]]:
    for launch in legal_launches():
        sized = facts.sized(launch.q, launch.kv)
        yield launch, sized, resources(sized, launch, target)


def cost(facts: Footprint, need: Resources, launch: Launch, target: Target, bounded: bool) -> float:
    """Expected seconds per pair of a query and a key on one multiprocessor, tiles that are seen in part included.

    A step multiplies, computes and loads; what runs at once hides all but the longest of the three.
    """
    device = devices_of(target.name)[0]
    units = device.multiprocessors
    storage = Storage.BFLOAT16 if facts.width == 2 else Storage.FLOAT32
    multiply = facts.flops / (device.tflops(storage) * 1e12 / units * filled(facts, launch, target))
    compute = facts.scores * facts.pairs * ELEMENTWISE / (device.float32_tflops * 1e12 / units / 2)
    load = sum(t.bytes for t in (*facts.staged, *facts.read)) / (L2 * device.gigabytes * 1e9 / units)
    longest, total = max(multiply, compute, load), multiply + compute + load
    at_once = min(need.blocks, 3) + (0.5 if launch.num_stages > 1 else 0.0)
    step = longest + (total - longest + STEP_LATENCY) / (1 + at_once)
    unseen = (launch.q + launch.kv) / TYPICAL_LENGTH if bounded else 0.0
    return step / facts.pairs * (1 + unseen)


def filled(facts: Footprint, launch: Launch, target: Target) -> float:
    """How much of the matrix units' rate the shapes of the products reach."""
    narrowest = min((min(p.columns, p.depth) for p in facts.products), default=64)
    rows = min((p.rows for p in facts.products), default=64)
    alone = target.matrix_groups and facts.width == 2 and not grouped(facts, launch, target)
    share = narrowest / (narrowest + 16) * min(1.0, rows / (8 * launch.num_warps))
    return share * (ALONE if alone else 1.0)
