"""The operator of DeepSeek-V3.2-Exp in plain torch and float64, from its formulas; and inputs for it, poisoned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

NAN = float("nan")
F64 = torch.float64


@dataclass(frozen=True)
class Sizes:
    h: int = 40
    q_rank: int = 24
    n1: int = 3
    nope: int = 16
    rope: int = 8
    kv_rank: int = 32
    heads: int = 4
    dim: int = 16
    block_size: int = 16


def rms(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * gamma


def rope(x: Tensor, sin: Tensor, cos: Tensor, pairs: str = "interleaved") -> Tensor:
    """Column by column: result j is x_j cos_j -+ its partner sin_j, of the columns as halves."""
    n = x.shape[-1]
    order = [*range(0, n, 2), *range(1, n, 2)] if pairs == "interleaved" else [*range(n)]
    columns = [x[..., i] for i in order]
    turned = [-columns[j + n // 2] if j < n // 2 else columns[j - n // 2] for j in range(n)]
    return torch.stack([columns[j] * cos[..., j] + turned[j] * sin[..., j] for j in range(n)], -1)


def rope_of_indexer(x: Tensor, sin: Tensor, cos: Tensor, kind: str) -> Tensor:
    place, pairs = kind.split("_")
    n = sin.shape[-1]
    if place == "first":
        return torch.cat((rope(x[..., :n], sin, cos, pairs), x[..., n:]), -1)
    return torch.cat((x[..., :-n], rope(x[..., -n:], sin, cos, pairs)), -1)


@dataclass(eq=False)
class Operands:
    """The 20 tensors, in the operator's order; and those of old tokens by sequence, in float64."""

    tensors: dict[str, Tensor]
    sizes: Sizes
    written: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def copy(self) -> list[Tensor]:
        return [x.clone() for x in self.tensors.values()]


