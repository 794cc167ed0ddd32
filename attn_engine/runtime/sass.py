"""What NVIDIA machine code asks for: registers, stack, and its instructions, altogether and in each innermost loop.

Read by the disassemblers that triton's wheel carries (cuobjdump, nvdisasm): no CUDA toolkit and no GPU is needed.
"""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from attn_engine.errors import BackendNotInstalled

# Instructions of the matrix unit: warp, warp group (sm_90), tensor memory (sm_100).
PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA", "DMMA", "IMMA")
# A loop of so few instructions that polls a barrier is a wait, not work.
_LONGEST_WAIT = 8
_POLLS = {"SYNCS", "NANOSLEEP", "UCGABAR_WAIT", "USETMAXREG"}
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_LABEL = re.compile(r"^(\.L_\w+|\$[\w$]+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_JUMPS = ("BRA", "JMP", "WARPSYNC", "CALL")
_BARRIER = re.compile(r"\bB\d+\b")


@dataclass(frozen=True, slots=True)
class Instructions:
    """How often each instruction occurs in the text, by its full name, such as "MUFU.EX2"."""

    counts: Mapping[str, int]

    def count(self, name: str) -> int:
        """Those that are `name`, or `name` with modifiers: count("HGMMA") includes "HGMMA.64x64x16.F32.BF16"."""
        return sum(n for opcode, n in self.counts.items() if opcode == name or opcode.startswith(f"{name}."))

    @property
    def products(self) -> int:
        """Instructions of the matrix unit."""
        return sum(self.count(name) for name in PRODUCTS)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def by_kind(self) -> dict[str, int]:
        """The counts without modifiers, the most frequent first."""
        kinds: Counter[str] = Counter()
        for opcode, n in self.counts.items():
            kinds[opcode.partition(".")[0]] += n
        return dict(kinds.most_common())


@dataclass(frozen=True, slots=True)
class Loop(Instructions):
    """A loop without another one inside; waits for a barrier count as instructions.

    first, last: addresses. trip: the shortest way through it, which leaves out a mask that stands under a branch.
    """

    first: int = 0
    last: int = 0
    trip: Instructions = field(default_factory=lambda: Instructions({}))


@dataclass(frozen=True, slots=True)
class MachineCode(Instructions):
    """One kernel of a cubin.

    registers: per thread, as reserved at launch (warp groups may hand some over: USETMAXREG). stack_bytes: reserved per
    thread. static_shared_bytes: without what a launch asks for. loops: the innermost ones in the order of the text.
    """

    kernel: str = ""
    registers: int = 0
    stack_bytes: int = 0
    static_shared_bytes: int = 0
    loops: tuple[Loop, ...] = field(default=())

    @property
    def spill_bytes(self) -> int:
        """The stack, where instructions touch it: newer targets reserve a few bytes that none does."""
        return self.stack_bytes if self.count("STL") + self.count("LDL") else 0

    @property
    def main_loop(self) -> Loop | None:
        """The innermost loop with the most instructions of the matrix unit; None where no loop has any."""
        with_products = [loop for loop in self.loops if loop.products]
        return max(with_products, key=lambda loop: (loop.products, loop.total), default=None)


def read_cubin(cubin: bytes, kernel: str | None = None) -> MachineCode:
    """The machine code of one kernel of `cubin`; `kernel` may be left out where there is one only.

    Raises BackendNotInstalled where triton's disassemblers are missing, KeyError for a kernel that is not there.
    """
    found = {code.kernel: code for code in read_kernels(cubin)}
    if kernel is None:
        (kernel,) = found
    return found[kernel]


def read_kernels(cubin: bytes) -> tuple[MachineCode, ...]:
    """The machine code of every kernel of `cubin`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = disassembler("cuobjdump", "-res-usage", file.name)
        return parse(disassembler("nvdisasm", "-c", file.name), usage)


def registers_of(cubin: bytes) -> tuple[int, int]:
    """(registers per thread, bytes spilled per thread) of a cubin of one kernel; quick where it has no stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = disassembler("cuobjdump", "-res-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), read_cubin(cubin).spill_bytes if int(found[2]) else 0


def disassembler(name: str, *arguments: str) -> str:
    """What one of the wheel's programs prints. Raises BackendNotInstalled where it is missing."""
    return subprocess.run([_program(name), *arguments], capture_output=True, text=True, check=True).stdout


@cache
def _program(name: str) -> Path:
    spec = find_spec("triton")
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent
    path = None if path is None else path / "backends" / "nvidia" / "bin" / name
    if path is None or not path.exists():
        raise BackendNotInstalled(
            backend="triton",
            needs=f"the program {name} of triton's wheel",
            instead="Install triton's own wheel for Linux: pip install 'triton>=3.6,<3.8'.",
        )
    return path


def parse(disassembly: str, usage: str) -> tuple[MachineCode, ...]:
    """The kernels of nvdisasm's text (-c), with what cuobjdump reports (-res-usage)."""
    parts = re.split(r"^\s*\.section\s+\.text\.([\w$]+),.*$", disassembly, flags=re.MULTILINE)
    return tuple(_kernel(name, text, usage) for name, text in zip(parts[1::2], parts[2::2], strict=True))


def _kernel(name: str, text: str, usage: str) -> MachineCode:
    found = re.search(
        rf"Function {re.escape(name)}:\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage, flags=re.MULTILINE
    )
    assert found is not None, usage
    lines, labels = _read(text)
    counts = Counter(line.opcode for line in lines)
    registers, stack, shared = (int(found[i]) for i in (1, 2, 3))
    return MachineCode(counts, name, registers, stack, shared, _innermost(lines, labels))


# ---- loops: back edges of the graph of basic blocks


@dataclass(frozen=True, slots=True)
class _Line:
    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def always(self) -> bool:
        return self.predicate in ("", "@PT", "@UPT")

    @property
    def may_go_on(self) -> bool:
        """Whether a jump may also be left out: guarded, with a predicate among its operands, or by some threads."""
        asked = re.search(r"\bU?P\d", self.operands.partition("`")[0])
        return not self.always or asked is not None or self.opcode.startswith(("WARPSYNC", "BRA.DIV"))


def _read(text: str) -> tuple[list[_Line], dict[str, int]]:
    """The instructions, and for every label the index of the one that follows it."""
    lines: list[_Line] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(lines)
        elif found := _INSTRUCTION.match(line):
            lines.append(_Line(int(found[1], 16), (found[2] or "").strip(), found[3], found[4]))
    return lines, labels


def _successors(lines: list[_Line], labels: Mapping[str, int]) -> list[tuple[int, ...]]:
    """Where the run may go on after each instruction, by index."""
    meets: dict[str, int] = {}  # where the threads that parted meet again, by barrier
    found: list[tuple[int, ...]] = []
    for i, line in enumerate(lines):
        kind = line.opcode.partition(".")[0]
        target = _TARGET.search(line.operands)
        to = labels.get(target[1]) if target else None
        barrier = _BARRIER.search(line.operands)
        if kind == "BSSY" and barrier and to is not None:
            meets[barrier[0]] = to
        following = (i + 1,)
        if (
            kind in _JUMPS and to is not None
        ):  # also CALL, which is a jump where its target is a label in the text
            following = (i + 1, to) if line.may_go_on else (to,)
        elif kind == "BSYNC" and barrier and barrier[0] in meets:
            following = (meets[barrier[0]],)
        elif kind in ("EXIT", "RET", "BRX", "BPT") and line.always:
            following = ()
        found.append(tuple(n for n in following if n < len(lines)))
    return found


def _innermost(lines: list[_Line], labels: Mapping[str, int]) -> tuple[Loop, ...]:
    """Natural loops that are work and contain no other such loop."""
    successors = _successors(lines, labels)
    blocks = _blocks(successors)

    def counted(chosen: Iterable[int]) -> Counter[str]:
        return Counter(lines[i].opcode for block in chosen for i in blocks[block])

    found: list[Loop] = []
    loops = _loops(blocks, successors)
    work = {
        head: body for head, body in loops.items() if not _waits([lines[i] for b in body for i in blocks[b]])
    }
    for head, body in sorted(work.items()):
        if not any(other < body for other in work.values()):
            first, last = lines[min(body)].address, lines[blocks[max(body)][-1]].address
            trip = Instructions(counted(_shortest(head, body, blocks, successors)))
            found.append(Loop(counted(body), first, last, trip))
    return tuple(found)


def _blocks(successors: list[tuple[int, ...]]) -> dict[int, range]:
    """Stretches of instructions that only run as a whole, by the first of each."""
    firsts = {0, len(successors)}
    for i, following in enumerate(successors):
        if following != (i + 1,):
            firsts.update((i + 1, *following))
    ordered = sorted(firsts)
    return {first: range(first, end) for first, end in pairwise(ordered)}


def _loops(blocks: Mapping[int, range], successors: list[tuple[int, ...]]) -> dict[int, set[int]]:
    """The blocks of each loop by its head: those that reach a jump back to it without passing it."""
    import networkx

    graph: Any = networkx.DiGraph((b, to) for b, block in blocks.items() for to in successors[block[-1]])
    if 0 not in graph:
        return {}
    graph = graph.subgraph(networkx.descendants(graph, 0) | {0})
    parents: Mapping[int, int] = networkx.immediate_dominators(graph, 0)
    loops: dict[int, set[int]] = {}
    for block, head in graph.edges:
        if _dominates(head, block, parents):
            loops.setdefault(head, set()).update(_reaching(graph, block, head))
    return loops


def _dominates(head: int, block: int, parents: Mapping[int, int]) -> bool:
    """Whether every way from the beginning to `block` passes `head`."""
    while block not in (head, 0):
        block = parents[block]
    return block == head


def _reaching(graph: Any, block: int, head: int) -> set[int]:
    """The blocks that lead to `block` without passing `head`, both included."""
    seen, waiting = {head}, [block]
    while waiting:
        at = waiting.pop()
        if at not in seen:
            seen.add(at)
            waiting.extend(graph.predecessors(at))
    return seen


def _shortest(
    head: int, body: set[int], blocks: Mapping[int, range], successors: list[tuple[int, ...]]
) -> list[int]:
    """The blocks on the way with the fewest instructions from a loop's head back to it."""
    ways: list[tuple[int, tuple[int, ...]]] = [(len(blocks[head]), (head,))]
    seen: set[int] = set()
    while ways:
        length, way = heapq.heappop(ways)
        if way[-1] in seen:
            continue
        seen.add(way[-1])
        following = successors[blocks[way[-1]][-1]]
        if head in following:
            return list(way)
        for block in body.intersection(following) - seen:
            heapq.heappush(ways, (length + len(blocks[block]), (*way, block)))
    return []


def _waits(body: Sequence[_Line]) -> bool:
    """Whether a loop only polls a barrier or asks for registers again, or lies behind the end, never reached."""
    kinds = {line.opcode.partition(".")[0] for line in body}
    return kinds == {"BRA"} or (len(body) <= _LONGEST_WAIT and bool(kinds & _POLLS))
