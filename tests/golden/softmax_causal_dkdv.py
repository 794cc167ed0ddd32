# attn_engine golden | causal_OnlineSoftmax: backward, dkdv | triton | block_q=32 block_kv=64
# regenerate: engine.source(backend="triton", kernel="dkdv")
# launch with num_warps=8, num_stages=2
import triton
import triton.language as tl

BLOCK_Q = tl.constexpr(32)
BLOCK_KV = tl.constexpr(64)
BLOCK_D = tl.constexpr(64)
BLOCK_DV = tl.constexpr(64)


@triton.jit(do_not_specialize=[
    "saved_row_max_batch_stride", "saved_row_max_head_stride", "saved_inverse_sum_batch_stride",
    "saved_inverse_sum_head_stride", "Delta_batch_stride", "Delta_head_stride", "scale", "heads",
    "kv_heads", "q_len", "kv_len"
])  # fmt: skip
def dkdv(
    Q, K, V, dO, saved_row_max, saved_inverse_sum, Delta, dK, dV,
    Q_batch_stride, Q_head_stride, Q_row_stride, Q_d_stride,
    K_batch_stride, K_head_stride, K_row_stride, K_d_stride,
    V_batch_stride, V_head_stride, V_row_stride, V_d_stride,
    dO_batch_stride, dO_head_stride, dO_row_stride, dO_d_stride,
    saved_row_max_batch_stride, saved_row_max_head_stride, saved_row_max_row_stride,
    saved_inverse_sum_batch_stride, saved_inverse_sum_head_stride, saved_inverse_sum_row_stride,
    Delta_batch_stride, Delta_head_stride, Delta_row_stride,
    dK_batch_stride, dK_head_stride, dK_row_stride, dK_d_stride,
    dV_batch_stride, dV_head_stride, dV_row_stride, dV_d_stride,
    scale, heads, kv_heads, q_len, kv_len,
):  # fmt: skip
    q_tile = tl.arange(0, BLOCK_Q)
    kv_tile = tl.arange(0, BLOCK_KV)
    d_idx = tl.arange(0, BLOCK_D)
    dv_idx = tl.arange(0, BLOCK_DV)
    kv_start = tl.program_id(0) * BLOCK_KV
    kv_row = tl.cast(kv_start, tl.int64)
    kv_idx = kv_start + kv_tile
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)

    # -- kv tile of this program
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
    d_key = tl.full([BLOCK_KV, BLOCK_D], 0.0, tl.float32)
    d_value = tl.full([BLOCK_KV, BLOCK_DV], 0.0, tl.float32)

    # -- query heads that read this kv head
    group = heads // kv_heads
    first_head = kv_head * group
    for head in tl.range(first_head, first_head + group):
        kv_last = tl.minimum(kv_start + 63, kv_len - 1)
        q_begin = tl.maximum(kv_start // 32 * 32, 0)
        q_end = tl.maximum((q_len + 31) // 32 * 32, q_begin)
        q_full_begin = tl.minimum(tl.maximum((kv_last + 31) // 32 * 32, q_begin), q_end)
        q_full_end = tl.maximum(tl.minimum(q_len // 32 * 32, q_end), q_full_begin)

        # -- q tiles in sight, masked where seen in part
        for q_start in tl.range(q_begin, q_end, BLOCK_Q):
            q_row = tl.cast(q_start, tl.int64)
            q_idx = q_start + q_tile
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
                saved_row_max_base + q_tile * saved_row_max_row_stride,
                mask=q_idx < q_len,
                other=0.0,
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
                Delta
                + batch * Delta_batch_stride
                + head * Delta_head_stride
                + q_row * Delta_row_stride
            )
            delta = tl.load(Delta_base + q_tile * Delta_row_stride, mask=q_idx < q_len, other=0.0)
            score = tl.dot(key, query.T) * scale
            # softmax.py:43: below_max = (scores - final_rowscales["row_max"]).min(0.0)
            below_max = tl.minimum(score - safe_row_max[None, :], 0.0)
            probs = tl.exp2(below_max * 1.4426950408889634) * inverse_sum[None, :]
            d_probs = tl.dot(value, d_out.T)
            d_score = probs * (d_probs - delta[None, :])
            if (q_start < q_full_begin) | (q_full_end <= q_start):
                visible = (kv_idx[:, None] <= q_idx[None, :]) & (q_idx[None, :] < q_len)
                probs = tl.where(visible, probs, 0.0)
                d_score = tl.where(visible, d_score, 0.0)
            d_value = d_value + tl.dot(probs.to(V.dtype.element_ty), d_out)
            d_key = d_key + tl.dot(d_score.to(K.dtype.element_ty), query)

    # -- store
    dK_base = dK + batch * dK_batch_stride + kv_head * dK_head_stride + kv_row * dK_row_stride
    tl.store(
        dK_base + (kv_tile[:, None] * dK_row_stride + d_idx[None, :] * dK_d_stride),
        d_key * scale,
        mask=kv_idx[:, None] < kv_len,
    )
    dV_base = dV + batch * dV_batch_stride + kv_head * dV_head_stride + kv_row * dV_row_stride
    tl.store(
        dV_base + (kv_tile[:, None] * dV_row_stride + dv_idx[None, :] * dV_d_stride),
        d_value,
        mask=kv_idx[:, None] < kv_len,
    )
