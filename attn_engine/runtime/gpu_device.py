"""The GPU at hand: whether there is one that kernels run on, and if not, the error that says why."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attn_engine.errors import AttnEngineError, NoGpu, OldDriver, StridesTooLarge, UnsupportedGpu

# Compute capabilities and AMD architectures that triton's and tilelang's compilers have instructions of matrices for.
CAPABILITIES = {8: "sm_80 to sm_89", 9: "sm_90", 10: "sm_100", 11: "sm_110", 12: "sm_120"}
AMD = ("gfx90a", "gfx942", "gfx950")
# The first driver for each major version of CUDA, from NVIDIA's release notes.
DRIVERS = {11: "450.80", 12: "525.60", 13: "580.65"}
# A tile's offsets from its first element have 32 bits; its rows are at most so many.
MOST_ROWS = 256


def missing_gpu(backend: str) -> AttnEngineError | None:
    """Why torch has no GPU here: NoGpu, or OldDriver where the driver is to blame; None where it has one."""
    if torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return explained(backend, str(error))
    return NoGpu(backend=backend, reason="there is no CUDA or ROCm device")


def explained(backend: str, message: str) -> AttnEngineError:
    """The error that torch's message about a device that cannot be used amounts to."""
    old = re.search(r"driver on your system is too old \(found version (\d+)\)", message)
    if old is not None and torch.version.cuda is not None:
        needed = torch.version.cuda
        return OldDriver(
            found=f"{int(old[1]) // 1000}.{int(old[1]) % 1000 // 10}",
            needed=needed,
            torch=torch.__version__,
            driver=DRIVERS.get(int(needed.partition(".")[0]), "of that version"),
        )
    return NoGpu(backend=backend, reason=message.strip().splitlines()[0].rstrip("."))


def check_gpu(device: torch.device) -> None:
    """Raise UnsupportedGpu for a device that kernels are not made for."""
    _check_properties(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _check_properties(index: int) -> None:
    check_properties(torch.cuda.get_device_properties(index))


def check_properties(properties: Any) -> None:
    """Raise UnsupportedGpu; properties: what torch knows of a device."""
    architecture = str(getattr(properties, "gcnArchName", "") or "").partition(":")[0]
    if architecture:
        if architecture not in AMD:
            raise UnsupportedGpu(device=properties.name, found=architecture, known=", ".join(AMD))
    elif properties.major not in CAPABILITIES:
        found = f"sm_{properties.major}{properties.minor}"
        raise UnsupportedGpu(device=properties.name, found=found, known=", ".join(CAPABILITIES.values()))


def check_strides(name: str, x: Tensor) -> None:
    """Raise StridesTooLarge where a tile of (.., rows, dimension) cannot be addressed from its first row."""
    rows, columns = x.shape[2:]
    reach = (min(rows, MOST_ROWS) - 1) * x.stride(2) + (columns - 1) * x.stride(3)
    if reach >= 2**31:
        raise StridesTooLarge(argument=name, strides=tuple(x.stride()), rows=min(rows, MOST_ROWS))
