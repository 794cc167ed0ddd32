# attn_engine golden | causal_OnlineSoftmax: backward, dkdv | triton | block_q=32 block_kv=64
# regenerate: engine.source(backend="triton", kernel="dkdv")
# launch with num_warps=4, num_stages=2
import triton
import triton.language as tl

BLOCK_Q = tl.constexpr(32)
BLOCK_KV = tl.constexpr(64)
BLOCK_D = tl.constexpr(64)
BLOCK_DV = tl.constexpr(64)


@triton.jit(do_not_specialize=[
    "saved_lse_batch_stride", "saved_lse_head_stride", "Delta_batch_stride", "Delta_head_stride",
    "scale", "heads", "kv_heads"
])  # fmt: skip
def dkdv(
    Q, K, V, dO, saved_lse, Delta, q_spans, kv_spans, tile_list, tile_ranges, dK, dV,
    Q_batch_stride, Q_head_stride, Q_row_stride, Q_d_stride,
    K_batch_stride, K_head_stride, K_row_stride, K_d_stride,
    V_batch_stride, V_head_stride, V_row_stride, V_d_stride,
    dO_batch_stride, dO_head_stride, dO_row_stride, dO_d_stride,
    saved_lse_batch_stride, saved_lse_head_stride, saved_lse_row_stride,
    Delta_batch_stride, Delta_head_stride, Delta_row_stride,
    q_spans_batch_stride, q_spans_end_stride,
    kv_spans_batch_stride, kv_spans_end_stride,
    tile_list_tile_stride,
    tile_ranges_batch_stride, tile_ranges_end_stride,
    dK_batch_stride, dK_head_stride, dK_row_stride, dK_d_stride,
    dV_batch_stride, dV_head_stride, dV_row_stride, dV_d_stride,
    scale, heads, kv_heads,
):  # fmt: skip
    q_tile = tl.arange(0, BLOCK_Q)
    kv_tile = tl.arange(0, BLOCK_KV)
    d_idx = tl.arange(0, BLOCK_D)
    dv_idx = tl.arange(0, BLOCK_DV)
    tile = tl.program_id(0).to(tl.int64)

    # -- sequence of this program
    batch = tl.load(tile_list + tile // kv_heads * tile_list_tile_stride)
    tile_ranges_value = tl.load(tile_ranges + tl.cast(batch, tl.int64) * tile_ranges_batch_stride)
    place_value = tile - tile_ranges_value * kv_heads
    tiles_of_head = tl.load(
        tile_ranges + tl.cast(batch, tl.int64) * tile_ranges_batch_stride + tile_ranges_end_stride
    )
    kv_head = place_value // tiles_of_head
    tile_start = place_value % tiles_of_head * 64
    q_first = tl.load(q_spans + tl.cast(batch, tl.int64) * q_spans_batch_stride)
    q_len = tl.load(q_spans + tl.cast(batch, tl.int64) * q_spans_batch_stride + q_spans_end_stride)
    kv_first = tl.load(kv_spans + tl.cast(batch, tl.int64) * kv_spans_batch_stride)
    kv_len = tl.load(
        kv_spans + tl.cast(batch, tl.int64) * kv_spans_batch_stride + kv_spans_end_stride
    )
    Q_rows = Q + tl.cast(q_first, tl.int64) * Q_row_stride
    K_rows = K + tl.cast(kv_first, tl.int64) * K_row_stride
    V_rows = V + tl.cast(kv_first, tl.int64) * V_row_stride
    dO_rows = dO + tl.cast(q_first, tl.int64) * dO_row_stride
    saved_lse_rows = saved_lse + tl.cast(q_first, tl.int64) * saved_lse_row_stride
    Delta_rows = Delta + tl.cast(q_first, tl.int64) * Delta_row_stride
    dK_rows = dK + tl.cast(kv_first, tl.int64) * dK_row_stride
    dV_rows = dV + tl.cast(kv_first, tl.int64) * dV_row_stride
    kv_start = tile_start
    kv_row = tl.cast(kv_start, tl.int64)
    kv_idx = kv_start + kv_tile

    # -- kv tile of this program
    scale_log2 = scale * 1.4426950408889634
    K_base = (
        K_rows
        + tl.cast(batch, tl.int64) * K_batch_stride
        + kv_head * K_head_stride
        + kv_row * K_row_stride
    )
    key = tl.load(
        K_base + (kv_tile[:, None] * K_row_stride + d_idx[None, :] * K_d_stride),
        mask=kv_idx[:, None] < kv_len,
        other=0.0,
    )
    V_base = (
        V_rows
        + tl.cast(batch, tl.int64) * V_batch_stride
        + kv_head * V_head_stride
        + kv_row * V_row_stride
    )
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
            dO_base = (
                dO_rows
                + tl.cast(batch, tl.int64) * dO_batch_stride
                + head * dO_head_stride
                + q_row * dO_row_stride
            )
            d_out = tl.load(
                dO_base + (q_tile[:, None] * dO_row_stride + dv_idx[None, :] * dO_d_stride),
                mask=q_idx[:, None] < q_len,
                other=0.0,
            )
            saved_lse_base = (
                saved_lse_rows
                + tl.cast(batch, tl.int64) * saved_lse_batch_stride
                + head * saved_lse_head_stride
                + q_row * saved_lse_row_stride
            )
            lse = tl.load(
                saved_lse_base + q_tile * saved_lse_row_stride, mask=q_idx < q_len, other=0.0
            )
            safe_lse = tl.where(lse == float("-inf"), 0.0, lse)
            Delta_base = (
                Delta_rows
                + tl.cast(batch, tl.int64) * Delta_batch_stride
                + head * Delta_head_stride
                + q_row * Delta_row_stride
            )
            delta = tl.load(Delta_base + q_tile * Delta_row_stride, mask=q_idx < q_len, other=0.0)
            score = tl.dot(key, query.T, input_precision="ieee")
            log2_sum = safe_lse * 1.4426950408889634
            probs = tl.exp2(score * scale_log2 - log2_sum[None, :])
            d_probs = tl.dot(value, d_out.T, input_precision="ieee")
            d_score = probs * (d_probs - delta[None, :])
            if (q_start < q_full_begin) | (q_full_end <= q_start):
                visible = (kv_idx[:, None] <= q_idx[None, :]) & (q_idx[None, :] < q_len)
                probs = tl.where(visible, probs, 0.0)
                d_score = tl.where(visible, d_score, 0.0)
            d_value = d_value + tl.dot(probs, d_out, input_precision="ieee")
            d_key = d_key + tl.dot(d_score, query, input_precision="ieee")

    # -- store
    dK_base = (
        dK_rows
        + tl.cast(batch, tl.int64) * dK_batch_stride
        + kv_head * dK_head_stride
        + kv_row * dK_row_stride
    )
    tl.store(
        dK_base + (kv_tile[:, None] * dK_row_stride + d_idx[None, :] * dK_d_stride),
        d_key * scale,
        mask=kv_idx[:, None] < kv_len,
    )
    dV_base = (
        dV_rows
        + tl.cast(batch, tl.int64) * dV_batch_stride
        + kv_head * dV_head_stride
        + kv_row * dV_row_stride
    )
    tl.store(
        dV_base + (kv_tile[:, None] * dV_row_stride + dv_idx[None, :] * dV_d_stride),
        d_value,
        mask=kv_idx[:, None] < kv_len,
    )
