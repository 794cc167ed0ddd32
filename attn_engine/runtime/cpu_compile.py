"""Compile generated C++ with the machine's compiler, once per source and machine."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import signal
import struct
import subprocess
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from attn_engine.codegen.backends.cpu import CpuTarget
from attn_engine.codegen.backends.cpu_names import INCLUDE
from attn_engine.errors import BrokenLibrary, CompilationFailed, CompilerNotUsable, WrongArgument
from attn_engine.ir.tile import Kernel
from attn_engine.runtime.cache import NO_ROOM, cache_folder, forget, key_of, stored
from attn_engine.runtime.cpu_launch import ABI_VERSION, CpuKernel

SECONDS = "ATTN_ENGINE_COMPILE_SECONDS"
SECONDS_TO_COMPILE = 120.0  # where that is not set
ELF_HEADER_BYTES = 64
SECONDS_TO_PROBE = 20
# Never -ffast-math: it breaks masks by -inf, and older g++ would link code that changes how the whole process rounds.
FLAGS = (
    "-std=c++17", "-O2", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
    "-ffp-contract=off", "-Wno-psabi", "-Wno-attributes", "-Wno-ignored-attributes",
)  # fmt: skip
# Tuning for one processor loses up to 30 % on vectors of 32 bytes with some compilers; generic tuning never did.
MACHINE_FLAGS = {"x86_64": ("-march={0}", "-mtune=generic"), "AMD64": ("-march={0}", "-mtune=generic")}
OTHER_MACHINE_FLAGS = ("-mcpu={0}",)
Loaded = TypeVar("Loaded")
VECTOR_BYTES = (("__AVX512F__", 64), ("__AVX2__", 32))


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler that works here: how to call it, what it calls itself, and the vector width it compiles for."""

    command: tuple[str, ...]
    version: str
    flags: tuple[str, ...]
    features: tuple[str, ...]
    vector_bytes: int

    @property
    def target(self) -> CpuTarget:
        return CpuTarget(self.vector_bytes, "__AVX512BF16__" in self.features)


def find_compiler(processor: str = "native") -> Compiler | None:
    """The first of $CXX, c++, g++, clang++ that compiles for `processor`; None where none does."""
    return _find(os.environ.get("CXX", ""), os.environ.get("PATH", ""), processor)


@cache
def _find(configured: str, _search_path: str, processor: str) -> Compiler | None:
    if configured.strip():
        found, problem = _configured(configured, processor)
        if found is not None:
            return found
        warnings.warn(
            f"CXX={configured!r} is not used: {problem}. Trying c++, g++ and clang++ instead; correct or unset CXX.",
            CompilerNotUsable,
            stacklevel=2,
        )
    for candidate in ("c++", "g++", "clang++"):
        path = shutil.which(candidate)
        if path and (compiler := _probe((path,), processor)):
            return compiler
    return None


def _configured(configured: str, processor: str) -> tuple[Compiler | None, str]:
    """The compiler that $CXX names, or why it is none."""
    path = shutil.which(configured.strip())  # a path may have blanks
    try:
        command = (path,) if path else tuple(shlex.split(configured))
    except ValueError as problem:
        return None, f"it cannot be read as a command ({problem})"
    path = shutil.which(command[0]) if command else None
    if path is None:
        return None, "there is no such program"
    found = _probe((path, *command[1:]), processor)
    return found, "it does not compile C++ for this machine"


def _probe(command: tuple[str, ...], processor: str) -> Compiler | None:
    """What the compiler says of itself and of the machine; remembered on disk until either changes."""
    machine = MACHINE_FLAGS.get(platform.machine(), OTHER_MACHINE_FLAGS)
    flags = (*FLAGS, *(f.format(processor) for f in machine))
    about = Path(command[0]).resolve().stat()
    identity = key_of(*command, *flags, str(about.st_mtime_ns), str(about.st_size), _processor_flags())

    def build(path: Path) -> None:
        version = _output([*command, "--version"])
        macros = _output([*command, *flags, "-dM", "-E", "-x", "c++", os.devnull])
        names = sorted(line.split()[1] for line in macros.splitlines() if line.startswith("#define __"))
        path.write_text(json.dumps({"version": version, "features": names}))

    try:
        known = json.loads(stored(f"compiler_{identity}.json", build).read_text())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    width = next((n for name, n in VECTOR_BYTES if name in known["features"]), 16)
    return Compiler(command, known["version"], flags, tuple(known["features"]), width)


