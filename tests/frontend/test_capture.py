"""What functions close over: numbers and tensors stay live without a new trace, everything else is guarded."""

from __future__ import annotations

import cProfile
import functools
import math
import sys

import pytest
import torch

from attn_engine import errors
from attn_engine.frontend import CustomIO, KernelNames, trace_mask_mod, trace_score_mod
from attn_engine.ir.evaluate import evaluate
from attn_engine.ir.expr import Const, Load, loads
from attn_engine.ir.ops import DType, Storage
from attn_engine.ir.program import BATCH, HEAD, KV_IDX, Q_IDX, SCORE

WINDOW = 5
SLOPES = torch.arange(4.0)


def values(trace):
    return {s.var.name: s.accessor() for s in trace.scalars}


def score_at(trace, score, *where):
    tensors = {t.name: t.accessor() for t in trace.tensors}
    inputs = dict(zip((SCORE, BATCH, HEAD, Q_IDX, KV_IDX), (score, *where), strict=True))
    env = {**inputs, **{s.var: s.accessor() for s in trace.scalars}}
    return evaluate(trace.fn.result, env, lambda name, indices: tensors[name][indices].item())


def test_closure_number_is_a_runtime_argument():
    window = 3

    def mask(b, h, q_idx, kv_idx):
        return q_idx - kv_idx <= window

    trace = trace_mask_mod(mask)
    assert values(trace) == {"window": 3}
    window = 9
    assert values(trace) == {"window": 9} and not trace.stale()
    assert trace_mask_mod(mask).fn == trace.fn
    window = 2.5
    assert trace.stale()


def test_global_number_is_a_runtime_argument(monkeypatch):
    trace = trace_mask_mod(lambda b, h, q, k: q - k <= WINDOW)
    monkeypatch.setitem(globals(), "WINDOW", 11)
    assert values(trace) == {"WINDOW": 11} and not trace.stale()


def test_partial_and_default_arguments():
    def score_mod(score, b, h, q_idx, kv_idx, cap=2.0, *, shift=1):
        return cap * torch.tanh(score / cap) + shift

    trace = trace_score_mod(functools.partial(score_mod, cap=4.0))
    assert values(trace) == {"cap": 4.0, "shift": 1}
    assert math.isclose(score_at(trace, 3.0, 0, 0, 0, 0), 4 * math.tanh(0.75) + 1)
    first = functools.partial(lambda factor, score, b, h, q, k: score * factor, 3)
    assert values(trace_score_mod(first)) == {"factor": 3}


def test_numbers_of_inner_functions_are_followed():
    def window(width):
        return lambda b, h, q, k: q - k <= width

    def both(first, second):
        return lambda b, h, q, k: first(b, h, q, k) & second(b, h, q, k)

    trace = trace_mask_mod(both(window(3), window(7)))
    assert sorted(values(trace).values()) == [3, 7]
    assert len({s.name for s in trace.fn.scalars}) == 2


def test_recursive_function():
    def power(x, n):
        return x if n == 1 else x * power(x, n - 1)

    trace = trace_score_mod(lambda s, b, h, q, k: power(s, 3))
    assert score_at(trace, 2.0, 0, 0, 0, 0) == 8.0


def test_a_number_used_as_a_plain_value_is_guarded():
    steps, dim = 3, 16

    def score_mod(score, b, h, q_idx, kv_idx):
        if steps > 2:
            for _ in range(steps):
                score = score + 1
        return score / math.sqrt(dim)

    trace = trace_score_mod(score_mod)
    assert trace.scalars == () and not trace.stale()
    assert score_at(trace, 1.0, 0, 0, 0, 0) == 1.0
    steps = 4
    assert trace.stale()
    steps = 3
    assert not trace.stale()
    dim = 64
    assert trace.stale()


def test_flags_and_strings_are_guarded():
    flag = True
    trace = trace_score_mod(lambda s, b, h, q, k: s * 2 if flag else s)
    assert not trace.stale()
    flag = False
    assert trace.stale()


def test_infinity_is_part_of_the_program():
    lowest = -math.inf
    trace = trace_score_mod(lambda s, b, h, q, k: torch.where(q >= k, s, lowest))
    assert trace.scalars == ()
    lowest = 0.0
    assert trace.stale()


def test_tensors_are_read_anew_at_each_call():
    bias = torch.randn(2, 3, 4)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + bias[h, q_idx, kv_idx] * SLOPES[h]

    trace = trace_score_mod(score_mod)
    assert [(c.name, c.storage, c.rank) for c in trace.fn.captures] == [
        ("bias", Storage.FLOAT32, 3), ("SLOPES", Storage.FLOAT32, 1),
    ]  # fmt: skip
    bias = torch.randn(7, 8, 9)
    assert trace.tensors[0].accessor() is bias and not trace.stale() and not trace.opaque
    bias = torch.randn(7, 8, 9, dtype=torch.float64)
    assert trace.stale()
    bias = torch.randn(7, 8)
    assert trace.stale()


