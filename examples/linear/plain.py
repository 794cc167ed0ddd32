"""The definition that the examples are held against, and the comparison."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def small(arguments: list[str] | None, about: str | None) -> bool:
    """Whether the script was asked for a small size."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--small", action="store_true", help="a size for tests")
    return parser.parse_args(arguments).small


def definition(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """One head, in float32 and O(T^2): o_i = sum over j <= i of (q_i . k_j) e^(log_decay from j+1 to i) v_j."""
    total = log_decay.double().cumsum(0)
    exponent = total[:, None] - total
    future = torch.ones(exponent.shape, dtype=torch.bool).triu(1)
    left = exponent.masked_fill(future, -torch.inf).exp().float()
    return ((q.float() @ k.float().T) * left) @ v.float()


def compare(
    run: Callable[..., Tensor],
    plain: Callable[[int], Tensor],
    tensors: Sequence[Tensor],
    heads: Sequence[int],
) -> float:
    """Run an engine on the leaves with gradients, print what it took, and return the largest relative error of the
    output of some heads, and of the gradients that these heads alone give.

    plain: the definition's output of a head of batch element 0.
    """
    begin = time.perf_counter()
    o = run(*tensors)
    middle = time.perf_counter()
    weights = torch.zeros_like(o)
    for h in heads:
        weights[0, h] = torch.randn(o.shape[2:])
    found = torch.autograd.grad(o, tensors, weights)
    end = time.perf_counter()
    print(f"output {tuple(o.shape)}: {middle - begin:.2f} s, gradients: {end - middle:.2f} s")
    outputs = {h: plain(h) for h in heads}
    loss = sum(((x * weights[0, h].float()).sum() for h, x in outputs.items()), torch.zeros(()))
    wanted = torch.autograd.grad(loss, tensors)
    errors = [relative(o[0, h], x) for h, x in outputs.items()]
    errors += [relative(x, y) for x, y in zip(found, wanted, strict=True)]
    print(f"largest error beside the definition: {max(errors):.1e}")
    return max(errors)


def relative(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference beside the norm."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())
