"""What a linear attention refuses: a typed error each, with the user's line and the next step."""

from __future__ import annotations

import pytest
import torch

from attn_engine import CustomIO, LinearAttentionEngine, errors, linear_errors, meta_tensor

F32 = torch.float32
META = meta_tensor(None, None, None, 16, dtype=F32)


def engine(**options):
    return LinearAttentionEngine([META] * 3, **options)


def rows(tokens: int = 10):
    return [torch.randn(2, tokens, 4, 16) for _ in range(3)]


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"k_mod": lambda k: k.cumsum(1)}, linear_errors.MixesTokens, "cumsum"),
        ({"k_mod": lambda k: torch.roll(k, 1)}, linear_errors.MixesTokens, "roll"),
        ({"v_mod": lambda v: v / v.sum(1)}, linear_errors.MixesTokens, "dim=1"),
        ({"k_mod": lambda k: k + k[0]}, linear_errors.MixesTokens, "an index"),
        ({"q_mod": lambda q: None}, linear_errors.ModResult, "return"),
        ({"q_mod": lambda q: q > 0}, linear_errors.ModResult, "bool"),
        ({"q_mod": lambda q, a, b: q}, errors.WrongParameters, "q_mod"),
        ({"v_mod": lambda v, c: v * c.input_tensors["nothing"]}, errors.UnknownCustomInput, "nothing"),
        ({"v_mod": lambda v, c: v * c.input_tensors["k"]}, errors.UnknownCustomInput, "k"),
        ({"bonus_mod": lambda k: k}, errors.WrongArgument, "exclusive"),
        ({"normalizer_mod": lambda w: w, "delta": True}, errors.WrongArgument, "delta"),
        ({"phase": "before"}, errors.UnknownOption, "phase"),
        ({"chunk": 48}, errors.UnknownOption, "chunk"),
        ({"decay_rank": "matrix"}, errors.UnknownOption, "decay_rank"),
        ({"backend": "gpu"}, errors.UnknownBackend, "gpu"),
        ({"tuned": True}, errors.UnknownOption, "tuned"),
        ({"layout": "hsbd"}, errors.UnknownLayout, "hsbd"),
        ({"scale": torch.ones(())}, errors.WrongArgument, "scale"),
    ],
)
def test_when_it_is_made(options, error, words):
    with pytest.raises(error, match=words) as caught:
        engine(**options)
    assert "test_bad_input.py" in str(caught.value)


def call(**changed):
    q, k, v = rows()
    given = {"q": q, "k": k, "v": v, "decay": None, **changed}
    made = {name: given.pop(name) for name in ("delta", "decay_rank") if name in given}
    return engine(**made)(given.pop("q"), given.pop("k"), given.pop("v"), given.pop("decay"), **given)


@pytest.mark.parametrize(
    "changed, error, words",
    [
        ({"q": torch.randn(2, 10, 16)}, errors.WrongRank, "q"),
        ({"q": torch.randn(2, 10, 4, 8)}, errors.HeadDimMismatch, "q"),
        ({"q": torch.randn(2, 10, 3, 16)}, errors.HeadsNotDivisible, "3"),
        ({"k": torch.randn(2, 9, 4, 16)}, errors.ShapeMismatch, "k"),
        ({"v": torch.randn(2, 10, 4, 16).double()}, errors.DtypeMismatch, "v"),
        ({"decay": torch.zeros(2, 10, 4, 8)}, linear_errors.DecayRank, "decay"),
        ({"decay": torch.zeros(2, 4, 10)}, linear_errors.DecayRank, "10, 4"),
        ({"decay": torch.zeros(2, 10, 4), "decay_rank": "vector"}, linear_errors.DecayRank, "vector"),
        ({"decay": torch.zeros(2, 10, 4).int()}, errors.UnsupportedDtype, "decay"),
        ({"beta": torch.zeros(2, 10, 4)}, linear_errors.WrongInputs, "delta"),
        ({"beta": torch.zeros(2, 4, 10), "delta": True}, errors.ShapeMismatch, "beta"),
        ({"initial_state": torch.zeros(2, 4, 16, 8)}, linear_errors.StateMismatch, "shape"),
        ({"initial_state": torch.zeros(2, 4, 16, 16).half()}, linear_errors.StateMismatch, "dtype"),
        ({"cu_seqlens": torch.tensor([0, 5, 10])}, linear_errors.SequenceBounds, "batch of 1"),
        ({"extra": torch.zeros(1)}, errors.ExtraCustomInput, "extra"),
    ],
)  # fmt: skip
def test_calls(changed, error, words):
    with pytest.raises(error, match=words):
        call(**changed)


@pytest.mark.parametrize("bounds", [[0, 5], [1, 10], [0, 7, 5, 10], [10], [[0, 10]], [0.0, 10.0]])
def test_bounds_of_packed_sequences(bounds):
    q, k, v = (x[:1] for x in rows())
    with pytest.raises(linear_errors.SequenceBounds):
        engine()(q, k, v, cu_seqlens=torch.tensor(bounds))


def test_shapes_of_custom_inputs():
    made = engine(k_mod=lambda k, c: k * c.input_tensors["w"], custom_io=CustomIO({"w": ("heads", "dimqk")}))
    with pytest.raises(errors.CustomInputShape, match="w"):
        made(*rows(), None, torch.randn(4, 8))
    with pytest.raises(errors.MissingCustomInput, match="w"):
        made(*rows())


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize(
    "value, error",
    [
        (0.5, linear_errors.DecayPositive),
        (torch.nan, linear_errors.DecayPositive),
        (-torch.inf, linear_errors.DecayInfinite),
    ],
)
@pytest.mark.parametrize("vector", [False, True])
def test_what_is_no_decay(backend, value, error, vector):
    decay = torch.full((2, 10, 4, 16) if vector else (2, 10, 4), -0.1)
    decay[1, 7, 2] = value
    with pytest.raises(error, match="batch 1, head 2, token 7"):
        engine(backend=backend)(*rows(), decay)


def test_a_step_has_no_gradient():
    q, k, v = (x[:, 0].requires_grad_() for x in rows())
    with pytest.raises(errors.GradientNotSupported, match="no_grad"):
        engine().step(q, k, v, None, torch.zeros(2, 4, 16, 16))


def test_a_step_needs_a_state():
    q, k, v = (x[:, 0] for x in rows())
    with pytest.raises(linear_errors.StateMismatch, match="state has no tensor: None"):
        engine().step(q, k, v, None, None)


def test_no_second_derivative():
    q, k, v = rows()
    q.requires_grad_()
    (d,) = torch.autograd.grad(engine()(q, k, v).square().sum(), q, create_graph=False)
    assert torch.isfinite(d).all()
    with pytest.raises(errors.TransformNotSupported, match="second"):
        torch.autograd.grad(engine()(q, k, v).square().sum(), q, create_graph=True)


def test_attention_takes_no_dimensions_of_rows():
    from attn_engine import AttentionEngine

    with pytest.raises(errors.WrongCustomIO, match="dimqk"):
        AttentionEngine([META] * 3, custom_fwd_inputs=CustomIO({"w": ("heads", "dimqk")}))
