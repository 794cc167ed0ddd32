# attn_engine golden | OnlineSoftmax: forward | triton | block_q=128 block_kv=64
# regenerate: engine.source(backend="triton", kernel="forward")
# launch with num_warps=4, num_stages=2
import triton
import triton.language as tl

BLOCK_Q = tl.constexpr(128)
BLOCK_KV = tl.constexpr(64)
BLOCK_D = tl.constexpr(64)
BLOCK_D2 = tl.constexpr(32)
BLOCK_DV = tl.constexpr(64)


@triton.jit(do_not_specialize=[
    "saved_lse_batch_stride", "saved_lse_head_stride", "saved_row_max_batch_stride",
    "saved_row_max_head_stride", "saved_inverse_sum_batch_stride", "saved_inverse_sum_head_stride",
    "scale", "heads", "kv_heads", "q_len", "kv_len"
])  # fmt: skip
def forward(
    Q, K, O, saved_lse, saved_row_max, saved_inverse_sum,
    Q_batch_stride, Q_head_stride, Q_row_stride, Q_d_stride,
    K_batch_stride, K_head_stride, K_row_stride, K_d_stride,
    O_batch_stride, O_head_stride, O_row_stride, O_d_stride,
    saved_lse_batch_stride, saved_lse_head_stride, saved_lse_row_stride,
    saved_row_max_batch_stride, saved_row_max_head_stride, saved_row_max_row_stride,
    saved_inverse_sum_batch_stride, saved_inverse_sum_head_stride, saved_inverse_sum_row_stride,
    scale, heads, kv_heads, q_len, kv_len,
):  # fmt: skip
    q_tile = tl.arange(0, BLOCK_Q)
    kv_tile = tl.arange(0, BLOCK_KV)
    d_idx = tl.arange(0, BLOCK_D)
    d2_idx = 64 + tl.arange(0, BLOCK_D2)
    dv_idx = tl.arange(0, BLOCK_DV)
    q_start = tl.program_id(0) * BLOCK_Q
    q_row = tl.cast(q_start, tl.int64)
    q_idx = q_start + q_tile
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)

    # -- query tile of this program
    kv_head = head // (heads // kv_heads)
    scale_log2 = scale * 1.4426950408889634
    Q_base = Q + batch * Q_batch_stride + head * Q_head_stride + q_row * Q_row_stride
    query = tl.load(
        Q_base + (q_tile[:, None] * Q_row_stride + d_idx[None, :] * Q_d_stride),
        mask=q_idx[:, None] < q_len,
        other=0.0,
    )
    query_2 = tl.load(
        Q_base + (q_tile[:, None] * Q_row_stride + d2_idx[None, :] * Q_d_stride),
        mask=q_idx[:, None] < q_len,
        other=0.0,
    )

    # -- row state of OnlineSoftmax, maxima in powers of two
    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.full([BLOCK_Q], 0.0, tl.float32)
    out = tl.full([BLOCK_Q, BLOCK_DV], 0.0, tl.float32)

    # -- kv tiles this tile can see
    kv_begin = 0
    kv_end = tl.maximum((kv_len + 63) // 64 * 64, kv_begin)
    kv_full_end = tl.maximum(tl.minimum(kv_len // 64 * 64, kv_end), kv_begin)

    # -- kv tiles in sight, masked where seen in part
    for kv_start in tl.range(kv_begin, kv_end, BLOCK_KV):
        kv_row = tl.cast(kv_start, tl.int64)
        kv_idx = kv_start + kv_tile
        K_base = K + batch * K_batch_stride + kv_head * K_head_stride + kv_row * K_row_stride
        key = tl.load(
            K_base + (kv_tile[:, None] * K_row_stride + d_idx[None, :] * K_d_stride),
            mask=kv_idx[:, None] < kv_len,
            other=0.0,
        )
        key_2 = tl.load(
            K_base + (kv_tile[:, None] * K_row_stride + d2_idx[None, :] * K_d_stride),
            mask=kv_idx[:, None] < kv_len,
            other=0.0,
        )
        value = key
        score = tl.dot(query, key.T, input_precision="ieee") + tl.dot(
            query_2, key_2.T, input_precision="ieee"
        )
        if kv_full_end <= kv_start:
            visible = kv_idx < kv_len
            score = tl.where(visible[None, :], score, float("-inf"))
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
