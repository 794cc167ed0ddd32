"""A user's tensor may have any name: those that a kernel needs for itself are changed."""

from __future__ import annotations

import re

import pytest
import torch

from attn_engine import CustomIO, LinearAttentionEngine, meta_tensor
from attn_engine.frontend.names import _PREFIXES, RESERVED
from attn_engine.ir.kernel_words import CHUNK_WORDS
from tests.linear.variants import EVERY, Variant

F32 = torch.float32
NOT_CODE = re.compile(r'""".*?"""|(//|#)(?!include|define)[^\n]*|"[^"\n]*"', re.S)
# What a kernel names after the user's tensors u, s and a and the user's lines, and names with a number behind.
OF_THE_USER = re.compile(
    r"(d_)?[usa](_|$)|.*_\d+$|.*_(value|lanes|stride|size)$|(x|small|attn_engine.*|_.*)$"
)
NAMES = ("decays", "state", "weights", "D", "initial", "out", "T_COLUMNS", "load", "Real", "chunk")


@pytest.mark.parametrize("variant", EVERY[::3], ids=str)
def test_every_name_of_a_kernel_is_reserved(variant: Variant):
    found: set[str] = set()
    for backend, kernels in (("cpu", ("forward", "backward", "step")), ("triton", ("forward", "backward"))):
        engine = variant.engine(F32, backend=backend)
        for kernel in kernels:
            text = NOT_CODE.sub("", engine.source(kernel))
            found |= set(re.findall(r"(?<![\w.>])([A-Za-z_]\w*)", text))
    assert len(found) > 100
    free = found - RESERVED - CHUNK_WORDS
    assert not {name for name in free if not name.startswith(_PREFIXES) and not OF_THE_USER.match(name)}


def test_tensors_have_the_names_of_the_kernel():
    """Ten custom inputs, each named as something in the kernel: forward and backward compile and are right."""
    meta = meta_tensor(None, None, None, 8, dtype=F32)

    def k_mod(k, custom):
        for name in NAMES:
            k = k * custom.input_tensors[name]
        return k

    engine = LinearAttentionEngine(
        [meta] * 3, k_mod=k_mod, custom_io=CustomIO(dict.fromkeys(NAMES, (1, "heads"))), backend="cpu"
    )
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 20, 2, 8) for _ in range(3))
    decay = -torch.rand(1, 20, 2)
    custom = [(torch.rand(1, 2) + 0.5).requires_grad_() for _ in NAMES]
    o, want = engine(q, k, v, decay, *custom), engine.reference(q, k, v, decay, *custom, dtype=torch.float64)
    torch.testing.assert_close(o.double(), want, atol=1e-4, rtol=1e-4)
    weights = torch.randn(o.shape)
    wanted = torch.autograd.grad(want, custom, weights.double())
    for one, other in zip(torch.autograd.grad(o, custom, weights), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
