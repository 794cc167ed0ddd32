"""The table of what FlexAttention must do: a part on the reference, the CPU and Triton's interpreter; the rest is slow.

`python -m attn_engine conformance` runs it in full and says how much passes.
"""

from __future__ import annotations

import pytest

from attn_engine.conformance.check import Wrong, check
from attn_engine.conformance.entries import NotApplicable, Property
from attn_engine.conformance.report import markdown, summary
from attn_engine.conformance.run import ENTRIES, Outcome, counted, everything, run
from attn_engine.conformance.subjects import Subject, ours

ROWS = {f"{row.section}: {row.name}": row for row in everything()}
# What does not hold yet, by backend and row, and why; the page docs/conformance.md shows the same.
FAILING: dict[tuple[str, str], str] = {
    (
        "cpu",
        "bias[h] * (q - kv), bfloat16",
    ): "delta = sum(o * dO) is taken of o as it was rounded to bfloat16",
}
FAST = (
    "double index bias[b][q]", "composition of two functions", "poison: one over a hidden zero",
    "relative position table",
    "random dense mask", "padding by functools.partial", "symmetric bias[q] + bias[kv]", "by a computed index",
    "head dimension 17", "grouped queries 6:2", "keys of one batch for 3", "inputs that lie column major",
)  # fmt: skip


def named(names: tuple[str, ...]) -> list[str]:
    found = [key for key, row in ROWS.items() if row.name in names]
    assert len(found) == len(names)
    return found


def verify(backend: str, key: str) -> None:
    row = ROWS[key]
    try:
        if isinstance(row, Property):
            row.run(ours(backend))
        else:
            check(ours(backend), row)
    except NotApplicable as reason:
        pytest.skip(str(reason))
    except Wrong:
        if (backend, row.name) in FAILING:
            pytest.xfail(FAILING[backend, row.name])
        raise


FULL_CPU = {key for key, row in ROWS.items() if isinstance(row, Property)} | set(named(FAST))
QUICK = [("cpu", key) for key in ROWS if key in FULL_CPU] + [("reference", key) for key in named(FAST)]
INTERPRETED = (
    "causal and window", "captured offset per head", "keys of one batch for 3", "documents, causal", "soft cap",
    "squared distance of points, 3 coordinates", "grouped queries 6:2", "relative, one dimension",
)  # fmt: skip
SLOW = [(backend, key) for backend in ("cpu", "reference") for key in ROWS if (backend, key) not in QUICK]
SLOW += [("triton-interpreter", key) for key in named(INTERPRETED[1:])]


@pytest.mark.parametrize(("backend", "key"), [*QUICK, ("triton-interpreter", *named(INTERPRETED[:1]))])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_part(backend: str, key: str):
    verify(backend, key)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "key"), SLOW)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_rest(backend: str, key: str):
    verify(backend, key)


# -- the machinery itself


def broken(name: str) -> Subject:
    """A subject that is right about everything but one thing."""
    subject = ours("reference")

    def attend(*args: object, **kwargs: object) -> object:
        if name == "mask":
            kwargs["block_mask"] = None
        if name == "score":
            kwargs["score_mod"] = None
        if name == "scale":
            kwargs["scale"] = 1.0
        return subject.attend(*args, **kwargs)

    return Subject(**{**subject.__dict__, "attend": attend, "repeated": attend, "in_graph": attend})


@pytest.mark.parametrize(("name", "row"), [("mask", "causal"), ("score", "soft cap"), ("scale", "identity")])
def test_the_table_would_notice(name: str, row: str):
    (entry,) = [e for e in ENTRIES if e.name == row]
    with pytest.raises(Wrong):
        check(broken(name), entry, backward=False)


def test_outcomes_are_kept_and_counted(tmp_path, capsys):
    rows = [row for row in ENTRIES if row.name in ("soft cap", "identity")]
    kept = tmp_path / "outcomes.json"
    found = run(broken("score"), rows, kept)
    assert {o.name: o.forward == "pass" for o in found} == {"identity": True, "soft cap": False}
    assert run(broken("score"), rows, kept, seconds=-1.0) == found  # nothing is run again
    assert counted(found) == ((1, 2), (1, 2))
    text = markdown({"broken": found, "other": [Outcome("identity", "4a score_mod", "pass", "")]})
    assert "| broken | 1 of 2 | 1 of 2 |" in text and "not run" in text and "Wrong" in text
    assert summary("broken", found) == "broken: forward 1 of 2, backward 1 of 2"
