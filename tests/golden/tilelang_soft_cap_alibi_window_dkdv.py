# attn_engine golden | score_mod_mask_mod_OnlineSoftmax: backward, dkdv | tilelang | block_q=64 block_kv=128
# regenerate: engine.source(backend="tilelang", kernel="dkdv")
import tilelang.language as T

BLOCK_Q = 64
BLOCK_KV = 128
DIM_QK = 64
DIM_V = 64
THREADS = 256
FULL_ROW = T.GemmWarpPolicy.FullRow

batches, heads, q_len, kv_heads, kv_len = T.dynamic("batches, heads, q_len, kv_heads, kv_len")
slopes_size_0 = T.dynamic("slopes_size_0")
Q_strides = T.dynamic("Q_batch_stride, Q_head_stride, Q_row_stride", "int64")
K_strides = T.dynamic("K_batch_stride, K_head_stride, K_row_stride", "int64")
V_strides = T.dynamic("V_batch_stride, V_head_stride, V_row_stride", "int64")
dO_strides = T.dynamic("dO_batch_stride, dO_head_stride, dO_row_stride", "int64")
saved_row_max_strides = T.dynamic("saved_row_max_batch_stride, saved_row_max_head_stride", "int64")
saved_inverse_sum_strides = T.dynamic("saved_inverse_sum_batch_stride, saved_inverse_sum_head_stride", "int64")
Delta_strides = T.dynamic("Delta_batch_stride, Delta_head_stride", "int64")
slopes_strides = T.dynamic("slopes_stride_0", "int64")
dK_strides = T.dynamic("dK_batch_stride, dK_head_stride, dK_row_stride", "int64")
dV_strides = T.dynamic("dV_batch_stride, dV_head_stride, dV_row_stride", "int64")
d_slopes_columns_strides = T.dynamic("d_slopes_columns_batch_stride, d_slopes_columns_head_stride", "int64")


def begin_aligned(elements, *strides):
    """Rows begin at multiples of so many, which the launch sees to: one instruction may copy them."""
    for stride in strides:
        T.evaluate(T.assume(stride % elements == 0))


