# attn_engine golden | causal_OnlineSoftmax: backward, dkdv | tilelang | block_q=64 block_kv=128
# regenerate: engine.source(backend="tilelang", kernel="dkdv")
import tilelang.language as T

BLOCK_Q = 64
BLOCK_KV = 128
DIM_QK = 64
DIM_V = 64
THREADS = 256
FULL_ROW = T.GemmWarpPolicy.FullRow

batches, heads, q_rows, kv_heads, kv_rows = T.dynamic("batches, heads, q_rows, kv_heads, kv_rows")
listed_tiles = T.dynamic("listed_tiles")
Q_strides = T.dynamic("Q_batch_stride, Q_head_stride, Q_row_stride", "int64")
K_strides = T.dynamic("K_batch_stride, K_head_stride, K_row_stride", "int64")
V_strides = T.dynamic("V_batch_stride, V_head_stride, V_row_stride", "int64")
dO_strides = T.dynamic("dO_batch_stride, dO_head_stride, dO_row_stride", "int64")
saved_row_max_strides = T.dynamic("saved_row_max_batch_stride, saved_row_max_head_stride", "int64")
saved_inverse_sum_strides = T.dynamic("saved_inverse_sum_batch_stride, saved_inverse_sum_head_stride", "int64")
Delta_strides = T.dynamic("Delta_batch_stride, Delta_head_stride", "int64")
q_spans_strides = T.dynamic("q_spans_batch_stride", "int64")
kv_spans_strides = T.dynamic("kv_spans_batch_stride", "int64")
tile_ranges_strides = T.dynamic("tile_ranges_batch_stride", "int64")
dK_strides = T.dynamic("dK_batch_stride, dK_head_stride, dK_row_stride", "int64")
dV_strides = T.dynamic("dV_batch_stride, dV_head_stride, dV_row_stride", "int64")


def begin_aligned(elements, *strides):
    """Rows begin at multiples of so many, which the launch sees to: one instruction may copy them."""
    for stride in strides:
        T.evaluate(T.assume(stride % elements == 0))