def operands(
    lengths: Sequence[int],
    s1: int,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    spare: int = 2,
) -> Operands:
    """act_seqs = lengths, with the new tokens; they go to the last slots of each sequence. Pages are shuffled; unused
    ones and unused slots hold NaN, unused entries of the table anything."""
    z, b = sizes or Sizes(), len(lengths)
    width = -(-max(lengths, default=1) // z.block_size) + 1
    blocks = sum(-(-max(n, 0) // z.block_size) for n in lengths) + spare
    table = torch.tensor([-1, -7, 2147480000])[torch.randint(0, 3, (b, width))].to(torch.int32)
    order = torch.randperm(blocks).tolist()
    caches = {
        n: torch.full((blocks, z.block_size, 1, d), NAN)
        for n, d in (("kv", z.kv_rank), ("kr", z.rope), ("k", z.dim))
    }
    places = torch.full((b, s1), -1, dtype=torch.int32)
    for i, length in enumerate(lengths):
        for j in range(-(-max(length, 0) // z.block_size)):
            table[i, j] = order.pop()
        for u in range(length):
            page, row = int(table[i, u // z.block_size]), u % z.block_size
            if u >= length - s1:
                places[i, u - (length - s1)] = page * z.block_size + row
            else:
                for c in caches.values():
                    c[page, row, 0] = torch.randn(c.shape[3])
    angle = torch.rand(2, b, s1, z.rope) * 6
    given = {
        "x": torch.randn(b, s1, z.h),
        "w_dq": torch.randn(z.h, z.q_rank) / z.h**0.5,
        "w_uq_qr": torch.randn(z.q_rank, z.n1 * (z.nope + z.rope)) / z.q_rank**0.5,
        "w_uk": torch.randn(z.n1, z.nope, z.kv_rank) / z.nope**0.5,
        "w_dkv_kr": torch.randn(z.h, z.kv_rank + z.rope) / z.h**0.5,
        "gamma_cq": torch.rand(z.q_rank) + 0.5,
        "gamma_ckv": torch.rand(z.kv_rank) + 0.5,
        "sin": angle[0].sin(),
        "cos": angle[1].cos(),
        "cache_index": places,
        "kv_cache": caches["kv"],
        "kr_cache": caches["kr"],
        "block_table": table,
        "act_seqs": torch.tensor(lengths, dtype=torch.int32),
        "w_idx_qb": torch.randn(z.q_rank, z.heads * z.dim) / z.q_rank**0.5,
        "w_idx_k": torch.randn(z.h, z.dim) / z.h**0.5,
        "w_idx_proj": torch.randn(z.h, z.heads) / z.h**0.5,
        "in_gamma_k": torch.rand(z.dim) + 0.5,
        "in_beta_k": torch.randn(z.dim),
        "index_k_cache": caches["k"],
    }
    return Operands({n: x.to(dtype) if x.is_floating_point() else x for n, x in given.items()}, z)


@dataclass(frozen=True, eq=False)
class Golden:
    """All in float64: queries and new rows, the scores of each query and position, and what each query sees."""

    c_q: Tensor
    q_latent: Tensor
    q_rope: Tensor
    latent: Tensor
    k_rope: Tensor
    index_q: Tensor
    index_k: Tensor
    weights: Tensor


def prologs(
    given: Operands,
    eps: float = 1e-5,
    kind: str = "first_interleaved",
    ln_eps: float = 1e-6,
    stored: torch.dtype = F64,
) -> Golden:
    """stored: what the values that the golden code keeps are rounded to."""

    def kept(x: Tensor) -> Tensor:
        return x.to(stored).double()

    t = {n: x.double() for n, x in given.tensors.items()}
    z = given.sizes
    c_q = kept(rms(kept(t["x"] @ t["w_dq"]), t["gamma_cq"], eps))
    q = kept(c_q @ t["w_uq_qr"]).reshape(*c_q.shape[:2], z.n1, z.nope + z.rope)
    q_latent = torch.einsum("bshd,hdc->bshc", q[..., : z.nope], t["w_uk"])
    both = kept(t["x"] @ t["w_dkv_kr"])
    k = t["x"] @ t["w_idx_k"]
    k = (k - k.mean(-1, keepdim=True)) / torch.sqrt(k.var(-1, keepdim=True, correction=0) + ln_eps)
    k = k * t["in_gamma_k"] + t["in_beta_k"]
    index_q = (c_q @ t["w_idx_qb"]).reshape(*c_q.shape[:2], z.heads, z.dim)
    sin, cos = t["sin"], t["cos"]
    return Golden(
        c_q,
        kept(q_latent),
        kept(rope(q[..., z.nope :], sin[:, :, None], cos[:, :, None])),
        kept(rms(both[..., : z.kv_rank], t["gamma_ckv"], eps)),
        kept(rope(both[..., z.kv_rank :], sin, cos)),
        kept(rope_of_indexer(index_q, sin[:, :, None], cos[:, :, None], kind)),
        kept(rope_of_indexer(k, sin, cos, kind)),
        kept(t["x"] @ t["w_idx_proj"]),
    )


def written(given: Operands, g: Golden) -> dict[str, Tensor]:
    """The three caches after the new rows, in float64."""
    rows = {"kv_cache": g.latent, "kr_cache": g.k_rope, "index_k_cache": g.index_k}
    found = {n: given.tensors[n].double().clone() for n in rows}
    for b, i in (given.tensors["cache_index"] >= 0).nonzero().tolist():
        slot = int(given.tensors["cache_index"][b, i])
        page, row = divmod(slot, given.sizes.block_size)
        for n, cache in found.items():
            cache[page, row, 0] = rows[n][b, i]
    return found


def rows_of(cache: Tensor, table: Tensor, count: int) -> Tensor:
    """(count, dim): the first rows of one sequence."""
    page = cache.shape[1]
    return torch.stack([cache[int(table[u // page]), u % page, 0] for u in range(count)])


def seen(given: Operands, b: int, i: int) -> int:
    """How many positions a query sees."""
    return max(0, int(given.tensors["act_seqs"][b]) - given.tensors["x"].shape[1] + 1 + i)


def scores(given: Operands, g: Golden, caches: dict[str, Tensor], b: int, i: int) -> Tensor:
    """Of the indexer, one for each position in sight."""
    k = rows_of(caches["index_k_cache"], given.tensors["block_table"][b], seen(given, b, i))
    return (g.weights[b, i][:, None] * torch.relu(g.index_q[b, i] @ k.T)).sum(0)


def attended(
    given: Operands,
    g: Golden,
    caches: dict[str, Tensor],
    b: int,
    i: int,
    chosen: Sequence[int],
    scale: float,
) -> Tensor:
    """(n1, kv_rank): of one query, over the positions chosen."""
    if not chosen:
        return torch.zeros(given.sizes.n1, given.sizes.kv_rank, dtype=F64)
    table, most = given.tensors["block_table"][b], max(chosen) + 1
    latent = rows_of(caches["kv_cache"], table, most)[list(chosen)]
    rotated = rows_of(caches["kr_cache"], table, most)[list(chosen)]
    score = (g.q_latent[b, i] @ latent.T + g.q_rope[b, i] @ rotated.T) * scale
    return torch.softmax(score, -1) @ latent


def whole(
    given: Operands,
    topk: int,
    scale: float,
    kind: str = "first_interleaved",
    eps: float = 1e-5,
    ln_eps: float = 1e-6,
) -> Tensor:
    """The operator, end to end."""
    g = prologs(given, eps, kind, ln_eps)
    caches = written(given, g)
    b, s1 = given.tensors["x"].shape[:2]
    out = torch.zeros(b, s1, given.sizes.n1, given.sizes.kv_rank, dtype=F64)
    for sequence in range(b):
        for i in range(s1):
            if count := seen(given, sequence, i):
                best = scores(given, g, caches, sequence, i).sort(descending=True, stable=True).indices
                chosen = sorted(best[: min(topk, count)].tolist())
                out[sequence, i] = attended(given, g, caches, sequence, i, chosen, scale)
    return out