def test_indexing_in_steps_and_twice():
    table, documents = torch.randn(2, 3), torch.arange(9) // 4
    one = trace_score_mod(lambda s, b, h, q, k: s + table[h, q])
    two = trace_score_mod(lambda s, b, h, q, k: s + table[h][q])
    full = trace_score_mod(lambda s, b, h, q, k: s + table[..., q][h])
    assert one.fn.result is two.fn.result is full.fn.result
    trace = trace_mask_mod(lambda b, h, q, k: documents[q] == documents[k])
    assert len(loads(trace.fn.result)) == 2 and len(trace.fn.captures) == 1
    assert trace.fn.captures[0].storage is Storage.INT64


def test_scalar_tensor_and_negative_index():
    scale, slopes = torch.tensor(3.0, requires_grad=True), torch.arange(4.0)
    trace = trace_score_mod(lambda s, b, h, q, k: scale * s + slopes[-1])
    assert [(c.name, c.rank) for c in trace.fn.captures] == [("scale_1", 0), ("slopes", 1)]
    assert score_at(trace, 2.0, 0, 0, 0, 0) == 9.0
    assert Load("slopes", DType.FLOAT, (Const(3),)) in loads(
        trace.fn.result
    )  # kernels know no negative index
    slopes = torch.arange(6.0)
    assert trace.stale()


def test_derived_tensors_make_the_trace_opaque_and_keep_their_gradient():
    bias = torch.randn(4, requires_grad=True)
    trace = trace_score_mod(lambda s, b, h, q, k: s + (bias * 2)[h])
    (found,) = trace.tensors
    assert trace.opaque and found.accessor().requires_grad
    assert torch.equal(found.accessor(), bias * 2)


def test_shape_of_a_captured_tensor_is_guarded():
    bias = torch.randn(4)
    trace = trace_score_mod(lambda s, b, h, q, k: s + bias.shape[0])
    assert not trace.stale()
    bias = torch.randn(5)
    assert trace.stale()


def test_methods_and_objects_are_opaque():
    class Model:
        def __init__(self):
            self.bias, self.factor = torch.randn(4), 3

        def score(self, score, b, h, q_idx, kv_idx):
            return score * self.factor + self.bias[h]

        def __call__(self, b, h, q_idx, kv_idx):
            return q_idx - kv_idx <= self.factor

    model = Model()
    trace = trace_score_mod(model.score)
    assert trace.opaque and trace.tensors[0].accessor() is model.bias
    assert trace.fn.captures[0].name == "captured_0"
    assert trace_mask_mod(model).opaque


class Learned(torch.nn.Module):
    """Scores that read a parameter, a buffer and numbers of the module they belong to."""

    factor = 0.5

    def __init__(self):
        super().__init__()
        self.p, self.window = torch.nn.Parameter(torch.arange(4.0)), 2
        self.register_buffer("shift", torch.tensor(1.0))

    def forward(self, x):
        return x * self.window + self.p[0]

    def helper(self, score, h):
        return score * self.factor + self.p[h]


def test_attributes_of_a_captured_module():
    module = Learned()
    trace = trace_score_mod(lambda s, b, h, q, k: s * module.window + module.p[h] + module.shift)
    assert trace.opaque and trace.tensors[0].accessor() is module.p
    assert score_at(trace, 1.0, 0, 3, 0, 0) == 6.0
    with torch.no_grad():
        module.p.add_(1)  # an optimiser's step
    assert score_at(trace, 1.0, 0, 3, 0, 0) == 7.0
    module.load_state_dict({"p": torch.zeros(4), "shift": torch.tensor(5.0)})
    module.window = 10
    again = trace_score_mod(lambda s, b, h, q, k: s * module.window + module.p[h] + module.shift)
    assert score_at(again, 1.0, 0, 3, 0, 0) == 15.0


def test_captured_objects_can_be_called():
    module = Learned()
    for function in (
        lambda s, b, h, q, k: module.helper(s, h),
        (lambda helper: lambda s, b, h, q, k: helper(s, h))(module.helper),
    ):
        trace = trace_score_mod(function)
        assert trace.opaque and score_at(trace, 4.0, 0, 2, 0, 0) == 4.0
    trace = trace_score_mod(lambda s, b, h, q, k: module(s))
    assert score_at(trace, 4.0, 0, 2, 0, 0) == 8.0
    bound = functools.partial(module.helper)
    assert score_at(trace_score_mod(lambda s, b, h, q, k: bound(s, h)), 4.0, 0, 2, 0, 0) == 4.0


