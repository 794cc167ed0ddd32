"""Mamba-2 with one group: all heads share B and C; the step is in the values.

python -m examples.linear.mamba2_one_group            2 x 24 heads of 128 x 64, 2048 tokens, bfloat16
python -m examples.linear.mamba2_one_group --small    the same in a moment
"""

from __future__ import annotations

from typing import Any

import torch

from attn_engine.integrations.attention_engine import CustomIO, LinearAttentionEngine, meta_tensor
from examples.linear.plain import compare, definition, small


def decay_mod(decay: Any, custom_io: Any) -> Any:
    return decay * custom_io.input_tensors["A"]


def v_mod(v: Any, custom_io: Any) -> Any:
    return v * custom_io.input_tensors["dt"]


def main(arguments: list[str] | None = None) -> float:
    """The largest relative error beside the definition."""
    B, H, T, D, DV = (2, 4, 300, 64, 32) if small(arguments, __doc__) else (2, 24, 2048, 128, 64)
    dtype = torch.bfloat16
    qkv_meta = (
        meta_tensor(B, 1, T, D, dtype=dtype),
        meta_tensor(B, 1, T, D, dtype=dtype),
        meta_tensor(B, H, T, DV, dtype=dtype),
    )
    custom_io = CustomIO({"A": (1, "heads"), "dt": ("batch", "heads", "seq_len")})
    engine = LinearAttentionEngine(
        qkv_meta,
        decay_mod=decay_mod,
        v_mod=v_mod,
        custom_io=custom_io,
        tune=False,
        tune_filename="mamba2",
        tune_bwd=False,
    )

    torch.manual_seed(0)
    C, K = (torch.randn(B, 1, T, D, dtype=dtype, requires_grad=True) for _ in range(2))
    x = torch.randn(B, H, T, DV, dtype=dtype, requires_grad=True)
    dt = torch.nn.functional.softplus(torch.randn(B, H, T) - 4).detach().requires_grad_()
    A = (-1.0 - 15.0 * torch.rand(1, H)).requires_grad_()

    def plain(h: int) -> torch.Tensor:
        return definition(C[0, 0], K[0, 0], x[0, h] * dt[0, h, :, None], A[0, h] * dt[0, h])

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        C, K, x, dt, A = tensors
        return engine(C, K, x, dt, A, dt)

    return compare(run, plain, (C, K, x, dt, A), range(0, H, max(1, H // 4)))


if __name__ == "__main__":
    assert main() < 2e-2
