"""An indexer learns which tokens a trained attention looks at, on real text (DeepSeek-V3.2, section 2.1).

A small language model is trained on the sources of Python's standard library and frozen. Then its indexer imitates the
dense attention (warm-up), and after that the attention among the tokens that the indexer itself chooses (sparse stage).

python examples/indexer_training.py            256 tokens of context: one or two minutes on a CPU
python examples/indexer_training.py --small    64 tokens: a moment
"""

from __future__ import annotations

import argparse
import re
import sysconfig
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.library import causal, indexer_loss, lightning_indexer, sparse_attention

MODULES = (
    "argparse",
    "ast",
    "inspect",
    "pathlib",
    "subprocess",
    "tarfile",
    "textwrap",
    "threading",
    "typing",
    "zipfile",
)
WORDS, WIDTH, HEADS, DIM = 1000, 96, 4, 24
INDEX_HEADS, INDEX_DIM = 4, 16


@dataclass(frozen=True)
class Sizes:
    context: int
    batch: int
    chosen: int
    model_steps: int
    dense_steps: int
    sparse_steps: int


LARGE, SMALL = Sizes(256, 8, 32, 150, 120, 60), Sizes(64, 4, 8, 60, 60, 20)


def text() -> Tensor:
    """Word numbers of some modules of the standard library; 0 is any rare word."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [
        p for name in MODULES for p in (folder / f"{name}.py", folder / name / "__init__.py") if p.exists()
    ]
    words = re.findall(r"\w+|\n *|[^\w\s]", "\n".join(p.read_text(errors="replace") for p in files))
    known = {w: i + 1 for i, (w, _) in enumerate(Counter(words).most_common(WORDS - 1))}
    return torch.tensor([known.get(w, 0) for w in words])


class Model(nn.Module):
    """Words to the next word: a layer that knows the word before, one of attention, one of plain layers."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(context, WIDTH)
        self.before, self.of_qkv = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, 3 * HEADS * DIM, bias=False)
        self.out = nn.Linear(HEADS * DIM, WIDTH)
        self.plain = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )
        self.end = nn.Linear(WIDTH, WORDS)
        metas = [meta_tensor(None, None, None, DIM, dtype=torch.float32)] * 3
        self.attention = AttentionEngine(metas, mask_mod=causal())

    def hidden(self, words: Tensor) -> Tensor:
        """(batch, context, width): what attention and indexer read."""
        x = self.words(words)
        previous = F.pad(x, (0, 0, 1, 0))[:, :-1]
        x = x + torch.tanh(self.before(torch.cat((x, previous), -1)))
        return F.layer_norm(x + self.places.weight[: words.shape[1]], (WIDTH,))

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.of_qkv(x).unflatten(-1, (3, HEADS, DIM)).unbind(2)
        return q, k, v

    def forward(self, words: Tensor) -> Tensor:
        x = self.hidden(words)
        x = x + self.out(self.attention(*self.qkv(x)).flatten(2))
        return self.end(x + self.plain(x))


