"""A gate learns where attention looks, and then chooses the blocks of keys that are visited (SeerAttention).

python examples/gate_distillation.py            three sequences of 2560 tokens in all: less than a minute on a CPU
python examples/gate_distillation.py --small    the same in a moment
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_engine.library import (
    attn_pooling,
    block_1d_gqa_sparse_attn_varlen_func,
    get_sparse_attn_mask_from_threshold_grouped,
)

HEADS, KV_HEADS, DIM, TOPICS = 8, 2, 64, 12
GROUP = HEADS // KV_HEADS
GATE_DIM = 64


class Gate(nn.Module):
    """For every query and kv head, a score for each block of keys, of projections of q and of pooled keys."""

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size
        self.of_q = nn.Parameter(torch.randn(KV_HEADS, GROUP * DIM, GATE_DIM) / math.sqrt(GROUP * DIM))
        self.of_k = nn.Parameter(torch.randn(KV_HEADS, 2 * DIM, GATE_DIM) / math.sqrt(2 * DIM))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """log_softmax over the blocks that a query can see, (kv heads, length, blocks); q, k: of one sequence."""
        length = q.shape[0]
        blocks = -(-length // self.block_size)
        padded = F.pad(k, (0, 0, 0, 0, 0, blocks * self.block_size - length)).unflatten(
            0, (blocks, self.block_size)
        )
        pooled = torch.cat([padded.mean(1), padded.amax(1)], -1)
        queries = torch.einsum("thd,hdg->htg", q.reshape(length, KV_HEADS, GROUP * DIM), self.of_q)
        keys = torch.einsum("nhd,hdg->hng", pooled, self.of_k)
        score = queries @ keys.mT / math.sqrt(GATE_DIM)
        past = torch.arange(length)[:, None] // self.block_size >= torch.arange(blocks)
        return score.masked_fill(~past, -math.inf).log_softmax(-1)


def tokens(lengths: list[int]) -> list[Tensor]:
    """q, k, v of packed sequences in which stretches of tokens are about a topic, and look for keys of their own."""
    topics = torch.randn(TOPICS, HEADS, DIM)
    about = torch.randint(TOPICS, (sum(lengths) // 24 + 1,)).repeat_interleave(24)[: sum(lengths)]
    q = 1.2 * topics[about] + torch.randn(sum(lengths), HEADS, DIM)
    of_group = topics.unflatten(1, (KV_HEADS, GROUP)).mean(2) * GROUP**0.5
    k = 1.2 * of_group[about] + torch.randn(sum(lengths), KV_HEADS, DIM)
    return [q, k, torch.randn(sum(lengths), KV_HEADS, DIM)]


def targets(q: Tensor, k: Tensor, cu_seqlens: Tensor, max_seqlen: int, block_size: int) -> list[Tensor]:
    """What each group of heads gives to each block: of every sequence (kv heads, length, blocks), rows sum to 1."""
    _, pooled = attn_pooling(q, k, cu_seqlens, max_seqlen, 1.0 / math.sqrt(DIM), block_size)
    found: list[Tensor] = []
    for one in pooled:
        largest = F.max_pool3d(one, kernel_size=[GROUP, 1, 1], stride=[GROUP, 1, 1])[0]
        found.append(largest / (largest.sum(-1, keepdim=True) + 1e-6))
    return found


def loss_of(gate: Gate, q: list[Tensor], k: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """KL divergence of the gate from its targets, per query and kv head."""
    total = torch.zeros(())
    for one, keys, target in zip(q, k, wanted, strict=True):
        total = total + F.kl_div(gate(one, keys).clamp(min=-1e4), target, reduction="sum")
    return total / (KV_HEADS * sum(len(one) for one in q))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Teach a gate, and compare attention over its blocks with dense attention; returns what is printed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="300 tokens, blocks of 16, few steps")
    parser.add_argument(
        "--share", type=float, default=0.2, help="visited: what has more of the best block's weight"
    )
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    lengths, block_size, steps = ([170, 33, 97], 16, 40) if given.small else ([1400, 260, 900], 64, 100)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v = tokens(lengths)
    wanted = targets(q, k, cu_seqlens, max(lengths), block_size)
    of_q, of_k = q.split(lengths), k.split(lengths)

    gate = Gate(block_size)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=1e-2, weight_decay=0.0)
    losses: list[float] = []
    for step in range(steps):
        loss = loss_of(gate, list(of_q), list(of_k), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % max(1, steps // 5) == 0 or step == steps - 1:
            print(f"step {step:4}: KL divergence {losses[-1]:.4f}")

    with torch.no_grad():
        scores = [gate(x, y).exp() for x, y in zip(of_q, of_k, strict=True)]
    relative = [x / x.amax(-1, keepdim=True) for x in scores]
    mask = get_sparse_attn_mask_from_threshold_grouped(relative, given.share, max(lengths), block_size)
    block_of_query, blocks_of_keys = (
        torch.arange(mask.shape[2])[:, None] // block_size,
        torch.arange(mask.shape[3]),
    )
    mask = mask | (block_of_query == blocks_of_keys)
    past = block_of_query >= blocks_of_keys
    outputs: list[Any] = [
        block_1d_gqa_sparse_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, max(lengths), 1.0 / math.sqrt(DIM), blocks, block_size
        )
        for blocks in (mask, chance(mask & past, past), torch.ones_like(mask))
    ]
    return report(losses, mask & past, past, lengths, outputs)


def chance(mask: Tensor, past: Tensor) -> Tensor:
    """As many blocks for each query, anywhere in its past."""
    order = torch.rand(mask.shape).masked_fill(~past, math.inf).argsort(-1).argsort(-1)
    return (order < mask.sum(-1, keepdim=True)) & past


def report(
    losses: list[float], mask: Tensor, past: Tensor, lengths: list[int], outputs: list[Any]
) -> dict[str, float]:
    """Print how much is visited and how far the outputs are from dense attention."""
    kept = sum(int(mask[b, :, :length].sum()) for b, length in enumerate(lengths))
    seen = sum(KV_HEADS * int(past[:length].sum()) for length in lengths)
    gated, random, dense = outputs
    numbers = {
        "first loss": losses[0],
        "last loss": losses[-1],
        "visited": kept / seen,
        "error": float((gated - dense).norm() / dense.norm()),
        "error by chance": float((random - dense).norm() / dense.norm()),
    }
    print(f"the gate visits {numbers['visited']:.1%} of the blocks")
    by_chance = numbers["error by chance"]
    print(f"relative error of the output: {numbers['error']:.3f}, of as many random blocks {by_chance:.3f}")
    return numbers


if __name__ == "__main__":
    main()
