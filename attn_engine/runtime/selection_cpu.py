"""Selections on CPUs: how a call is cut for the threads, and the generated C++."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attn_engine.codegen.backends.cpu import MANY_REGISTERS, render_cpu
from attn_engine.codegen.lower.selection import SelectionSchedule, lower_selection
from attn_engine.ir.ops import Number, Storage
from attn_engine.ir.selection import Selection
from attn_engine.ir.tile import Kernel, Module
from attn_engine.runtime.cpu_compile import compile_cpu, host_target
from attn_engine.runtime.cpu_launch import CpuKernel
from attn_engine.runtime.selection_machine import LaunchPlan, SelectionMachine
from attn_engine.version import VERSION

HEAD_ROWS = 64  # heads of a tile
TILE_ROWS = 256  # rows of all tokens of a program, about: so often is a tile of keys used once it is packed
MOST_TOKENS = 64
STATE_WORDS = 2**24  # of 4 bytes, of all tokens of a launch
LEAST_SHARE = 1024  # keys of a share
TASKS_OF_THREAD = 4


@dataclass(eq=False)
class CpuSelection(SelectionMachine):
    """The kernels of one program."""

    _kernels: dict[bool, tuple[CpuKernel, ...]] = field(default_factory=dict[bool, "tuple[CpuKernel, ...]"])

    @property
    def schedule(self) -> SelectionSchedule:
        target = host_target()
        registers = 4 if target.vector_bytes == MANY_REGISTERS else 2
        return SelectionSchedule(HEAD_ROWS, registers * target.width(self.program.pairs.element))

    def module(self, *, split: bool) -> Module:
        return lower_selection(self.program, self.schedule, split=split)

    def source(self, *, split: bool) -> str:
        return "\n\n".join(self._text(k) for k in self.module(split=split).kernels)

    def _text(self, kernel: Kernel) -> str:
        first = f"attn_engine {VERSION} | {kernel.header[0]} | cpu | block_q={kernel.block('q')} "
        header = (f"{first}block_kv={kernel.block('kv')}", *kernel.header[1:])
        return render_cpu(replace(kernel, header=header), host_target())

    def kernels(self, *, split: bool) -> tuple[CpuKernel, ...]:
        if split not in self._kernels:
            made = self.module(split=split).kernels
            self._kernels[split] = tuple(compile_cpu(k, self._text(k)) for k in made)
        return self._kernels[split]

    def plan(self, sizes: dict[str, int], topk: int) -> LaunchPlan:
        return plan_launches(self.program, sizes, topk, self.schedule.keys)

    def launch(
        self, plan: LaunchPlan, given: dict[str, Tensor], numbers: dict[str, Number], sizes: dict[str, int]
    ) -> None:
        for kernel in self.kernels(split=plan.splits > 1):
            kernel.launch(given, numbers, sizes)


def plan_launches(program: Selection, sizes: dict[str, int], topk: int, lanes: int) -> LaunchPlan:
    """The plan for a call. Results do not depend on it, so it may look at the number of threads."""
    tokens, group = sizes["q_len"], sizes["heads"] // sizes["kv_heads"]
    rows = sizes["batches"] * sizes["kv_heads"]
    wanted = TASKS_OF_THREAD * torch.get_num_threads()
    tile = min(tokens, MOST_TOKENS, max(1, TILE_ROWS // group))
    shares = 1 if program.pool is not None else max(1, sizes["kv_len"] // LEAST_SHARE)
    tile = max(1, min(tile, tokens * rows * shares // wanted))
    tiles = -(-tokens // tile)
    splits = min(shares, max(1, -(-wanted // (tiles * rows))))
    words = state_words(program, topk, lanes)
    launched = max(1, min(tiles, STATE_WORDS // (words * splits * rows * tile)))
    shape = (splits, sizes["batches"], sizes["kv_heads"], launched * tile, words)
    return LaunchPlan(tile, tiles, launched, splits, shape)


def state_words(program: Selection, topk: int, lanes: int) -> int:
    """What a state needs, in words of 4 bytes; include/select.h cuts it up."""
    width = 2 if program.pairs.element is Storage.FLOAT64 else 1
    carry = 0 if program.pool is None else program.pool.step - 1 + program.pool.reach
    windows = -(-(carry + lanes) // lanes) * lanes if carry else 0
    slots = 2 * topk + 3 * lanes
    words = 8 + windows * width + slots * (width + 1) + topk
    return -(-words // 16) * 16
