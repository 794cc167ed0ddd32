"""C++ for CPUs: a query row or a key per lane, products through a blocked micro-kernel, all else fused around it.

Arithmetic lives in include/*.h; codegen/lower/nests.py decides what shares a loop; this file prints the file around the
kernel, cpu_nests.py the loops. For few query rows, with keys in lanes, cpu_rows.py prints them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from attn_engine.codegen.backends.cpu_lanes import BLOCKS
from attn_engine.codegen.backends.cpu_names import with_legal_names
from attn_engine.codegen.backends.cpu_nests import NestRenderer
from attn_engine.codegen.backends.cpu_rows import RowNestRenderer
from attn_engine.codegen.lower.nests import schedule_nests
from attn_engine.codegen.lower.paged import with_tables_at_hand
from attn_engine.codegen.lower.scaled import SCALES, is_scaled, scale_param
from attn_engine.ir.ops import DType, Storage
from attn_engine.ir.tile import Kernel, Let, Narrow, Param, walk

TYPES: Mapping[Storage, str] = {
    Storage.FLOAT64: "double",
    Storage.FLOAT32: "float",
    Storage.FLOAT16: "Half",
    Storage.BFLOAT16: "BFloat16",
    Storage.FLOAT8: "Float8",
    Storage.INT64: "int64_t",
    Storage.INT32: "int32_t",
    Storage.INT16: "int16_t",
    Storage.INT8: "int8_t",
    Storage.UINT8: "uint8_t",
    Storage.BOOL: "bool",
}
IN_DOUBLE = "COMPUTE_IN_DOUBLE"  # the headers then compute in double instead of float
REGISTERS = "LANE_REGISTERS"  # registers that hold the lanes of one value
SIZES = ("batches", "heads", "kv_heads", "q_len", "kv_len")
COUNTS = {
    "head": "heads", "kv_head": "kv_heads", "batch": "batches", "split": "splits",
    "tile": "tile_count", "turn": "batches",
}  # fmt: skip
LENGTHS = {"q": "q_len", "kv": "kv_len"}


@dataclass(frozen=True, slots=True)
class CpuTarget:
    """What a kernel is rendered for: the bytes of a vector register, and whether bfloat16 are multiplied in pairs.

    Without bfloat16_dot they are converted to float32 first.
    """

    vector_bytes: int = 64
    bfloat16_dot: bool = False

    def width(self, element: Storage) -> int:
        """Numbers of the compute type in a register."""
        return self.vector_bytes // (8 if element is Storage.FLOAT64 else 4)

    def lanes(self, element: Storage, dim_qk: int = 64, dim_v: int = 64) -> int:
        """Rows of a query tile for q, k, v of this storage and these head dimensions.

        Four registers side by side need the fewest loads, where there are 32 of them; the gradients' columns are filled
        up to as many lanes, so where that would compute more zeros, two.
        """
        width = self.width(element)
        choices = (4, 2) if self.vector_bytes == MANY_REGISTERS else (2,)
        return min(
            (n * width for n in choices), key=lambda n: sum(-(-dim // n) * n for dim in (dim_qk, dim_v))
        )


MANY_REGISTERS = 64  # instruction sets with registers of this many bytes have 32 of them


def render_cpu(kernel: Kernel, target: CpuTarget) -> str:
    """The C++ source of one kernel; it exports `attn_engine_<kernel name>(Arguments*)`.

    Where query rows are lanes, the query tile must have as many as the target; the compiler checks it again.
    """
    renderer = CpuRenderer if kernel.lanes.whole else FewRowsRenderer
    return renderer(target).render(with_legal_names(with_tables_at_hand(kernel)))


def symbol(kernel: Kernel) -> str:
    """The exported name of a kernel's function."""
    return f"attn_engine_{kernel.name}"