class Indexer(nn.Module):
    """Queries, keys and weights of heads, much narrower than those of the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.of_q = nn.Linear(WIDTH, INDEX_HEADS * INDEX_DIM, bias=False)
        self.of_k = nn.Linear(WIDTH, INDEX_DIM, bias=False)
        self.of_weights = nn.Linear(WIDTH, INDEX_HEADS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.of_q(x).unflatten(-1, (INDEX_HEADS, INDEX_DIM)), self.of_k(x), self.of_weights(x)


def choose(parts: tuple[Tensor, Tensor, Tensor], count: int) -> Tensor:
    """The tokens of each query, int32 (batch, context, 1, count)."""
    q, k, weights = (x.detach() for x in parts)
    return lightning_indexer(q, k[:, :, None], weights, sparse_count=count)


def batches(words: Tensor, sizes: Sizes) -> Tensor:
    """(batch, context + 1) pieces of the text, drawn anywhere."""
    starts = torch.randint(len(words) - sizes.context - 1, (sizes.batch,))
    return torch.stack([words[i : i + sizes.context + 1] for i in starts.tolist()])


def train(
    parameters: nn.Module, steps: int, rate: float, loss_of: Callable[[], Tensor], title: str
) -> list[float]:
    """The losses of all steps."""
    optimizer = torch.optim.AdamW(parameters.parameters(), lr=rate)
    losses: list[float] = []
    for step in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % max(1, steps // 3) == 0 or step == steps - 1:
            print(f"{title}, step {step:4}: {losses[-1]:.4f}")
    return losses


@torch.no_grad()
def compare(model: Model, indexer: Indexer, words: Tensor, sizes: Sizes) -> dict[str, float]:
    """On text that was not trained on: KL divergence, and how much of the best tokens and of the attention is found,
    for queries that have more than twice as many tokens to choose from."""
    x = model.hidden(words[:, :-1])
    q, k, v = model.qkv(x)
    parts = indexer(x)
    score = torch.einsum("bthd,buhd->bhtu", q, k) * DIM**-0.5
    past = torch.ones(score.shape[-2:], dtype=torch.bool).tril()
    p = score.masked_fill(~past, -torch.inf).softmax(-1).mean(1)  # (batch, query, key)
    queries = slice(2 * sizes.chosen, None)
    best = p.topk(sizes.chosen, -1).indices
    chosen = choose(parts, sizes.chosen)
    found = torch.zeros_like(p).scatter_(2, chosen[:, :, 0].clamp_min(0).long(), 1.0)
    latest = torch.arange(sizes.context)[:, None] - torch.arange(sizes.chosen)
    nearby = torch.zeros_like(p).scatter_(2, latest.clamp_min(0).expand(len(p), -1, -1), 1.0)
    dense, sparse = model.attention(q, k, v), sparse_attention(q, k, chosen, v)
    numbers = {"KL": float(indexer_loss(q, k, *parts))}
    for name, taken in (("indexer", found), ("latest tokens", nearby)):
        numbers[f"recall, {name}"] = float(taken.gather(2, best)[:, queries].mean())
        numbers[f"attention, {name}"] = float((taken * p).sum(-1)[:, queries].mean())
    error = (sparse - dense)[:, queries].norm() / dense[:, queries].norm()
    return {**numbers, "error of the output": float(error)}


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Train a model, then its indexer; returns what is printed: before, after the warm-up, after the sparse stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a short context, few steps")
    sizes = SMALL if parser.parse_args(arguments).small else LARGE
    torch.manual_seed(0)
    words = text()
    held = len(words) * 9 // 10
    seen, unseen = words[:held], batches(words[held:], sizes)
    model, indexer = Model(sizes.context), Indexer()

    def next_word() -> Tensor:
        batch = batches(seen, sizes)
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def of_batch() -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        with torch.no_grad():
            x = model.hidden(batches(seen, sizes)[:, :-1])
            q, k, _ = model.qkv(x)
        return q, k, indexer(x)

    def imitate_all() -> Tensor:
        q, k, parts = of_batch()
        return indexer_loss(q, k, *parts)

    def imitate_among_chosen() -> Tensor:
        q, k, parts = of_batch()
        return indexer_loss(q, k, *parts, choose(parts, sizes.chosen))

    train(model, sizes.model_steps, 3e-3, next_word, "next word")
    found = {"before": compare(model, indexer, unseen, sizes)}
    train(indexer, sizes.dense_steps, 1e-2, imitate_all, "KL, all tokens")
    found["warm-up"] = compare(model, indexer, unseen, sizes)
    train(indexer, sizes.sparse_steps, 3e-3, imitate_among_chosen, "KL, chosen tokens")
    found["sparse stage"] = compare(model, indexer, unseen, sizes)
    print(f"\n{sizes.chosen} of up to {sizes.context} tokens, text that was not trained on:")
    for name in found["before"]:
        print(f"{name:26}" + "".join(f"{stage}: {numbers[name]:<10.3f}" for stage, numbers in found.items()))
    return found


if __name__ == "__main__":
    main()
