# attn_engine golden | score_mod_mask_mod_OnlineSoftmax: forward | triton | block_q=128 block_kv=64
# regenerate: engine.source(backend="triton", kernel="forward")
# launch with num_warps=8, num_stages=2
# K and V: tensor descriptors of tiles, batch and head first
import triton
import triton.language as tl

BLOCK_Q = tl.constexpr(128)
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
    "saved_lse_batch_stride", "saved_lse_head_stride", "saved_row_max_batch_stride",
    "saved_row_max_head_stride", "saved_inverse_sum_batch_stride", "saved_inverse_sum_head_stride",
    "scale", "cap", "window", "heads", "kv_heads", "q_len", "kv_len", "slopes_size_0"
])  # fmt: skip
def forward(
    Q, K, V, slopes, O, saved_lse, saved_row_max, saved_inverse_sum,
    Q_batch_stride, Q_head_stride, Q_row_stride, Q_d_stride,
    slopes_stride_0,
    O_batch_stride, O_head_stride, O_row_stride, O_d_stride,
    saved_lse_batch_stride, saved_lse_head_stride, saved_lse_row_stride,
    saved_row_max_batch_stride, saved_row_max_head_stride, saved_row_max_row_stride,
    saved_inverse_sum_batch_stride, saved_inverse_sum_head_stride, saved_inverse_sum_row_stride,
    scale, cap, window, heads, kv_heads, q_len, kv_len,
    slopes_size_0,
):  # fmt: skip
    q_tile = tl.arange(0, BLOCK_Q)
    kv_tile = tl.arange(0, BLOCK_KV)
    d_idx = tl.arange(0, BLOCK_D)
    dv_idx = tl.arange(0, BLOCK_DV)
    q_start = tl.program_id(0) * BLOCK_Q
    q_row = tl.cast(q_start, tl.int64)
    q_idx = q_start + q_tile
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)

    # -- query tile of this program
    kv_head = head // (heads // kv_heads)
    Q_base = Q + batch * Q_batch_stride + head * Q_head_stride + q_row * Q_row_stride
    query = tl.load(
        Q_base + (q_tile[:, None] * Q_row_stride + d_idx[None, :] * Q_d_stride),
        mask=q_idx[:, None] < q_len,
        other=0.0,
    )
    slopes_value = tl.load(slopes + tl.minimum(head, slopes_size_0 - 1) * slopes_stride_0)

    # -- row state of OnlineSoftmax, maxima in powers of two
    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.full([BLOCK_Q], 0.0, tl.float32)
    out = tl.full([BLOCK_Q, BLOCK_DV], 0.0, tl.float32)

    # -- kv tiles this tile can see
    q_last = tl.minimum(q_start + 127, q_len - 1)
    kv_begin = tl.maximum(floor_divide(q_start - (window - 1), 64) * 64, 0)
    kv_end = tl.maximum((tl.minimum(q_last + 1, kv_len) + 63) // 64 * 64, kv_begin)
    kv_full_begin = tl.minimum(
        tl.maximum(floor_divide(q_last - (window - 1) + 63, 64) * 64, kv_begin), kv_end
    )
    kv_full_end = tl.maximum(
        tl.minimum(tl.minimum(q_start + 1, kv_len) // 64 * 64, kv_end), kv_full_begin
    )

    # -- kv tiles in sight, masked where seen in part
    for kv_start in tl.range(kv_begin, kv_end, BLOCK_KV):
        kv_idx = kv_start + kv_tile
        key = load_tile(K, batch, kv_head, kv_start, 0, BLOCK_KV, BLOCK_D)
        value = load_tile(V, batch, kv_head, kv_start, 0, BLOCK_KV, BLOCK_DV)
        score = tl.dot(query, key.T) * scale
        # test_golden.py:37: squashed = cap * torch.tanh(score / cap)
        squashed = cap * tanh(score / cap)
        # test_golden.py:38: distance = q_idx - kv_idx
        distance = q_idx[:, None] - kv_idx[None, :]
        # test_golden.py:39: return squashed - slopes[h] * distance
        logit = squashed - slopes_value * distance
        if (kv_start < kv_full_begin) | (kv_full_end <= kv_start):
            # test_golden.py:42: in_past = kv_idx <= q_idx
            in_past = kv_idx[None, :] <= q_idx[:, None]
            # test_golden.py:43: in_window = q_idx - kv_idx < window
            in_window = q_idx[:, None] - kv_idx[None, :] < window
            visible = in_past & in_window & (kv_idx[None, :] < kv_len)
            logit = tl.where(visible, logit, float("-inf"))
        # softmax.py:27: new_max = old_max.max(scores.get_reduce("max"))
        new_max = tl.maximum(row_max, tl.max(logit, axis=1) * 1.4426950408889634)
        safe_row_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        # softmax.py:28: rescale = torch.exp(old_max - new_max)
        rescale = tl.exp2(row_max - safe_row_max)
        probs = tl.exp2(logit * 1.4426950408889634 - safe_row_max[:, None])
        # softmax.py:30: new_sum = online_rowscales["row_sum"] * rescale + weights.get_reduce("sum")
        new_sum = row_sum * rescale + tl.sum(probs, axis=1)
        out = out * rescale[:, None] + tl.dot(probs.to(V.dtype), value)
        row_max = new_max
        row_sum = new_sum

    # -- normalise and store
    # softmax.py:36: inverse_sum = torch.where(total > 0, 1.0 / total, 0.0)
    inverse_sum = tl.where(0.0 < row_sum, 1.0 / row_sum, 0.0)
    O_base = O + batch * O_batch_stride + head * O_head_stride + q_row * O_row_stride
    tl.store(
        O_base + (q_tile[:, None] * O_row_stride + dv_idx[None, :] * O_d_stride),
        out * inverse_sum[:, None],
        mask=q_idx[:, None] < q_len,
    )
    saved_lse_base = (
        saved_lse
        + batch * saved_lse_batch_stride
        + head * saved_lse_head_stride
        + q_row * saved_lse_row_stride
    )
    tl.store(
        saved_lse_base + q_tile * saved_lse_row_stride,
        row_max * 0.6931471805599453 + tl.log(row_sum),
        mask=q_idx < q_len,
    )
    saved_row_max_base = (
        saved_row_max
        + batch * saved_row_max_batch_stride
        + head * saved_row_max_head_stride
        + q_row * saved_row_max_row_stride
    )
    tl.store(
        saved_row_max_base + q_tile * saved_row_max_row_stride,
        row_max * 0.6931471805599453,
        mask=q_idx < q_len,
    )
    saved_inverse_sum_base = (
        saved_inverse_sum
        + batch * saved_inverse_sum_batch_stride
        + head * saved_inverse_sum_head_stride
        + q_row * saved_inverse_sum_row_stride
    )
    tl.store(
        saved_inverse_sum_base + q_tile * saved_inverse_sum_row_stride,
        inverse_sum,
        mask=q_idx < q_len,
    )
