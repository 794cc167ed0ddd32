"""Device functions that lie in a file beside the headers: a generated file gets those that it calls."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

_FOLDER = Path(__file__).parent / "include"


@lru_cache(maxsize=4)
def device_functions(name: str) -> dict[str, str]:
    """The functions of a file of include/ by their names."""
    blocks = re.split(r"\n\n\n", (_FOLDER / name).read_text().strip())
    functions = [b for b in blocks if b.startswith("@")]
    return {re.findall(r"def (\w+)\(", b)[0]: b for b in functions}


def functions_called(name: str, text: str) -> list[str]:
    """The lines of those that a text calls, and of those that they call, in the file's order."""
    known = device_functions(name)
    wanted: set[str] = set()
    texts = [text]
    while texts:
        called = set(re.findall(r"(?<!\.)\b(\w+)\(", texts.pop())) & set(known)
        texts += [known[name] for name in called - wanted]
        wanted |= called
    return [line for n, body in known.items() if n in wanted for line in [*body.split("\n"), "", ""]]
