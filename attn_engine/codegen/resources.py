"""What a kernel needs of a GPU, predicted: shared memory, registers, how many blocks fit, whether it launches.

Shared memory follows Triton's pipeline (measured with 3.7 on every target, see docs/schedules.md):

- NVIDIA: operands loaded before the loop stay in shared memory. Operands loaded in it have a buffer for every stage
  but one, and one more where groups of four warps multiply (wgmma, tcgen05), for the product still reads its buffer
  while the next is filled; tcgen05 keeps yet one more of an operand that two products read. Other loads of a step have
  a buffer for every stage but one. Operands made in a step pass through shared memory unless each warp has rows enough
  to keep them. With one stage there is no pipeline: buffers live from the first product that reads them to the last.
- AMD: operands loaded before the loop pass through shared memory into registers; those of the loop have a buffer for
  every stage but one.

The prediction is never below what the compiler takes; tests hold it to that, and to a margin above. Registers are an
estimate for a verdict: where it says that a kernel keeps its values in registers, it does.
"""

from __future__ import annotations

from dataclasses import dataclass

from attn_engine.codegen.footprint import Footprint, Tile, footprint
from attn_engine.codegen.schedule import Launch
from attn_engine.codegen.targets import Target
from attn_engine.ir.expr import COLUMNS
from attn_engine.ir.tile import Kernel