def test_a_mistake_in_a_method_is_shown_there():
    class Model:
        def helper(self, score):
            return score if score > 0 else 0.0

    model = Model()
    with pytest.raises(errors.ControlFlowOnTraced) as caught:
        trace_score_mod(lambda s, b, h, q, k: model.helper(s))
    assert caught.value.location.text.strip() == "return score if score > 0 else 0.0"


def test_names_are_valid_and_unique_across_functions():
    names = KernelNames()

    def scores(K, lse, bias, int_):
        return lambda s, b, h, q, k: s + K[h] + lse[h] + bias[h] + int_[h]

    def masks(bias):
        return lambda b, h, q, k: bias[h] > 0

    score = trace_score_mod(scores(*(torch.randn(4) for _ in range(4))), names=names)
    mask = trace_mask_mod(masks(torch.randn(4)), names=names)
    used = [c.name for c in (*score.fn.captures, *mask.fn.captures)]
    assert used == ["K_1", "lse_1", "bias", "int", "bias_1"] or used == [
        "K_1",
        "lse_1",
        "bias",
        "int_1",
        "bias_1",
    ]
    shared = torch.randn(4)
    names = KernelNames()
    first = trace_score_mod(lambda s, b, h, q, k: s + shared[h], names=names)
    second = trace_mask_mod(lambda b, h, q, k: shared[h] > 0, names=names)
    assert first.fn.captures == second.fn.captures


def test_user_names_and_lines():
    def score_mod(score, b, h, q_idx, kv_idx):
        distance = q_idx - kv_idx
        penalty = (  # the line of an assignment is its first one
            distance * 2.0
        )
        return score - penalty

    fn = trace_score_mod(score_mod).fn
    assert sorted(fn.names.values()) == ["distance", "penalty"]
    texts = {fn.names.get(e): text for e, text in fn.sources.items()}
    assert texts["distance"].startswith("test_capture.py:")
    assert texts["distance"].endswith(": distance = q_idx - kv_idx")
    assert texts["penalty"].endswith("first one")
    assert fn.name == "score_mod"


def test_the_profiler_is_restored():
    seen = []

    def hook(*event):
        seen.append(event)

    sys.setprofile(hook)
    try:
        trace_mask_mod(lambda b, h, q, k: q >= k)
        assert sys.getprofile() is hook
    finally:
        sys.setprofile(None)


def test_a_profiler_in_c_goes_on() -> None:
    """cProfile is no function that sys.setprofile takes back."""
    profiler = cProfile.Profile()
    with profiler:
        trace_mask_mod(lambda b, h, q, k: q >= k)
        "after".upper()
    assert any("upper" in str(entry.code) for entry in profiler.getstats())


CUSTOM = {
    ("heads",): (HEAD,),
    ("batch", "heads"): (BATCH, HEAD),
    ("batch", "heads", "seq_len"): (BATCH, HEAD, Q_IDX),
    ("heads", "seq_len", "seq_len_kv"): (HEAD, Q_IDX, KV_IDX),
    ("seq_len_kv",): (KV_IDX,),
}


@pytest.mark.parametrize("shape", CUSTOM)
def test_custom_input_used_as_its_element(shape):
    custom = CustomIO({"bias": shape})
    for _ in range(2):  # one CustomIO serves several engines
        trace = trace_score_mod(
            lambda s, c, b, h, q, k: s + c.input_tensors["bias"], custom, {"bias": Storage.BFLOAT16}
        )
        (load,) = loads(trace.fn.result)
        assert load is Load("bias", DType.FLOAT, CUSTOM[shape])
        assert trace.custom == (("bias", "bias"),) and trace.tensors == ()
        assert trace.fn.captures[0].storage is Storage.BFLOAT16
    assert custom.shapes == {"bias": shape}


def test_custom_input_in_all_ways():
    custom = CustomIO({"temperature": (1,), "table": ("heads", 16), "scale": ("heads",)})

    def score_mod(score, custom_fwd_inputs, b, h, q_idx, kv_idx):
        inputs = custom_fwd_inputs.input_tensors
        return (
            inputs["scale"].exp() * score / inputs["temperature"] + inputs["table"][h, (q_idx - kv_idx) % 16]
        )

    trace = trace_score_mod(score_mod, custom)
    assert {given: name for name, given in trace.custom} == {
        "temperature": "temperature",
        "table": "table",
        "scale": "scale_1",
    }
    mask = trace_mask_mod(lambda b, h, q, k, c: q - k <= c.input_tensors["temperature"], custom)
    assert [c.name for c in mask.fn.captures] == ["temperature"]


def test_flex_attentions_own_helpers_trace():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    width = 4
    both = flex.and_masks(lambda b, h, q, k: q >= k, lambda b, h, q, k: q - k < width)
    trace = trace_mask_mod(both)
    assert values(trace) == {"width": 4} and not trace.opaque
    assert trace_mask_mod(flex.noop_mask).fn.result.dtype is DType.BOOL
