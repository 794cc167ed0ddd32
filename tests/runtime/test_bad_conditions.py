"""The CPU backend on a hostile machine: each condition in a process of its own, which works or says what to do."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from attn_engine.runtime.cpu_compile import find_compiler

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")

START = """
import torch, warnings
from attn_engine import AttentionEngine, meta_tensor
metas = [meta_tensor(None, None, None, 16, dtype=torch.float32)] * 3
engine = AttentionEngine(metas, mask_mod=lambda b, h, q, kv: kv <= q, backend="cpu")
q, k, v = (torch.randn(2, 150, 4, 16, requires_grad=True) for _ in range(3))
weights = torch.randn(2, 150, 4, 16)
def both():
    o = engine(q, k, v)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), weights)]
def right(results):
    o = engine.reference(q, k, v)
    wanted = [o, *torch.autograd.grad(o, (q, k, v), weights.double())]
    return all(torch.allclose(a.double(), b.double(), atol=1e-5) for a, b in zip(results, wanted))
"""
ALWAYS = START + "assert right(both())"


def run(
    program: str, *, seconds: int = 100, limit_file_bytes: int | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A Python program with these variables set; nothing else of the test's own state reaches it."""

    def limit() -> None:
        if limit_file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_file_bytes, limit_file_bytes))

    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
        preexec_fn=limit,
        check=False,
    )


def works(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stderr


def script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def works_until_asked(kernel_compiler: str) -> str:
    """A compiler that answers the questions about itself and does something else when it is given a kernel."""
    real = find_compiler()
    assert real is not None
    return f'case "$*" in *.cpp*) {kernel_compiler};; *) exec {real.command[0]} "$@";; esac'


def test_a_compiler_that_fails(tmp_path: Path):
    compiler = script(tmp_path / "c++", works_until_asked("echo internal compiler error >&2; exit 4"))
    done = run(ALWAYS, CXX=compiler, ATTN_ENGINE_CACHE=str(tmp_path / "kernels"))
    assert "CompilationFailed" in done.stderr
    assert "internal compiler error" in done.stderr
    assert "source kept at" in done.stderr


def test_a_compiler_that_hangs(tmp_path: Path):
    compiler = script(tmp_path / "c++", works_until_asked("sleep 100"))
    limit = {"ATTN_ENGINE_COMPILE_SECONDS": "5"}
    done = run(ALWAYS, CXX=compiler, ATTN_ENGINE_CACHE=str(tmp_path / "kernels"), **limit)
    assert "CompilationFailed" in done.stderr
    assert "ATTN_ENGINE_COMPILE_SECONDS" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_cache_of_somebody_else(tmp_path: Path):
    folder = tmp_path / "kernels"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)
    said = works(run(ALWAYS, ATTN_ENGINE_CACHE=str(folder)))
    assert "belongs to user 12345" in said
    assert not list(folder.iterdir())


def test_a_home_that_cannot_be_written():
    said = works(run(ALWAYS, HOME="/proc/none", ATTN_ENGINE_CACHE=""))
    assert "/proc/none" in said
    assert "Set ATTN_ENGINE_CACHE" in said


def test_a_disk_that_is_full_from_the_start(tmp_path: Path):
    full = (
        "import shutil; shutil.disk_usage = lambda path: (10, 10, 0) and type('U', (), {'free': 1 << 20})\n"
    )
    said = works(run(full + ALWAYS, ATTN_ENGINE_CACHE=str(tmp_path / "kernels")))
    assert "only 1 MiB left" in said


def test_a_disk_that_fills_up(tmp_path: Path):
    compiler = script(
        tmp_path / "c++",
        works_until_asked("echo final link failed: No space left on device >&2; exit 1"),
    )
    done = run(ALWAYS, CXX=compiler, ATTN_ENGINE_CACHE=str(tmp_path / "kernels"))
    assert "CacheNotWritten" in done.stderr
    assert "Make room" in done.stderr


def test_files_that_may_not_grow(tmp_path: Path):
    """RLIMIT_FSIZE: what is read from a full cache still works, a new kernel is a typed error."""
    done = run(ALWAYS, limit_file_bytes=1000, ATTN_ENGINE_CACHE=str(tmp_path / "kernels"))
    last = done.stderr.strip()
    assert "attn_engine.errors." in last, done.stderr
    assert not list((tmp_path / "kernels").glob("*.so"))


def test_one_thread_of_openmp():
    works(run(START + "assert torch.get_num_threads() == 1\nassert right(both())", OMP_NUM_THREADS="1"))


MANY_THREADS = """
import threading
from attn_engine.runtime import cpu_launch
cpu_launch.SMALL_WORK = 0
torch.set_num_threads(2)
wanted, wrong = both(), []
def calls():
    for i in range(50):
        if not all(torch.equal(a, b) for a, b in zip(both(), wanted)):
            wrong.append(i)
threads = [threading.Thread(target=calls) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
assert right(wanted) and not wrong, wrong
"""


def test_eight_threads_fifty_calls_each():
    works(run(START + MANY_THREADS))


FORK = """
import multiprocessing
torch.set_num_threads(2)
from attn_engine.runtime import cpu_launch
cpu_launch.SMALL_WORK = 0
q, k, v = (torch.randn(2, 700, 4, 16, requires_grad=True) for _ in range(3))  # torch uses its pool for these
weights = torch.randn(2, 700, 4, 16)
wanted = both()
def child(queue):
    queue.put(all(torch.equal(a, b) for a, b in zip(both(), wanted)))
context = multiprocessing.get_context("fork")
queue = context.Queue()
process = context.Process(target=child, args=(queue,))
process.start()
try:
    assert queue.get(timeout=30)
finally:
    process.kill()
assert all(torch.equal(a, b) for a, b in zip(both(), wanted)), "the parent goes on"
"""


def test_a_forked_child_computes_gradients():
    works(run(START + FORK))


def test_two_processes_compile_the_same_kernel(tmp_path: Path):
    folder = tmp_path / "kernels"
    environment = {**os.environ, "ATTN_ENGINE_CACHE": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    running = [subprocess.Popen([sys.executable, "-c", ALWAYS], env=environment) for _ in range(2)]
    assert [p.wait(100) for p in running] == [0, 0]
    assert not list(folder.glob("build_*"))
    assert len(list(folder.glob("forward_*.so"))) == 1
