"""The TileLang showcase: two attentions, kept as text and read in review. `--update-golden` rewrites them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attn_engine.codegen.backends.tilelang import render_tilelang
from attn_engine.codegen.pipeline import with_header
from tests.codegen.test_tilelang import kernels


@pytest.mark.parametrize("name", ["softmax_causal", "soft_cap_alibi_window"])
def test_showcase(name: str, golden: Callable[[str, str], None]) -> None:
    for kernel in kernels(name).values():
        if kernel.name != "delta":
            golden(
                f"tilelang_{name}_{kernel.name}.py",
                render_tilelang(with_header(kernel, "tilelang", "golden")),
            )
