"""Attention over blocks: a local window with strides, and a pattern of your own.

python examples/block_patterns.py            2 x 8192 tokens, 32 heads of 128: some seconds and 2 GB on a CPU
python examples/block_patterns.py --small    the same in a moment
"""

from __future__ import annotations

import argparse
import time

import torch

from attn_engine.library import LocalStrideSparseAttention, SparseAttention


def main(arguments: list[str] | None = None) -> None:
    """Both modules on random tensors, with the time of a second call."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="512 tokens, 4 heads")
    small = parser.parse_args(arguments).small

    block_size = 64  # positions of a block
    local_blocks = 2 if small else 32  # always attends to the last 32 * 64 positions
    vert_stride = 8  # and to one block of 8 before them
    max_seq_len = 512 if small else 8192
    num_heads = 4 if small else 32
    device = "cpu"
    q, k, v = (torch.rand(2, max_seq_len, num_heads, 128, device=device).requires_grad_() for _ in range(3))

    attn = LocalStrideSparseAttention(
        num_heads,
        max_seq_len,
        block_size,
        local_blocks,
        vert_stride,
        seq_dim=1,  # q/k/v layout: (batch, seqlen, num_heads, head_dim)
    )
    attn.to(device)
    attn(q, k, v)  # the first call compiles
    report("local blocks and strides", attn, q, k, v)

    num_blocks = max_seq_len // block_size
    block_sparse_pattern = torch.rand((num_heads, num_blocks, num_blocks)) > 0.8
    for head_sparse_pattern in block_sparse_pattern:
        head_sparse_pattern.diagonal()[:] = True  # every token sees its own block
    block_sparse_pattern *= torch.tril(torch.ones_like(block_sparse_pattern[0]))
    attn = SparseAttention(block_size, block_sparse_pattern, seq_dim=1)
    attn.to(device)
    attn(q, k, v, sm_scale=0.008)
    report("a random pattern", attn, q, k, v)


def report(name: str, attn: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Print how long one call and its gradient take."""
    begin = time.perf_counter()
    output = attn(q, k, v)
    middle = time.perf_counter()
    output.sum().backward()
    end = time.perf_counter()
    print(
        f"{name}: forward {middle - begin:.2f} s, backward {end - middle:.2f} s, output {tuple(output.shape)}"
    )


if __name__ == "__main__":
    main()
