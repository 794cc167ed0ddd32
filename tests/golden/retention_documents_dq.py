# attn_engine golden | mask_mod_OnlineRetention: backward, dq | triton | block_q=128 block_kv=64
# regenerate: engine.source(backend="triton", kernel="dq")
# launch with num_warps=8, num_stages=2
# K and V: tensor descriptors of tiles, batch and head first
import triton
import triton.language as tl

BLOCK_Q = tl.constexpr(128)
BLOCK_KV = tl.constexpr(64)
BLOCK_D = tl.constexpr(64)
BLOCK_DV = tl.constexpr(64)


@triton.jit
def load_tile(tiles, batch, head, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows from `row` on of one batch and head, through a tensor descriptor: zeros past the end."""
    place = [tl.cast(batch, tl.int32), tl.cast(head, tl.int32), tl.cast(row, tl.int32), column]
    return tiles.load(place).reshape(ROWS, COLUMNS)


@triton.jit(do_not_specialize=[
    "saved_abs_sum_batch_stride", "saved_abs_sum_head_stride", "Delta_batch_stride",
    "Delta_head_stride", "scale", "heads", "kv_heads", "q_len", "kv_len", "documents_size_0"
])  # fmt: skip
def dq(
    Q, K, V, dO, saved_abs_sum, Delta, documents, q_documents_range, kv_documents_range, dQ,
    Q_batch_stride, Q_head_stride, Q_row_stride, Q_d_stride,
    dO_batch_stride, dO_head_stride, dO_row_stride, dO_d_stride,
    saved_abs_sum_batch_stride, saved_abs_sum_head_stride, saved_abs_sum_row_stride,
    Delta_batch_stride, Delta_head_stride, Delta_row_stride,
    documents_stride_0,
    q_documents_range_tile_stride, q_documents_range_end_stride,
    kv_documents_range_tile_stride, kv_documents_range_end_stride,
    dQ_batch_stride, dQ_head_stride, dQ_row_stride, dQ_d_stride,
    scale, heads, kv_heads, q_len, kv_len,
    documents_size_0,
):  # fmt: skip
    q_tile = tl.arange(0, BLOCK_Q)
    kv_tile = tl.arange(0, BLOCK_KV)
    d_idx = tl.arange(0, BLOCK_D)
    dv_idx = tl.arange(0, BLOCK_DV)
    # heads come in sections that share a cache; in each of them the heavy tiles come first
    place = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    q_start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_Q
    q_row = tl.cast(q_start, tl.int64)
    q_idx = q_start + q_tile
    head = (place % heads).to(tl.int64)
    batch = (place // heads).to(tl.int64)

    # -- query tile of this program
    kv_head = head // (heads // kv_heads)
    Q_base = Q + batch * Q_batch_stride + head * Q_head_stride + q_row * Q_row_stride
    query = tl.load(
        Q_base + (q_tile[:, None] * Q_row_stride + d_idx[None, :] * Q_d_stride),
        mask=q_idx[:, None] < q_len,
        other=0.0,
    )
    dO_base = dO + batch * dO_batch_stride + head * dO_head_stride + q_row * dO_row_stride
    d_out = tl.load(
        dO_base + (q_tile[:, None] * dO_row_stride + dv_idx[None, :] * dO_d_stride),
        mask=q_idx[:, None] < q_len,
        other=0.0,
    )
    saved_abs_sum_base = (
        saved_abs_sum
        + batch * saved_abs_sum_batch_stride
        + head * saved_abs_sum_head_stride
        + q_row * saved_abs_sum_row_stride
    )
    abs_sum = tl.load(
        saved_abs_sum_base + q_tile * saved_abs_sum_row_stride, mask=q_idx < q_len, other=0.0
    )
    Delta_base = (
        Delta + batch * Delta_batch_stride + head * Delta_head_stride + q_row * Delta_row_stride
    )
    delta = tl.load(Delta_base + q_tile * Delta_row_stride, mask=q_idx < q_len, other=0.0)
    documents_row = tl.load(
        documents + q_idx * documents_stride_0, mask=q_idx < documents_size_0, other=0
    )
    d_query = tl.full([BLOCK_Q, BLOCK_D], 0.0, tl.float32)

    # -- kv tiles this tile meets
    q_last = tl.minimum(q_start + 127, q_len - 1)
    q_documents_min = tl.load(
        q_documents_range + tl.cast(q_start // 128, tl.int64) * q_documents_range_tile_stride
    ).to(tl.int32)
    q_documents_max = tl.load(
        q_documents_range
        + tl.cast(q_start // 128, tl.int64) * q_documents_range_tile_stride
        + q_documents_range_end_stride,
    ).to(tl.int32)
    kv_begin = 0
    kv_end = tl.maximum((tl.minimum(q_last + 1, kv_len) + 63) // 64 * 64, kv_begin)

    # -- kv tiles in sight: none, some or all of the pairs visible
    for kv_start in tl.range(kv_begin, kv_end, BLOCK_KV):
        kv_idx = kv_start + kv_tile
        kv_documents_min = tl.load(
            kv_documents_range + tl.cast(kv_start // 64, tl.int64) * kv_documents_range_tile_stride
        ).to(tl.int32)
        kv_documents_max = tl.load(
            kv_documents_range
            + tl.cast(kv_start // 64, tl.int64) * kv_documents_range_tile_stride
            + kv_documents_range_end_stride,
        ).to(tl.int32)
        if (q_documents_min <= kv_documents_max) & (kv_documents_min <= q_documents_max):
            key = load_tile(K, batch, kv_head, kv_start, 0, BLOCK_KV, BLOCK_D)
            value = load_tile(V, batch, kv_head, kv_start, 0, BLOCK_KV, BLOCK_DV)
            score = tl.dot(query, key.T) * scale
            # test_golden.py:53: same_document = documents[q_idx] == documents[kv_idx]
            documents_value = tl.load(
                documents + kv_idx * documents_stride_0, mask=kv_idx < documents_size_0, other=0
            )
            same_document = documents_row[:, None] == documents_value[None, :]
            visible = (
                same_document & (kv_idx[None, :] <= q_idx[:, None]) & (kv_idx[None, :] < kv_len)
            )
            probs = tl.where(
                visible, score / tl.where(abs_sum[:, None] < 1.0, 1.0, abs_sum[:, None]), 0.0
            )
            d_probs = tl.dot(d_out, value.T)
            # retention.py:41: through_sum = torch.where(total > 1, doosum * torch.sign(scores), ...
            through_sum = tl.where(
                1.0 < abs_sum[:, None],
                delta[:, None] * ((0.0 < probs).to(tl.float32) - (probs < 0.0).to(tl.float32)),
                0.0,
            )
            d_score = tl.where(
                visible,
                (d_probs - through_sum) / tl.where(abs_sum[:, None] < 1.0, 1.0, abs_sum[:, None]),
                0.0,
            )
            d_query = d_query + tl.dot(d_score.to(K.dtype), key)

    # -- store
    dQ_base = dQ + batch * dQ_batch_stride + head * dQ_head_stride + q_row * dQ_row_stride
    tl.store(
        dQ_base + (q_tile[:, None] * dQ_row_stride + d_idx[None, :] * dQ_d_stride),
        d_query * scale,
        mask=q_idx[:, None] < q_len,
    )
