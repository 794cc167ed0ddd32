"""Sections 4a to 4d and "extra": what must hold beside single results."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attn_engine.conformance.entries import NotApplicable, Property
from attn_engine.conformance.gold import dense_attention
from attn_engine.conformance.masks import all_of, any_of
from attn_engine.conformance.subjects import Subject, close

PROPERTIES: list[Property] = []


def prop(name: str, section: str, backward: bool = False) -> Callable[[Callable[[Any], None]], Any]:
    def declared(run: Callable[[Any], None]) -> Callable[[Any], None]:
        PROPERTIES.append(Property(name, section, run, backward))
        return run

    return declared


def qkv(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    made = [torch.randn(shape, generator=generator).to(dtype).requires_grad_(grad) for _ in range(3)]
    return made[0], made[1], made[2]


def causal(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return q >= kv


def raises(run: Callable[[], Any], *kinds: type[BaseException]) -> None:
    """Nothing, if run() raises one of the kinds (any Exception where none is given)."""
    try:
        run()
    except Exception as error:
        # A compiler may wrap what the function that it compiled raised.
        if kinds and not isinstance(error, kinds) and not any(kind.__name__ in str(error) for kind in kinds):
            raise AssertionError(f"{type(error).__name__} instead of {kinds[0].__name__}") from error
        return
    raise AssertionError("nothing was raised")


def right_or_refused(run: Callable[[], Tensor], want: Tensor, tolerance: float = 1e-5) -> None:
    """Nothing, if run() raises or gives what is wanted."""
    try:
        got = run()
    except Exception:
        return
    close(got, want, tolerance, tolerance)


# -- 4a: what functions capture


@prop("a captured tensor that changes is never stale", "4a score_mod")
def changed_tensor(subject: Subject) -> None:
    q, k, v = qkv(1, 2, 33, 16)
    for seed in range(3):
        bias = torch.randn(33, generator=torch.Generator().manual_seed(seed))
        got = subject.attend(q, k, v, score_mod=lambda score, b, h, i, j: score + bias[j])
        close(got, dense_attention(q, k, v, lambda score, b, h, i, j: score + bias[j], None, None)[0])


@prop("a captured tensor changed in place is never stale", "4a score_mod")
def changed_in_place(subject: Subject) -> None:
    q, k, v = qkv(1, 2, 33, 16)
    bias = torch.zeros(33)

    def biased(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return score + bias[j]

    for _ in range(3):
        bias += torch.randn(33, generator=torch.Generator().manual_seed(5))
        close(subject.attend(q, k, v, score_mod=biased), dense_attention(q, k, v, biased, None, None)[0])


@prop("captured tensors of many sizes", "4a score_mod")
def sizes_of_captures(subject: Subject) -> None:
    for length in (17, 40, 33, 64):
        q, k, v = qkv(1, 2, length, 16)
        bias = torch.randn(length, length, generator=torch.Generator().manual_seed(length))
        got = subject.attend(q, k, v, score_mod=lambda score, b, h, i, j: score + bias[i, j])
        want = dense_attention(q, k, v, lambda score, b, h, i, j: score + bias[i, j], None, None)[0]
        close(got, want)


@prop("a captured number of 12 values", "extra")
def number_sweep(subject: Subject) -> None:
    q, k, v = qkv(1, 2, 33, 16)
    for step in range(12):
        slope = 0.1 * step + 0.05
        got = subject.repeated(q, k, v, score_mod=lambda score, b, h, i, j: score - slope * (i - j).abs())
        want = dense_attention(q, k, v, lambda s, b, h, i, j: s - slope * (i - j).abs(), None, None)[0]
        close(got, want)


@prop("squared distance of points, 256 coordinates: right or refused", "4a score_mod")
def long_vectors(subject: Subject) -> None:
    q, k, v = qkv(1, 2, 33, 16)
    points = torch.randn(33, 256, generator=torch.Generator().manual_seed(0))

    def near(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return score - ((points[i] - points[j]) ** 2).sum(-1) * 0.01

    right_or_refused(
        lambda: subject.attend(q, k, v, score_mod=near), dense_attention(q, k, v, near, None, None)[0]
    )


# -- 4b: what masks are put together with


@prop("and_masks and or_masks of none, one and three", "4b mask_mod")
def combined_masks(subject: Subject) -> None:
    q, k, v = qkv(1, 2, 40, 16)
    parts = (causal, lambda b, h, i, j: (i - j).abs() < 12, lambda b, h, i, j: j % 3 > 0)
    for combine, several in ((subject.masks.and_masks, all_of), (subject.masks.or_masks, any_of)):
        for count in (0, 1, 3):
            mask = subject.mask(combine(*parts[:count]), None, None, 40, 40, BLOCK_SIZE=32)
            want = dense_attention(q, k, v, None, several(*parts[:count]), None)[0]
            close(subject.attend(q, k, v, block_mask=mask), want)


@prop("noop_mask", "4b mask_mod")
def no_mask(subject: Subject) -> None:
    q, k, v = qkv(1, 2, 40, 16)
    mask = subject.mask(subject.masks.noop_mask, None, None, 40, 40, BLOCK_SIZE=32)
    close(subject.attend(q, k, v, block_mask=mask), dense_attention(q, k, v, None, None, None)[0])


# -- 4c: memory


@prop("output and gradients lie as the inputs", "4c shapes", backward=True)
def strides(subject: Subject) -> None:
    if subject.name.endswith("reference"):
        raise NotApplicable("the dense definition does not say how a result lies")
    for order in itertools.permutations(range(3)):
        dims = (*order, 3)
        back = tuple(dims.index(i) for i in range(4))
        q, k, v = (
            x.permute(dims).contiguous().permute(back).detach().requires_grad_() for x in qkv(2, 3, 20, 16)
        )
        out = subject.attend(q, k, v)
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
        for x, like in ((out, q), *zip(gradients, (q, k, v), strict=True)):
            if x.stride() != like.stride():
                raise AssertionError(f"strides {x.stride()} for {like.stride()}")


@prop("rows without a key: output 0, lse -inf, gradients 0", "4c shapes", backward=True)
def empty_rows(subject: Subject) -> None:
    q, k, v = qkv(1, 2, 40, 16, grad=True)
    mask = subject.mask(lambda b, h, i, j: (i >= j) & (i >= 10), None, None, 40, 40)
    out, aux = subject.attend(q, k, v, block_mask=mask, return_aux=subject.aux_request(lse=True))
    if out[:, :, :10].any() or not (aux.lse[:, :, :10] == -math.inf).all():
        raise AssertionError("a row without a key is not 0 with lse -inf")
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    if dq[:, :, :10].any() or not all(torch.isfinite(x).all() for x in (dq, dk, dv)):
        raise AssertionError("a row without a key has a gradient")


@prop("rows without a key: output 0, lse -inf (forward)", "4c shapes")
def empty_rows_forward(subject: Subject) -> None:
    q, k, v = qkv(1, 2, 40, 16)
    mask = subject.mask(lambda b, h, i, j: (i >= j) & (i >= 10), None, None, 40, 40)
    if subject.attend(q, k, v, block_mask=mask)[:, :, :10].any():
        raise AssertionError("a row without a key is not 0")


@prop("no keys at all", "extra")
def no_keys(subject: Subject) -> None:
    q, k, v = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 0, 16), torch.randn(1, 2, 0, 16)
    close(subject.attend(q, k, v), torch.zeros(1, 2, 5, 16))


@prop("no queries or no keys: an error, or nothing", "4c shapes")
def no_length(subject: Subject) -> None:
    for queries, keys in ((0, 5), (5, 0), (0, 0)):
        q, k, v = torch.randn(1, 2, queries, 16), torch.randn(1, 2, keys, 16), torch.randn(1, 2, keys, 16)
        right_or_refused(lambda q=q, k=k, v=v: subject.attend(q, k, v), torch.zeros(1, 2, queries, 16))


@prop("float64", "extra", backward=True)
def double(subject: Subject) -> None:
    inputs = qkv(1, 2, 20, 16, dtype=torch.float64, grad=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return subject.attend(q, k, v, score_mod=lambda score, b, h, i, j: torch.tanh(score))

    want = dense_attention(*inputs, lambda score, b, h, i, j: torch.tanh(score), None, None)[0]
    close(attend(*inputs), want, 1e-12, 1e-12)
    for got, expected in zip(
        torch.autograd.grad(attend(*inputs).sum(), inputs),
        torch.autograd.grad(want.sum(), inputs),
        strict=True,
    ):
        close(got, expected, 1e-11, 1e-11)


@prop("torch.func.vmap over a batch of batches", "extra")
def under_vmap(subject: Subject) -> None:
    q, k, v = qkv(3, 2, 2, 20, 16)
    offset = torch.randn(2, generator=torch.Generator().manual_seed(0))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return subject.attend(q, k, v, score_mod=lambda score, b, h, i, j: score + offset[b] * (i - j))

    close(torch.func.vmap(attend)(q, k, v), torch.stack([attend(*x) for x in zip(q, k, v, strict=True)]))


@prop("double backward", "extra", backward=True)
def second_derivatives(subject: Subject) -> None:
    inputs = qkv(1, 2, 7, 16, dtype=torch.float64, grad=True)

    def penalty(attend: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(attend(*inputs).square().sum(), inputs, create_graph=True)
        total = torch.stack([x.square().sum() for x in first]).sum()
        return torch.autograd.grad(total, inputs)

    def mod(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return score * score

    got = penalty(lambda q, k, v: subject.attend(q, k, v, score_mod=mod))
    want = penalty(lambda q, k, v: dense_attention(q, k, v, mod, None, None)[0])
    for x, y in zip(got, want, strict=True):
        close(x, y, 1e-8, 1e-8)


# -- 4g: biases


@prop("equal to scaled_dot_product_attention with the dense bias", "4g learned bias", backward=True)
def dense_bias(subject: Subject) -> None:
    inputs = qkv(2, 4, 37, 16, grad=True)
    bias = torch.randn(4, 37, 37, generator=torch.Generator().manual_seed(5)).requires_grad_()
    got = subject.attend(*inputs, score_mod=lambda s, b, h, i, j: s + bias[h, i, j])
    want = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=bias[None])
    close(got, want)
    leaves = (*inputs, bias)
    for x, y in zip(
        torch.autograd.grad(got.square().sum(), leaves),
        torch.autograd.grad(want.square().sum(), leaves),
        strict=True,
    ):
        close(x, y, 1e-4, 1e-5)


# -- 4d: row values


def _aux_case(subject: Subject, grad: bool = False, **request: bool) -> tuple[Any, ...]:
    q, k, v = qkv(2, 2, 40, 16, grad=grad)
    mask = subject.mask(causal, None, None, 40, 40)
    got = subject.attend(q, k, v, block_mask=mask, return_aux=subject.aux_request(**request))
    return (*got, dense_attention(q, k, v, None, causal, None), (q, k, v))


@prop("lse", "4d row values")
def lse(subject: Subject) -> None:
    _, aux, (_, want, _), _ = _aux_case(subject, lse=True)
    close(aux.lse, want)
    if aux.lse.dtype is not torch.float32 or aux.max_scores is not None:
        raise AssertionError("lse is not float32, or more than it came")


@prop("largest scores: float32, without a gradient", "4d row values")
def max_scores(subject: Subject) -> None:
    _, aux, (_, _, want), _ = _aux_case(subject, max_scores=True)
    close(aux.max_scores, want)
    if aux.max_scores.dtype is not torch.float32 or aux.max_scores.requires_grad or aux.lse is not None:
        raise AssertionError("max_scores is not a float32 tensor without gradient, or more came than it")


@prop("every combination of row values", "4d row values")
def combinations(subject: Subject) -> None:
    for lse, largest in itertools.product((False, True), repeat=2):
        _, aux, _, _ = _aux_case(subject, lse=lse, max_scores=largest)
        if (aux.lse is not None, aux.max_scores is not None) != (lse, largest):
            raise AssertionError(f"asked for lse={lse}, max_scores={largest}")


@prop("a loss of lse has gradients", "4d row values", backward=True)
def lse_gradient(subject: Subject) -> None:
    _, aux, (_, want, _), inputs = _aux_case(subject, grad=True, lse=True)
    got = torch.autograd.grad(aux.lse.square().sum(), inputs[:2])
    for x, y in zip(got, torch.autograd.grad(want.square().sum(), inputs[:2]), strict=True):
        close(x, y, 1e-4, 1e-5)


@prop("gradcheck of output and lse, float64", "4d row values", backward=True)
def gradcheck(subject: Subject) -> None:
    inputs = qkv(1, 2, 6, 16, dtype=torch.float64, grad=True)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        request = subject.aux_request(lse=True)
        out, aux = subject.attend(q, k, v, score_mod=lambda s, b, h, i, j: torch.tanh(s), return_aux=request)
        return out, aux.lse

    torch.autograd.gradcheck(run, inputs)


@prop("two parts of the keys merged by their lse", "4d row values")
def merged(subject: Subject) -> None:
    q, k, v = qkv(2, 2, 40, 16)
    parts = []
    for mask_mod in (lambda b, h, i, j: j < 13, lambda b, h, i, j: j >= 13):
        mask = subject.mask(mask_mod, None, None, 40, 40)
        parts.append(subject.attend(q, k, v, block_mask=mask, return_aux=subject.aux_request(lse=True)))
    total = torch.logaddexp(parts[0][1].lse, parts[1][1].lse)
    got = [o * torch.exp(aux.lse - total)[..., None] for o, aux in parts]
    close(got[0] + got[1], dense_attention(q, k, v, None, None, None)[0])


@prop("return_lse works and says that it is deprecated", "4d row values")
def return_lse(subject: Subject) -> None:
    q, k, v = qkv(2, 2, 40, 16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, found = subject.attend(q, k, v, return_lse=True)
    close(found, dense_attention(q, k, v, None, None, None)[1])
    if not any(w.category is FutureWarning for w in caught):
        raise AssertionError("no FutureWarning")
