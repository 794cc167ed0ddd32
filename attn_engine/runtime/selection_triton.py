"""Selections in Triton: how a call is cut for a GPU, and the generated kernels; or through Triton's interpreter.

The keys are always in shares, if only one: a second launch settles the tokens, one to a program instance.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from attn_engine.codegen.backends.triton import TritonOptions, render_triton
from attn_engine.codegen.backends.triton_choices import SHARE_WORDS
from attn_engine.codegen.lower.selection import SelectionSchedule, lower_selection
from attn_engine.errors import UnsupportedOnBackend
from attn_engine.ir.ops import Number, Storage
from attn_engine.ir.selection import Selection
from attn_engine.ir.tile import Kernel, Module
from attn_engine.runtime.selection_machine import LaunchPlan, SelectionMachine
from attn_engine.runtime.triton_launch import TritonKernel, compile_triton
from attn_engine.version import VERSION

LEAST_HEADS, MOST_HEADS = 16, 64  # heads of a tile
MOST_TOKENS = 8  # that share a tile of keys
STATE_WORDS = 2**24  # of 4 bytes, of all tokens of a launch
LEAST_SHARE, MOST_SHARES = 1024, 64  # keys of a share; shares of the keys
PROGRAMS = 512  # of a launch, so that every multiprocessor has some
MOST_TILES = 65535  # of a launch, by CUDA's limits


@dataclass(eq=False)
class TritonSelection(SelectionMachine):
    """The kernels of one program, by how many heads share a kv head. Raises UnsupportedOnBackend for float64."""

    interpret: bool = False
    _kernels: dict[SelectionSchedule, tuple[TritonKernel, ...]] = field(
        default_factory=dict[SelectionSchedule, "tuple[TritonKernel, ...]"]
    )

    def __post_init__(self) -> None:
        if self.program.pairs.element is Storage.FLOAT64:
            instead = 'Use backend="torch", or float32 tensors.'
            raise UnsupportedOnBackend(backend=self.name, feature="float64 selections", instead=instead)

    @property
    def name(self) -> str:
        return "triton-interpreter" if self.interpret else "triton"

    def module(self, schedule: SelectionSchedule) -> Module:
        return lower_selection(self.program, schedule, split=True)

    def source(self, group: int = MOST_HEADS) -> str:
        """The files of both kernels, where so many heads share a kv head."""
        schedule = schedule_for(self.program, group)
        return "\n\n".join(self.text(k) for k in self.module(schedule).kernels)

    def text(self, kernel: Kernel) -> str:
        first = f"attn_engine {VERSION} | {kernel.header[0]} | triton | block_q={kernel.block('q')} "
        header = (f"{first}block_kv={kernel.block('kv')}", *kernel.header[1:])
        return render_triton(replace(kernel, header=header), options_for(kernel))

    def kernels(self, schedule: SelectionSchedule) -> tuple[TritonKernel, ...]:
        if schedule not in self._kernels:
            self._kernels[schedule] = tuple(
                compile_triton(k, self.text(k), options_for(k), interpret=self.interpret)
                for k in self.module(schedule).kernels
            )
        return self._kernels[schedule]

    def plan(self, sizes: dict[str, int], topk: int) -> LaunchPlan:
        return plan_launches(self.program, sizes)

    def launch(
        self, plan: LaunchPlan, given: dict[str, Tensor], numbers: dict[str, Number], sizes: dict[str, int]
    ) -> None:
        select, settle = self.kernels(schedule_for(self.program, sizes["q_len"]))
        select.launch(given, numbers, sizes)
        tokens = plan.tile_tokens
        one = {"tile_tokens": 1, "first_tile": int(numbers["first_tile"]) * tokens}
        settle.launch(given, {**numbers, **one}, {**sizes, "tile_count": sizes["tile_count"] * tokens})


def schedule_for(program: Selection, group: int) -> SelectionSchedule:
    """The tiles of scores where `group` heads share a kv head."""
    heads = max(LEAST_HEADS, min(MOST_HEADS, 1 << (group - 1).bit_length()))
    short = program.pairs.element in (Storage.BFLOAT16, Storage.FLOAT16)
    keys = 128 if short and program.pairs.dim_qk <= 128 else 64
    return SelectionSchedule(heads, keys, one_tile=group <= heads)


def options_for(kernel: Kernel) -> TritonOptions:
    """Warps and stages: on sm_90 none of these kernels spills."""
    if kernel.name == "settle":
        return TritonOptions(8, 1)
    return TritonOptions(8 if kernel.block("q") == MOST_HEADS else 4, 2)


def plan_launches(program: Selection, sizes: dict[str, int]) -> LaunchPlan:
    """The plan for a call."""
    tokens, rows = sizes["q_len"], sizes["batches"] * sizes["kv_heads"]
    shares = max(1, min(MOST_SHARES, sizes["kv_len"] // LEAST_SHARE))
    words = state_words(program, sizes["kv_len"], shares)
    planes = 1 if program.pool is None and program.forced is None else 2
    together = max(1, STATE_WORDS // (words * rows * planes))
    tile = max(1, min(MOST_TOKENS, tokens, together, min(tokens, together) * rows * shares // PROGRAMS))
    tiles = -(-tokens // tile)
    launched = min(tiles, MOST_TILES, max(1, together // tile))
    splits = min(shares, -(-PROGRAMS // (launched * rows)))
    shape = (planes, sizes["batches"], sizes["kv_heads"], launched * tile, words)
    return LaunchPlan(tile, tiles, launched, splits, shape)


def state_words(program: Selection, keys: int, shares: int) -> int:
    """What a plane of a state needs, in words of 4 bytes: include/select.triton. Tiles of up to 128 keys are whole."""
    return shares * SHARE_WORDS + -(-max(keys, program.candidates(keys)) // 128) * 128
