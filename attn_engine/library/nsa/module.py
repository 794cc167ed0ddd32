"""Native sparse attention as a layer: projections, gates, phi, and a cache for decoding (NSA, arXiv:2502.11089)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attn_engine.library.arguments import divisible
from attn_engine.library.nsa.attention import native_sparse_attention
from attn_engine.library.nsa.cache import NSACache
from attn_engine.library.nsa.compression import (
    LinearCompression,
    PerceptronCompression,
    Phi,
    WeightedPooling,
    mean_pooling,
)
from attn_engine.library.nsa.rotary import Rotary
from attn_engine.library.nsa.sequences import CuSeqlens
from attn_engine.library.nsa.sizes import Compression, Sizes, refuse
from attn_engine.library.sparse.seer_arguments import shaped

PHIS = ("mean", "weighted", "linear", "mlp")


class NativeSparseAttention(nn.Module):
    """A causal attention layer: (batch, T, dim) to (batch, T, dim), or packed (rows, dim) with cu_seqlens.

    dim: of the tokens. heads, kv_heads, head_dim: of the attention; head_dim None: dim / heads. phi: "mean",
        "weighted", "linear" or "mlp", each but the mean with a learnable position inside of a block for keys.
        own_pairs: every branch has keys and values of its own, as in the paper. rotary_base: of rotary positions,
        keys being compressed before they are rotated; None: no positions. Sizes are those of `native_sparse_attention`.

    The gates are sigmoids of a projection of the token, one for each head and branch. Raises WrongArgument.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        head_dim: int | None = None,
        *,
        phi: str = "mlp",
        own_pairs: bool = True,
        rotary_base: float | None = 10000.0,
        compression_block: int = 32,
        compression_stride: int = 16,
        selection_block: int = 64,
        selected_blocks: int = 16,
        window: int = 512,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        divisible(heads, kv_heads)
        compression = Compression(compression_block, compression_stride)
        self.sizes = Sizes(compression, selection_block, selected_blocks, window)
        self.heads, self.kv_heads, self.backend = heads, kv_heads, backend
        self.head_dim = dim // heads if head_dim is None else head_dim
        if rotary_base is not None and self.head_dim % 2:
            instead = "Give head_dim, or rotary_base=None."
            refuse("head_dim", self.head_dim, "even: rotary positions turn pairs of numbers", instead)
        self.pairs = 3 if own_pairs else 1
        self.rotary = None if rotary_base is None else Rotary(self.head_dim, rotary_base)
        self.to_q = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.to_k = nn.Linear(dim, self.pairs * kv_heads * self.head_dim, bias=False)
        self.to_v = nn.Linear(dim, self.pairs * kv_heads * self.head_dim, bias=False)
        self.to_gates = nn.Linear(dim, 3 * heads)
        self.to_out = nn.Linear(heads * self.head_dim, dim, bias=False)
        self.compress_k = _phi(phi, kv_heads, compression_block, self.head_dim, position=True)
        self.compress_v = _phi(phi, kv_heads, compression_block, self.head_dim, position=False)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: CuSeqlens = None,
        cache: NSACache | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """The layer's output; with a cache of `make_cache`, x are new tokens (batch, n, dim) behind those in it.

        counts: with a cache, integers (batch,), how many of the n tokens each sequence has; the output of others is 0.
        Calls with a cache have no gradients.
        """
        packed = cu_seqlens is not None and cache is None
        rows = ("rows",) if packed else ("batch", "T")
        shaped("x", x, (*rows, self.to_q.in_features), "tokens, packed where cu_seqlens is given")
        if cache is None:
            q, kv, gates = self._projected(x, self._positions(x, cu_seqlens))
            o = native_sparse_attention(
                q, *kv.pop("first"), *gates, cu_seqlens=cu_seqlens, **kv, **self._options()
            )
            assert isinstance(o, Tensor)
            return self.to_out(o.flatten(-2))
        if cu_seqlens is not None:
            refuse(
                "cu_seqlens",
                "given beside a cache",
                "None",
                "A cache takes a batch (batch, n, dim) and counts.",
            )
        with torch.no_grad():
            q, kv, gates = self._projected(
                x, cache.lengths[:, None] + torch.arange(x.shape[1], device=x.device)
            )
            cache.append(*kv.pop("first"), **kv, counts=counts)
            return self.to_out(cache.attend(q, *gates, counts=counts, backend=self.backend).flatten(-2))

    def make_cache(
        self, batch: int, capacity: int, *, page_size: int | None = None, pages: int | None = None
    ) -> NSACache:
        """An empty cache for so many sequences of up to `capacity` tokens; in pages with a page_size (`NSACache`)."""
        options = {n: x for n, x in self._options().items() if n != "backend"}
        options |= {"page_size": page_size, "pages": pages}
        like = self.to_q.weight
        return NSACache(
            batch, capacity, self.kv_heads, self.head_dim,
            own_pairs=self.pairs == 3, dtype=like.dtype, device=like.device, **options,
        )  # fmt: skip

    def _options(self) -> dict[str, Any]:
        sizes = self.sizes
        return {
            "compress_k": self.compress_k,
            "compress_v": self.compress_v,
            "place_k": self.rotary,
            "compression_block": sizes.compression.block,
            "compression_stride": sizes.compression.stride,
            "selection_block": sizes.selection_block,
            "selected_blocks": sizes.selected_blocks,
            "window": sizes.window,
            "backend": self.backend,
        }

    def _projected(self, x: Tensor, positions: Tensor) -> tuple[Tensor, dict[str, Any], tuple[Tensor, ...]]:
        """q; keys and values by the names of the operator's arguments, "first" those to compress; the gates."""
        q = self.to_q(x).unflatten(-1, (self.heads, self.head_dim))
        k, v = (
            list(project(x).unflatten(-1, (self.pairs, self.kv_heads, self.head_dim)).unbind(-3))
            for project in (self.to_k, self.to_v)
        )
        gates = self.to_gates(x).sigmoid().unflatten(-1, (3, self.heads)).unbind(-2)
        k_slc, k_win = k[len(k) // 2], k[-1]
        if self.rotary is not None:
            q = self.rotary(q, positions)
            k_slc = self.rotary(k_slc, positions)
            k_win = k_slc if self.pairs == 1 else self.rotary(k_win, positions)
        others = {"k_slc": k_slc, "v_slc": v[len(v) // 2], "k_win": k_win, "v_win": v[-1]}
        return q, {"first": (k[0], v[0]), **others}, gates

    def _positions(self, x: Tensor, cu_seqlens: CuSeqlens) -> Tensor:
        """Of every token in its sequence."""
        if cu_seqlens is None:
            return torch.arange(x.shape[1], device=x.device)
        if isinstance(cu_seqlens, tuple):
            refuse(
                "cu_seqlens",
                "a pair",
                "one tensor",
                "Queries and keys are the same tokens here; take a cache.",
            )
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        first = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        first[: int(lengths.sum())] = starts.repeat_interleave(lengths)
        return torch.arange(len(x), device=x.device) - first


def _phi(name: str, heads: int, block: int, dim: int, position: bool) -> Phi:
    match name:
        case "mean":
            return mean_pooling
        case "weighted":
            return WeightedPooling(heads, block, dim, position=position)
        case "linear":
            return LinearCompression(heads, block, dim, position=position)
        case "mlp":
            return PerceptronCompression(heads, block, dim, 2 * dim, position=position)
        case _:
            refuse("phi", name, f"one of {', '.join(PHIS)}", "The operator takes any function of blocks.")
