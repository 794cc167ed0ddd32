# attn_engine golden | score_mod_OnlineSoftmax: backward, dkdv | triton | block_q=32 block_kv=64
# regenerate: engine.source(backend="triton", kernel="dkdv")
# launch with num_warps=4, num_stages=2
# Q and dO: tensor descriptors of tiles, batch and head first
import triton
import triton.language as tl

BLOCK_Q = tl.constexpr(32)
BLOCK_KV = tl.constexpr(64)
BLOCK_D = tl.constexpr(64)
BLOCK_DV = tl.constexpr(64)


@triton.jit
def load_tile(tiles, batch, head, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows from `row` on of one batch and head, through a tensor descriptor: zeros past the end."""
    place = [tl.cast(batch, tl.int32), tl.cast(head, tl.int32), tl.cast(row, tl.int32), column]
    return tiles.load(place).reshape(ROWS, COLUMNS)


@triton.jit(do_not_specialize=[
    "saved_lse_batch_stride", "saved_lse_head_stride", "Delta_batch_stride", "Delta_head_stride",
    "scale", "heads", "kv_heads", "q_len", "kv_len", "bias_size_0", "bias_size_1", "bias_size_2"
])  # fmt: skip
def dkdv(
    Q, K, V, dO, saved_lse, Delta, bias, dK, dV,
    K_batch_stride, K_head_stride, K_row_stride, K_d_stride,
    V_batch_stride, V_head_stride, V_row_stride, V_d_stride,
    saved_lse_batch_stride, saved_lse_head_stride, saved_lse_row_stride,
    Delta_batch_stride, Delta_head_stride, Delta_row_stride,
    bias_stride_0, bias_stride_1, bias_stride_2,
    dK_batch_stride, dK_head_stride, dK_row_stride, dK_d_stride,
    dV_batch_stride, dV_head_stride, dV_row_stride, dV_d_stride,
    scale, heads, kv_heads, q_len, kv_len,
    bias_size_0, bias_size_1, bias_size_2,
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
        q_begin = 0
        q_end = tl.maximum((q_len + 31) // 32 * 32, q_begin)
        q_full_end = tl.maximum(tl.minimum(q_len // 32 * 32, q_end), q_begin)

        # -- q tiles in sight, masked where seen in part
        for q_start in tl.range(q_begin, q_end, BLOCK_Q):
            q_row = tl.cast(q_start, tl.int64)
            q_idx = q_start + q_tile
            query = load_tile(Q, batch, head, q_start, 0, BLOCK_Q, BLOCK_D)
            d_out = load_tile(dO, batch, head, q_start, 0, BLOCK_Q, BLOCK_DV)
            saved_lse_base = (
                saved_lse
                + batch * saved_lse_batch_stride
                + head * saved_lse_head_stride
                + q_row * saved_lse_row_stride
            )
            lse = tl.load(
                saved_lse_base + q_tile * saved_lse_row_stride, mask=q_idx < q_len, other=0.0
            )
            safe_lse = tl.where(lse == float("-inf"), 0.0, lse)
            Delta_base = (
                Delta
                + batch * Delta_batch_stride
                + head * Delta_head_stride
                + q_row * Delta_row_stride
            )
            delta = tl.load(Delta_base + q_tile * Delta_row_stride, mask=q_idx < q_len, other=0.0)
            score = tl.dot(key, query.T) * scale
            # test_golden.py:63: return score + bias[h, q_idx, kv_idx]
            bias_base = (
                bias
                + tl.minimum(head, bias_size_0 - 1) * bias_stride_0
                + q_row * bias_stride_1
                + kv_row * bias_stride_2
            )
            bias_value = tl.load(
                bias_base + (q_tile[None, :] * bias_stride_1 + kv_tile[:, None] * bias_stride_2),
                mask=(q_idx[None, :] < bias_size_1) & (kv_idx[:, None] < bias_size_2),
                other=0.0,
            )
            logit = score + bias_value
            log2_sum = safe_lse * 1.4426950408889634
            probs = tl.exp2(logit * 1.4426950408889634 - log2_sum[None, :])
            d_probs = tl.dot(value, d_out.T)
            d_logit = probs * (d_probs - delta[None, :])
            d_score = d_logit
            if q_full_end <= q_start:
                visible = q_idx < q_len
                probs = tl.where(visible[None, :], probs, 0.0)
                d_score = tl.where(visible[None, :], d_score, 0.0)
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
