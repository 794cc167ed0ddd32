# attn_engine golden | causal_OnlineSoftmax: forward | triton | block_q=128 block_kv=64
# regenerate: engine.source(backend="triton", kernel="forward")
# launch with num_warps=4, num_stages=2
import triton
import triton.language as tl

BLOCK_Q = tl.constexpr(128)
BLOCK_KV = tl.constexpr(64)
BLOCK_D = tl.constexpr(64)
BLOCK_DV = tl.constexpr(64)


@triton.jit(do_not_specialize=[
    "saved_lse_batch_stride", "saved_lse_head_stride", "saved_row_max_batch_stride",
    "saved_row_max_head_stride", "saved_inverse_sum_batch_stride", "saved_inverse_sum_head_stride",
    "scale", "heads", "kv_heads", "block_table_size_0", "block_table_size_1"
])  # fmt: skip
def forward(
    Q, K, V, q_spans, kv_spans, tile_list, tile_ranges, block_table, O, saved_lse, saved_row_max, saved_inverse_sum,
    Q_batch_stride, Q_head_stride, Q_row_stride, Q_d_stride,
    K_page_stride, K_head_stride, K_row_stride, K_d_stride,
    V_page_stride, V_head_stride, V_row_stride, V_d_stride,
    q_spans_batch_stride, q_spans_end_stride,
    kv_spans_batch_stride, kv_spans_end_stride,
    tile_list_tile_stride,
    tile_ranges_batch_stride, tile_ranges_end_stride,
    block_table_stride_0, block_table_stride_1,
    O_batch_stride, O_head_stride, O_row_stride, O_d_stride,
    saved_lse_batch_stride, saved_lse_head_stride, saved_lse_row_stride,
    saved_row_max_batch_stride, saved_row_max_head_stride, saved_row_max_row_stride,
    saved_inverse_sum_batch_stride, saved_inverse_sum_head_stride, saved_inverse_sum_row_stride,
    scale, heads, kv_heads,
    block_table_size_0, block_table_size_1,
):  # fmt: skip
    q_tile = tl.arange(0, BLOCK_Q)
    kv_tile = tl.arange(0, BLOCK_KV)
    d_idx = tl.arange(0, BLOCK_D)
    dv_idx = tl.arange(0, BLOCK_DV)
    tile = tl.program_id(0).to(tl.int64)

    # -- sequence of this program
    batch = tl.load(tile_list + tile // heads * tile_list_tile_stride)
    tile_ranges_value = tl.load(tile_ranges + tl.cast(batch, tl.int64) * tile_ranges_batch_stride)
    place_value = tile - tile_ranges_value * heads
    tiles_of_head = tl.load(
        tile_ranges + tl.cast(batch, tl.int64) * tile_ranges_batch_stride + tile_ranges_end_stride
    )
    head = place_value // tiles_of_head
    tile_start = (tiles_of_head - 1 - place_value % tiles_of_head) * 128
    q_first = tl.load(q_spans + tl.cast(batch, tl.int64) * q_spans_batch_stride)
    q_len = tl.load(q_spans + tl.cast(batch, tl.int64) * q_spans_batch_stride + q_spans_end_stride)
    kv_len = tl.load(
        kv_spans + tl.cast(batch, tl.int64) * kv_spans_batch_stride + kv_spans_end_stride
    )
    Q_rows = Q + tl.cast(q_first, tl.int64) * Q_row_stride
    O_rows = O + tl.cast(q_first, tl.int64) * O_row_stride
    saved_lse_rows = saved_lse + tl.cast(q_first, tl.int64) * saved_lse_row_stride
    saved_row_max_rows = saved_row_max + tl.cast(q_first, tl.int64) * saved_row_max_row_stride
    saved_inverse_sum_rows = (
        saved_inverse_sum + tl.cast(q_first, tl.int64) * saved_inverse_sum_row_stride
    )
    q_start = tile_start
    q_row = tl.cast(q_start, tl.int64)
    q_idx = q_start + q_tile

    # -- query tile of this program
    kv_head = head // (heads // kv_heads)
    scale_log2 = scale * 1.4426950408889634
    Q_base = (
        Q_rows
        + tl.cast(batch, tl.int64) * Q_batch_stride
        + head * Q_head_stride
        + q_row * Q_row_stride
    )
    query = tl.load(
        Q_base + (q_tile[:, None] * Q_row_stride + d_idx[None, :] * Q_d_stride),
        mask=q_idx[:, None] < q_len,
        other=0.0,
    )

    # -- row state of OnlineSoftmax, maxima in powers of two
    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.full([BLOCK_Q], 0.0, tl.float32)
    out = tl.full([BLOCK_Q, BLOCK_DV], 0.0, tl.float32)

    # -- kv tiles this tile can see
    q_last = tl.minimum(q_start + 127, q_len - 1)
    kv_begin = 0
    kv_end = tl.maximum((tl.minimum(q_last + 1, kv_len) + 63) // 64 * 64, kv_begin)
    kv_full_end = tl.maximum(
        tl.minimum(tl.minimum(q_start + 1, kv_len) // 64 * 64, kv_end), kv_begin
    )

    # -- kv tiles in sight, masked where seen in part
    for kv_start in tl.range(kv_begin, kv_end, BLOCK_KV):
        kv_row = tl.cast(kv_start, tl.int64)
        kv_idx = kv_start + kv_tile
        kv_page = tl.load(
            block_table
            + tl.cast(tl.minimum(batch, block_table_size_0 - 1), tl.int64) * block_table_stride_0
            + tl.cast(tl.minimum(kv_start // 64, block_table_size_1 - 1), tl.int64)
            * block_table_stride_1,
        )
        page_start = kv_start // 64 * 64
        K_rows = (
            K
            + tl.cast(kv_page, tl.int64) * K_page_stride
            + tl.cast(-page_start, tl.int64) * K_row_stride
        )
        V_rows = (
            V
            + tl.cast(kv_page, tl.int64) * V_page_stride
            + tl.cast(-page_start, tl.int64) * V_row_stride
        )
        K_base = K_rows + kv_head * K_head_stride + kv_row * K_row_stride
        key = tl.load(
            K_base + (kv_tile[:, None] * K_row_stride + d_idx[None, :] * K_d_stride),
            mask=kv_idx[:, None] < kv_len,
            other=0.0,
        )
        V_base = V_rows + kv_head * V_head_stride + kv_row * V_row_stride
        value = tl.load(
            V_base + (kv_tile[:, None] * V_row_stride + dv_idx[None, :] * V_d_stride),
            mask=kv_idx[:, None] < kv_len,
            other=0.0,
        )
        score = tl.dot(query, key.T, input_precision="ieee")
        if kv_full_end <= kv_start:
            visible = (kv_idx[None, :] <= q_idx[:, None]) & (kv_idx[None, :] < kv_len)
            score = tl.where(visible, score, float("-inf"))
        # softmax.py:27: new_max = old_max.max(scores.get_reduce("max"))
        new_max = tl.maximum(row_max, tl.max(score, axis=1) * scale_log2)
        safe_row_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        # softmax.py:28: rescale = torch.exp(old_max - new_max)
        rescale = tl.exp2(row_max - safe_row_max)
        probs = tl.exp2(score * scale_log2 - safe_row_max[:, None])
        # softmax.py:30: new_sum = online_rowscales["row_sum"] * rescale + weights.get_reduce("sum")
        new_sum = row_sum * rescale + tl.sum(probs, axis=1)
        out = out * rescale[:, None] + tl.dot(probs, value, input_precision="ieee")
        row_max = new_max
        row_sum = new_sum

    # -- normalise and store
    # softmax.py:36: inverse_sum = torch.where(total > 0, 1.0 / total, 0.0)
    inverse_sum = tl.where(0.0 < row_sum, 1.0 / row_sum, 0.0)
    O_base = (
        O_rows
        + tl.cast(batch, tl.int64) * O_batch_stride
        + head * O_head_stride
        + q_row * O_row_stride
    )
    tl.store(
        O_base + (q_tile[:, None] * O_row_stride + dv_idx[None, :] * O_d_stride),
        out * inverse_sum[:, None],
        mask=q_idx[:, None] < q_len,
    )
    saved_lse_base = (
        saved_lse_rows
        + tl.cast(batch, tl.int64) * saved_lse_batch_stride
        + head * saved_lse_head_stride
        + q_row * saved_lse_row_stride
    )
    tl.store(
        saved_lse_base + q_tile * saved_lse_row_stride,
        row_max * 0.6931471805599453 + tl.log(row_sum),
        mask=q_idx < q_len,
    )
    saved_row_max_base = (
        saved_row_max_rows
        + tl.cast(batch, tl.int64) * saved_row_max_batch_stride
        + head * saved_row_max_head_stride
        + q_row * saved_row_max_row_stride
    )
    tl.store(
        saved_row_max_base + q_tile * saved_row_max_row_stride,
        row_max * 0.6931471805599453,
        mask=q_idx < q_len,
    )
    saved_inverse_sum_base = (
        saved_inverse_sum_rows
        + tl.cast(batch, tl.int64) * saved_inverse_sum_batch_stride
        + head * saved_inverse_sum_head_stride
        + q_row * saved_inverse_sum_row_stride
    )
    tl.store(
        saved_inverse_sum_base + q_tile * saved_inverse_sum_row_stride,
        inverse_sum,
        mask=q_idx < q_len,
    )