@T.prim_func
def dkdv(
    Q: T.StridedTensor((batches, heads, q_rows, DIM_QK), (*Q_strides, 1), "bfloat16"),
    K: T.StridedTensor((batches, kv_heads, kv_rows, DIM_QK), (*K_strides, 1), "bfloat16"),
    V: T.StridedTensor((batches, kv_heads, kv_rows, DIM_V), (*V_strides, 1), "bfloat16"),
    dO: T.StridedTensor((batches, heads, q_rows, DIM_V), (*dO_strides, 1), "bfloat16"),
    saved_row_max: T.StridedTensor((batches, heads, q_rows), (*saved_row_max_strides, 1), "float32"),
    saved_inverse_sum: T.StridedTensor((batches, heads, q_rows), (*saved_inverse_sum_strides, 1), "float32"),
    Delta: T.StridedTensor((batches, heads, q_rows), (*Delta_strides, 1), "float32"),
    q_spans: T.StridedTensor((batches, 2), (q_spans_strides, 1), "int32"),
    kv_spans: T.StridedTensor((batches, 2), (kv_spans_strides, 1), "int32"),
    tile_list: T.StridedTensor((listed_tiles,), (1,), "int32"),
    tile_ranges: T.StridedTensor((batches, 2), (tile_ranges_strides, 1), "int32"),
    dK: T.StridedTensor((batches, kv_heads, kv_rows, DIM_QK), (*dK_strides, 1), "bfloat16"),
    dV: T.StridedTensor((batches, kv_heads, kv_rows, DIM_V), (*dV_strides, 1), "bfloat16"),
    scale: T.float32,
    tile_count: T.int32,
):  # fmt: skip
    with T.Kernel(tile_count, threads=THREADS) as tile:
        begin_aligned(8, *Q_strides)
        begin_aligned(8, *K_strides)
        begin_aligned(8, *V_strides)
        begin_aligned(8, *dO_strides)
        begin_aligned(8, *dK_strides)
        begin_aligned(8, *dV_strides)
        key = T.alloc_shared((BLOCK_KV, DIM_QK), "bfloat16")
        value = T.alloc_shared((BLOCK_KV, DIM_V), "bfloat16")
        d_key = T.alloc_fragment((BLOCK_KV, DIM_QK), "float32")
        d_value = T.alloc_fragment((BLOCK_KV, DIM_V), "float32")
        query = T.alloc_shared((BLOCK_Q, DIM_QK), "bfloat16")
        d_out = T.alloc_shared((BLOCK_Q, DIM_V), "bfloat16")
        safe_row_max = T.alloc_shared((BLOCK_Q,), "float32")
        inverse_sum = T.alloc_shared((BLOCK_Q,), "float32")
        delta = T.alloc_shared((BLOCK_Q,), "float32")
        score = T.alloc_fragment((BLOCK_KV, BLOCK_Q), "float32")
        probs = T.alloc_fragment((BLOCK_KV, BLOCK_Q), "float32")
        d_probs = T.alloc_fragment((BLOCK_KV, BLOCK_Q), "float32")
        d_score = T.alloc_fragment((BLOCK_KV, BLOCK_Q), "float32")
        probs_rounded = T.alloc_fragment((BLOCK_KV, BLOCK_Q), "bfloat16")
        d_score_rounded = T.alloc_fragment((BLOCK_KV, BLOCK_Q), "bfloat16")
        dK_tile = T.alloc_fragment((BLOCK_KV, DIM_QK), "float32")
        dK_rounded = T.alloc_shared((BLOCK_KV, DIM_QK), "bfloat16")
        dV_rounded = T.alloc_shared((BLOCK_KV, DIM_V), "bfloat16")

        # -- sequence of this program
        batch = T.alloc_var("int32", init=tile_list[T.truncdiv(tile, kv_heads)])
        place = T.alloc_var("int32", init=tile - tile_ranges[batch, 0] * kv_heads)
        tiles_of_head = T.alloc_var("int32", init=tile_ranges[batch, 1])
        kv_head = T.alloc_var("int32", init=T.truncdiv(place, tiles_of_head))
        tile_start = T.alloc_var("int32", init=T.truncmod(place, tiles_of_head) * 128)
        q_first = T.alloc_var("int32", init=q_spans[batch, 0])
        q_len = T.alloc_var("int32", init=q_spans[batch, 1])
        kv_first = T.alloc_var("int32", init=kv_spans[batch, 0])
        kv_len = T.alloc_var("int32", init=kv_spans[batch, 1])
        kv_start = tile_start

        # -- kv tile of this program
        for ki, di in T.Parallel(BLOCK_KV, DIM_QK):
            kv_idx = kv_start + ki
            d_idx = di
            key[ki, di] = T.if_then_else(
                kv_idx < kv_len,
                K[batch, kv_head, kv_first + kv_idx, d_idx],
                T.cast(0.0, "bfloat16"),
            )
        for ki, vi in T.Parallel(BLOCK_KV, DIM_V):
            kv_idx = kv_start + ki
            dv_idx = vi
            value[ki, vi] = T.if_then_else(
                kv_idx < kv_len,
                V[batch, kv_head, kv_first + kv_idx, dv_idx],
                T.cast(0.0, "bfloat16"),
            )
        T.fill(d_key, 0.0)
        T.fill(d_value, 0.0)

        # -- query heads that read this kv head
        group = T.truncdiv(heads, kv_heads)
        first_head = kv_head * group
        kv_last = T.min(kv_start + 127, kv_len - 1)
        q_begin = T.max(kv_start // 64 * 64, 0)
        q_end = T.max((q_len + 63) // 64 * 64, q_begin)
        q_full_begin = T.min(T.max((kv_last + 63) // 64 * 64, q_begin), q_end)
        q_full_end = T.max(T.min(q_len // 64 * 64, q_end), q_full_begin)
        q_steps = T.max(q_end // 64 - q_begin // 64, 1)
        for step in T.Pipelined(0, group * q_steps, num_stages=1):
            head = first_head + T.truncdiv(step, q_steps)
            q_start = q_begin + T.truncmod(step, q_steps) * 64
            for qi, di in T.Parallel(BLOCK_Q, DIM_QK):
                q_idx = q_start + qi
                d_idx = di
                query[qi, di] = T.if_then_else(
                    q_idx < q_len, Q[batch, head, q_first + q_idx, d_idx], T.cast(0.0, "bfloat16")
                )
            for qi, vi in T.Parallel(BLOCK_Q, DIM_V):
                q_idx = q_start + qi
                dv_idx = vi
                d_out[qi, vi] = T.if_then_else(
                    q_idx < q_len, dO[batch, head, q_first + q_idx, dv_idx], T.cast(0.0, "bfloat16")
                )
            for qi in T.Parallel(BLOCK_Q):
                q_idx = q_start + qi
                row_max = T.if_then_else(
                    q_idx < q_len, saved_row_max[batch, head, q_first + q_idx], 0.0
                )
                safe_row_max[qi] = T.if_then_else(row_max == -T.infinity("float32"), 0.0, row_max)
                inverse_sum[qi] = T.if_then_else(
                    q_idx < q_len, saved_inverse_sum[batch, head, q_first + q_idx], 0.0
                )
                delta[qi] = T.if_then_else(q_idx < q_len, Delta[batch, head, q_first + q_idx], 0.0)
            T.gemm(key, query, score, transpose_B=True, clear_accum=True, policy=FULL_ROW)
            for ki, qi in T.Parallel(BLOCK_KV, BLOCK_Q):
                score[ki, qi] = score[ki, qi] * scale
                # softmax.py:43: below_max = (scores - final_rowscales["row_max"]).min(0.0)
                below_max = T.min(score[ki, qi] - safe_row_max[qi], 0.0)
                probs[ki, qi] = T.exp2(below_max * 1.4426950408889634) * inverse_sum[qi]
            T.gemm(value, d_out, d_probs, transpose_B=True, clear_accum=True, policy=FULL_ROW)
            for ki, qi in T.Parallel(BLOCK_KV, BLOCK_Q):
                d_score[ki, qi] = probs[ki, qi] * (d_probs[ki, qi] - delta[qi])
            if (q_start < q_full_begin) | (q_full_end <= q_start):
                for ki, qi in T.Parallel(BLOCK_KV, BLOCK_Q):
                    kv_idx = kv_start + ki
                    q_idx = q_start + qi
                    visible = (kv_idx <= q_idx) & (q_idx < q_len)
                    probs[ki, qi] = T.if_then_else(visible, probs[ki, qi], 0.0)
                    d_score[ki, qi] = T.if_then_else(visible, d_score[ki, qi], 0.0)
            T.copy(probs, probs_rounded)
            T.gemm(probs_rounded, d_out, d_value, policy=FULL_ROW)
            T.copy(d_score, d_score_rounded)
            T.gemm(d_score_rounded, query, d_key, policy=FULL_ROW)

        # -- store
        for ki, di in T.Parallel(BLOCK_KV, DIM_QK):
            dK_tile[ki, di] = d_key[ki, di] * scale
        T.copy(dK_tile, dK_rounded)
        for ki, di in T.Parallel(BLOCK_KV, DIM_QK):
            kv_idx = kv_start + ki
            d_idx = di
            if kv_idx < kv_len:
                dK[batch, kv_head, kv_first + kv_idx, d_idx] = dK_rounded[ki, di]
        T.copy(d_value, dV_rounded)
        for ki, vi in T.Parallel(BLOCK_KV, DIM_V):
            kv_idx = kv_start + ki
            dv_idx = vi
            if kv_idx < kv_len:
                dV[batch, kv_head, kv_first + kv_idx, dv_idx] = dV_rounded[ki, vi]
