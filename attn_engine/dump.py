"""ATTN_ENGINE_DUMP=directory writes every stage of every compiled attention; ATTN_ENGINE_DUMP=stderr prints them."""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from attn_engine.errors import DumpNotWritten
from attn_engine.ir.printer import format_kernel, format_program
from attn_engine.runtime.compiled import CompiledAttention


def dump_stages(compiled: CompiledAttention, scale: float) -> None:
    """Write the stages of `compiled` where the environment variable says; nothing where it is not set."""
    target = os.environ.get("ATTN_ENGINE_DUMP")
    if not target:
        return
    if target == "stderr":
        for name, text in stages(compiled, scale):
            print(f"==== {compiled.program.name} {name}\n{text}", file=sys.stderr)
        return
    program = format_program(compiled.program)
    key = hashlib.sha256(f"{program}{compiled.backend.name}".encode()).hexdigest()[:8]
    try:
        place = Path(os.path.expanduser(target))  # noqa: PTH111  pathlib raises for an unknown user
        folder = place / f"{compiled.program.name}_{compiled.backend.name}_{key}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in stages(compiled, scale):
            (folder / name).write_text(text + "\n", encoding="utf-8", errors="replace")
    except OSError as problem:
        warnings.warn(
            f"ATTN_ENGINE_DUMP={target}: the stages are not written ({problem}). Name a directory "
            "that you can write, or stderr.",
            DumpNotWritten,
            stacklevel=2,
        )


def stages(compiled: CompiledAttention, scale: float) -> Iterator[tuple[str, str]]:
    """(file name, text) of each stage in order: program, mask plan, tile kernels, source."""
    from attn_engine.explain import explain

    yield "00_program.txt", format_program(compiled.program)
    yield "10_explanation.txt", str(explain(compiled.program, scale, compiled))
    learned = compiled.supported(tuple(c.name for c in compiled.program.differentiable_captures))
    for direction in ("forward", "backward"):
        for kernel in compiled.module(direction, learned).kernels:
            yield f"40_tile_{kernel.name}.txt", format_kernel(kernel)
            ending = {"cpu": "cpp", "torch": "txt"}.get(compiled.backend.name, "py")
            yield f"50_source_{kernel.name}.{ending}", compiled.backend.source(kernel, compiled.schedule)
