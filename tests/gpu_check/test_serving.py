"""The checks of serving: in small through the interpreter, and kernels compiled ahead of time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attn_engine.gpu_check import serving
from attn_engine.gpu_check.checks import Place

SMALL = Place("triton-interpreter", "cpu", small=True)
ONE_TILE, LATENT = serving.KINDS[2], serving.KINDS[6]


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(k, marks=[] if k in (ONE_TILE, LATENT) else pytest.mark.slow, id=k.name)
        for k in serving.KINDS
    ],
)
def test_in_small(kind: serving.Kind) -> None:
    outcome = serving.ServingCheck(kind, SMALL).run()
    assert outcome.verdict == "passed", outcome.detail


def test_a_wrong_page_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = replace(ONE_TILE, lengths=(100, 77))
    drawn = serving._drawn

    def swapped(*arguments: object):
        q, k, v, given = drawn(*arguments)  # pyright: ignore[reportArgumentType]
        given["block_table"][0, 0] = given["block_table"][1, 0]
        return q, k, v, given

    monkeypatch.setattr(serving, "_drawn", swapped)
    kept = replace(kind, lengths=(39, 16))
    monkeypatch.setattr(
        serving.Kind, "small", lambda self: replace(kept, heads=2, kv_heads=1, dims=(16, 16), page=16)
    )
    assert serving.ServingCheck(kind, SMALL).run().verdict == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("kind", serving.KINDS[1:], ids=lambda k: k.name)
def test_ahead_of_time(kind: serving.Kind, target: str) -> None:
    outcome = serving.ServingAhead(kind, target).run()
    assert outcome.verdict == "passed", outcome.detail
    assert "forward" in outcome.numbers["kernels"]


def test_latent_attention_needs_less_memory_with_one_load() -> None:
    """By the kernels themselves: one tensor of keys is an argument, and none of values."""
    kernels = [k for k, _ in serving.kernels_of(LATENT, "sm_90")]
    assert [("K" in names, "V" in names) for names in ({p.name for p in k.params} for k in kernels)] == [
        (True, False), (True, False), (False, False),
    ]  # fmt: skip