GROUP_ROWS = 64  # of a product of four warps
WARP_ROWS = 16  # of a product of one
BARRIERS = 2176  # bytes: of pipelines, and for reductions between warps


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one block. registers: estimated, per thread. blocks: how many a multiprocessor holds at once, 0: it does not
    launch. spills: it may need more registers than a thread can have."""

    shared_bytes: int
    registers: int
    blocks: int
    warps: int
    most_warps: int
    spills: bool
    target: str

    @property
    def launches(self) -> bool:
        return self.blocks > 0

    @property
    def fits(self) -> bool:
        """Whether it launches and keeps its values in registers."""
        return self.launches and not self.spills

    @property
    def occupancy(self) -> float:
        """Resident warps of those that a multiprocessor can have."""
        return self.blocks * self.warps / self.most_warps

    def __str__(self) -> str:
        spills = ", may spill" if self.spills else ""
        return (
            f"{self.shared_bytes / 1024:.0f} KiB shared, about {self.registers} registers{spills}, "
            f"{self.blocks} block{'' if self.blocks == 1 else 's'} per multiprocessor "
            f"({100 * self.occupancy:.0f} % of its warps)"
        )


def predict(kernel: Kernel, launch: Launch, target: Target) -> Resources:
    """Of a kernel whose tiles are already in it; `launch` says warps and stages."""
    return resources(footprint(kernel), launch, target)


def resources(facts: Footprint, launch: Launch, target: Target) -> Resources:
    """The same from a kernel's facts, in the tiles that they are sized for."""
    shared = shared_bytes(facts, launch, target)
    wanted = register_estimate(facts, launch, target)
    most = most_registers(launch, target)
    given = min(most, -(-wanted // target.register_step) * target.register_step)
    blocks = 0
    if shared <= target.shared_limit and launch.num_warps <= target.most_warps:
        threads = launch.num_warps * target.warp
        blocks = min(
            target.most_blocks,
            target.most_warps // launch.num_warps,
            target.shared_total // max(1, shared + target.shared_reserved),
            target.registers // (given * threads),
        )
    spills = may_spill(facts, launch, target)
    return Resources(shared, given, blocks, launch.num_warps, target.most_warps, spills, target.name)


# -- shared memory


def shared_bytes(facts: Footprint, launch: Launch, target: Target) -> int:
    """Bytes of a block: never below what the compiler takes."""
    if target.amd:
        return max(_passing_through(facts), _amd_loop(facts, launch)) + BARRIERS
    loop = _one_stage(facts, launch, target) if launch.num_stages < 2 else _pipeline(facts, launch, target)
    stores = max((t.bytes for t in facts.stored), default=0)  # turned into rows before they are written
    more = BARRIERS if _pieces(facts) else 0
    return max(_bytes(facts.resident) + loop, stores + stores // 8) + BARRIERS + more


def grouped(facts: Footprint, launch: Launch, target: Target) -> bool:
    """Whether the products of a step are those of four warps together."""
    rows = min((p.rows for p in facts.products), default=0)
    return target.matrix_groups and facts.width == 2 and rows >= GROUP_ROWS and launch.num_warps % 4 == 0


def _pipeline(facts: Footprint, launch: Launch, target: Target) -> int:
    groups, stages = grouped(facts, launch, target), launch.num_stages

    def buffers(tile: Tile) -> int:
        again = target.name == "sm_100" and len(tile.products) > 1
        return stages + again if groups else stages - 1

    staged = sum(t.bytes * buffers(t) for t in facts.staged)
    kept = groups and min(p.rows for p in facts.products) >= WARP_ROWS * launch.num_warps
    return staged + _bytes(facts.read) * (stages - 1) + (0 if kept else _bytes(facts.made))


def _one_stage(facts: Footprint, launch: Launch, target: Target) -> int:
    everything = _bytes(facts.staged) + _bytes(facts.made)
    if grouped(facts, launch, target):
        return everything
    live = (
        sum(t.bytes for t in (*facts.staged, *facts.made) if t.products[0] <= at <= t.products[-1])
        for at in range(len(facts.products))
    )
    # dK/dV read their tiles both as they lie and turned: a copy
    turned = max((t.bytes for t in facts.staged), default=0) if len(facts.made) > 1 else 0
    return max(max(live, default=0), everything if turned else 0) + turned


def _passing_through(facts: Footprint) -> int:
    """The largest tensor whose tile is brought into the layout of a product before the loop."""
    by_tensor: dict[str, int] = {}
    for tile in facts.resident:
        by_tensor[tile.tensor] = by_tensor.get(tile.tensor, 0) + tile.bytes
    return max(by_tensor.values(), default=0)


def _amd_loop(facts: Footprint, launch: Launch) -> int:
    if launch.num_stages < 2:
        by_product = (
            sum(t.bytes for t in (*facts.staged, *facts.made) if at in t.products)
            for at in range(len(facts.products))
        )
        return max(by_product, default=0)
    return _bytes(facts.staged) * (launch.num_stages - 1) + _bytes(facts.made)


def _bytes(tiles: tuple[Tile, ...]) -> int:
    return sum(t.bytes for t in tiles)


# -- registers

BASE = 48  # addresses, positions, bounds
WIDE_HEADS = 768  # columns of keys and values beyond which compilers were seen to need twice as much
# Threads multiply elements of 32 bits by themselves: up to so many multiplications of a product without spilling.
WIDE_PRODUCT = 65536
# Estimates up to which no compiled kernel spilled, for blocks of up to 4 and of 8 warps: of a step with two products
# (forward), three (dQ) and four (dK/dV). Compilers schedule loads early, so that these lie on both sides of 255.
NO_SPILL = {
    ("sm_80", 4): (300, 223, 163), ("sm_80", 8): (288, 205, 129),
    ("sm_90", 4): (304, 368, 227), ("sm_90", 8): (330, 280, 279),
    ("sm_100", 4): (191, 223, 167), ("sm_100", 8): (288, 280, 107),
    ("gfx942", 4): (353, 400, 195), ("gfx942", 8): (127, 153, 119),
}  # fmt: skip


def register_estimate(facts: Footprint, launch: Launch, target: Target) -> int:
    """Registers of 32 bits that a thread's values want, whether or not there are so many."""
    rows = max((p.rows for p in facts.products), default=launch.num_warps * WARP_ROWS)
    # Warps beyond the rows of a product hold copies on AMD.
    warps = min(launch.num_warps, max(1, rows // WARP_ROWS)) if target.amd else launch.num_warps
    threads = warps * target.warp
    carried = sum(t.elements for t in facts.carried)
    pairs = facts.scores * facts.pairs
    loaded = _bytes((*facts.staged, *facts.read)) // 4
    share = (
        1 if launch.num_stages < 2 else 4
    )  # without a pipeline they pass through registers, else addresses do
    resident = _bytes(facts.resident) // 4 if target.amd else 0
    wanted = BASE + (carried + pairs + loaded // share + resident) // threads
    columns = sum(n for axis, n in facts.sizes if axis in COLUMNS)
    return wanted * 2 if columns > WIDE_HEADS else wanted + wanted // 4 if _pieces(facts) else wanted


def _pieces(facts: Footprint) -> bool:
    """Whether a head dimension is cut: more tiles of fewer columns each."""
    return any(axis in COLUMNS and axis[-1].isdigit() for axis, _ in facts.sizes)


def may_spill(facts: Footprint, launch: Launch, target: Target) -> bool:
    """Whether a thread may want more registers than it can have; False is certain for what the table holds."""
    if facts.width > 2:
        return any(p.flops // 2 > WIDE_PRODUCT for p in facts.products)
    by_products = NO_SPILL[target.name, 4 if launch.num_warps <= 4 else 8]
    most = by_products[min(max(len(facts.products), 2), 4) - 2]
    return register_estimate(facts, launch, target) > most


def most_registers(launch: Launch, target: Target) -> int:
    """Per thread, as a block of so many warps can have."""
    threads = launch.num_warps * target.warp
    return min(target.most_registers, target.registers // threads)
