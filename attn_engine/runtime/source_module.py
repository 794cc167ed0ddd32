"""Generated Python text as a module, without a file: compilers that read a function's source back find it."""

from __future__ import annotations

import hashlib
import linecache
from types import ModuleType


def load_source(text: str, name: str) -> ModuleType:
    """Execute `text` as a module called `name`.

    Its lines are registered with `linecache`, where `inspect` (and so triton.jit) and tracebacks look them up.
    """
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    file = f"<attn_engine {name} {digest}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    module = ModuleType(f"attn_engine_{name}_{digest}")
    module.__file__ = file
    exec(compile(text, file, "exec"), module.__dict__)
    return module
