"""The GPU that kernels are made for: the one at hand, else the one that was asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from attn_engine.codegen.targets import DEFAULT_TARGET, TARGETS, Target, target_named


def current_target() -> Target:
    """That of torch's current CUDA or ROCm device; sm_90 where there is none."""
    if not torch.cuda.is_available():
        return target_named(DEFAULT_TARGET)
    return target_of(torch.cuda.get_device_properties(torch.cuda.current_device()))


def current_device_name() -> str:
    """What CUDA calls the device; "" where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def target_of(properties: Any) -> Target:
    """The target of a device, from torch's properties: its own limits on top of the nearest known instruction set."""
    if architecture := getattr(properties, "gcnArchName", ""):
        name = architecture.split(":")[0]
        return TARGETS.get(name) or replace(TARGETS["gfx942"], name=name)
    name = f"sm_{properties.major}{properties.minor}"
    # 9 and 10 alone have products of four warps; all others, older and newer, multiply as sm_80 does.
    nearest = TARGETS[{9: "sm_90", 10: "sm_100"}.get(properties.major, "sm_80")]
    return (
        replace(
            nearest,
            name=nearest.name,
            shared_limit=getattr(properties, "shared_memory_per_block_optin", nearest.shared_limit),
            shared_total=getattr(properties, "shared_memory_per_multiprocessor", nearest.shared_total),
            registers=getattr(properties, "regs_per_multiprocessor", nearest.registers),
            most_warps=getattr(properties, "max_threads_per_multi_processor", 32 * nearest.most_warps) // 32,
        )
        if name != nearest.name
        else nearest
    )


def converts_float8() -> bool:
    """Whether torch's current device has instructions for numbers in e4m3: of NVIDIA's, 8.9 and newer."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability() >= (8, 9)
