"""Retention: a fixed factor of each head, 1 - 2^(-5 - h), given for every token; its logarithm is taken in the kernel.

python -m examples.linear.retention            20 heads of 256 x 512, 1024 tokens, bfloat16
python -m examples.linear.retention --small    the same in a moment
"""

from __future__ import annotations

from typing import Any

import torch

from attn_engine.integrations.attention_engine import CustomIO, LinearAttentionEngine, meta_tensor
from examples.linear.plain import compare, definition, small


def decay_mod(decay: Any, custom_io: Any) -> Any:
    return decay.log()


def main(arguments: list[str] | None = None) -> float:
    """The largest relative error beside the definition."""
    B, H, T, D, DV = (1, 4, 300, 32, 64) if small(arguments, __doc__) else (1, 20, 1024, 256, 512)
    scale = 1 / D**0.5

    def q_mod(q: Any, custom_io: Any) -> Any:
        return q * scale

    qkv_meta = (
        meta_tensor(B, H, T, D, dtype=torch.bfloat16),
        meta_tensor(B, H, T, D, dtype=torch.bfloat16),
        meta_tensor(B, H, T, DV, dtype=torch.bfloat16),
    )
    engine = LinearAttentionEngine(
        qkv_meta,
        q_mod=q_mod,
        decay_mod=decay_mod,
        custom_io=CustomIO({}),
        tune=True,
        tune_filename="retention_linear",
        tune_bwd=True,
    )

    torch.manual_seed(0)
    q, k = (torch.randn(B, H, T, D, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    v = torch.randn(B, H, T, DV, dtype=torch.bfloat16, requires_grad=True)
    factors = 1 - torch.exp2(-5.0 - torch.arange(H) % 16)
    decay = factors[None, :, None].expand(B, H, T).contiguous().requires_grad_()

    def plain(h: int) -> torch.Tensor:
        return definition(q[0, h] * scale, k[0, h], v[0, h], decay[0, h].log())

    return compare(engine, plain, (q, k, v, decay), range(0, H, max(1, H // 4)))


if __name__ == "__main__":
    assert main() < 2e-2