def argument_slots(kernel: Kernel) -> list[str]:
    """What each 8-byte slot of `Arguments` holds, in order: the launcher's contract.

    "next_task", then "<tensor>" (address), "<tensor>.size.<i>", "<tensor>.stride.<i>", then sizes and numbers by name.
    """
    slots = ["next_task"]
    for p in kernel.params:
        rank = range(max(len(p.shape), 1))
        slots += [p.name, *(f"{p.name}.size.{i}" for i in rank), *(f"{p.name}.stride.{i}" for i in rank)]
    return [*slots, *SIZES, *(v.name for v in kernel.scalars)]


class CpuRenderer(NestRenderer):
    """Prints one kernel as one C++ file."""

    def __init__(self, target: CpuTarget) -> None:
        self.target = target

    def render(self, kernel: Kernel) -> str:
        self.kernel = kernel
        self.in_double = self.storage is Storage.FLOAT64
        body = self.scheduled(schedule_nests(kernel, self.paired))
        return "\n".join([*self.prologue(), *self.task(body), *self.entry()]) + "\n"

    def prologue(self) -> list[str]:
        k = self.kernel
        blocks = ", ".join(f"{BLOCKS[axis]} = {n}" for axis, n in k.tile)
        return [
            *(self.remark(line) for line in k.header),
            *(f"#define {name}" for name in self.definitions()),
            '#include "kernel.h"',
            "",
            "namespace attention {",
            "",
            f"constexpr int {blocks};",
            f"static_assert({self.tile_rule});",
            "",
            "struct Arguments {  // 8 bytes each: the launcher fills them in this order",
            "  int64_t next_task;  // shared by the threads",
            *(f"  {self.tensor_type(p)} {p.name};" for p in self.tensors),
            f"  int64_t {', '.join(SIZES)};",
            *(f"  {'double' if v.dtype is DType.FLOAT else 'int64_t'} {v.name};" for v in k.scalars),
            "};",
            f"static_assert(sizeof(Arguments) == 8 * {len(argument_slots(k))});",
            "",
            "struct Scratch {  // of one thread",
            *(f"  alignas(64) {line}" for line in self.scratch_fields()),
            "};",
            "",
        ]

    @property
    def tile_rule(self) -> str:
        what = "query row" if self.axis == "q" else "key"
        return f'{BLOCKS[self.axis]} == LANES, "one {what} per lane"'

    @property
    def storage(self) -> Storage:
        return self.kernel.params[0].storage

    @property
    def paired(self) -> bool:
        """Whether products multiply pairs of bfloat16."""
        return self.storage is Storage.BFLOAT16 and self.target.bfloat16_dot and not is_scaled(self.kernel)

    @property
    def registers(self) -> int:
        """Registers that hold the lanes of one value."""
        return self.kernel.block(self.axis) // self.target.width(self.storage)

    def definitions(self) -> list[str]:
        """What the headers need to know before they are read."""
        return [f"{REGISTERS} {self.registers}", *([f"{IN_DOUBLE} 1"] if self.in_double else [])]

    @property
    def tensors(self) -> list[Param]:
        """The parameters that have a name of their own: scales belong to what they scale."""
        return [p for p in self.kernel.params if p.name not in SCALES]

    def tensor_type(self, p: Param) -> str:
        own = f"Tensor<{'' if p.output else 'const '}{TYPES[p.storage]}, {len(p.shape)}>"
        scale = next((s for s in self.kernel.params if s.name == scale_param(p.name)), None)
        return own if scale is None else f"Scaled<{own}, {self.tensor_type(scale)}>"

    def task(self, body: list[str]) -> list[str]:
        """The function that one program instance runs."""
        k = self.kernel
        words = set(re.findall(r"\w+", "\n".join(body)))
        parameters = [f"int {axis}_start" if axis in LENGTHS else f"int {axis}" for axis in k.grid]
        tiles = [axis for axis in k.grid if axis in LENGTHS]
        words |= {LENGTHS[axis] for axis in tiles if f"{axis}_rows" in words}
        # What the body itself makes: the lengths and the tensors of a sequence, say.
        made = {
            s.name if isinstance(s, Let) else s.tensor for s in walk(k.body) if isinstance(s, Let | Narrow)
        }
        words -= made & {*SIZES, *(p.name for p in k.params)}
        sizes = [n for n in SIZES if n in words]
        return [
            f"static void tile_task({', '.join(['const Arguments& arguments', 'Scratch& scratch', *parameters])}) {{",
            *(f"  const auto& {p.name} = arguments.{p.name};" for p in self.tensors if p.name in words),
            *([f"  const int {', '.join(f'{n} = arguments.{n}' for n in sizes)};"] if sizes else []),
            *(
                f"  const {self.scalar_type(v.dtype)} {v.name} = arguments.{v.name};"
                for v in k.scalars
                if v.name in words
            ),
            *(
                f"  const int {n} = arguments.{p.name}.sizes[{i}];"
                for n, p, i in self.captured_sizes()
                if n in words
            ),
            *(f"  auto& {name} = scratch.{name};" for name in self.scratch if name in words),
            *(f"  {line}" for axis in tiles for line in self.tile_positions(axis, words)),
            *(f"  {line}".rstrip() for line in body),
            "}",
            "",
        ]

    def captured_sizes(self) -> list[tuple[str, Param, int]]:
        return [(n, p, i) for p in self.kernel.params for i, n in enumerate(p.shape) if "_size_" in n]

    def entry(self) -> list[str]:
        """The exported function: take tasks until there are none, the first grid axis fastest."""
        k = self.kernel
        counts = [f"{axis}_tiles" if axis in LENGTHS else f"arguments->{COUNTS[axis]}" for axis in k.grid]
        indices: list[str] = []
        below: list[str] = []
        for n, (axis, count) in enumerate(zip(k.grid, counts, strict=True)):
            divisor = " * ".join(below)
            index = "task" if not below else f"task / {divisor}" if len(below) == 1 else f"task / ({divisor})"
            index = index if n == len(counts) - 1 else f"{index} % {count}"
            if axis in LENGTHS:
                last_first = k.heavy_last and n == 0
                index = (
                    f"({count} - 1 - {index}) * {BLOCKS[axis]}"
                    if last_first
                    else f"({index}) * {BLOCKS[axis]}"
                )
            indices.append(index)
            below.append(count)
        order = " Heavy tiles come first." if k.heavy_last else ""
        return [
            f"// Any number of threads may run this on the same arguments; each takes the next task.{order}",
            f'extern "C" void {symbol(k)}(Arguments* arguments) {{',
            *(
                f"  const int64_t {axis}_tiles = (arguments->{LENGTHS[axis]} + {BLOCKS[axis]} - 1) / {BLOCKS[axis]};"
                for axis in k.grid
                if axis in LENGTHS
            ),
            f"  const int64_t tasks = {' * '.join(counts) or '1'};",
            "  Scratch* scratch = (Scratch*)aligned_alloc(64, (sizeof(Scratch) + 63) / 64 * 64);",
            "  for (;;) {",
            "    const int64_t task = __atomic_fetch_add(&arguments->next_task, 1, __ATOMIC_RELAXED);",
            "    if (task >= tasks) break;",
            f"    tile_task({', '.join(['*arguments', '*scratch', *indices])});",
            "  }",
            "  free(scratch);",
            "}",
            "",
            "}  // namespace attention",
        ]


class FewRowsRenderer(RowNestRenderer, CpuRenderer):
    """The same file around loops over query rows, with keys and columns in lanes; elements convert when loaded."""

    @property
    def tile_rule(self) -> str:
        return 'BLOCK_KV % LANES == 0, "whole vectors of keys"'

    @property
    def paired(self) -> bool:
        return False

    @property
    def registers(self) -> int:
        return min(2, self.kernel.block("kv") // self.target.width(self.storage))
