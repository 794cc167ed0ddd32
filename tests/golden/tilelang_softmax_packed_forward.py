# attn_engine golden | causal_OnlineSoftmax: forward | tilelang | block_q=128 block_kv=64
# regenerate: engine.source(backend="tilelang", kernel="forward")
import tilelang.language as T

BLOCK_Q = 128
BLOCK_KV = 64
DIM_QK = 64
DIM_V = 64
THREADS = 256
FULL_ROW = T.GemmWarpPolicy.FullRow

batches, heads, q_rows, kv_heads, kv_rows = T.dynamic("batches, heads, q_rows, kv_heads, kv_rows")
listed_tiles = T.dynamic("listed_tiles")
Q_strides = T.dynamic("Q_batch_stride, Q_head_stride, Q_row_stride", "int64")
K_strides = T.dynamic("K_batch_stride, K_head_stride, K_row_stride", "int64")
V_strides = T.dynamic("V_batch_stride, V_head_stride, V_row_stride", "int64")
q_spans_strides = T.dynamic("q_spans_batch_stride", "int64")
kv_spans_strides = T.dynamic("kv_spans_batch_stride", "int64")
tile_ranges_strides = T.dynamic("tile_ranges_batch_stride", "int64")
O_strides = T.dynamic("O_batch_stride, O_head_stride, O_row_stride", "int64")
saved_lse_strides = T.dynamic("saved_lse_batch_stride, saved_lse_head_stride", "int64")
saved_row_max_strides = T.dynamic("saved_row_max_batch_stride, saved_row_max_head_stride", "int64")
saved_inverse_sum_strides = T.dynamic("saved_inverse_sum_batch_stride, saved_inverse_sum_head_stride", "int64")


def begin_aligned(elements, *strides):
    """Rows begin at multiples of so many, which the launch sees to: one instruction may copy them."""
    for stride in strides:
        T.evaluate(T.assume(stride % elements == 0))


