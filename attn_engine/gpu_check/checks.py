"""The checks: what is done with a case, on a backend and a device, and what must hold of it.

Each takes a case and a place and returns a line of numbers; it raises Failed, which says what did not hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_engine import AttentionEngine, create_block_mask, meta_tensor
from attn_engine.errors import AttnEngineError
from attn_engine.gpu_check.cases import NORMALISERS, Case, Tensors
from attn_engine.gpu_check.dense import EXACT, dense, kept_rows, of_rows, straightforward
from attn_engine.gpu_check.given import FAR, FAR_IF_SMALL, Given, draw
from attn_engine.gpu_check.guards import guarded_allocations
from attn_engine.gpu_check.judge import judge
from attn_engine.gpu_check.sparse import BLOCKS, cumulative


class Failed(AssertionError):
    """Something does not hold; the message says what."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a check runs. small: in sizes for an interpreter."""

    backend: str
    device: str
    small: bool = False

    def sized(self, case: Case) -> Case:
        return case.small() if self.small else case

    def given(self, case: Case) -> Given:
        return draw(case, self.device, FAR_IF_SMALL if self.small else FAR)


def attend(case: Case, given: Given, backend: str) -> dict[str, Tensor]:
    """One forward and backward pass of the engine: o, lse (of softmax) and the gradients, by name."""
    q, k, v = (x.detach().requires_grad_(case.gradients) for x in (given.q, given.k, given.v))
    tensors = {
        name: x.detach().requires_grad_(case.gradients and name in case.learned)
        for name, x in given.tensors.items()
    }
    engine = engine_of(case, tensors, backend)
    options: dict[str, Any] = {}
    mask_mod = case.mask_mod(tensors)
    if case.listed and mask_mod is not None:
        lengths = (case.sizes.q_len, case.sizes.kv_len)
        options["block_mask"] = create_block_mask(mask_mod, None, None, *lengths, device=str(q.device))
    options |= options_of(case, tensors, q.device)
    inputs = [x[0] for x in (q, k, v)] if case.lengths else [q, k, v]
    o, rows = engine(*inputs, return_final_rowscales=True, **options)
    if case.lengths:
        o, rows = o[None], {name: x[None] for name, x in rows.items()}
    found = {"o": o.detach()} | ({"lse": rows["lse"].detach()} if "lse" in rows else {})
    if case.gradients:
        wanted = {"dq": q, "dk": k, "dv": v, **{f"d {name}": tensors[name] for name in case.learned}}
        gradients = torch.autograd.grad(o, list(wanted.values()), given.d_out)
        found |= dict(zip(wanted, gradients, strict=True))
    return found


def options_of(case: Case, tensors: Tensors, device: torch.device) -> dict[str, Any]:
    """What a call brings beside its tensors: where sequences lie, blocks."""
    options: dict[str, Any] = {}
    if case.lengths:
        options["cu_len_q"] = cumulative(case.lengths, device)
    if case.blocks:
        options |= {"block_sparse_mask": tensors["blocks"], "block_size": BLOCKS[case.blocks]}
    return options


def engine_of(case: Case, tensors: Tensors, backend: str) -> AttentionEngine:
    s, dtype = case.sizes, getattr(torch, case.dtype)
    return AttentionEngine(
        [meta_tensor(None, None, None, dim, dtype=dtype) for dim in (s.dim, s.dim, s.dim_v)],
        case.score_mod(tensors),
        online_func=NORMALISERS[case.normaliser][0](),
        mask_mod=case.mask_mod(tensors),
        layout="bhsd",
        backend=backend,
        scale=case.scale,
    )


def numbers(case: Case, place: Place) -> str:
    """Output, lse and all gradients against float64; what is allocated is NaN before, and nothing beside it changes."""
    case = place.sized(case)
    given = place.given(case)
    with guarded_allocations() as guards:
        found = attend(case, given, place.backend)
        touched = guards.touched()
    if touched:
        raise Failed(f"{touched} bytes beside what was allocated were written to")
    kept, dtype = kept_rows(case, place.device), getattr(torch, case.dtype)
    exact = dense(case, given, EXACT, kept)
    plain = dense(case, given, straightforward(dtype), kept)
    verdicts = judge(dtype, of_rows(found, kept), exact, plain)
    wrong = [v for v in verdicts if not v.ok]
    if wrong:
        raise Failed("; ".join(str(v) for v in wrong))
    return "part of the allowed error: " + ", ".join(f"{v.name} {v.worst:.2f}" for v in verdicts)


def repeated(case: Case, place: Place) -> str:
    """Three runs give the same bits, whatever was in memory before."""
    case = place.sized(case)
    given = place.given(case)
    first = attend(case, given, place.backend)
    for _ in range(2):
        with guarded_allocations():
            again = attend(case, given, place.backend)
        differing = [name for name, x in first.items() if not torch.equal(_bits(x), _bits(again[name]))]
        if differing:
            raise Failed(f"another run gives other bits of {', '.join(differing)}")
    return f"{sum(x.numel() for x in first.values())} numbers, three times the same"


def _bits(x: Tensor) -> Tensor:
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(whole)


def refused(case: Case, place: Place) -> str:
    """Tensors on other devices are refused by an error of their own, and named."""
    case = place.sized(case)
    given = place.given(case)
    engine = engine_of(case, given.tensors, place.backend)
    elsewhere = "meta" if place.device == "cpu" else "cpu"
    tries: dict[str, Callable[[], object]] = {
        "k": lambda: engine(given.q, given.k.to(elsewhere), given.v),
        "v": lambda: engine(given.q, given.k, given.v.to(elsewhere)),
        "q, k and v": lambda: engine(*(x.to("meta") for x in (given.q, given.k, given.v))),
    }
    for name, run in tries.items():
        try:
            run()
        except AttnEngineError:
            continue
        except Exception as error:
            raise Failed(f"{name} elsewhere: {type(error).__name__}: {error}") from error
        raise Failed(f"{name} elsewhere was accepted")
    return f"{len(tries)} mistakes named"


KINDS: dict[str, Callable[[Case, Place], str]] = {
    "numbers": numbers,
    "repeated": repeated,
    "refused": refused,
}
