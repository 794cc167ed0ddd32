# attn_engine golden | score_mod_mask_mod_OnlineSoftmax: backward, dq | triton | block_q=128 block_kv=64
# regenerate: engine.source(backend="triton", kernel="dq")
# launch with num_warps=8, num_stages=2
import triton
import triton.language as tl

BLOCK_Q = tl.constexpr(128)
BLOCK_KV = tl.constexpr(64)
BLOCK_D = tl.constexpr(64)
BLOCK_DV = tl.constexpr(64)


@triton.jit
def floor_divide(a, b):
    """a // b, rounded toward minus infinity."""
    rest = a % b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), a // b - 1, a // b)


@triton.jit
def tanh(x):
    """The hyperbolic tangent to float32 accuracy."""
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    near = x + x * square * series
    far = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    return tl.where(tl.abs(x) < 0.625, near, far)


@triton.jit(do_not_specialize=[
    "saved_row_max_batch_stride", "saved_row_max_head_stride", "saved_inverse_sum_batch_stride",
    "saved_inverse_sum_head_stride", "Delta_batch_stride", "Delta_head_stride", "scale", "cap",
    "window", "heads", "kv_heads", "q_len", "kv_len", "slopes_size_0"
])  # fmt: skip
def dq(
    Q, K, V, dO, saved_row_max, saved_inverse_sum, Delta, slopes, dQ,
    Q_batch_stride, Q_head_stride, Q_row_stride, Q_d_stride,
    K_batch_stride, K_head_stride, K_row_stride, K_d_stride,
    V_batch_stride, V_head_stride, V_row_stride, V_d_stride,
    dO_batch_stride, dO_head_stride, dO_row_stride, dO_d_stride,
    saved_row_max_batch_stride, saved_row_max_head_stride, saved_row_max_row_stride,
    saved_inverse_sum_batch_stride, saved_inverse_sum_head_stride, saved_inverse_sum_row_stride,
    Delta_batch_stride, Delta_head_stride, Delta_row_stride,
    slopes_stride_0,
    dQ_batch_stride, dQ_head_stride, dQ_row_stride, dQ_d_stride,
    scale, cap, window, heads, kv_heads, q_len, kv_len,
    slopes_size_0,
):  # fmt: skip
    q_tile = tl.arange(0, BLOCK_Q)
    kv_tile = tl.arange(0, BLOCK_KV)
    d_idx = tl.arange(0, BLOCK_D)
    dv_idx = tl.arange(0, BLOCK_DV)
    q_start = tl.program_id(0) * BLOCK_Q
    q_row = tl.cast(q_start, tl.int64)
    q_idx = q_start + q_tile
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)

    # -- query tile of this program
    kv_head = head // (heads // kv_heads)
    Q_base = Q + batch * Q_batch_stride + head * Q_head_stride + q_row * Q_row_stride
    query = tl.load(
        Q_base + (q_tile[:, None] * Q_row_stride + d_idx[None, :] * Q_d_stride),
        mask=q_idx[:, None] < q_len,
        other=0.0,
    )
    dO_base = dO + batch * dO_batch_stride + head * dO_head_stride + q_row * dO_row_stride
    d_out = tl.load(
        dO_base + (q_tile[:, None] * dO_row_stride + dv_idx[None, :] * dO_d_stride),
        mask=q_idx[:, None] < q_len,
        other=0.0,
    )
    saved_row_max_base = (
        saved_row_max
        + batch * saved_row_max_batch_stride
        + head * saved_row_max_head_stride
        + q_row * saved_row_max_row_stride
    )
    row_max = tl.load(
        saved_row_max_base + q_tile * saved_row_max_row_stride, mask=q_idx < q_len, other=0.0
    )
    safe_row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    saved_inverse_sum_base = (
        saved_inverse_sum
        + batch * saved_inverse_sum_batch_stride
        + head * saved_inverse_sum_head_stride
        + q_row * saved_inverse_sum_row_stride
    )
    inverse_sum = tl.load(
        saved_inverse_sum_base + q_tile * saved_inverse_sum_row_stride,
        mask=q_idx < q_len,
        other=0.0,
    )
    Delta_base = (
        Delta + batch * Delta_batch_stride + head * Delta_head_stride + q_row * Delta_row_stride
    )
    delta = tl.load(Delta_base + q_tile * Delta_row_stride, mask=q_idx < q_len, other=0.0)
    slopes_value = tl.load(slopes + tl.minimum(head, slopes_size_0 - 1) * slopes_stride_0)
    d_query = tl.full([BLOCK_Q, BLOCK_D], 0.0, tl.float32)

    # -- kv tiles this tile meets
    q_last = tl.minimum(q_start + 127, q_len - 1)
    kv_begin = tl.maximum(floor_divide(q_start - (window - 1), 64) * 64, 0)
    kv_end = tl.maximum((tl.minimum(q_last + 1, kv_len) + 63) // 64 * 64, kv_begin)
    kv_full_begin = tl.minimum(
        tl.maximum(floor_divide(q_last - (window - 1) + 63, 64) * 64, kv_begin), kv_end
    )
    kv_full_end = tl.maximum(
        tl.minimum(tl.minimum(q_start + 1, kv_len) // 64 * 64, kv_end), kv_full_begin
    )

    # -- kv tiles in sight, masked where seen in part
    for kv_start in tl.range(kv_begin, kv_end, BLOCK_KV):
        kv_row = tl.cast(kv_start, tl.int64)
        kv_idx = kv_start + kv_tile
        K_base = K + batch * K_batch_stride + kv_head * K_head_stride + kv_row * K_row_stride
        key = tl.load(
            K_base + (kv_tile[:, None] * K_row_stride + d_idx[None, :] * K_d_stride),
            mask=kv_idx[:, None] < kv_len,
            other=0.0,
        )
        V_base = V + batch * V_batch_stride + kv_head * V_head_stride + kv_row * V_row_stride
        value = tl.load(
            V_base + (kv_tile[:, None] * V_row_stride + dv_idx[None, :] * V_d_stride),
            mask=kv_idx[:, None] < kv_len,
            other=0.0,
        )
        score = tl.dot(query, key.T) * scale
        # test_golden.py:36: squashed = cap * torch.tanh(score / cap)
        squashed = cap * tanh(score / cap)
        # test_golden.py:37: distance = q_idx - kv_idx
        distance = q_idx[:, None] - kv_idx[None, :]
        # test_golden.py:38: return squashed - slopes[h] * distance
        logit = squashed - slopes_value * distance
        # softmax.py:43: below_max = (scores - final_rowscales["row_max"]).min(0.0)
        below_max = tl.minimum(logit - safe_row_max[:, None], 0.0)
        probs = tl.exp2(below_max * 1.4426950408889634) * inverse_sum[:, None]
        d_probs = tl.dot(d_out, value.T)
        d_logit = probs * (d_probs - delta[:, None])
        d_score = d_logit * cap * (1.0 - tanh(score / cap) * tanh(score / cap)) / cap
        if (kv_start < kv_full_begin) | (kv_full_end <= kv_start):
            # test_golden.py:41: in_past = kv_idx <= q_idx
            in_past = kv_idx[None, :] <= q_idx[:, None]
            # test_golden.py:42: in_window = q_idx - kv_idx < window
            in_window = q_idx[:, None] - kv_idx[None, :] < window
            visible = in_past & in_window & (kv_idx[None, :] < kv_len)
            probs = tl.where(visible, probs, 0.0)
            d_score = tl.where(visible, d_score, 0.0)
        d_query = d_query + tl.dot(d_score.to(K.dtype.element_ty), key)

    # -- store
    dQ_base = dQ + batch * dQ_batch_stride + head * dQ_head_stride + q_row * dQ_row_stride
    tl.store(
        dQ_base + (q_tile[:, None] * dQ_row_stride + d_idx[None, :] * dQ_d_stride),
        d_query * scale,
        mask=q_idx[:, None] < q_len,
    )
