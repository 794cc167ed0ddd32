# attn_engine golden | score_mod_OnlineSoftmax: backward, d_bias | triton | block_q=32 block_kv=64
# regenerate: engine.source(backend="triton", kernel="d_bias")
# launch with num_warps=4, num_stages=2
# K and V: tensor descriptors of tiles, batch and head first
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
    "scale", "batches", "heads", "kv_heads", "q_len", "kv_len", "bias_size_0", "bias_size_1",
    "bias_size_2"
])  # fmt: skip
def d_bias(
    Q, K, V, dO, saved_lse, Delta, bias, d_bias,
    Q_batch_stride, Q_head_stride, Q_row_stride, Q_d_stride,
    dO_batch_stride, dO_head_stride, dO_row_stride, dO_d_stride,
    saved_lse_batch_stride, saved_lse_head_stride, saved_lse_row_stride,
    Delta_batch_stride, Delta_head_stride, Delta_row_stride,
    bias_stride_0, bias_stride_1, bias_stride_2,
    d_bias_stride_0, d_bias_stride_1, d_bias_stride_2,
    scale, batches, heads, kv_heads, q_len, kv_len,
    bias_size_0, bias_size_1, bias_size_2,
):  # fmt: skip
    q_tile = tl.arange(0, BLOCK_Q)
    kv_tile = tl.arange(0, BLOCK_KV)
    d_idx = tl.arange(0, BLOCK_D)
    dv_idx = tl.arange(0, BLOCK_DV)
    q_start = tl.program_id(0) * BLOCK_Q
    q_row = tl.cast(q_start, tl.int64)
    q_idx = q_start + q_tile
    head = tl.program_id(1).to(tl.int64)
    for batch in tl.range(0, batches):
        kv_head = head // (heads // kv_heads)
        Q_base = (
            Q
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
            dO
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
            saved_lse
            + tl.cast(batch, tl.int64) * saved_lse_batch_stride
            + head * saved_lse_head_stride
            + q_row * saved_lse_row_stride
        )
        lse = tl.load(saved_lse_base + q_tile * saved_lse_row_stride, mask=q_idx < q_len, other=0.0)
        safe_lse = tl.where(lse == float("-inf"), 0.0, lse)
        Delta_base = (
            Delta
            + tl.cast(batch, tl.int64) * Delta_batch_stride
            + head * Delta_head_stride
            + q_row * Delta_row_stride
        )
        delta = tl.load(Delta_base + q_tile * Delta_row_stride, mask=q_idx < q_len, other=0.0)
        log2_sum = safe_lse * 1.4426950408889634
        kv_begin = 0
        kv_end = tl.maximum((kv_len + 63) // 64 * 64, kv_begin)
        kv_full_end = tl.maximum(
            tl.minimum(tl.where(q_start + 32 <= q_len, kv_len, 0) // 64 * 64, kv_end), kv_begin
        )

        # -- kv tiles in sight, masked where seen in part
        for kv_start in tl.range(kv_begin, kv_end, BLOCK_KV):
            kv_row = tl.cast(kv_start, tl.int64)
            kv_idx = kv_start + kv_tile
            key = load_tile(K, batch, kv_head, kv_start, 0, BLOCK_KV, BLOCK_D)
            value = load_tile(V, batch, kv_head, kv_start, 0, BLOCK_KV, BLOCK_DV)
            score = tl.dot(query, key.T) * scale
            # test_golden.py:63: return score + bias[h, q_idx, kv_idx]
            bias_base = (
                bias
                + tl.minimum(head, bias_size_0 - 1) * bias_stride_0
                + q_row * bias_stride_1
                + kv_row * bias_stride_2
            )
            bias_value = tl.load(
                bias_base + (q_tile[:, None] * bias_stride_1 + kv_tile[None, :] * bias_stride_2),
                mask=(q_idx[:, None] < bias_size_1) & (kv_idx[None, :] < bias_size_2),
                other=0.0,
            )
            logit = score + bias_value
            probs = tl.exp2(logit * 1.4426950408889634 - log2_sum[:, None])
            d_probs = tl.dot(d_out, value.T)
            d_logit = probs * (d_probs - delta[:, None])
            d_bias_tile = d_logit
            if kv_full_end <= kv_start:
                visible = (q_idx[:, None] < q_len) & (kv_idx[None, :] < kv_len)
                probs = tl.where(visible, probs, 0.0)
                d_bias_tile = tl.where(visible, d_bias_tile, 0.0)
            d_bias_base = (
                d_bias + head * d_bias_stride_0 + q_row * d_bias_stride_1 + kv_row * d_bias_stride_2
            )
            d_bias_place = d_bias_base + (
                q_tile[:, None] * d_bias_stride_1 + kv_tile[None, :] * d_bias_stride_2
            )
            d_bias_old = tl.load(
                d_bias_place,
                mask=(head < bias_size_0)
                & (q_idx[:, None] < bias_size_1)
                & (kv_idx[None, :] < bias_size_2),
                other=0.0,
            )
            tl.store(
                d_bias_place,
                d_bias_old + d_bias_tile,
                mask=(head < bias_size_0)
                & (q_idx[:, None] < bias_size_1)
                & (kv_idx[None, :] < bias_size_2),
            )
            tl.debug_barrier()