def _processor_flags() -> str:
    """What this processor can do: a home directory may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def seconds_to_compile() -> float:
    """How long one run of the compiler may take: $ATTN_ENGINE_COMPILE_SECONDS, else two minutes."""
    text = os.environ.get(SECONDS, "").strip()
    try:
        seconds = float(text) if text else SECONDS_TO_COMPILE
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < threading.TIMEOUT_MAX:
        unset = f"Correct it, or unset it for {SECONDS_TO_COMPILE:.0f} seconds."
        raise WrongArgument(argument=SECONDS, got=text, expected="a positive number", instead=unset)
    return seconds


def _output(command: list[str]) -> str:
    done = _run(command, min(SECONDS_TO_PROBE, seconds_to_compile()))
    done.check_returncode()
    return done.stdout


def _run(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """The finished program. Late or interrupted, it is stopped together with every process that it has started."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as running:
        try:
            output, errors = running.communicate(timeout=seconds)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
            running.wait()
            raise
    return subprocess.CompletedProcess(command, running.returncode, output, errors)


def host_target() -> CpuTarget:
    """The target that this machine's compiler compiles for; the widest where there is no compiler."""
    compiler = find_compiler()
    return compiler.target if compiler else CpuTarget()


@cache
def _headers() -> str:
    return "\n".join(path.read_text() for path in sorted(INCLUDE.glob("*.h")))


def compile_cpu(kernel: Kernel, source: str, compiler: Compiler | None = None) -> CpuKernel:
    """The kernel as machine code, from the disk cache where it is there; see `compile_library`."""
    return compile_library(kernel.name, source, lambda library: CpuKernel(kernel, library), compiler)


def compile_library(
    name: str, source: str, loaded: Callable[[Path], Loaded], compiler: Compiler | None = None
) -> Loaded:
    """What `loaded` makes of the library of a source, from the disk cache where it is there.

    A damaged file there is compiled again, once. Raises CompilationFailed with the compiler's message, its source kept
    where the message says, and BrokenLibrary where the fresh library cannot be loaded either.
    """
    compiler = compiler or find_compiler()
    assert compiler is not None, "the engine asks find_compiler() first"
    name = f"{name}_{key_of(source, _headers(), *_made_by(compiler), ABI_VERSION)}.so"

    def load() -> Loaded:
        library = stored(name, lambda path: _build(path, source, compiler))
        if not _is_whole(library):
            raise OSError("the file is cut off")
        return loaded(library)

    try:
        return load()
    except (OSError, AttributeError):  # not a library, or one without the kernel: the file was damaged
        forget(cache_folder() / name)
    try:
        return load()
    except (OSError, AttributeError) as problem:
        raise BrokenLibrary(path=cache_folder() / name, reason=problem) from problem


def _is_whole(library: Path) -> bool:
    """Whether an ELF file reaches to its last table, which lies at its end: running a shorter one kills the process."""
    data = library.read_bytes()
    if data[:5] != b"\x7fELF\x02" or len(data) < ELF_HEADER_BYTES:
        return data[:4] != b"\x7fELF"  # another format: loading it tells
    (start,) = struct.unpack_from("=Q", data, 40)
    size, count = struct.unpack_from("=HH", data, 58)
    return start + size * count <= len(data)


def _made_by(compiler: Compiler) -> tuple[str, ...]:
    return (*compiler.command, compiler.version, *compiler.flags, *compiler.features)


@cache
def _include_folder(compiler: Compiler, definition: tuple[str, ...]) -> Path:
    """The headers, read by the compiler beforehand where it is a GCC: that halves the time to compile a kernel."""
    if "Free Software Foundation" not in compiler.version:
        return INCLUDE

    def build(folder: Path) -> None:
        shutil.copytree(INCLUDE, folder)
        header = folder / "kernel.h"
        flags = [flag for flag in compiler.flags if flag != "-shared"]
        _output(
            [*compiler.command, *flags, *definition, "-x", "c++-header", str(header), "-o", f"{header}.gch"]
        )

    try:
        return stored(f"headers_{key_of(_headers(), *_made_by(compiler), *definition)}", build)
    except (OSError, subprocess.SubprocessError):
        return INCLUDE


def _build(library: Path, source: str, compiler: Compiler) -> None:
    text = library.with_suffix(".cpp")
    text.write_text(source, encoding="utf-8", errors="replace")
    definition = tuple(
        f"-D{name}={value}" for name, value in re.findall(r"^#define (\w+) (\d+)$", source, re.M)
    )
    include = _include_folder(compiler, definition)
    command = [*compiler.command, *compiler.flags, f"-I{include}", str(text), "-o", str(library)]
    output = run_compiler(command)
    if output is not None:
        for code in NO_ROOM:
            if os.strerror(code) in output:
                raise OSError(code, os.strerror(code))
        kept = cache_folder() / text.name
        text.replace(kept)
        command = [part.replace(str(library.parent), str(kept.parent)) for part in command]
        raise CompilationFailed(command=shlex.join(command), source=kept, output=output)


def run_compiler(command: list[str]) -> str | None:
    """Run a compiler for as long as it may take; what it said where it failed, None where it did not."""
    seconds = seconds_to_compile()
    try:
        done = _run(command, seconds)
    except subprocess.TimeoutExpired:
        return f"The compiler took more than {seconds:g} seconds and was stopped; {SECONDS} sets the limit."
    return done.stderr if done.returncode != 0 else None
