"""A layer of native sparse attention learns to look something up, and then decodes from a cache (NSA).

python examples/native_sparse_attention.py            300 steps on sequences of 192 tokens: a minute or two on a CPU
python examples/native_sparse_attention.py --small    a few steps, in a moment

A sequence is pairs of a name and a number vector, then questions: names alone. The answer is the number of the name.
A question sees few tokens: those near it, and the blocks that the means of blocks, or what phi learns in their place,
let it find.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attn_engine.library import NativeSparseAttention

NAME, NUMBER, PAIRS, QUESTIONS = 24, 8, 160, 32


def sequences(batch: int) -> tuple[Tensor, Tensor]:
    """Tokens (batch, pairs + questions, dim), and the answers (batch, questions, NUMBER)."""
    names = nn.functional.normalize(torch.randn(batch, PAIRS // 8, NAME), dim=-1)
    topics = names.repeat_interleave(8, 1)  # what stands together is alike, as in a text
    names = nn.functional.normalize(topics + 0.6 * torch.randn(batch, PAIRS, NAME) / NAME**0.5, dim=-1)
    numbers = torch.randn(batch, PAIRS // 8, NUMBER).repeat_interleave(8, 1)
    asked = torch.randint(PAIRS, (batch, QUESTIONS))
    questions = names.gather(1, asked[..., None].expand(-1, -1, NAME))
    told = torch.cat((names, numbers), -1)
    tokens = torch.cat((told, torch.cat((questions, torch.zeros(batch, QUESTIONS, NUMBER)), -1)), 1)
    return 3 * tokens, numbers.gather(1, asked[..., None].expand(-1, -1, NUMBER))


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    steps = 12 if given.small else 300
    layer = NativeSparseAttention(
        NAME + NUMBER, heads=4, kv_heads=1, head_dim=32, phi="linear", rotary_base=None,
        compression_block=8, compression_stride=4, selection_block=16, selected_blocks=4, window=16,
    )  # fmt: skip
    read = nn.Linear(NAME + NUMBER, NUMBER)
    learned = torch.optim.AdamW([*layer.parameters(), *read.parameters()], lr=4e-3, weight_decay=0.0)
    losses: list[float] = []
    for step in range(steps):
        tokens, answers = sequences(batch=8)
        loss = (read(layer(tokens)[:, PAIRS:]) - answers).square().mean()
        learned.zero_grad()
        loss.backward()
        learned.step()
        losses.append(float(loss.detach()))
        if step % max(1, steps // 10) == 0 or step == steps - 1:
            print(f"step {step:>4}: squared error {losses[-1]:.3f}")

    tokens, answers = sequences(batch=2)
    with torch.no_grad():
        whole = layer(tokens)
    cache = layer.make_cache(batch=2, capacity=PAIRS + QUESTIONS)
    rows = [layer(tokens[:, :PAIRS], cache=cache)]
    rows += [layer(tokens[:, t : t + 1], cache=cache) for t in range(PAIRS, PAIRS + QUESTIONS)]
    apart = float((torch.cat(rows, 1) - whole).abs().max())
    print(f"one question after the other from the cache: within {apart:.1e} of all at once")
    tail = losses[-5:]
    return {"first": losses[0], "last": sum(tail) / len(tail), "apart": apart}


if __name__ == "__main__":
    main()