@T.prim_func
def forward(
    Q: T.StridedTensor((batches, heads, q_rows, DIM_QK), (*Q_strides, 1), "bfloat16"),
    K: T.StridedTensor((batches, kv_heads, kv_rows, DIM_QK), (*K_strides, 1), "bfloat16"),
    V: T.StridedTensor((batches, kv_heads, kv_rows, DIM_V), (*V_strides, 1), "bfloat16"),
    q_spans: T.StridedTensor((batches, 2), (q_spans_strides, 1), "int32"),
    kv_spans: T.StridedTensor((batches, 2), (kv_spans_strides, 1), "int32"),
    tile_list: T.StridedTensor((listed_tiles,), (1,), "int32"),
    tile_ranges: T.StridedTensor((batches, 2), (tile_ranges_strides, 1), "int32"),
    O: T.StridedTensor((batches, heads, q_rows, DIM_V), (*O_strides, 1), "bfloat16"),
    saved_lse: T.StridedTensor((batches, heads, q_rows), (*saved_lse_strides, 1), "float32"),
    saved_row_max: T.StridedTensor((batches, heads, q_rows), (*saved_row_max_strides, 1), "float32"),
    saved_inverse_sum: T.StridedTensor((batches, heads, q_rows), (*saved_inverse_sum_strides, 1), "float32"),
    scale: T.float32,
    tile_count: T.int32,
):  # fmt: skip
    with T.Kernel(tile_count, threads=THREADS) as tile:
        begin_aligned(8, *Q_strides)
        begin_aligned(8, *K_strides)
        begin_aligned(8, *V_strides)
        begin_aligned(8, *O_strides)
        query = T.alloc_shared((BLOCK_Q, DIM_QK), "bfloat16")
        row_max = T.alloc_fragment((BLOCK_Q,), "float32")
        row_sum = T.alloc_fragment((BLOCK_Q,), "float32")
        out = T.alloc_fragment((BLOCK_Q, DIM_V), "float32")
        key = T.alloc_shared((BLOCK_KV, DIM_QK), "bfloat16")
        value = T.alloc_shared((BLOCK_KV, DIM_V), "bfloat16")
        score = T.alloc_fragment((BLOCK_Q, BLOCK_KV), "float32")
        tile_max = T.alloc_fragment((BLOCK_Q,), "float32")
        new_max = T.alloc_fragment((BLOCK_Q,), "float32")
        safe_row_max = T.alloc_fragment((BLOCK_Q,), "float32")
        rescale = T.alloc_fragment((BLOCK_Q,), "float32")
        probs = T.alloc_fragment((BLOCK_Q, BLOCK_KV), "float32")
        tile_sum = T.alloc_fragment((BLOCK_Q,), "float32")
        new_sum = T.alloc_fragment((BLOCK_Q,), "float32")
        probs_rounded = T.alloc_fragment((BLOCK_Q, BLOCK_KV), "bfloat16")
        inverse_sum = T.alloc_fragment((BLOCK_Q,), "float32")
        O_tile = T.alloc_fragment((BLOCK_Q, DIM_V), "float32")
        O_rounded = T.alloc_shared((BLOCK_Q, DIM_V), "bfloat16")

        # -- sequence of this program
        batch = T.alloc_var("int32", init=tile_list[T.truncdiv(tile, heads)])
        place = T.alloc_var("int32", init=tile - tile_ranges[batch, 0] * heads)
        tiles_of_head = T.alloc_var("int32", init=tile_ranges[batch, 1])
        head = T.alloc_var("int32", init=T.truncdiv(place, tiles_of_head))
        tile_start = T.alloc_var(
            "int32", init=(tiles_of_head - 1 - T.truncmod(place, tiles_of_head)) * 128
        )
        q_first = T.alloc_var("int32", init=q_spans[batch, 0])
        q_len = T.alloc_var("int32", init=q_spans[batch, 1])
        kv_first = T.alloc_var("int32", init=kv_spans[batch, 0])
        kv_len = T.alloc_var("int32", init=kv_spans[batch, 1])
        q_start = tile_start

        # -- query tile of this program
        kv_head = T.alloc_var("int32", init=T.truncdiv(head, T.truncdiv(heads, kv_heads)))
        for qi, di in T.Parallel(BLOCK_Q, DIM_QK):
            q_idx = q_start + qi
            d_idx = di
            query[qi, di] = T.if_then_else(
                q_idx < q_len, Q[batch, head, q_first + q_idx, d_idx], T.cast(0.0, "bfloat16")
            )

        # -- row state of OnlineSoftmax
        T.fill(row_max, -T.infinity("float32"))
        T.fill(row_sum, 0.0)
        T.fill(out, 0.0)

        # -- kv tiles this tile can see
        q_last = T.min(q_start + 127, q_len - 1)
        kv_begin = 0
        kv_end = T.max((T.min(q_last + 1, kv_len) + 63) // 64 * 64, kv_begin)
        kv_full_end = T.max(T.min(T.min(q_start + 1, kv_len) // 64 * 64, kv_end), kv_begin)

        # -- kv tiles in sight, masked where seen in part
        for kv_tile in T.Pipelined(
            kv_begin // 64, T.max(kv_end // 64, kv_begin // 64 + 1), num_stages=1
        ):
            kv_start = kv_tile * 64
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
            T.gemm(query, key, score, transpose_B=True, clear_accum=True, policy=FULL_ROW)
            for qi, ki in T.Parallel(BLOCK_Q, BLOCK_KV):
                score[qi, ki] = score[qi, ki] * scale
            if kv_full_end <= kv_start:
                for qi, ki in T.Parallel(BLOCK_Q, BLOCK_KV):
                    q_idx = q_start + qi
                    kv_idx = kv_start + ki
                    visible = (kv_idx <= q_idx) & (kv_idx < kv_len)
                    score[qi, ki] = T.if_then_else(visible, score[qi, ki], -T.infinity("float32"))
            T.reduce_max(score, tile_max, dim=1)
            for qi in T.Parallel(BLOCK_Q):
                # softmax.py:27: new_max = old_max.max(scores.get_reduce("max"))
                new_max[qi] = T.max(row_max[qi], tile_max[qi])
                safe_row_max[qi] = T.if_then_else(
                    new_max[qi] == -T.infinity("float32"), 0.0, new_max[qi]
                )
                # softmax.py:28: rescale = torch.exp(old_max - new_max)
                rescale[qi] = T.exp2((row_max[qi] - safe_row_max[qi]) * 1.4426950408889634)
            for qi, ki in T.Parallel(BLOCK_Q, BLOCK_KV):
                probs[qi, ki] = T.exp2((score[qi, ki] - safe_row_max[qi]) * 1.4426950408889634)
            T.reduce_sum(probs, tile_sum, dim=1)
            for qi in T.Parallel(BLOCK_Q):
                # softmax.py:30: new_sum = online_rowscales["row_sum"] * rescale + weights.get_r ...
                new_sum[qi] = row_sum[qi] * rescale[qi] + tile_sum[qi]
            for qi, vi in T.Parallel(BLOCK_Q, DIM_V):
                out[qi, vi] = out[qi, vi] * rescale[qi]
            T.copy(probs, probs_rounded)
            T.gemm(probs_rounded, value, out, policy=FULL_ROW)
            for qi in T.Parallel(BLOCK_Q):
                row_max[qi] = new_max[qi]
                row_sum[qi] = new_sum[qi]

        # -- normalise and store
        for qi in T.Parallel(BLOCK_Q):
            # softmax.py:36: inverse_sum = torch.where(total > 0, 1.0 / total, 0.0)
            inverse_sum[qi] = T.if_then_else(0.0 < row_sum[qi], 1.0 / row_sum[qi], 0.0)
        for qi, vi in T.Parallel(BLOCK_Q, DIM_V):
            O_tile[qi, vi] = out[qi, vi] * inverse_sum[qi]
        T.copy(O_tile, O_rounded)
        for qi, vi in T.Parallel(BLOCK_Q, DIM_V):
            q_idx = q_start + qi
            dv_idx = vi
            if q_idx < q_len:
                O[batch, head, q_first + q_idx, dv_idx] = O_rounded[qi, vi]
        for qi in T.Parallel(BLOCK_Q):
            q_idx = q_start + qi
            if q_idx < q_len:
                saved_lse[batch, head, q_first + q_idx] = row_max[qi] + T.log(row_sum[qi])
            if q_idx < q_len:
                saved_row_max[batch, head, q_first + q_idx] = row_max[qi]
            if q_idx < q_len:
                saved_inverse_sum[batch, head, q_first + q_idx] = inverse_sum[qi]
