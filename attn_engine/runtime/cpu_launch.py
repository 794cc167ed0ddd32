"""Run compiled CPU kernels on torch's threads.

A kernel is one function of one array of 8-byte slots. Every thread that runs it takes tasks from a counter in the first
slot until there are none, so the result does not depend on how many threads there are.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from struct import Struct

import torch

from attn_engine.codegen.backends.cpu import COUNTS, LENGTHS, SIZES, symbol
from attn_engine.ir.ops import DType, Number
from attn_engine.ir.tile import Kernel
from attn_engine.runtime.launch_plan import Layout

ABI_VERSION = "1"
# Below this many multiply-adds, waking another thread costs more than it saves.
SMALL_WORK = 100_000

_forked = False


def _after_fork() -> None:
    """A pool of OpenMP threads does not survive a fork: whatever uses it in the child, torch too, waits for ever."""
    global _forked
    _forked = True
    if openmp_parallel.cache_info().currsize:  # our kernels have started the pool
        torch.set_num_threads(1)


os.register_at_fork(after_in_child=_after_fork)


class CpuKernel:
    """A loaded kernel. `launch` may be called from several Python threads at once."""

    def __init__(self, kernel: Kernel, library: Path) -> None:
        self.name = kernel.name
        self._function = ctypes.CDLL(str(library))[symbol(kernel)]
        self._function.argtypes = [ctypes.c_void_p]
        self._function.restype = None
        self._tensors = [p.name for p in kernel.params]
        self._scalars = [v.name for v in kernel.scalars]
        self._grid = [
            (COUNTS.get(a) or LENGTHS[a], kernel.block(a) if a in LENGTHS else 1) for a in kernel.grid
        ]
        self._loops = [LENGTHS[a] for a, _ in kernel.tile if a in LENGTHS and a not in kernel.grid]
        self._width = max((n for a, n in kernel.tile if a not in LENGTHS), default=1)
        slots = "".join("q" * (1 + 2 * max(len(p.shape), 1)) for p in kernel.params)
        numbers = "".join("d" if v.dtype is DType.FLOAT else "q" for v in kernel.scalars)
        self._slots = Struct(f"=q{slots}{'q' * len(SIZES)}{numbers}")
        self._scalar_slots = Struct(f"={numbers}")
        self._memory = ctypes.c_int64 * (self._slots.size // 8)

    def launch(
        self, tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Number], sizes: Mapping[str, int]
    ) -> None:
        """Run the kernel to its end. `tensors` in logical order with any strides; `sizes` holds the five of SIZES, and
        "splits" where the kernel's grid has them."""
        layouts = {name: Layout.of(tensors[name]) for name in self._tensors}
        addresses = {name: tensors[name].data_ptr() for name in self._tensors}
        self.prepare(layouts, sizes).launch(addresses, scalars)

    def prepare(self, layouts: Mapping[str, Layout], sizes: Mapping[str, int]) -> PreparedKernel:
        """The kernel with everything in place but addresses and numbers."""
        slots: list[Number] = [0]
        places = dict[str, int]()
        for name in self._tensors:
            layout = layouts[name]
            places[name] = len(slots)
            slots += [0, *(layout.shape or (1,)), *(layout.stride or (0,))]
        slots += [sizes[name] for name in SIZES]
        first_scalar = len(slots)
        slots += [0] * len(self._scalars)
        return PreparedKernel(
            function=self._function,
            slots=self._slots.pack(*slots),
            memory=self._memory,
            addresses=tuple(places.items()),
            scalars=tuple(self._scalars),
            pack_scalars=self._scalar_slots.pack_into,
            first_scalar=8 * first_scalar,
            tasks=self._tasks(sizes),
        )

    def _tasks(self, sizes: Mapping[str, int]) -> int:
        """As many threads as could share the work; 1 where waking another costs more than it saves."""
        tasks, work = 1, self._width
        for size, block in self._grid:
            blocks = -(-sizes[size] // block)
            tasks *= blocks
            if size != "splits":  # they share the same work
                work *= blocks * block
        for size in self._loops:
            work *= sizes[size]
        return 1 if work < SMALL_WORK else tasks


@dataclass(frozen=True, slots=True, eq=False)
class PreparedKernel:
    """A kernel and its array of slots, filled in but for addresses and scalars. Every launch has a copy of its own, so
    several Python threads may use it at once."""

    function: Callable[[object], None]
    slots: bytes
    memory: type[ctypes.Array[ctypes.c_int64]]
    addresses: tuple[tuple[str, int], ...]
    scalars: tuple[str, ...]
    pack_scalars: Callable[..., None]
    first_scalar: int
    tasks: int

    def launch(self, addresses: Mapping[str, int], numbers: Mapping[str, Number]) -> None:
        """Run the kernel to its end."""
        slots = self.memory.from_buffer_copy(self.slots)
        for name, place in self.addresses:
            slots[place] = addresses[name]
        self.pack_scalars(slots, self.first_scalar, *[numbers[name] for name in self.scalars])
        threads = 1 if self.tasks <= 1 else min(self.tasks, torch.get_num_threads())
        run_on_threads(self.function, ctypes.addressof(slots), threads)


def run_on_threads(function: Callable[[int], None], address: int, count: int) -> None:
    """Call function(address) on `count` threads at once and wait for all of them."""
    if count <= 1:
        function(address)
    elif (parallel := openmp_parallel()) is not None and not _forked:
        parallel(function, address, count, 0)
    else:
        # No OpenMP runtime, or a child process of one whose pool did not survive the fork.
        helpers = [threading.Thread(target=function, args=(address,)) for _ in range(count - 1)]
        for helper in helpers:
            helper.start()
        function(address)
        for helper in helpers:
            helper.join()


@cache
def openmp_parallel() -> Callable[..., None] | None:
    """GOMP_parallel of the OpenMP runtime that torch has loaded: its threads are warm, another pool would compete."""
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    loaded = {line.split(maxsplit=5)[-1] for line in maps if "omp" in line.rsplit("/", 1)[-1] and "/" in line}
    home = str(Path(torch.__path__[0]).parent)
    for path in sorted(loaded, key=lambda p: not p.startswith(home)):
        if not Path(path).name.startswith(("libgomp", "libiomp", "libomp")):
            continue
        try:
            parallel = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        return parallel
    return None
