"""Row rules and some traced functions written directly on the IR, for tests below the front end."""

from __future__ import annotations

import math

from attn_engine.ir.expr import Const, Expr, Full, Load, Reduce, Var, call, where
from attn_engine.ir.ops import DType, Op, Storage
from attn_engine.ir.program import (
    D_PROBS,
    DELTA,
    HEAD,
    LOGIT,
    OUT,
    PROBS,
    Attention,
    Captured,
    OnlineRule,
    RowPass,
    RowState,
    RuleParameter,
    ScalarFn,
    d_saved_var,
    saved_var,
)

NEW_MAX = call(Op.MAX, RowState("row_max", -math.inf).var, Reduce("max", LOGIT, "kv"))


def softmax() -> OnlineRule:
    row_max, row_sum = RowState("row_max", -math.inf), RowState("row_sum", 0.0)
    weights = call(Op.EXP, LOGIT - NEW_MAX)
    rescale = call(Op.EXP, row_max.var - NEW_MAX)
    lse = saved_var("lse")
    return OnlineRule(
        "softmax",
        (row_max, row_sum),
        weights,
        (NEW_MAX, row_sum.var * rescale + Reduce("sum", weights, "kv")),
        rescale,
        OUT / row_sum.var,
        (("lse", row_max.var + call(Op.LOG, row_sum.var)),),
        call(Op.EXP, LOGIT - lse),
        PROBS * (D_PROBS - DELTA),
    )


def sigmoid() -> OnlineRule:
    weights = call(Op.SIGMOID, LOGIT)
    return OnlineRule(
        "sigmoid",
        (),
        weights,
        (),
        Const(1.0),
        OUT,
        (),
        weights,
        D_PROBS * PROBS * (1.0 - PROBS),
    )


def relu() -> OnlineRule:
    weights = call(Op.MAX, LOGIT, 0.0)
    return OnlineRule("relu", (), weights, (), Const(1.0), OUT, (), weights, where(LOGIT > 0.0, D_PROBS, 0.0))


def retention() -> OnlineRule:
    total = RowState("total", 0.0)
    new_total = total.var + Reduce("sum", call(Op.ABS, LOGIT), "kv")
    clamped = call(Op.MAX, total.var, 1.0)
    sign = where(LOGIT > 0.0, 1.0, where(LOGIT < 0.0, -1.0, 0.0))
    saved = saved_var("row_abs_sum")
    kept = call(Op.MAX, saved, 1.0)
    return OnlineRule(
        "retention",
        (total,),
        LOGIT,
        (new_total,),
        Const(1.0),
        OUT / clamped,
        (("row_abs_sum", total.var),),
        LOGIT / kept,
        D_PROBS / kept - where(saved > 1.0, DELTA / saved, 0.0) * sign,
    )


def centred() -> OnlineRule:
    """p = relu(s - mean)^2, w = p / (1 + sum of p): two passes forward, and one before the gradient."""
    total, keys, power = RowState("running_total", 0.0), RowState("running_keys", 0.0), RowState("power", 0.0)
    mean, count, norm = saved_var("mean"), saved_var("key_count"), saved_var("norm")
    pull, slopes = saved_var("pull"), RowState("slopes", 0.0)
    above = call(Op.MAX, LOGIT - mean, 0.0)
    weights = above * above
    slope = 2.0 * above * ((D_PROBS - DELTA) / norm + d_saved_var("norm"))
    ones = Full(1.0, ("q", "kv"))
    return OnlineRule(
        "centred",
        (power,),
        weights,
        (power.var + Reduce("sum", weights, "kv"),),
        Const(1.0),
        OUT / (power.var + 1.0),
        (("mean", mean), ("count", count), ("norm", power.var + 1.0)),
        weights / norm,
        slope + pull + d_saved_var("mean") / saved_var("count"),
        earlier=(
            RowPass(
                (total, keys),
                (total.var + Reduce("sum", LOGIT, "kv"), keys.var + Reduce("sum", ones, "kv")),
                (("mean", total.var / keys.var), ("key_count", keys.var)),
            ),
        ),
        adjoints=(
            RowPass(
                (slopes,),
                (slopes.var + Reduce("sum", slope, "kv"),),
                (("pull", -slopes.var / saved_var("count")),),
            ),
        ),
    )


def softmax_with_sink() -> OnlineRule:
    """exp(s / temperature[h]) / (sum + exp(sink[h])): one parameter of pairs, one of rows."""
    sink, temperature = (Load(name, DType.FLOAT, (HEAD,)) for name in ("sink", "temperature"))
    row_max, row_sum, lse = RowState("row_max", -math.inf), RowState("row_sum", 0.0), saved_var("lse")
    scaled = LOGIT / temperature
    new_max = call(Op.MAX, row_max.var, Reduce("max", scaled, "kv"))
    weights, rescale = call(Op.EXP, scaled - new_max), call(Op.EXP, row_max.var - new_max)
    whole = row_sum.var + call(Op.EXP, sink - row_max.var)
    d_scaled = PROBS * (D_PROBS - DELTA + d_saved_var("lse"))
    return OnlineRule(
        "softmax_with_sink",
        (row_max, row_sum),
        weights,
        (new_max, row_sum.var * rescale + Reduce("sum", weights, "kv")),
        rescale,
        OUT / whole,
        (("lse", row_max.var + call(Op.LOG, whole)),),
        call(Op.EXP, scaled - lse),
        d_scaled / temperature,
        parameters=(
            RuleParameter(sink, None, call(Op.EXP, sink - lse) * (d_saved_var("lse") - DELTA)),
            RuleParameter(temperature, -d_scaled * LOGIT / (temperature * temperature), None),
        ),
        captures=(
            Captured("sink", Storage.FLOAT32, 1),
            Captured("temperature", Storage.FLOAT32, 1),
        ),
    )


RULES = {"softmax": softmax, "sigmoid": sigmoid, "relu": relu, "retention": retention}


def function(result: Expr, *captures: Captured, scalars: tuple[Var, ...] = ()) -> ScalarFn:
    return ScalarFn("f", result, captures, scalars)


def program(
    score: ScalarFn | None = None,
    mask: ScalarFn | None = None,
    rule: OnlineRule | None = None,
    element: Storage = Storage.FLOAT32,
    dim_qk: int = 8,
    dim_v: int = 5,
) -> Attention:
    return Attention("test", score, mask, rule or softmax(), element, dim_qk, dim_v)


WINDOW = Var("window", DType.INT)
