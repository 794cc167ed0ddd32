"""Finding and driving the C++ compiler, the good ones and the bad ones."""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from pathlib import Path

import pytest

from attn_engine.codegen.backends.cpu import render_cpu
from attn_engine.codegen.lower.forward import lower_forward
from attn_engine.codegen.schedule import cpu_schedule
from attn_engine.errors import BrokenLibrary, CompilationFailed, CompilerNotUsable, WrongArgument
from attn_engine.ir.ops import Storage
from attn_engine.ir.tile import Kernel
from attn_engine.runtime import cpu_compile
from attn_engine.runtime.cpu_compile import Compiler, compile_cpu, find_compiler
from tests.runtime.rules import program

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """The machine's compiler, with an empty cache."""
    monkeypatch.setenv("ATTN_ENGINE_CACHE", str(tmp_path / "kernels"))
    monkeypatch.setattr(cpu_compile, "_include_folder", lambda *_: cpu_compile.INCLUDE)
    found = find_compiler()
    assert found is not None
    return found


def kernel_of(compiler: Compiler) -> Kernel:
    return lower_forward(program(), cpu_schedule(compiler.target.lanes(Storage.FLOAT32)))


def script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_the_target_follows_the_processor():
    widths = [c.vector_bytes for p in ("x86-64-v2", "x86-64-v3", "x86-64-v4") if (c := find_compiler(p))]
    if not widths:
        pytest.skip("not an x86-64 compiler")
    assert widths == [16, 32, 64]
    v3 = find_compiler("x86-64-v3")
    assert v3 is not None
    assert (v3.target.lanes(Storage.BFLOAT16), v3.target.lanes(Storage.FLOAT64)) == (16, 8)


def test_the_same_source_is_compiled_once(compiler: Compiler, monkeypatch: pytest.MonkeyPatch):
    kernel = kernel_of(compiler)
    source = render_cpu(kernel, compiler.target)
    compile_cpu(kernel, source, compiler)
    monkeypatch.setattr(cpu_compile, "_build", lambda *_: pytest.fail("compiled again"))
    compile_cpu(kernel, source, compiler)


def test_a_rejected_kernel_keeps_its_source(compiler: Compiler):
    with pytest.raises(CompilationFailed) as caught:
        compile_cpu(kernel_of(compiler), "this is not C++\n", compiler)
    assert "error" in str(caught.value)
    assert Path(caught.value.source).read_text() == "this is not C++\n"
    assert str(caught.value.source) in caught.value.command


