# attn_engine golden | score_mod_mask_mod_OnlineSoftmax: backward, dkdv | triton | block_q=32 block_kv=64
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
def floor_divide(a, b):
    """a // b, rounded toward minus infinity."""
    rest = a % b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), a // b - 1, a // b)


@triton.jit
def tanh(x):
    """The hyperbolic tangent, to 2e-7 beside 1."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(2.8853900817779268 * x))


@triton.jit
def load_tile(tiles, batch, head, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows from `row` on of one batch and head, through a tensor descriptor: zeros past the end."""
    place = [tl.cast(batch, tl.int32), tl.cast(head, tl.int32), tl.cast(row, tl.int32), column]
    return tiles.load(place).reshape(ROWS, COLUMNS)


@triton.jit(do_not_specialize=[
    "saved_lse_batch_stride", "saved_lse_head_stride", "Delta_batch_stride", "Delta_head_stride",
    "d_slopes_columns_batch_stride", "d_slopes_columns_head_stride", "scale", "cap", "window",
    "heads", "kv_heads", "q_len", "kv_len", "slopes_size_0"
])  # fmt: skip
def dkdv(
    Q, K, V, dO, saved_lse, Delta, slopes, dK, dV, d_slopes_columns,
    K_batch_stride, K_head_stride, K_row_stride, K_d_stride,
    V_batch_stride, V_head_stride, V_row_stride, V_d_stride,
    saved_lse_batch_stride, saved_lse_head_stride, saved_lse_row_stride,
    Delta_batch_stride, Delta_head_stride, Delta_row_stride,
    slopes_stride_0,
    dK_batch_stride, dK_head_stride, dK_row_stride, dK_d_stride,
    dV_batch_stride, dV_head_stride, dV_row_stride, dV_d_stride,
    d_slopes_columns_batch_stride, d_slopes_columns_head_stride, d_slopes_columns_row_stride,
    scale, cap, window, heads, kv_heads, q_len, kv_len,
    slopes_size_0,
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
        slopes_value = tl.load(slopes + tl.minimum(head, slopes_size_0 - 1) * slopes_stride_0)
        d_slopes_columns_sum = tl.full([BLOCK_KV], 0.0, tl.float32)
        kv_last = tl.minimum(kv_start + 63, kv_len - 1)
        q_begin = tl.maximum(kv_start // 32 * 32, 0)
        q_end = tl.maximum(
            floor_divide(tl.minimum(kv_last + (window - 1) + 1, q_len) + 31, 32) * 32, q_begin
        )
        q_full_begin = tl.minimum(tl.maximum((kv_last + 31) // 32 * 32, q_begin), q_end)
        q_full_end = tl.maximum(
            tl.minimum(
                floor_divide(tl.minimum(kv_start + (window - 1) + 1, q_len), 32) * 32, q_end
            ),
            q_full_begin,
        )

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
            # test_golden.py:37: squashed = cap * torch.tanh(score / cap)
            squashed = cap * tanh(score / cap)
            # test_golden.py:38: distance = q_idx - kv_idx
            distance = q_idx[None, :] - kv_idx[:, None]
            # test_golden.py:39: return squashed - slopes[h] * distance
            logit = squashed - slopes_value * distance
            log2_sum = safe_lse * 1.4426950408889634
            probs = tl.exp2(logit * 1.4426950408889634 - log2_sum[None, :])
            d_probs = tl.dot(value, d_out.T)
            d_logit = probs * (d_probs - delta[None, :])
            d_score = d_logit * cap * (1.0 - tanh(score / cap) * tanh(score / cap)) / cap
            d_slopes_columns_tile = -d_logit * distance
            if (q_start < q_full_begin) | (q_full_end <= q_start):
                # test_golden.py:42: in_past = kv_idx <= q_idx
                in_past = kv_idx[:, None] <= q_idx[None, :]
                # test_golden.py:43: in_window = q_idx - kv_idx < window
                in_window = q_idx[None, :] - kv_idx[:, None] < window
                visible = in_past & in_window & (q_idx[None, :] < q_len)
                probs = tl.where(visible, probs, 0.0)
                d_score = tl.where(visible, d_score, 0.0)
                d_slopes_columns_tile = tl.where(visible, d_slopes_columns_tile, 0.0)
            d_value = d_value + tl.dot(probs.to(V.dtype.element_ty), d_out)
            d_key = d_key + tl.dot(d_score.to(K.dtype.element_ty), query)
            d_slopes_columns_sum = d_slopes_columns_sum + tl.sum(d_slopes_columns_tile, axis=1)
        d_slopes_columns_base = (
            d_slopes_columns
            + batch * d_slopes_columns_batch_stride
            + head * d_slopes_columns_head_stride
            + kv_row * d_slopes_columns_row_stride
        )
        tl.store(
            d_slopes_columns_base + kv_tile * d_slopes_columns_row_stride,
            d_slopes_columns_sum,
            mask=kv_idx < kv_len,
        )

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
