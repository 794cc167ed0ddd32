"""The disk cache: what it keeps, what it refuses, and what happens where it cannot write."""

from __future__ import annotations

import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.errors import DumpNotWritten, UnsafeCache
from attn_engine.runtime import cache


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "kernels"
    monkeypatch.setenv(cache.VARIABLE, str(path))
    return path


def write(text: str):
    return lambda path: path.write_text(text)


def never(path: Path) -> None:
    raise AssertionError("built twice")


def test_builds_once_and_keeps_it_private(folder: Path):
    first = cache.stored("a.so", write("one"))
    assert cache.stored("a.so", never) == first == folder / "a.so"
    assert first.read_text() == "one"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [p.name for p in folder.iterdir()] == ["a.so"], "nothing is left of the building"


def test_a_failed_build_leaves_nothing(folder: Path):
    def fail(path: Path) -> None:
        path.write_text("half")
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        cache.stored("a.so", fail)
    assert not (folder / "a.so").exists()
    assert cache.stored("a.so", write("whole")).read_text() == "whole"


def test_loses_a_race_without_harm(folder: Path):
    def build(path: Path) -> None:
        path.mkdir()
        (path / "x").write_text("mine")
        if not (folder / "tree").exists():  # another process is quicker
            (folder / "tree").mkdir()
            (folder / "tree" / "x").write_text("theirs")

    assert (cache.stored("tree", build) / "x").read_text() == "theirs"


def test_refuses_files_that_others_could_write(folder: Path):
    made = cache.stored("a.so", write("code"))
    made.chmod(0o722)
    with pytest.raises(UnsafeCache, match="other users"):
        cache.stored("a.so", never)


def test_refuses_links(folder: Path, tmp_path: Path):
    cache.cache_folder()
    (tmp_path / "elsewhere.so").write_text("code")
    (folder / "a.so").symlink_to(tmp_path / "elsewhere.so")
    with pytest.raises(UnsafeCache, match="symbolic link"):
        cache.stored("a.so", never)


@pytest.mark.parametrize("trouble", ["writable by others", "a link", "a file", "below a file"])
def test_an_unusable_folder_is_replaced_by_a_private_one(
    trouble: str, folder: Path, tmp_path: Path, monkeypatch
):
    if trouble == "writable by others":
        folder.mkdir()
        folder.chmod(0o777)
    elif trouble == "a link":
        (tmp_path / "real").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "real")
    else:
        folder.write_text("")
        if trouble == "below a file":
            monkeypatch.setenv(cache.VARIABLE, str(folder / "inner"))
    with pytest.warns(UserWarning, match="is not used"):
        used = cache.cache_folder()
    assert used != folder
    assert stat.S_IMODE(used.stat().st_mode) == 0o700
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert cache.cache_folder() == used
    assert cache.stored("a.so", write("code")).parent == used


def test_keys_tell_every_list_of_parts_apart():
    lists = [("ab", "c"), ("a", "bc"), ("abc",), ("a", "b", "c"), ("a", "b", "c", "")]
    assert len({cache.key_of(*parts) for parts in lists}) == len(lists)


def test_processes_build_side_by_side(folder: Path):
    program = (
        "import sys, time; from pathlib import Path; from attn_engine.runtime.cache import stored\n"
        "print(stored('a.so', lambda p: (time.sleep(0.2), p.write_text('x' * 100000))).read_text() == 'x' * 100000)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [p.communicate()[0].strip() for p in running] == ["True", "True"]


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(cache.VARIABLE, "~/kernels")
    assert cache.cache_folder() == tmp_path / "kernels"


def test_a_dump_that_cannot_be_written_only_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ATTN_ENGINE_DUMP", str(tmp_path / "file" / "dump"))
    built = AttentionEngine([meta_tensor(None, None, None, 4, dtype=torch.float32)] * 3, backend="torch")
    q = torch.randn(1, 3, 1, 4)
    with pytest.warns(DumpNotWritten, match="ATTN_ENGINE_DUMP"):
        out = built(q, q, q)
    assert out.isfinite().all()
