"""Planning makes no array of Sq x Skv elements, nor do calls; new contents of a mask's tensors compile nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attn_engine import AttentionEngine, create_block_mask, meta_tensor
from attn_engine.masks.classes import MOST_AT_ONCE
from attn_engine.runtime.cpu_compile import find_compiler
from tests.masks.random_masks import LENGTH, atoms_of


class LargestTensor(TorchDispatchMode):
    """The number of elements in memory of the largest tensor that torch makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and not func.is_view:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // max(1, x.element_size()))
        return result


def spread(x: torch.Tensor, length: int) -> torch.Tensor:
    return x.repeat_interleave(-(-length // LENGTH))[:length].contiguous()


def masks(length: int) -> dict[str, Any]:
    documents, shuffled = torch.arange(length) // 700, spread(torch.randint(0, 4, (LENGTH,)), length)
    known = (
        "causal",
        "window",
        "prefix",
        "chunked",
        "dilated",
        "dilated blocks",
        "sink or window",
    )
    return {name: atoms_of(601)[name] for name in known} | {
        "documents": lambda b, h, q, k: documents[q] == documents[k],
        "unsorted": lambda b, h, q, k: (shuffled[q] == shuffled[k]) & (k <= q),
    }


@pytest.mark.parametrize("name", list(masks(LENGTH)))
def test_planning(name: str) -> None:
    length = 16384
    mask_mod = masks(length)[name]
    with LargestTensor() as largest:
        create_block_mask(mask_mod, None, None, length, length, "cpu").lists()
    assert 0 < largest.elements <= max(MOST_AT_ONCE, 2 * length) < length**2 // 1000


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_a_call_with_a_mask_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    length, dim = 3000, 16
    ids = torch.arange(length) // 300

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (ids[q_idx] == ids[kv_idx]) & (kv_idx <= q_idx)

    metas = [meta_tensor(None, None, None, dim, dtype=torch.float32)] * 3
    run = AttentionEngine(metas, mask_mod=mask_mod, layout="bhsd")
    block_mask = create_block_mask(mask_mod, None, None, length, length)
    q, k, v = torch.randn(3, 1, 1, length, dim)
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def step(lists: Any) -> torch.Tensor:
        o = run(*inputs, block_mask=lists)
        torch.autograd.grad(o.sum(), inputs)
        return o.detach()

    for lists in (None, block_mask):
        step(lists)
    monkeypatch.setattr("attn_engine.runtime.backends.CpuBackend.compile", None)
    for size in (500, 70, 2000):
        ids.copy_(torch.arange(length) // size)
        with LargestTensor() as largest:
            found = [step(None), step(block_mask)]
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
        exact = run.reference(*(x.detach() for x in inputs)).to(found[0].dtype)
        torch.testing.assert_close(found[0], exact, rtol=1e-5, atol=1e-5)
        assert largest.elements < length**2 // 16  # a few parts of dQ
