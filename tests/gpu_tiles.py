"""A GPU schedule that stays as it is: texts and numbers of tests do not move with the defaults."""

from __future__ import annotations

from dataclasses import replace

from attn_engine.codegen.schedule import MULTIPROCESSORS, TENSOR_MEMORY, Edges, Gradients, Schedule


def gpu_schedule(dim_qk: int, dim_v: int, element_bytes: int, target: str = "sm_90") -> Schedule:
    """Tiles that do not follow the package's defaults; float32 counts twice, as its products need twice the room."""
    short = element_bytes == 2
    tiles = _gpu_tiles(max(dim_qk, dim_v) * (2 if element_bytes >= 4 else 1))
    return replace(
        tiles,
        folded=short,
        descriptors=short and target in TENSOR_MEMORY,
        sections=True,
        short_tiles=True,
        split_tasks=MULTIPROCESSORS,
    )


def _gpu_tiles(widest: int) -> Schedule:
    if widest <= 64:
        return Schedule(128, 64, 32, 64, Edges.BRANCH, Gradients.TWO_KERNELS, 8, 2, 4, 2)
    if widest <= 128:
        return Schedule(128, 64, 64, 64, Edges.BRANCH, Gradients.TWO_KERNELS, 8, 2, 8, 2)
    return Schedule(64, 32, 32, 32, Edges.BRANCH, Gradients.TWO_KERNELS, 8, 1, 8, 1)
