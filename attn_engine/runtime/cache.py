"""The kernel cache on disk: files named by a hash of everything that made them, safe for many processes at once.

A compiled kernel is code that runs when it is loaded, so nothing is loaded from a directory or file that somebody else
could have written. Where the cache directory cannot be used, a private temporary one takes its place for this process.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

from attn_engine.errors import CacheNotWritten, UnsafeCache

VARIABLE = "ATTN_ENGINE_CACHE"
WANTED_MEBIBYTES = 32  # less free space than for the compiler's precompiled header and a few kernels is none
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def key_of(*parts: str) -> str:
    """A name for what these texts make together; no two lists of texts share one."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()[:40]


def cache_folder() -> Path:
    """Where kernels are kept: $ATTN_ENGINE_CACHE, else ~/.cache/attn_engine, else a private temporary directory."""
    configured = os.environ.get(VARIABLE, "").strip() or "~/.cache/attn_engine"
    # os.path leaves the name of an unknown user alone, where pathlib raises
    return _usable_folder(os.path.expanduser(configured), os.getpid())  # noqa: PTH111


@cache
def _usable_folder(wanted: str, _process: int) -> Path:
    path = Path(wanted)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        reason = why_unsafe(path)
        if reason is None and not os.access(path, os.W_OK | os.X_OK):
            reason = "it cannot be written"
        free = shutil.disk_usage(path).free >> 20
        if reason is None and free < WANTED_MEBIBYTES:
            reason = f"its disk has only {free} MiB left"
    except OSError as problem:
        reason = str(problem)
    if reason is None:
        return path
    try:
        private = Path(tempfile.mkdtemp(prefix="attn_engine_"))
    except OSError as problem:
        raise CacheNotWritten(
            path=path, reason=f"{reason}; a temporary one failed too: {problem}"
        ) from problem
    atexit.register(_remove, private, os.getpid())
    warnings.warn(
        f"The kernel cache {path} is not used: {reason}. Kernels of this process are compiled into {private} and "
        f"lost at its end. Set {VARIABLE} to a directory that only you can write.",
        stacklevel=2,
    )
    return private


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not in a forked child, whose parent still needs it
        shutil.rmtree(folder, ignore_errors=True)


def why_unsafe(path: Path) -> str | None:
    """Why code from `path` must not be trusted; None when only this user can have written it."""
    about = path.lstat()
    if stat.S_ISLNK(about.st_mode):
        return "it is a symbolic link"
    if about.st_uid != os.geteuid():
        return f"it belongs to user {about.st_uid}"
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "other users may write to it"
    return None


def stored(name: str, build: Callable[[Path], None]) -> Path:
    """The cached file or folder `name`; where there is none, `build(path)` makes it in a fresh place and it is moved.

    Two processes that build the same at once both succeed, and either result serves. Raises UnsafeCache when what is
    there could have been written by somebody else, CacheNotWritten when the disk is full.
    """
    folder = cache_folder()
    path = folder / name
    if not path.exists():
        try:
            _build_into(folder, name, build)
        except OSError as problem:
            if problem.errno not in NO_ROOM:
                raise
            raise CacheNotWritten(path=folder, reason=problem.strerror) from problem
    if reason := why_unsafe(path):
        raise UnsafeCache(path=path, reason=reason)
    return path


def _build_into(folder: Path, name: str, build: Callable[[Path], None]) -> None:
    """Build in a fresh folder inside and move the result to its place at once: nobody sees half of it."""
    path = folder / name
    with tempfile.TemporaryDirectory(dir=folder, prefix="build_", ignore_cleanup_errors=True) as scratch:
        fresh = Path(scratch) / name
        build(fresh)
        fresh.chmod(0o700)
        try:
            fresh.replace(path)
        except OSError:  # a folder does not replace one that another process was quicker to put there
            if not path.is_dir():
                raise


def forget(path: Path) -> None:
    """Remove a file that turned out to be damaged, so that `stored` builds it again."""
    path.unlink(missing_ok=True)