@T.prim_func
def dkdv(
    Q: T.StridedTensor((batches, heads, q_len, DIM_QK), (*Q_strides, 1), "bfloat16"),
    K: T.StridedTensor((batches, kv_heads, kv_len, DIM_QK), (*K_strides, 1), "bfloat16"),
    V: T.StridedTensor((batches, kv_heads, kv_len, DIM_V), (*V_strides, 1), "bfloat16"),
    dO: T.StridedTensor((batches, heads, q_len, DIM_V), (*dO_strides, 1), "bfloat16"),
    saved_row_max: T.StridedTensor((batches, heads, q_len), (*saved_row_max_strides, 1), "float32"),
    saved_inverse_sum: T.StridedTensor((batches, heads, q_len), (*saved_inverse_sum_strides, 1), "float32"),
    Delta: T.StridedTensor((batches, heads, q_len), (*Delta_strides, 1), "float32"),
    slopes: T.StridedTensor((slopes_size_0,), (slopes_strides,), "float32"),
    dK: T.StridedTensor((batches, kv_heads, kv_len, DIM_QK), (*dK_strides, 1), "bfloat16"),
    dV: T.StridedTensor((batches, kv_heads, kv_len, DIM_V), (*dV_strides, 1), "bfloat16"),
    d_slopes_columns: T.StridedTensor((batches, heads, kv_len), (*d_slopes_columns_strides, 1), "float32"),
    scale: T.float32,
    cap: T.float32,
    window: T.int32,
):  # fmt: skip
    with T.Kernel(T.ceildiv(kv_len, BLOCK_KV), kv_heads, batches, threads=THREADS) as (kv_tile, kv_head, batch):
        T.annotate_producer_reg_dealloc(40)
        T.annotate_consumer_reg_alloc(232)
        begin_aligned(8, *Q_strides)
        begin_aligned(8, *K_strides)
        begin_aligned(8, *V_strides)
        begin_aligned(8, *dO_strides)
        begin_aligned(4, *saved_row_max_strides)
        begin_aligned(4, *saved_inverse_sum_strides)
        begin_aligned(4, *Delta_strides)
        begin_aligned(8, *dK_strides)
        begin_aligned(8, *dV_strides)
        kv_start = kv_tile * BLOCK_KV
        key = T.alloc_shared((BLOCK_KV, DIM_QK), "bfloat16")
        value = T.alloc_shared((BLOCK_KV, DIM_V), "bfloat16")
        d_key = T.alloc_fragment((BLOCK_KV, DIM_QK), "float32")
        d_value = T.alloc_fragment((BLOCK_KV, DIM_V), "float32")
        d_slopes_columns_sum = T.alloc_fragment((BLOCK_KV,), "float32")
        query = T.alloc_shared((BLOCK_Q, DIM_QK), "bfloat16")
        d_out = T.alloc_shared((BLOCK_Q, DIM_V), "bfloat16")
        row_max = T.alloc_shared((BLOCK_Q,), "float32")
        safe_row_max = T.alloc_shared((BLOCK_Q,), "float32")
        inverse_sum = T.alloc_shared((BLOCK_Q,), "float32")
        delta = T.alloc_shared((BLOCK_Q,), "float32")
        score = T.alloc_fragment((BLOCK_KV, BLOCK_Q), "float32")
        probs = T.alloc_fragment((BLOCK_KV, BLOCK_Q), "float32")
        d_probs = T.alloc_fragment((BLOCK_KV, BLOCK_Q), "float32")
        d_score = T.alloc_fragment((BLOCK_KV, BLOCK_Q), "float32")
        d_slopes_columns_tile = T.alloc_fragment((BLOCK_KV, BLOCK_Q), "float32")
        probs_rounded = T.alloc_fragment((BLOCK_KV, BLOCK_Q), "bfloat16")
        d_score_rounded = T.alloc_fragment((BLOCK_KV, BLOCK_Q), "bfloat16")
        tile_sum = T.alloc_fragment((BLOCK_KV,), "float32")
        dK_tile = T.alloc_fragment((BLOCK_KV, DIM_QK), "float32")
        dK_rounded = T.alloc_shared((BLOCK_KV, DIM_QK), "bfloat16")
        dV_rounded = T.alloc_shared((BLOCK_KV, DIM_V), "bfloat16")

        # -- kv tile of this program
        T.copy(K[batch, kv_head, kv_start, 0], key)
        T.copy(V[batch, kv_head, kv_start, 0], value)
        T.fill(d_key, 0.0)
        T.fill(d_value, 0.0)

        # -- query heads that read this kv head
        group = T.truncdiv(heads, kv_heads)
        first_head = kv_head * group
        kv_last = T.min(kv_start + 127, kv_len - 1)
        q_begin = T.max(kv_start // 64 * 64, 0)
        q_end = T.max((T.min(kv_last + (window - 1) + 1, q_len) + 63) // 64 * 64, q_begin)
        q_full_begin = T.min(T.max((kv_last + 63) // 64 * 64, q_begin), q_end)
        q_full_end = T.max(
            T.min(T.min(kv_start + (window - 1) + 1, q_len) // 64 * 64, q_end), q_full_begin
        )
        q_steps = T.max(q_end // 64 - q_begin // 64, 1)
        for step in T.Pipelined(0, group * q_steps, num_stages=2):
            head = first_head + T.truncdiv(step, q_steps)
            slopes_value = slopes[T.min(head, slopes_size_0 - 1)]
            q_start = q_begin + T.truncmod(step, q_steps) * 64
            if T.truncmod(step, q_steps) == 0:
                T.fill(d_slopes_columns_sum, 0.0)
            T.copy(Q[batch, head, q_start, 0], query)
            T.copy(dO[batch, head, q_start, 0], d_out)
            T.copy(saved_row_max[batch, head, q_start], row_max)
            for qi in T.Parallel(BLOCK_Q):
                safe_row_max[qi] = T.if_then_else(
                    row_max[qi] == -T.infinity("float32"), 0.0, row_max[qi]
                )
            T.copy(saved_inverse_sum[batch, head, q_start], inverse_sum)
            T.copy(Delta[batch, head, q_start], delta)
            T.gemm(key, query, score, transpose_B=True, clear_accum=True, policy=FULL_ROW)
            for ki, qi in T.Parallel(BLOCK_KV, BLOCK_Q):
                kv_idx = kv_start + ki
                q_idx = q_start + qi
                score[ki, qi] = score[ki, qi] * scale
                # test_golden.py:37: squashed = cap * torch.tanh(score / cap)
                squashed = cap * T.tanh(score[ki, qi] / cap)
                # test_golden.py:38: distance = q_idx - kv_idx
                distance = q_idx - kv_idx
                # test_golden.py:39: return squashed - slopes[h] * distance
                logit = squashed - slopes_value * distance
                # softmax.py:43: below_max = (scores - final_rowscales["row_max"]).min(0.0)
                below_max = T.min(logit - safe_row_max[qi], 0.0)
                probs[ki, qi] = T.exp2(below_max * 1.4426950408889634) * inverse_sum[qi]
            T.gemm(value, d_out, d_probs, transpose_B=True, clear_accum=True, policy=FULL_ROW)
            for ki, qi in T.Parallel(BLOCK_KV, BLOCK_Q):
                kv_idx = kv_start + ki
                q_idx = q_start + qi
                d_logit = probs[ki, qi] * (d_probs[ki, qi] - delta[qi])
                d_score[ki, qi] = (
                    d_logit
                    * cap
                    * (1.0 - T.tanh(score[ki, qi] / cap) * T.tanh(score[ki, qi] / cap))
                    / cap
                )
                # test_golden.py:38: distance = q_idx - kv_idx
                distance = q_idx - kv_idx
                d_slopes_columns_tile[ki, qi] = -d_logit * distance
            if (q_start < q_full_begin) | (q_full_end <= q_start):
                for ki, qi in T.Parallel(BLOCK_KV, BLOCK_Q):
                    kv_idx = kv_start + ki
                    q_idx = q_start + qi
                    # test_golden.py:42: in_past = kv_idx <= q_idx
                    in_past = kv_idx <= q_idx
                    # test_golden.py:43: in_window = q_idx - kv_idx < window
                    in_window = q_idx - kv_idx < window
                    visible = in_past & in_window & (q_idx < q_len)
                    probs[ki, qi] = T.if_then_else(visible, probs[ki, qi], 0.0)
                    d_score[ki, qi] = T.if_then_else(visible, d_score[ki, qi], 0.0)
                    d_slopes_columns_tile[ki, qi] = T.if_then_else(
                        visible, d_slopes_columns_tile[ki, qi], 0.0
                    )
            T.copy(probs, probs_rounded)
            T.gemm(probs_rounded, d_out, d_value, policy=FULL_ROW)
            T.copy(d_score, d_score_rounded)
            T.gemm(d_score_rounded, query, d_key, policy=FULL_ROW)
            T.reduce_sum(d_slopes_columns_tile, tile_sum, dim=1)
            for ki in T.Parallel(BLOCK_KV):
                d_slopes_columns_sum[ki] = d_slopes_columns_sum[ki] + tile_sum[ki]
            if T.truncmod(step, q_steps) == q_steps - 1:
                for ki in T.Parallel(BLOCK_KV):
                    kv_idx = kv_start + ki
                    if kv_idx < kv_len:
                        d_slopes_columns[batch, head, kv_idx] = d_slopes_columns_sum[ki]

        # -- store
        for ki, di in T.Parallel(BLOCK_KV, DIM_QK):
            dK_tile[ki, di] = d_key[ki, di] * scale
        T.copy(dK_tile, dK_rounded)
        T.copy(dK_rounded, dK[batch, kv_head, kv_start, 0])
        T.copy(d_value, dV_rounded)
        T.copy(dV_rounded, dV[batch, kv_head, kv_start, 0])
