"""Simple GLA, or gated retention: the logarithm of a gate of each token and head.

python -m examples.linear.simple_gla            32 heads of 256 x 512, 2048 tokens, bfloat16
python -m examples.linear.simple_gla --small    the same in a moment
"""

from __future__ import annotations

from typing import Any

import torch

from attn_engine.integrations.attention_engine import CustomIO, LinearAttentionEngine, meta_tensor
from examples.linear.plain import compare, definition, small


def main(arguments: list[str] | None = None) -> float:
    """The largest relative error beside the definition."""
    B, H, S, D, DV = (1, 4, 300, 32, 64) if small(arguments, __doc__) else (1, 32, 2048, 256, 512)
    scale = 1 / D**0.5

    def q_mod(q: Any, custom_io: Any) -> Any:
        return q * scale

    dtype = torch.bfloat16
    qkv_meta = (
        meta_tensor(B, H, S, D, dtype=dtype),
        meta_tensor(B, H, S, D, dtype=dtype),
        meta_tensor(B, H, S, DV, dtype=dtype),
    )
    engine = LinearAttentionEngine(qkv_meta, q_mod=q_mod, custom_io=CustomIO({}), tune=False)

    torch.manual_seed(0)
    q, k = (torch.randn(B, H, S, D, dtype=dtype, requires_grad=True) for _ in range(2))
    v = torch.randn(B, H, S, DV, dtype=dtype, requires_grad=True)
    gate = torch.nn.functional.logsigmoid(torch.randn(B, H, S)).clamp_min(-5).detach().requires_grad_()

    def plain(h: int) -> torch.Tensor:
        return definition(q[0, h] * scale, k[0, h], v[0, h], gate[0, h])

    return compare(engine, plain, (q, k, v, gate), range(0, H, max(1, H // 4)))


if __name__ == "__main__":
    assert main() < 2e-2
