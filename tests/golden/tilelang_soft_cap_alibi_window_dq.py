# attn_engine golden | score_mod_mask_mod_OnlineSoftmax: backward, dq | tilelang | block_q=128 block_kv=64
# regenerate: engine.source(backend="tilelang", kernel="dq")
import tilelang.language as T

BLOCK_Q = 128
BLOCK_KV = 64
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
dQ_strides = T.dynamic("dQ_batch_stride, dQ_head_stride, dQ_row_stride", "int64")


def begin_aligned(elements, *strides):
    """Rows begin at multiples of so many, which the launch sees to: one instruction may copy them."""
    for stride in strides:
        T.evaluate(T.assume(stride % elements == 0))


@T.prim_func
def dq(
    Q: T.StridedTensor((batches, heads, q_len, DIM_QK), (*Q_strides, 1), "bfloat16"),
    K: T.StridedTensor((batches, kv_heads, kv_len, DIM_QK), (*K_strides, 1), "bfloat16"),
    V: T.StridedTensor((batches, kv_heads, kv_len, DIM_V), (*V_strides, 1), "bfloat16"),
    dO: T.StridedTensor((batches, heads, q_len, DIM_V), (*dO_strides, 1), "bfloat16"),
    saved_row_max: T.StridedTensor((batches, heads, q_len), (*saved_row_max_strides, 1), "float32"),
    saved_inverse_sum: T.StridedTensor((batches, heads, q_len), (*saved_inverse_sum_strides, 1), "float32"),
    Delta: T.StridedTensor((batches, heads, q_len), (*Delta_strides, 1), "float32"),
    slopes: T.StridedTensor((slopes_size_0,), (slopes_strides,), "float32"),
    dQ: T.StridedTensor((batches, heads, q_len, DIM_QK), (*dQ_strides, 1), "bfloat16"),
    scale: T.float32,
    cap: T.float32,
    window: T.int32,
):  # fmt: skip
    with T.Kernel(T.ceildiv(q_len, BLOCK_Q), heads, batches, threads=THREADS) as (q_tile, head, batch):
        T.annotate_producer_reg_dealloc(40)
        T.annotate_consumer_reg_alloc(232)
        begin_aligned(8, *Q_strides)
        begin_aligned(8, *K_strides)
        begin_aligned(8, *V_strides)
        begin_aligned(8, *dO_strides)
        begin_aligned(4, *saved_row_max_strides)
        begin_aligned(4, *saved_inverse_sum_strides)
        begin_aligned(4, *Delta_strides)
        begin_aligned(8, *dQ_strides)
        q_start = q_tile * BLOCK_Q
        query = T.alloc_shared((BLOCK_Q, DIM_QK), "bfloat16")
        d_out = T.alloc_shared((BLOCK_Q, DIM_V), "bfloat16")
        row_max = T.alloc_fragment((BLOCK_Q,), "float32")
        safe_row_max = T.alloc_fragment((BLOCK_Q,), "float32")
        inverse_sum = T.alloc_fragment((BLOCK_Q,), "float32")
        delta = T.alloc_fragment((BLOCK_Q,), "float32")
        d_query = T.alloc_fragment((BLOCK_Q, DIM_QK), "float32")
        key = T.alloc_shared((BLOCK_KV, DIM_QK), "bfloat16")
        value = T.alloc_shared((BLOCK_KV, DIM_V), "bfloat16")
        score = T.alloc_fragment((BLOCK_Q, BLOCK_KV), "float32")
        probs = T.alloc_fragment((BLOCK_Q, BLOCK_KV), "float32")
        d_probs = T.alloc_fragment((BLOCK_Q, BLOCK_KV), "float32")
        d_score = T.alloc_fragment((BLOCK_Q, BLOCK_KV), "float32")
        d_score_rounded = T.alloc_fragment((BLOCK_Q, BLOCK_KV), "bfloat16")
        dQ_tile = T.alloc_fragment((BLOCK_Q, DIM_QK), "float32")
        dQ_rounded = T.alloc_shared((BLOCK_Q, DIM_QK), "bfloat16")

        # -- query tile of this program
        kv_head = T.truncdiv(head, T.truncdiv(heads, kv_heads))
        T.copy(Q[batch, head, q_start, 0], query)
        T.copy(dO[batch, head, q_start, 0], d_out)
        T.copy(saved_row_max[batch, head, q_start], row_max)
        for qi in T.Parallel(BLOCK_Q):
            safe_row_max[qi] = T.if_then_else(
                row_max[qi] == -T.infinity("float32"), 0.0, row_max[qi]
            )
        T.copy(saved_inverse_sum[batch, head, q_start], inverse_sum)
        T.copy(Delta[batch, head, q_start], delta)
        slopes_value = slopes[T.min(head, slopes_size_0 - 1)]
        T.fill(d_query, 0.0)

        # -- kv tiles this tile meets
        q_last = T.min(q_start + 127, q_len - 1)
        kv_begin = T.max((q_start - (window - 1)) // 64 * 64, 0)
        kv_end = T.max((T.min(q_last + 1, kv_len) + 63) // 64 * 64, kv_begin)
        kv_full_begin = T.min(T.max((q_last - (window - 1) + 63) // 64 * 64, kv_begin), kv_end)
        kv_full_end = T.max(T.min(T.min(q_start + 1, kv_len) // 64 * 64, kv_end), kv_full_begin)

        # -- kv tiles in sight, masked where seen in part
        for kv_tile in T.Pipelined(
            kv_begin // 64, T.max(kv_end // 64, kv_begin // 64 + 1), num_stages=2
        ):
            kv_start = kv_tile * 64
            T.copy(K[batch, kv_head, kv_start, 0], key)
            T.copy(V[batch, kv_head, kv_start, 0], value)
            T.gemm(query, key, score, transpose_B=True, clear_accum=True, policy=FULL_ROW)
            for qi, ki in T.Parallel(BLOCK_Q, BLOCK_KV):
                q_idx = q_start + qi
                kv_idx = kv_start + ki
                score[qi, ki] = score[qi, ki] * scale
                # test_golden.py:37: squashed = cap * torch.tanh(score / cap)
                squashed = cap * T.tanh(score[qi, ki] / cap)
                # test_golden.py:38: distance = q_idx - kv_idx
                distance = q_idx - kv_idx
                # test_golden.py:39: return squashed - slopes[h] * distance
                logit = squashed - slopes_value * distance
                # softmax.py:43: below_max = (scores - final_rowscales["row_max"]).min(0.0)
                below_max = T.min(logit - safe_row_max[qi], 0.0)
                probs[qi, ki] = T.exp2(below_max * 1.4426950408889634) * inverse_sum[qi]
            T.gemm(d_out, value, d_probs, transpose_B=True, clear_accum=True, policy=FULL_ROW)
            for qi, ki in T.Parallel(BLOCK_Q, BLOCK_KV):
                d_logit = probs[qi, ki] * (d_probs[qi, ki] - delta[qi])
                d_score[qi, ki] = (
                    d_logit
                    * cap
                    * (1.0 - T.tanh(score[qi, ki] / cap) * T.tanh(score[qi, ki] / cap))
                    / cap
                )
            if (kv_start < kv_full_begin) | (kv_full_end <= kv_start):
                for qi, ki in T.Parallel(BLOCK_Q, BLOCK_KV):
                    q_idx = q_start + qi
                    kv_idx = kv_start + ki
                    # test_golden.py:42: in_past = kv_idx <= q_idx
                    in_past = kv_idx <= q_idx
                    # test_golden.py:43: in_window = q_idx - kv_idx < window
                    in_window = q_idx - kv_idx < window
                    visible = in_past & in_window & (kv_idx < kv_len)
                    probs[qi, ki] = T.if_then_else(visible, probs[qi, ki], 0.0)
                    d_score[qi, ki] = T.if_then_else(visible, d_score[qi, ki], 0.0)
            T.copy(d_score, d_score_rounded)
            T.gemm(d_score_rounded, key, d_query, policy=FULL_ROW)

        # -- store
        for qi, di in T.Parallel(BLOCK_Q, DIM_QK):
            dQ_tile[qi, di] = d_query[qi, di] * scale
        T.copy(dQ_tile, dQ_rounded)
        T.copy(dQ_rounded, dQ[batch, head, q_start, 0])
