"""What an engine reads anew, keeps and compiles, and how it lives with torch around it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import CustomIO
from attn_engine.runtime.backends import CpuBackend
from tests.small_engine import DerivedSoftmax, SeedSoftmax, causal, engine, qkv, softmax_attention

# -- what is read anew at each call


def test_captured_numbers_and_tensors_are_never_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    window, slopes = 5, torch.rand(4)

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + slopes[h] * (kv_idx - q_idx)

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (kv_idx <= q_idx) & (q_idx - kv_idx < window)

    built = engine(score_mod=score_mod, mask_mod=mask_mod, scale=0.3)
    q, k, v = qkv()
    built(q, k, v)
    compiled = count_compilations(monkeypatch)
    distance = torch.arange(50)[:, None] - torch.arange(50)[None, :]
    for new_window in (1, 17, 100):
        window, slopes = new_window, torch.rand(4)
        visible = (distance >= 0) & (distance < window)
        wanted = softmax_attention(q, k, v, 0.3, lambda s: s - slopes[:, None, None] * distance, visible)
        torch.testing.assert_close(built(q, k, v), wanted, rtol=2e-5, atol=2e-5)
    slopes.mul_(2)  # in place
    wanted = softmax_attention(q, k, v, 0.3, lambda s: s - slopes[:, None, None] * distance, visible)
    torch.testing.assert_close(built(q, k, v), wanted, rtol=2e-5, atol=2e-5)
    assert compiled == []


def count_compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels compiled from here on."""
    compiled: list[str] = []
    compile_kernel = CpuBackend.compile

    def counting(self: CpuBackend, kernel: Any, schedule: Any) -> Any:
        compiled.append(kernel.name)
        return compile_kernel(self, kernel, schedule)

    monkeypatch.setattr(CpuBackend, "compile", counting)
    return compiled


def test_a_new_length_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = count_compilations(monkeypatch)
    built = engine(mask_mod=causal)
    for length in (3, 64, 65, 200, 4):
        q, k, v = qkv(length, requires_grad=length != 65)
        o = built(q, k, v)
        if length != 65:
            o.sum().backward()
    assert sorted(compiled) == ["backward", "delta", "forward", "forward"], (
        "a forward kernel for packed heads (3 and 4 queries: tiles of 8 rows), one for long; the backward when asked"
    )


def test_engines_do_not_disturb_each_other() -> None:
    io = CustomIO({"bias": ("heads",)})
    add = engine(score_mod=lambda s, c, b, h, q, kv: s + c.input_tensors["bias"] * kv, custom_fwd_inputs=io)
    multiply = engine(
        score_mod=lambda s, c, b, h, q, kv: s * c.input_tensors["bias"][h], custom_fwd_inputs=io
    )
    q, k, v = qkv()
    bias = torch.rand(4)
    kv = torch.arange(50)
    for _ in range(2):
        wanted = softmax_attention(q, k, v, 1.0, lambda s: s + bias[:, None, None] * kv)
        torch.testing.assert_close(add(q, k, v, bias), wanted, rtol=2e-5, atol=2e-5)
        wanted = softmax_attention(q, k, v, 1.0, lambda s: s * bias[:, None, None])
        torch.testing.assert_close(multiply(q, k, v, bias=bias), wanted, rtol=2e-5, atol=2e-5)


# -- torch around it


def test_torch_compile_and_checkpoint() -> None:
    slopes = torch.rand(4, requires_grad=True)
    built = engine(score_mod=lambda s, b, h, q, kv: s + slopes[h] * (kv - q), mask_mod=causal, scale=0.3)
    q, k, v = qkv(requires_grad=True)

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return built(q * 1.5, k, v).relu()

    wanted = block(q, k, v)
    gradients = torch.autograd.grad(wanted.sum(), (q, k, v, slopes))
    compiled = torch.compile(block, fullgraph=True)
    got = compiled(q, k, v)
    torch.testing.assert_close(got, wanted)
    for g, w in zip(torch.autograd.grad(got.sum(), (q, k, v, slopes)), gradients, strict=True):
        torch.testing.assert_close(g, w)
    again = torch.utils.checkpoint.checkpoint(block, q, k, v, use_reentrant=False)
    for g, w in zip(torch.autograd.grad(again.sum(), (q, k, v, slopes)), gradients, strict=True):
        torch.testing.assert_close(g, w)


def test_operator_is_registered_correctly() -> None:
    built = engine(mask_mod=causal)
    q, k, v = qkv(20, requires_grad=True)
    built(q, k, v)
    _, key = built._call(built._traced, "cpu")
    arguments = (q, k, v, [], [built.scale], key)
    torch.library.opcheck(torch.ops.attn_engine.forward.default, arguments)


SECOND_PROCESS = """
import torch
from attn_engine import AttentionEngine, meta_tensor
engine = AttentionEngine([meta_tensor(None, None, None, 16, dtype=torch.float32)] * 3)
q = torch.randn(1, 9, 2, 16, requires_grad=True)
engine(q, q, q).sum().backward()
print("done")
"""


def test_a_second_process_reuses_the_cache(tmp_path: Path) -> None:
    environment = {**os.environ, "ATTN_ENGINE_CACHE": str(tmp_path / "cache")}
    libraries: list[dict[str, int]] = []
    for _ in range(2):
        run = [sys.executable, "-c", SECOND_PROCESS]
        done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
        assert done.stdout == "done\n", done.stderr
        libraries.append({p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("*.so")})
    assert len(libraries[0]) >= 3
    assert libraries[0] == libraries[1]


def test_check_reports_and_finds_a_wrong_gradient() -> None:
    q, k, v = qkv(40)
    report = engine(mask_mod=causal).check(q, k, v)
    assert report.ok, str(report)
    assert "d q" in str(report)

    class Wrong(DerivedSoftmax):
        forward = staticmethod(SeedSoftmax.forward)

        @staticmethod
        def backward(
            dp: Any, scores: Any, final_rowscales: Any, doosum: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any
        ) -> Any:
            return dp * scores

    assert not engine(online_func=Wrong()).check(q, k, v).ok


def test_sources_of_every_backend() -> None:
    built = engine(mask_mod=causal)
    assert "@triton.jit" in built.source(backend="triton")
    assert "multiply_add" in built.source(backend="cpu", kernel="backward")
    assert "Delta" in built.source(backend="triton", kernel="delta")


def test_different_functions_never_share_a_kernel() -> None:
    sources = {
        engine(score_mod=mod).source(backend="cpu").partition("#include")[2]
        for mod in (
            lambda s, b, h, q, kv: s * 2.0,
            lambda s, b, h, q, kv: s * 3.0,
            lambda s, b, h, q, kv: s + 2.0,
        )
    }
    assert len(sources) == 3


def test_graph_and_explanation() -> None:
    built = engine(mask_mod=causal, score_mod=lambda s, b, h, q, kv: torch.tanh(s) * 4)
    graph = built.graph()
    assert graph.number_of_nodes() > 5
    text = str(built.explain())
    for word in ("kv_idx <= q_idx", "tanh", "lse", "q_last"):
        assert word in text


def test_copies_of_an_engine() -> None:
    import copy
    import pickle

    built = engine(online_func=SeedSoftmax())
    q, k, v = qkv()
    wanted = built(q, k, v)
    for other in (copy.deepcopy(built), pickle.loads(pickle.dumps(built))):
        assert torch.equal(other(q, k, v), wanted)
    module = torch.nn.Module()
    module.attention = built
    assert torch.equal(copy.deepcopy(module).attention(q, k, v), wanted)