def test_a_compiler_that_hangs_is_stopped(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ATTN_ENGINE_COMPILE_SECONDS", "0.3")
    child = tmp_path / "child"
    slow = script(tmp_path / "slow", f"sleep 60 & echo $! > {child}; wait")  # as g++ starts cc1plus
    with pytest.raises(CompilationFailed, match=r"more than 0\.3 seconds .* ATTN_ENGINE_COMPILE_SECONDS"):
        compile_cpu(kernel_of(compiler), "int x;\n", Compiler((slow,), "slow", (), (), 64))
    assert has_ended(int(child.read_text())), "what the compiler had started is stopped too"


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "inf"])
def test_a_strange_time_limit_is_an_error(text: str, compiler: Compiler, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ATTN_ENGINE_COMPILE_SECONDS", text)
    with pytest.raises(WrongArgument, match="positive number"):
        compile_cpu(kernel_of(compiler), "int x;\n", compiler)


def test_an_interrupted_compilation_leaves_nothing(compiler: Compiler, tmp_path: Path):
    """Ctrl-C while the compiler runs: the exception arrives, the compiler is gone, and so is what it wrote."""
    child = tmp_path / "child"
    body = f'for o in "$@"; do :; done; echo half > "$o"; sleep 60 & echo $! > {child}; wait'
    slow = Compiler((script(tmp_path / "slow", body),), "slow", (), (), 64)

    def interrupt() -> None:
        while not child.exists() or not child.read_text().strip():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # what runs in the background ignores it
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            compile_cpu(kernel_of(compiler), "int x;\n", slow)
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert has_ended(int(child.read_text()))
    assert not [p.name for p in cpu_compile.cache_folder().iterdir() if not p.name.startswith("compiler_")]


def has_ended(process: int) -> bool:
    """Within two seconds; one that nobody has waited for yet has ended too."""
    for _ in range(100):
        status = Path(f"/proc/{process}/stat")
        if not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


def test_a_home_shared_by_machines_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What the compiler said on one processor is not believed on another."""
    monkeypatch.setenv("ATTN_ENGINE_CACHE", str(tmp_path / "kernels"))

    def on(flags: str, macro: str) -> Compiler:
        cpu_compile._find.cache_clear()
        monkeypatch.setattr(cpu_compile, "_processor_flags", lambda: flags)
        monkeypatch.setattr(cpu_compile, "_output", lambda _: f"#define {macro} 1\n")
        found = find_compiler()
        assert found is not None
        return found

    wide, narrow = on("flags: avx512f", "__AVX512F__"), on("flags: avx2", "__AVX2__")
    assert (wide.vector_bytes, narrow.vector_bytes) == (64, 32)
    assert cpu_compile._made_by(wide) != cpu_compile._made_by(narrow), "kernels are kept apart too"
    assert on("flags: avx512f", "never asked again").vector_bytes == 64
    cpu_compile._find.cache_clear()


@pytest.mark.parametrize("body", ["exit 1", "echo not json", "kill -9 $$"])
def test_broken_compilers_are_passed_over(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ATTN_ENGINE_CACHE", str(tmp_path / "kernels"))
    monkeypatch.setenv("CXX", script(tmp_path / "broken", body if "json" not in body else "exit 3"))
    with pytest.warns(CompilerNotUsable, match="CXX=.*broken"):
        found = find_compiler()
    assert found is not None
    assert "broken" not in found.command[0]


@pytest.mark.parametrize("text", ["'", " ", "/nowhere/c++ -O2", "a b"])
def test_a_strange_name_of_a_compiler_is_passed_over(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
):
    monkeypatch.setenv("ATTN_ENGINE_CACHE", str(tmp_path / "kernels"))
    monkeypatch.setenv("CXX", text)
    assert find_compiler() is not None
    assert bool(text.strip()) is any(issubclass(w.category, CompilerNotUsable) for w in recwarn)


def test_a_compiler_in_a_folder_with_blanks(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "my compilers"
    folder.mkdir()
    monkeypatch.setenv("CXX", script(folder / "c++", f'exec {compiler.command[0]} "$@"'))
    found = find_compiler()
    assert found is not None
    assert found.command == (str(folder / "c++"),)


@pytest.mark.parametrize("damage", ["garbage", "cut off"])
def test_a_damaged_library_is_compiled_again(
    damage: str, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
):
    kernel = kernel_of(compiler)
    source = render_cpu(kernel, compiler.target) + f"// {damage}\n"  # loaded by no other test
    with monkeypatch.context() as unloaded:
        unloaded.setattr(cpu_compile, "CpuKernel", lambda *_: None)
        compile_cpu(kernel, source, compiler)
    (library,) = cpu_compile.cache_folder().glob("*.so")
    size = library.stat().st_size
    library.write_bytes(library.read_bytes()[: size // 2] if damage == "cut off" else b"garbage")
    compile_cpu(kernel, source, compiler)
    assert library.stat().st_size == size


def test_a_library_that_never_loads_is_an_error(compiler: Compiler, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_compile, "_build", lambda path, *_: path.write_bytes(b"garbage"))
    with pytest.raises(BrokenLibrary, match="cannot be loaded"):
        compile_cpu(kernel_of(compiler), "int x;", compiler)


def test_a_machine_without_compiler_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert find_compiler() is None
