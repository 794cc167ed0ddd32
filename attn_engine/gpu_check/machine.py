"""What results depend on: the device, its driver and clocks, the versions of everything that takes part, and when."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from attn_engine.version import VERSION

PACKAGES = (
    "triton", "tilelang", "numpy", "flash-attn", "flash-attn-3", "flashinfer-python", "flash-linear-attention",
)  # fmt: skip
# What nvidia-smi is asked for, and what the report calls it.
QUERIES = {
    "driver_version": "driver",
    "clocks.sm": "clock now",
    "clocks.max.sm": "highest clock",
    "clocks.max.mem": "highest memory clock",
    "power.limit": "power limit",
}


def machine() -> dict[str, Any]:
    """Facts by name; what is not known is absent."""
    found: dict[str, Any] = {"device": "none"}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found = {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            **_of_the_driver(),
        }
    found |= {
        "processor": _processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda of torch": torch.version.cuda or torch.version.hip or "none",
        "cudnn": torch.backends.cudnn.version() or "none",
        **{name: version for name in PACKAGES if (version := _version(name))},
        "attn_engine": VERSION,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    return found


def _of_the_driver() -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERIES)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if len(values) != len(QUERIES):
        return {}
    return {name: x for name, x in zip(QUERIES.values(), values, strict=True) if not x.startswith("[")}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def commit() -> str:
    """The commit of the checkout that this is, with a + where files were changed since; else "unknown"."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=20, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"
