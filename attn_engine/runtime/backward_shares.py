"""How the one-kernel backward pass is shared out: over keys or queries, and in how many parts.

Decided by the sizes alone, so that the same call always adds in the same order, whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

# Work items wanted per backward pass: enough to keep the threads of a desktop busy, and few enough that parts of
# gradients stay small.
WANTED_TASKS = 8
MANY = 2**21  # numbers in parts of dQ, from which on it matters how many there are: caches hold fewer


def key_shares(sizes: Mapping[str, int], tile: int, shared: Sequence[str] = ()) -> int:
    """Shares of the kv axis. tile: its rows; shared: axes over which every instance runs."""
    tasks = 1 if "batch" in shared else sizes["batches"]
    tasks *= 1 if "kv_head" in shared else sizes["kv_heads"]
    return _shares(sizes["kv_len"], tile, tasks)


def query_shares(sizes: Mapping[str, int], tile: int) -> int:
    """Shares of the queries. tile: their rows."""
    return _shares(sizes["q_len"], tile, sizes["batches"] * sizes["kv_heads"])


def shares_fewer_queries(dq: Tensor, dk: Tensor, dv: Tensor, key_shares: int, query_shares: int) -> bool:
    """Whether parts of dK and dV, one for each share of the queries, are at most half as many numbers as parts of dQ,
    one for each share of the keys, and those are many."""
    of_queries = key_shares * dq.numel()
    of_keys = query_shares * (dk.numel() + dv.numel())
    return key_shares > 1 and of_queries >= MANY and 2 * of_keys <= of_queries


def _shares(length: int, tile: int, tasks: int) -> int:
    return max(1, min(-(-length // tile), WANTED_TASKS // max(1, tasks)))
